"""NVFP4 on Hopper: the launch of ``csrc/gemm_wide.cu``.

It reads weights as a file has them, so nothing is made of them; activations come from ``quantize_wide``, with
``down`` in 16 bits and a multiple of 64 ranks wide.
"""

from __future__ import annotations

import struct
from functools import lru_cache

import torch

from . import plan
from .driver import tensor_map
from .launch import Kernel, card, kernel_in_turns, on, pad_rank, pointer

_ARGUMENTS = struct.Struct("128s128s128s128s128s5P5i4x")  # aligned to 64 bytes
_BOX = 128  # bytes of a row in a stage


def takes(n: int) -> bool:
    """Whether the kernel takes a weight of n rows: its scales are copied 16 at a time."""
    return n % 16 == 0


def multiply(
    values: torch.Tensor,
    down: torch.Tensor,
    down_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_tensor_scale: torch.Tensor,
    weight_channel_scale: torch.Tensor | None,
    proj_up: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Outputs (M, N) of an NVFP4 layer of which :func:`takes` is true, operands checked.

    Args:
        values: (M, K) float16, as ``quantize_wide`` orders it.
        down: (M, 64 n) in 16 bits, at least proj_up's ranks.
        down_scale: (M,) float32 to multiply ``down`` by, or None.
        weight, weight_scale, weight_tensor_scale, weight_channel_scale: as a file has them.
        proj_up: (N, r) in the outputs' type.
        bias: (N,) likewise, or None.
    """
    (m, k), n = values.shape, weight.shape[0]
    out = torch.empty((m, n), dtype=proj_up.dtype, device=proj_up.device)
    if m == 0:
        return out
    proj_up = pad_rank(proj_up)
    rank, index = proj_up.shape[1], proj_up.device.index
    with on(index):
        build, whole, kernel = _kernel(index, m, n, out.dtype == torch.bfloat16)
        box, stages = build.tokens // build.cluster, k // plan.GROUP
        kernel.launch(
            torch._C._cuda_getCurrentRawStream(index),
            _ARGUMENTS.pack(
                tensor_map(values.data_ptr(), m, 2 * k, box, _BOX, True),
                tensor_map(weight.data_ptr(), n, k // 2, build.rows, 32, False),
                tensor_map(weight_scale.data_ptr(), k // 16, n, 4, build.rows, False),
                tensor_map(down.data_ptr(), m, 2 * down.shape[1], box, _BOX, True) if rank else bytes(128),
                tensor_map(out.data_ptr(), m, 2 * n, 32, _BOX, True),
                pointer(down_scale),
                weight_tensor_scale.data_ptr(),
                pointer(weight_channel_scale),
                proj_up.data_ptr(),
                pointer(bias),
                m,
                n,
                stages + stages % 2,
                rank,
                whole,
            ),
        )
    return out


@lru_cache(maxsize=4096)
def _kernel(index: int, m: int, n: int, bf16: bool) -> tuple[plan.WideGemmBuild, int, Kernel]:
    """The build, how many tiles are not halved, and the kernel."""
    build = plan.wide_build(card(index)[1], m, n, bf16)
    whole, kernel = kernel_in_turns(index, build, m, n)
    return build, whole, kernel._replace(early=True)
