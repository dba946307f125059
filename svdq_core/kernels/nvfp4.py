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
from typing import NamedTuple

import torch

from . import plan, wide
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
    pointer,
    zero_counters,
)

_QUANTIZE = struct.Struct("9P5i4x")
_GEMM = struct.Struct("11P7i4x8P")
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
    check_weight(_NAME, x, x.shape[1], proj_down.shape[1], *weights)
    if card(x.device.index)[0] == plan.HOPPER and wide.takes(weight.shape[0]):
        return wide.multiply(*quantize_wide(x, smooth_factor, proj_down), *weights)
    return multiply(*quantize(x, smooth_factor, proj_down), *weights)


def feed_forward(
    x: torch.Tensor,
    smooth_factor: torch.Tensor,
    proj_down: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_tensor_scale: torch.Tensor,
    weight_channel_scale: torch.Tensor | None,
    proj_up: torch.Tensor,
    bias: torch.Tensor | None,
    next_smooth_factor: torch.Tensor,
    next_proj_down: torch.Tensor,
    next_weight: torch.Tensor,
    next_weight_scale: torch.Tensor,
    next_weight_tensor_scale: torch.Tensor,
    next_weight_channel_scale: torch.Tensor | None,
    next_proj_up: torch.Tensor,
    next_bias: torch.Tensor | None,
) -> torch.Tensor:
    """``svdq::feed_forward_nvfp4`` in three launches, its inner columns a multiple of 64.

    Raises:
        KernelInputError: an operand that the kernels do not take.
    """
    weights = weight, weight_scale, weight_tensor_scale, weight_channel_scale, proj_up, bias
    next_weights = (
        next_weight,
        next_weight_scale,
        next_weight_tensor_scale,
        next_weight_channel_scale,
        next_proj_up,
        next_bias,
    )
    name = "feed_forward_nvfp4"
    check_quantizer_input(name, x, smooth_factor, proj_down)
    check_weight(name, x, x.shape[1], proj_down.shape[1], *weights)
    inner = weight.shape[0]
    if inner % plan.GROUP:
        raise KernelInputError(f"svdq::{name}: N = {inner} of weight is not a multiple of {plan.GROUP}")
    if next_proj_down.dim() != 2:
        shape = tuple(next_proj_down.shape)
        raise KernelInputError(f"svdq::{name}: next_proj_down has shape {shape}, expected ({inner}, rank)")
    expect(name, "next_smooth_factor", next_smooth_factor, x, (inner,), x.dtype)
    expect(name, "next_proj_down", next_proj_down, x, (inner, next_proj_down.shape[1]), x.dtype)
    check_weight(name, x, inner, next_proj_down.shape[1], *next_weights, prefix="next_")
    quantized = quantize(x, smooth_factor, proj_down)
    return multiply(*multiply_gelu_quantize(*quantized, *weights, next_smooth_factor, next_proj_down), *next_weights)


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
) -> tuple[Kernel, plan.Nvfp4QuantizeLaunch]:
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
    operator: str,
    x: torch.Tensor,
    k: int,
    rank: int,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_tensor_scale: torch.Tensor,
    weight_channel_scale: torch.Tensor | None,
    proj_up: torch.Tensor,
    bias: torch.Tensor | None,
    prefix: str = "",
) -> None:
    """Raise unless the GEMM takes these operands beside activations (M, K) of the type and device of ``x``.

    Args:
        operator: the name to complain under, and
        prefix: what its operands' names begin with.

    Raises:
        KernelInputError: it does not.
    """
    m, dtype = x.shape[0], x.dtype
    if weight.dim() != 2:
        raise KernelInputError(
            f"svdq::{operator}: {prefix}weight has shape {tuple(weight.shape)}, expected (N, {k // 2})"
        )
    n = weight.shape[0]
    check_limits(operator, m, n, k)
    if n == 0 or n % 8:
        raise KernelInputError(f"svdq::{operator}: N = {n} of {prefix}weight is not a positive multiple of 8")
    expect(operator, f"{prefix}weight", weight, x, (n, k // 2), torch.int8)
    expect(operator, f"{prefix}weight_scale", weight_scale, x, (k // 16, n), SCALE_DTYPE)
    expect(operator, f"{prefix}weight_tensor_scale", weight_tensor_scale, x, (), torch.float32)
    expect(operator, f"{prefix}proj_up", proj_up, x, (n, rank), dtype)
    for name, tensor in (("weight_channel_scale", weight_channel_scale), ("bias", bias)):
        if tensor is not None:
            expect(operator, f"{prefix}{name}", tensor, x, (n,), dtype)


@lru_cache(maxsize=4096)
def _gemm_kernel(index: int, m: int, n: int, bf16: bool, epilogue: int) -> Kernel:
    build = plan.nvfp4_gemm_build(*card(index), m, n, bf16, epilogue)
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
    m, n = codes.shape[0], weight.shape[0]
    out = torch.empty((m, n), dtype=proj_up.dtype, device=codes.device)
    weights = weight, weight_scale, weight_tensor_scale, weight_channel_scale, proj_up, bias
    _multiply(codes, scale, down, down_scale, *weights, out, None, build)
    return out


def multiply_gelu_quantize(
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
    next_smooth_factor: torch.Tensor,
    next_proj_down: torch.Tensor,
    build: plan.Nvfp4GemmBuild | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """What :func:`quantize` returns, of GELU of the layer's outputs, which are written nowhere.

    ``down`` is added up with atomics: its last bits may differ from run to run.

    Args:
        next_smooth_factor: (N,) of the layer that takes the result, N a multiple of 64, and
        next_proj_down: (N, r), both checked.
        build: run this one instead of the plan's, to test or to time.
    """
    m, n, device, dtype = codes.shape[0], weight.shape[0], codes.device, proj_up.dtype
    next_proj_down = pad_rank(next_proj_down)
    rank = next_proj_down.shape[1]
    out = _NextLayer(
        next_smooth_factor,
        next_proj_down,
        torch.empty((m, n // 2), dtype=torch.int8, device=device),
        torch.empty((n // plan.GROUP, m, 4), dtype=SCALE_DTYPE, device=device),
        torch.zeros((m, rank), dtype=torch.float32, device=device),
        torch.empty((m, -(-rank // _RANKS) * _RANKS), dtype=dtype, device=device),
        None if dtype == torch.bfloat16 or not rank else torch.empty(m, dtype=torch.float32, device=device),
    )
    weights = weight, weight_scale, weight_tensor_scale, weight_channel_scale, proj_up, bias
    _multiply(codes, scale, down, down_scale, *weights, None, out, build)
    return out.codes, out.scale, out.down, out.down_scale


class _NextLayer(NamedTuple):
    """What the layer that takes GELU(y) has, and where the epilogue writes its inputs."""

    smooth_factor: torch.Tensor
    proj_down: torch.Tensor
    codes: torch.Tensor
    scale: torch.Tensor
    sums: torch.Tensor  # ``down`` before it is rounded
    down: torch.Tensor
    down_scale: torch.Tensor | None


def _multiply(
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
    out: torch.Tensor | None,
    following: _NextLayer | None,
    build: plan.Nvfp4GemmBuild | None,
) -> None:
    """Fills ``out``, or what the following layer takes."""
    m, n, k = codes.shape[0], weight.shape[0], 2 * codes.shape[1]
    if m == 0:
        return
    proj_up = pad_rank(proj_up)
    index, bf16 = codes.device.index, proj_up.dtype == torch.bfloat16
    with on(index):
        if build is None:
            kernel = _gemm_kernel(index, m, n, bf16, plan.STORE if following is None else plan.GELU_QUANTIZE)
        else:
            kernel = kernel_of(index, build, build.grid(m, n), build.shared_bytes())
        stream = torch._C._cuda_getCurrentRawStream(index)
        next_ranks, next_pointers = (0, 0), (0,) * 8
        if following is not None:
            next_ranks = following.sums.shape[1], following.down.shape[1]
            # One counter for each tile of rows, of which the lowest tile has the most.
            counters = zero_counters(codes, stream, -(-m // plan.MEDIUM.bm))
            next_pointers = *map(pointer, following), counters.data_ptr()
        kernel.launch(
            stream,
            _GEMM.pack(
                *map(pointer, (codes, scale, down, down_scale, weight, weight_scale, weight_tensor_scale)),
                *map(pointer, (weight_channel_scale, proj_up, bias, out)),
                m,
                n,
                k,
                proj_up.shape[1],
                down.shape[1],
                *next_ranks,
                *next_pointers,
            ),
        )
