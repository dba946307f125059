"""W4A4 in NVFP4: the launches of ``csrc/quantize_nvfp4.cu`` and ``csrc/gemm_nvfp4.cu``.

What passes between the two::

    codes     (M, K / 2) int8, as in a file
    scale     (K / 64, M, 4) E4M3: the four of 64 columns are the word that a tensor core takes
    down      (M, rank to a multiple of 64), zeros behind the rank, in 16 bits
    its scale (M,) float32 powers of two; float16 only, whose range the product may leave, and not of no ranks
"""

from __future__ import annotations

import struct
from functools import lru_cache

import torch

from . import plan, ungrouped
from .launch import (
    Kernel,
    KernelInputError,
    card,
    check_limits,
    check_quantizer_input,
    expect,
    kernel_of,
    on,
    pad_rank,
    zero_counters,
)

_QUANTIZE = struct.Struct("9P5i4x")
_GEMM = struct.Struct("11P5i4x")
_NAME = "linear_nvfp4"
_RANKS = 64  # the multiple to which `down` is padded
SCALE_DTYPE = torch.float8_e4m3fn


def linear(
    x: torch.Tensor,
    smooth_factor: torch.Tensor,
    proj_down: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_tensor_scale: torch.Tensor,
    weight_channel_scale: torch.Tensor | None,
    proj_up: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """``svdq::linear_nvfp4``, of operands as a file has them: nothing is made of a weight.

    Raises:
        KernelInputError: an operand that the kernels do not take.
    """
    weights = weight, weight_scale, weight_tensor_scale, weight_channel_scale, proj_up, bias
    check_quantizer_input(_NAME, x, smooth_factor, proj_down)
    check_weight(x, proj_down.shape[1], *weights)
    if card(x.device.index)[0] == plan.HOPPER and ungrouped.takes(weight.shape[0]):
        return ungrouped.multiply_nvfp4(*quantize_wide(x, smooth_factor, proj_down), *weights)
    return multiply(*quantize(x, smooth_factor, proj_down), *weights)


def quantize(
    x: torch.Tensor, smooth_factor: torch.Tensor, proj_down: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """E2M1 codes and E4M3 scales of ``x / smooth_factor``, bit for bit the reference's, and ``x @ proj_down``.

    Args:
        x: (M, K) bfloat16 or float16, K a multiple of 64.
        smooth_factor: (K,) as ``x``.
        proj_down: (K, rank) as ``x``.

    Returns:
        codes, scale, down and its scale (None for bfloat16), as above.

    Raises:
        KernelInputError: an operand that the kernel does not take.
    """
    check_quantizer_input(_NAME, x, smooth_factor, proj_down)
    m, k = x.shape
    codes = torch.empty((m, k // 2), dtype=torch.int8, device=x.device)
    scale = torch.empty((k // plan.GROUP, m, 4), dtype=SCALE_DTYPE, device=x.device)
    return codes, scale, *_quantize(x, smooth_factor, proj_down, plan.CODES, codes, scale)[1:]


def quantize_wide(
    x: torch.Tensor, smooth_factor: torch.Tensor, proj_down: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What the codes and scales of :func:`quantize` stand for, in float16, which holds it exactly; Hopper only.

    Returns:
        values (M, K) float16, in each 64 columns with column ``16 t + 4 i + 2 h + e`` at ``16 i + 2 t + 8 h + e``
        (i, t below 4, h, e below 2); down and its scale as above.

    Raises:
        KernelInputError: an operand that the kernel does not take.
    """
    check_quantizer_input(_NAME, x, smooth_factor, proj_down)
    values = torch.empty(x.shape, dtype=torch.float16, device=x.device)
    return _quantize(x, smooth_factor, proj_down, plan.WIDE, values)


def absmax(
    x: torch.Tensor, smooth_factor: torch.Tensor, proj_down: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """The largest magnitude of each row of ``x / smooth_factor``, and ``x @ proj_down``; operands checked.

    Returns:
        (slices, M) float32, each of some of the columns; down and its scale as above.
    """
    return _quantize(x, smooth_factor, proj_down, plan.ABSMAX)


@lru_cache(maxsize=4096)
def _quantize_kernel(
    index: int, m: int, k: int, rank: int, bf16: bool, output: int
) -> tuple[Kernel, plan.QuantizeLaunch]:
    shape = plan.nvfp4_quantize_launch(*card(index), m, k, rank, bf16, output)
    kernel = kernel_of(index, shape.build, shape.grid, shape.build.shared_bytes(shape.slice_groups, shape.warps))
    return kernel._replace(threads=shape.warps * 32), shape


def _quantize(
    x: torch.Tensor,
    smooth_factor: torch.Tensor,
    proj_down: torch.Tensor,
    output: int,
    values: torch.Tensor | None = None,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Fills ``values`` (``plan.ABSMAX`` makes its own) and ``scale``; returns values, down and its scale."""
    (m, k), index, bf16 = x.shape, x.device.index, x.dtype == torch.bfloat16
    proj_down = pad_rank(proj_down)
    rank = proj_down.shape[1]
    down = torch.empty((m, -(-rank // _RANKS) * _RANKS), dtype=x.dtype, device=x.device)
    down_scale = None if bf16 or not rank else torch.empty(m, dtype=torch.float32, device=x.device)
    if m == 0:
        return x if values is None else values, down, down_scale
    with on(index):
        kernel, shape = _quantize_kernel(index, m, k, rank, bf16, output)
        if values is None:
            values = torch.empty((shape.grid[1], m), dtype=torch.float32, device=x.device)
        stream = torch._C._cuda_getCurrentRawStream(index)
        partial = counters = None
        parts = shape.grid[1] * shape.grid[2]
        if rank and parts > 1:
            tiles = shape.grid[0] * shape.warps
            sums = tiles * parts * shape.build.rows * shape.build.rank_tiles * 8
            partial = torch.empty(sums, dtype=torch.float32, device=x.device)
            counters = zero_counters(x, stream, tiles)
        kernel.launch(
            stream,
            _QUANTIZE.pack(
                x.data_ptr(),
                smooth_factor.data_ptr(),
                proj_down.data_ptr(),
                values.data_ptr(),
                0 if scale is None else scale.data_ptr(),
                down.data_ptr(),
                0 if down_scale is None else down_scale.data_ptr(),
                0 if partial is None else partial.data_ptr(),
                0 if counters is None else counters.data_ptr(),
                m,
                k,
                rank,
                down.shape[1],
                shape.slice_groups,
            ),
        )
    return values, down, down_scale


def check_weight(
    x: torch.Tensor,
    rank: int,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_tensor_scale: torch.Tensor,
    weight_channel_scale: torch.Tensor | None,
    proj_up: torch.Tensor,
    bias: torch.Tensor | None,
) -> None:
    """Raise unless the GEMM takes these operands beside activations (M, K) ``x``.

    Raises:
        KernelInputError: it does not.
    """
    (m, k), dtype = x.shape, x.dtype
    if weight.dim() != 2:
        raise KernelInputError(f"svdq::{_NAME}: weight has shape {tuple(weight.shape)}, expected (N, {k // 2})")
    n = weight.shape[0]
    check_limits(_NAME, m, n, k)
    if n == 0 or n % 8:
        raise KernelInputError(f"svdq::{_NAME}: N = {n} is not a positive multiple of 8")
    expect(_NAME, "weight", weight, x, (n, k // 2), torch.int8)
    expect(_NAME, "weight_scale", weight_scale, x, (k // 16, n), SCALE_DTYPE)
    expect(_NAME, "weight_tensor_scale", weight_tensor_scale, x, (), torch.float32)
    expect(_NAME, "proj_up", proj_up, x, (n, rank), dtype)
    for name, tensor in (("weight_channel_scale", weight_channel_scale), ("bias", bias)):
        if tensor is not None:
            expect(_NAME, name, tensor, x, (n,), dtype)


@lru_cache(maxsize=4096)
def _gemm_kernel(index: int, m: int, n: int, bf16: bool) -> Kernel:
    build = plan.nvfp4_gemm_build(*card(index), m, n, bf16)
    return kernel_of(index, build, build.grid(m, n), build.shared_bytes())


def multiply(
    codes: torch.Tensor,
    scale: torch.Tensor,
    down: torch.Tensor,
    down_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_tensor_scale: torch.Tensor,
    weight_channel_scale: torch.Tensor | None,
    proj_up: torch.Tensor,
    bias: torch.Tensor | None,
    build: plan.Nvfp4GemmBuild | None = None,
) -> torch.Tensor:
    """The layer's outputs (M, N), of what :func:`quantize` returns and checked operands of the weight.

    Args:
        build: run this one instead of the plan's, to test or to time.
    """
    m, n, k = codes.shape[0], weight.shape[0], 2 * codes.shape[1]
    proj_up = pad_rank(proj_up)
    rank, dtype, index = proj_up.shape[1], proj_up.dtype, codes.device.index
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
                scale.data_ptr(),
                down.data_ptr(),
                0 if down_scale is None else down_scale.data_ptr(),
                weight.data_ptr(),
                weight_scale.data_ptr(),
                weight_tensor_scale.data_ptr(),
                0 if weight_channel_scale is None else weight_channel_scale.data_ptr(),
                proj_up.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                out.data_ptr(),
                m,
                n,
                k,
                rank,
                down.shape[1],
            ),
        )
    return out
