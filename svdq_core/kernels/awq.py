"""W4A16 in AWQ's format: the launches of ``csrc/gemv_awq.cu``, and what takes more rows than it does."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

import torch

from ..numerics import awq, int4
from . import plan
from .launch import SIXTEEN_BIT, Kernel, KernelInputError, card, check_limits, expect, kernel_of, on, starts_early

_HEAD, _LAYER = struct.Struct("2P6i"), struct.Struct("4P2i")  # Arguments, and its Layer
_NAME = "linear_awq_w4a16"
_SLAB = 2**22  # weights that are dequantized at once: 16 MB of float32

_Layer = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]  # weight, scale, zero, bias


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
    _check_input(x)
    _check_layer(x, *layer)
    m, n = x.shape[0], weight.shape[0]
    if not _takes(m, n):
        return _dequantize_and_multiply(x, *layer)
    out = torch.empty((m, n), dtype=x.dtype, device=x.device)
    if m:
        _launch(x, [layer], (n,), out)
    return out


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
    _check_input(x)
    for layer in layers:
        _check_layer(x, *layer)
    m, outputs = x.shape[0], tuple(each.shape[0] for each in weight)
    out = torch.empty(m * sum(outputs), dtype=x.dtype, device=x.device)
    if out.numel() >= 2**31:
        raise KernelInputError(f"svdq::{_NAME}: {len(layers)} layers have more than 2^31 outputs; split them")
    parts = out.split([m * n for n in outputs])
    if not all(_takes(m, n) for n in outputs):
        for part, layer, n in zip(parts, layers, outputs, strict=True):
            part.view(m, n).copy_(linear(x, *layer))
    elif m:
        for first in range(0, len(layers), plan.GemvAwqBuild.most_layers):
            some = slice(first, first + plan.GemvAwqBuild.most_layers)
            _launch(x, layers[some], outputs[some], parts[first])
    return out


def _check_input(x: torch.Tensor) -> None:
    if x.dim() != 2 or x.dtype not in SIXTEEN_BIT:
        raise KernelInputError(f"svdq::{_NAME}: x is {tuple(x.shape)} {x.dtype}, expected (M, K) bfloat16 or float16")
    if x.shape[1] == 0 or x.shape[1] % plan.GROUP:
        raise KernelInputError(f"svdq::{_NAME}: K = {x.shape[1]} is not a positive multiple of {plan.GROUP}")
    expect(_NAME, "x", x, x, tuple(x.shape), x.dtype)


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
    return m <= plan.GemvAwqBuild.most_m and n >= plan.GemvAwqBuild.rows and n % 8 == 0


def _launch(x: torch.Tensor, layers: Sequence[_Layer], outputs: tuple[int, ...], out: torch.Tensor) -> None:
    """Start the kernel on checked operands of at least one row; ``out`` begins with the first layer's outputs."""
    (m, k), index = x.shape, x.device.index
    with on(index):
        kernel, shape = _kernel(index, m, outputs, k, x.dtype == torch.bfloat16)
        arguments = bytearray(_HEAD.size + _LAYER.size * shape.build.layers)
        _HEAD.pack_into(
            arguments,
            0,
            x.data_ptr(),
            out.data_ptr(),
            m,
            k,
            shape.rounds,
            shape.tiles,
            shape.longer,
            shape.batch,
        )
        before = 0
        for i, (weight, scale, zero, bias) in enumerate(layers):
            _LAYER.pack_into(
                arguments,
                _HEAD.size + _LAYER.size * i,
                weight.data_ptr(),
                scale.data_ptr(),
                zero.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                outputs[i],
                before,
            )
            before += outputs[i]
        kernel.launch(torch._C._cuda_getCurrentRawStream(index), bytes(arguments))


@lru_cache(maxsize=4096)
def _kernel(index: int, m: int, outputs: tuple[int, ...], k: int, bf16: bool) -> tuple[Kernel, plan.GemvLaunch]:
    shape = plan.gemv_awq_launch(*card(index), m, outputs, k, bf16)
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
