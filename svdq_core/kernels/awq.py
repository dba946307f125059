"""W4A16 in AWQ's format: the launch of ``csrc/gemv_awq.cu``, and what takes more rows than it does."""

from __future__ import annotations

import struct
from functools import lru_cache

import torch

from ..numerics import awq, int4
from . import plan
from .launch import SIXTEEN_BIT, Kernel, KernelInputError, card, check_limits, expect, kernel_of, on, starts_early

_GEMV = struct.Struct("6P6i")
_NAME = "linear_awq_w4a16"
_SLAB = 2**22  # weights that are dequantized at once: 16 MB of float32


def linear(
    x: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_zero: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """``svdq::linear_awq_w4a16``.

    Raises:
        KernelInputError: an operand that the kernel does not take.
    """
    if x.dim() != 2 or x.dtype not in SIXTEEN_BIT:
        raise KernelInputError(f"svdq::{_NAME}: x is {tuple(x.shape)} {x.dtype}, expected (M, K) bfloat16 or float16")
    (m, k), n = x.shape, weight.shape[0]
    if k == 0 or k % plan.GROUP:
        raise KernelInputError(f"svdq::{_NAME}: K = {k} is not a positive multiple of {plan.GROUP}")
    check_limits(_NAME, m, n, k)
    expect(_NAME, "x", x, x, (m, k), x.dtype)
    expect(_NAME, "weight", weight, x, (n, k // 2), torch.int8)
    expect(_NAME, "weight_scale", weight_scale, x, (k // plan.GROUP, n), x.dtype)
    expect(_NAME, "weight_zero", weight_zero, x, (k // plan.GROUP, n), x.dtype)
    if bias is not None:
        expect(_NAME, "bias", bias, x, (n,), x.dtype)
    # The kernel copies eight scales at a time, of 16 outputs.
    if m > plan.GemvAwqBuild.most_m or n < plan.GemvAwqBuild.rows or n % 8:
        return _dequantize_and_multiply(x, weight, weight_scale, weight_zero, bias)
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if m:
        index = x.device.index
        with on(index):
            kernel, shape = _kernel(index, m, n, k, x.dtype == torch.bfloat16)
            kernel.launch(
                torch._C._cuda_getCurrentRawStream(index),
                _GEMV.pack(
                    x.data_ptr(),
                    weight.data_ptr(),
                    weight_scale.data_ptr(),
                    weight_zero.data_ptr(),
                    0 if bias is None else bias.data_ptr(),
                    out.data_ptr(),
                    m,
                    n,
                    k,
                    shape.rounds,
                    shape.tiles,
                    shape.longer,
                ),
            )
    return out


@lru_cache(maxsize=4096)
def _kernel(index: int, m: int, n: int, k: int, bf16: bool) -> tuple[Kernel, plan.GemvLaunch]:
    shape = plan.gemv_awq_launch(*card(index), m, n, k, bf16)
    kernel = kernel_of(index, shape.build, (shape.blocks, 1, 1), shape.shared)
    return kernel._replace(threads=shape.warps * 32, early=starts_early(index)), shape


def _dequantize_and_multiply(x, weight, weight_scale, weight_zero, bias) -> torch.Tensor:
    """A product with the weight, of which a slab of rows at a time is dequantized.

    For many rows it is a 16-bit product, so the weight is rounded. For as few as the kernel takes it is a float32
    one, as exact as the kernel; it costs no more, since it is the weight that takes the time.
    """
    (m, k), n = x.shape, weight.shape[0]
    dtype = x.dtype if m > plan.GemvAwqBuild.most_m else torch.float32
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    rows = max(_SLAB // k, 1)
    for first in range(0, n, rows):
        slab = slice(first, first + rows)
        codes = int4.unpack(weight[slab], unsigned=True)
        values = awq.dequantize(codes, weight_scale[:, slab].t(), weight_zero[:, slab].t())
        slab_bias = None if bias is None else bias[slab].to(dtype)
        out[:, slab] = torch.nn.functional.linear(x.to(dtype), values.to(dtype), slab_bias)
    return out
