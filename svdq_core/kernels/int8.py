"""W8A8: ``csrc/gemv_int8.cu`` for few rows; for more ``quantize_int8.cu`` and ``gemm_int8.cu``, or Hopper's own."""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import lru_cache

import torch

from . import gemv, plan, rows, w8a8
from .launch import (
    Kernel,
    KernelInputError,
    card,
    check_limits,
    check_quantizer_input,
    check_rows,
    expect,
    kernel_of,
    on,
    pad_rank,
    starts_early,
)
from .nvfp4 import absmax

_QUANTIZE = struct.Struct("5P3i4x")
_GEMM = struct.Struct("9P5i4x")
_NAME = "linear_int8"
_MOST_K = 2**17  # of products up to 127 * 128
_FEW_ROWS = plan.GemvInt8Build


def linear(
    x: torch.Tensor,
    smooth_factor: torch.Tensor,
    proj_down: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    proj_up: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """``svdq::linear_int8``, of operands as a file has them: nothing is made of a weight.

    Raises:
        KernelInputError: an operand that the kernels do not take.
    """
    check_quantizer_input(_NAME, x, smooth_factor, proj_down)
    _check_weight(x, weight, weight_scale, bias)
    (m, k), n = x.shape, weight.shape[0]
    expect(_NAME, "proj_up", proj_up, x, (n, proj_down.shape[1]), x.dtype)
    if proj_down.shape[1] == 0 and _are_few(m, k, n):
        return gemv.evaluate(_FEW_ROWS, x, (smooth_factor, weight, weight_scale, bias), n)
    quantized = quantize(x, smooth_factor, proj_down)
    if card(x.device.index)[0] == plan.HOPPER:
        return w8a8.multiply(*quantized, weight, weight_scale, proj_up, bias)
    return multiply(*quantized, weight, weight_scale, proj_up, bias)


def linears(
    x: torch.Tensor,
    smooth_factor: Sequence[torch.Tensor],
    weight: Sequence[torch.Tensor],
    weight_scale: Sequence[torch.Tensor],
    bias: Sequence[torch.Tensor | None],
) -> torch.Tensor:
    """``svdq::linears_int8``.

    Raises:
        KernelInputError: an operand that the kernels do not take.
    """
    check_rows(_NAME, x)
    m, k = x.shape
    layers = list(zip(smooth_factor, weight, weight_scale, bias, strict=True))
    for smooth, *others in layers:
        expect(_NAME, "smooth_factor", smooth, x, (k,), x.dtype)
        _check_weight(x, *others)

    def without_branch(x, smooth, weight, weight_scale, bias):
        return linear(x, smooth, x.new_empty((k, 0)), weight, weight_scale, x.new_empty((len(weight), 0)), bias)

    outputs = tuple(each.shape[0] for each in weight)
    taken = all(_are_few(m, k, n) for n in outputs)
    return gemv.evaluate_several(_NAME, _FEW_ROWS, x, layers, outputs, taken, without_branch)


def _check_weight(x: torch.Tensor, weight: torch.Tensor, weight_scale, bias) -> None:
    (m, k), n = x.shape, weight.shape[0]
    check_limits(_NAME, m, n, k)
    if k > _MOST_K:
        raise KernelInputError(f"svdq::{_NAME}: sums over K = {k} may not fit 32 bits; at most {_MOST_K}")
    if n == 0 or n % 8:
        raise KernelInputError(f"svdq::{_NAME}: N = {n} is not a positive multiple of 8")
    expect(_NAME, "weight", weight, x, (n, k), torch.int8)
    expect(_NAME, "weight_scale", weight_scale, x, (n,), torch.float32)
    if bias is not None:
        expect(_NAME, "bias", bias, x, (n,), x.dtype)


def _are_few(m: int, k: int, n: int) -> bool:
    """Whether the kernel for few rows takes a layer without a branch."""
    return m <= _FEW_ROWS.most_m and k <= _FEW_ROWS.most_k and n >= _FEW_ROWS.rows


def quantize(
    x: torch.Tensor, smooth_factor: torch.Tensor, proj_down: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Codes of ``x / smooth_factor`` and ``x @ proj_down``, operands checked.

    Args:
        x: (M, K) bfloat16 or float16, K a multiple of 64.
        smooth_factor: (K,) as ``x``.
        proj_down: (K, rank) as ``x``.

    Returns:
        codes (M, K) int8; their scale (M,) float32; down (M, rank to a multiple of 64) as ``x``, zeros behind
        the rank; and its scale (M,) float32, None for bfloat16: powers of two that keep it in float16's range.
    """
    (m, k), index = x.shape, x.device.index
    if m and rows.takes(x, proj_down.shape[1]):
        return rows.quantize_with_branch(x, smooth_factor, proj_down)
    largest, down, down_scale = absmax(x, smooth_factor, proj_down)
    codes = torch.empty((m, k), dtype=torch.int8, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    if m:
        with on(index):
            _quantize_kernel(index, m, x.dtype == torch.bfloat16).launch(
                torch._C._cuda_getCurrentRawStream(index),
                _QUANTIZE.pack(
                    x.data_ptr(),
                    smooth_factor.data_ptr(),
                    largest.data_ptr(),
                    codes.data_ptr(),
                    scale.data_ptr(),
                    m,
                    k,
                    largest.shape[0],
                ),
            )
    return codes, scale, down, down_scale


@lru_cache(maxsize=4096)
def _quantize_kernel(index: int, m: int, bf16: bool) -> Kernel:
    build = plan.Int8QuantizeBuild(bf16)
    kernel = kernel_of(index, build, build.grid(m), build.shared_bytes())
    return kernel._replace(early=starts_early(index))


def multiply(
    codes: torch.Tensor,
    act_scale: torch.Tensor,
    down: torch.Tensor,
    down_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    proj_up: torch.Tensor,
    bias: torch.Tensor | None,
    build: plan.Int8GemmBuild | None = None,
) -> torch.Tensor:
    """The layer's outputs (M, N), of what :func:`quantize` returns and checked operands of the weight.

    Args:
        build: run this one instead of the plan's, to test or to time.
    """
    (m, k), n, dtype, index = codes.shape, weight.shape[0], proj_up.dtype, codes.device.index
    proj_up = pad_rank(proj_up)
    out = torch.empty((m, n), dtype=dtype, device=codes.device)
    if m == 0:
        return out
    with on(index):
        if build is None:
            kernel = _gemm_kernel(index, m, n, dtype == torch.bfloat16)
        else:
            kernel = kernel_of(index, build, build.grid(m, n), build.shared_bytes())
        kernel.launch(
            torch._C._cuda_getCurrentRawStream(index),
            _GEMM.pack(
                codes.data_ptr(),
                act_scale.data_ptr(),
                down.data_ptr(),
                0 if down_scale is None else down_scale.data_ptr(),
                weight.data_ptr(),
                weight_scale.data_ptr(),
                proj_up.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                out.data_ptr(),
                m,
                n,
                k,
                proj_up.shape[1],
                down.shape[1],
            ),
        )
    return out


@lru_cache(maxsize=4096)
def _gemm_kernel(index: int, m: int, n: int, bf16: bool) -> Kernel:
    build = plan.int8_gemm_build(card(index)[1], m, n, bf16)
    return kernel_of(index, build, build.grid(m, n), build.shared_bytes())
