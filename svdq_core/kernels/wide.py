"""NVFP4 on Hopper: the launch of ``csrc/gemm_wide.cu``.

It reads weights as a file has them, so nothing is made of them; activations come from ``quantize_wide``, with
``down`` in 16 bits and a multiple of 64 ranks wide.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import lru_cache

from . import plan
from .driver import tensor_map
from .launch import Kernel, card, down_width, kernel_in_turns

_ARGUMENTS = struct.Struct("128s128s128s128s128s5P5i4x")  # aligned to 64 bytes
_BOX = 128  # bytes of a row in a stage


def takes(n: int) -> bool:
    """Whether the kernel takes a weight of n rows: its scales are copied 16 at a time."""
    return n % 16 == 0


def multiplier(
    index: int,
    m: int,
    n: int,
    k: int,
    rank: int,
    bf16: bool,
    weight: int,
    weight_scale: int,
    weight_tensor_scale: int,
    weight_channel_scale: int,
    proj_up: int,
    bias: int,
) -> Callable[..., None]:
    """What multiplies m rows by an NVFP4 weight of which :func:`takes` is true, on the current device.

    Args:
        rank: a multiple of 8.
        weight, weight_scale, weight_tensor_scale, weight_channel_scale, proj_up, bias: where these are, as a file has
            them, ``proj_up`` with so many ranks; 0 for one that there is not.

    Returns:
        The launch, given a stream and where values (M, K) float16, as ``quantize_wide`` orders it, their scales (there
        are none), ``down`` (M, 64 n) in 16 bits, its scales (M,) float32 (0 for none), and outputs (M, N) are.
    """
    build, whole, kernel = _kernel(index, m, n, bf16)
    box, stages, width = build.tokens // build.cluster, k // plan.GROUP, down_width(rank)
    weight_map = tensor_map(weight, n, k // 2, build.rows, 32, False)
    scale_map = tensor_map(weight_scale, k // 16, n, 4, build.rows, False)
    of_layer = weight_tensor_scale, weight_channel_scale, proj_up, bias
    sizes = m, n, stages + stages % 2, rank, whole

    def start(stream: int, values: int, _: int, down: int, down_scale: int, out: int) -> None:
        kernel.launch(
            stream,
            _ARGUMENTS.pack(
                tensor_map(values, m, 2 * k, box, _BOX, True),
                weight_map,
                scale_map,
                tensor_map(down, m, 2 * width, box, _BOX, True) if rank else bytes(128),
                tensor_map(out, m, 2 * n, 32, _BOX, True),
                down_scale,
                *of_layer,
                *sizes,
            ),
        )

    return start


@lru_cache(maxsize=4096)
def _kernel(index: int, m: int, n: int, bf16: bool) -> tuple[plan.WideGemmBuild, int, Kernel]:
    """The build, how many tiles are not halved, and the kernel."""
    build = plan.wide_build(card(index)[1], m, n, bf16)
    whole, kernel = kernel_in_turns(index, build, m, n)
    return build, whole, kernel._replace(early=True)
