"""A layer in 8 bits, rotated, on Hopper: the launch of ``csrc/quantize_rows.cu``, and the product after it."""

from __future__ import annotations

import struct
from functools import lru_cache

import torch

from . import plan, ungrouped
from .driver import tensor_map
from .launch import SIXTEEN_BIT, Kernel, KernelInputError, card, check_limits, expect, kernel_of, on

_ARGUMENTS = struct.Struct("128s3P3i28x")  # aligned to 64 bytes
_BOX = 128  # bytes of a row in a group


_NAME = "linear_as_int8"


def linear(
    x: torch.Tensor,
    inverse: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """``svdq::linear_as_int8`` of an image (``ops.as_int8.Image``): (M, K) -> (M, N).

    Raises:
        KernelInputError: an operand that the kernels do not take.
    """
    if x.dim() != 2 or x.dtype not in SIXTEEN_BIT:
        raise KernelInputError(f"svdq::{_NAME}: x is {tuple(x.shape)} {x.dtype}, expected (M, K) bfloat16 or float16")
    (m, k), n = x.shape, weight.shape[0]
    check_limits(_NAME, m, n, k)
    expect(_NAME, "x", x, x, (m, k), x.dtype)
    expect(_NAME, "smooth_factor", inverse, x, (k,), x.dtype)
    expect(_NAME, "weight", weight, x, (n, k), torch.int8)
    if bias is not None:
        expect(_NAME, "bias", bias, x, (n,), x.dtype)
    down, up = x.new_empty((m, 0)), x.new_empty((n, 0))  # the low-rank branch is in the weight
    return ungrouped.multiply_int8(*quantize(x, inverse), down, None, weight, weight_scale, up, bias)


def quantize(x: torch.Tensor, inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes of ``x * inverse``, rotated in groups of 64; operands checked.

    Args:
        x: (M, K) bfloat16 or float16, K a multiple of 64 and at most ``plan.RowsBuild.most_k``.
        inverse: (K,) as ``x``.

    Returns:
        codes (M, K) int8 and their scale (M,) float32.
    """
    (m, k), index = x.shape, x.device.index
    codes = torch.empty((m, k), dtype=torch.int8, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    if m:
        with on(index):
            kernel, groups = _kernel(index, m, k, x.dtype == torch.bfloat16)
            kernel.launch(
                torch._C._cuda_getCurrentRawStream(index),
                _ARGUMENTS.pack(
                    tensor_map(x.data_ptr(), m, 2 * k, plan.RowsBuild.rows, _BOX, True),
                    inverse.data_ptr(),
                    codes.data_ptr(),
                    scale.data_ptr(),
                    m,
                    k,
                    groups,
                ),
            )
    return codes, scale


@lru_cache(maxsize=4096)
def _kernel(index: int, m: int, k: int, bf16: bool) -> tuple[Kernel, int]:
    """The kernel, and how many groups of columns a block has."""
    launch = plan.rows_launch(card(index)[1], m, k, bf16)
    kernel = kernel_of(index, launch.build, (launch.blocks, 1, 1), launch.shared)
    return kernel._replace(threads=launch.warps * 32), launch.groups
