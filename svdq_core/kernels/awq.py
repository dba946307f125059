"""W4A16 in AWQ's format: ``csrc/gemv_awq.cu`` for few rows, and what takes more."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from ..numerics import awq, int4
from . import gemv, plan
from .launch import check_limits, check_rows, expect

_KERNEL = plan.GemvAwqBuild
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
    layer = weight, weight_scale, weight_zero, bias
    check_rows(_NAME, x)
    _check_layer(x, *layer)
    m, n = x.shape[0], weight.shape[0]
    return gemv.evaluate(_KERNEL, x, layer, n) if _takes(m, n) else _dequantize_and_multiply(x, *layer)


def linears(
    x: torch.Tensor,
    weight: Sequence[torch.Tensor],
    weight_scale: Sequence[torch.Tensor],
    weight_zero: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """``svdq::linears_awq_w4a16``.

    Raises:
        KernelInputError: an operand that the kernel does not take.
    """
    layers = list(zip(weight, weight_scale, weight_zero, bias, strict=True))
    check_rows(_NAME, x)
    for layer in layers:
        _check_layer(x, *layer)
    outputs = tuple(each.shape[0] for each in weight)
    taken = all(_takes(x.shape[0], n) for n in outputs)
    return gemv.evaluate_several(_NAME, _KERNEL, x, layers, outputs, taken, linear)


def _check_layer(x: torch.Tensor, weight, weight_scale, weight_zero, bias) -> None:
    (m, k), n = x.shape, weight.shape[0]
    check_limits(_NAME, m, n, k)
    expect(_NAME, "weight", weight, x, (n, k // 2), torch.int8)
    expect(_NAME, "weight_scale", weight_scale, x, (k // plan.GROUP, n), x.dtype)
    expect(_NAME, "weight_zero", weight_zero, x, (k // plan.GROUP, n), x.dtype)
    if bias is not None:
        expect(_NAME, "bias", bias, x, (n,), x.dtype)


def _takes(m: int, n: int) -> bool:
    """The kernel copies eight scales at a time, of 16 outputs."""
    return m <= _KERNEL.most_m and n >= _KERNEL.rows and n % 8 == 0


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
