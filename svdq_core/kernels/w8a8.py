"""W8A8 on Hopper: the launch of ``csrc/gemm_rows.cu``.

It reads weights as a file has them, so nothing is made of them; activations come from ``quantize_rows.cu`` (or
INT8's own quantizer), with ``down`` in 16 bits and a multiple of 64 ranks wide.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import lru_cache

from . import plan
from .driver import tensor_map
from .launch import Kernel, card, down_width, kernel_in_turns

_ARGUMENTS = struct.Struct("128s128s128s128s128s4P5i12x")  # aligned to 64 bytes
_NO_MAP = bytes(128)
_BOX = 128  # bytes of a row in a stage


def multiplier(
    index: int,
    m: int,
    n: int,
    k: int,
    rank: int,
    bf16: bool,
    weight: int,
    weight_scale: int,
    proj_up: int,
    bias: int,
) -> Callable[..., None]:
    """What multiplies m rows by a layer's weight, on the current device.

    Args:
        rank: of the low-rank branch, a multiple of 8; 0 without one.
        weight: where the (N, K) int8 codes are, and
        weight_scale: their (N,) float32 scales, and
        proj_up: (N, rank) in the outputs' type, and
        bias: (N,) likewise, or 0.

    Returns:
        The launch, given a stream and where codes (M, K) int8, act_scale (M,) float32, ``down`` (M, 64 n) in 16 bits,
        down_scale (M,) float32 to multiply it by (0 for none), and the outputs (M, N) are.
    """
    build, whole, kernel = _kernel(index, m, n, bf16, rank > 0)
    share, width = build.columns // build.cluster, down_width(rank)
    weight_map = tensor_map(weight, n, k, share, _BOX, True)
    up_map = tensor_map(proj_up, n, 2 * rank, share, _BOX, True) if rank else _NO_MAP
    piece_rows, piece_columns = build.piece
    sizes = m, n, _stages(k), rank, whole

    def start(stream: int, codes: int, act_scale: int, down: int, down_scale: int, out: int) -> None:
        kernel.launch(
            stream,
            _ARGUMENTS.pack(
                tensor_map(codes, m, k, build.rows, _BOX, True),
                weight_map,
                tensor_map(down, m, 2 * width, build.rows, _BOX, True) if rank else _NO_MAP,
                up_map,
                tensor_map(out, m, 2 * n, piece_rows, 2 * piece_columns, True),
                act_scale,
                down_scale,
                weight_scale,
                bias,
                *sizes,
            ),
        )

    return start


def _stages(k: int) -> int:
    """Of 128 columns; with some of zeros they are an even number, four at least."""
    return max(4, -(-k // (2 * _BOX)) * 2)


@lru_cache(maxsize=4096)
def _kernel(index: int, m: int, n: int, bf16: bool, low_rank: bool) -> tuple[plan.RowsGemmBuild, int, Kernel]:
    """The build, how many tiles are not halved, and the kernel."""
    build = plan.rows_gemm_build(card(index)[1], m, n, bf16, low_rank)
    whole, kernel = kernel_in_turns(index, build, m, n)
    return build, whole, kernel._replace(early=True)
