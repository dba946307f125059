"""W8A8 on Hopper: the launch of ``csrc/gemm_rows.cu``.

It reads weights as a file has them, so nothing is made of them; activations come from ``quantize_rows.cu`` (or
INT8's own quantizer), with ``down`` in 16 bits and a multiple of 64 ranks wide.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import lru_cache

import torch

from . import plan
from .driver import tensor_map
from .launch import Kernel, card, kernel_in_turns, on, pad_rank, pointer

_ARGUMENTS = struct.Struct("128s128s128s128s128s4P5i12x")  # aligned to 64 bytes
_NO_MAP = bytes(128)
_BOX = 128  # bytes of a row in a stage


def multiply(
    codes: torch.Tensor,
    act_scale: torch.Tensor,
    down: torch.Tensor,
    down_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    proj_up: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Outputs (M, N) of a layer, operands checked.

    Args:
        codes: (M, K) int8.
        act_scale: (M,) float32.
        down: (M, 64 n) in 16 bits, at least proj_up's ranks.
        down_scale: (M,) float32 to multiply ``down`` by, or None.
        weight: (N, K) int8.
        weight_scale: (N,) float32.
        proj_up: (N, r) in the outputs' type.
        bias: (N,) likewise, or None.
    """
    (m, k), n = codes.shape, weight.shape[0]
    out = torch.empty((m, n), dtype=proj_up.dtype, device=proj_up.device)
    if m == 0:
        return out
    proj_up = pad_rank(proj_up)
    rank, index = proj_up.shape[1], proj_up.device.index
    with on(index):
        build, whole, kernel = _kernel(index, m, n, out.dtype == torch.bfloat16, rank > 0)
        share = build.columns // build.cluster
        kernel.launch(
            torch._C._cuda_getCurrentRawStream(index),
            _ARGUMENTS.pack(
                tensor_map(codes.data_ptr(), m, k, build.rows, _BOX, True),
                tensor_map(weight.data_ptr(), n, k, share, _BOX, True),
                tensor_map(down.data_ptr(), m, 2 * down.shape[1], build.rows, _BOX, True) if rank else _NO_MAP,
                tensor_map(proj_up.data_ptr(), n, 2 * rank, share, _BOX, True) if rank else _NO_MAP,
                _out_map(build, out.data_ptr(), m, n),
                act_scale.data_ptr(),
                pointer(down_scale),
                weight_scale.data_ptr(),
                pointer(bias),
                m,
                n,
                _stages(k),
                rank,
                whole,
            ),
        )
    return out


def prepared_launch(
    index: int,
    m: int,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[Callable[[int, bytes], None], Callable[[int, int, int], bytes]]:
    """:func:`multiply` of m rows without a low-rank branch, to be launched often on the same weight.

    Returns:
        The launch, given a stream and arguments; and what makes those of the codes', their scales' and the
        outputs' addresses.
    """
    n, k = weight.shape
    build, whole, kernel = _kernel(index, m, n, dtype == torch.bfloat16, False)
    weight_map = tensor_map(weight.data_ptr(), n, k, build.columns // build.cluster, _BOX, True)
    constant = 0, weight_scale.data_ptr(), pointer(bias), m, n, _stages(k), 0, whole

    def arguments(codes: int, act_scale: int, out: int) -> bytes:
        return _ARGUMENTS.pack(
            tensor_map(codes, m, k, build.rows, _BOX, True),
            weight_map,
            _NO_MAP,
            _NO_MAP,
            _out_map(build, out, m, n),
            act_scale,
            *constant,
        )

    return kernel.launch, arguments


def _out_map(build: plan.RowsGemmBuild, out: int, m: int, n: int) -> bytes:
    rows, columns = build.piece
    return tensor_map(out, m, 2 * n, rows, 2 * columns, True)


def _stages(k: int) -> int:
    """Of 128 columns; with some of zeros they are an even number, four at least."""
    return max(4, -(-k // (2 * _BOX)) * 2)


@lru_cache(maxsize=4096)
def _kernel(index: int, m: int, n: int, bf16: bool, low_rank: bool) -> tuple[plan.RowsGemmBuild, int, Kernel]:
    """The build, how many tiles are not halved, and the kernel."""
    build = plan.rows_gemm_build(card(index)[1], m, n, bf16, low_rank)
    whole, kernel = kernel_in_turns(index, build, m, n)
    return build, whole, kernel._replace(early=True)
