"""W4A4 in NVFP4: the launches of ``csrc/quantize_nvfp4.cu`` and ``csrc/gemm_nvfp4.cu``.

What passes between the two::

    codes     (M, K / 2) int8, as in a file
    scale     (K / 64, M, 4) E4M3: the four of 64 columns are the word that a tensor core takes
    down      (M, rank to a multiple of 64), zeros behind the rank, in 16 bits
    its scale (M,) float32 powers of two; float16 only, whose range the product may leave, and not of no ranks
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import lru_cache
from typing import NamedTuple

import torch

from . import plan, wide
from .kept import Kept
from .launch import (
    Kernel,
    KernelInputError,
    card,
    check_limits,
    check_quantizer_input,
    down_width,
    expect,
    kernel_of,
    on,
    pad_rank,
    pointer,
    zero_counters,
)
from .ready import Launches, ReadyLayer, evaluate

_QUANTIZE = struct.Struct("9P5i4x")
_GEMM = struct.Struct("11P7i4x8P")
_NAME = "linear_nvfp4"
_NO_NEXT_LAYER = (0,) * 10  # what the GEMM is told of it, where there is none
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
    return evaluate(_layers, _Layer, x, weight, (smooth_factor, proj_down, *weights))


class _Layer(ReadyLayer):
    @staticmethod
    def check(x: torch.Tensor, smooth_factor: torch.Tensor, proj_down: torch.Tensor, *weights) -> None:
        check_quantizer_input(_NAME, x, smooth_factor, proj_down)
        check_weight(_NAME, x, x.shape[1], proj_down.shape[1], *weights)

    def prepare(self, m: int) -> Launches:
        k, n, rank, bf16 = self.k, self.n, self.rank, self.dtype == torch.bfloat16
        check_limits(_NAME, m, n, k)
        is_wide = card(self.index)[0] == plan.HOPPER and wide.takes(n)
        launch = quantizer(self.index, m, k, rank, bf16, plan.WIDE if is_wide else plan.CODES)
        of_input = self.of_input

        def quantize(stream: int, x: int, *outputs: int) -> None:
            launch.start(stream, x, *of_input, *outputs)

        if is_wide:
            multiply = wide.multiplier(self.index, m, n, k, rank, bf16, *self.of_output)
        else:
            kernel = _gemm_kernel(self.index, m, n, bf16, plan.STORE)
            multiply = _multiplier(kernel, m, n, k, rank, *self.of_output)
        return Launches.laid_out(
            quantize,
            multiply,
            codes=2 * m * k if is_wide else m * k // 2,
            scale=0 if is_wide else m * k // 16,
            down=2 * m * launch.width,
            down_scale=0 if bf16 or not rank else 4 * m,
            rest=launch.sums,
        )


def _multiplier(kernel: Kernel, m: int, n: int, k: int, rank: int, *of_output: int) -> Callable[..., None]:
    """What starts the second half, given a stream and where codes, scales, ``down``, its scales and outputs are."""
    sizes = m, n, k, rank, down_width(rank), *_NO_NEXT_LAYER

    def start(stream: int, codes: int, scale: int, down: int, down_scale: int, out: int) -> None:
        kernel.launch(stream, _GEMM.pack(codes, scale, down, down_scale, *of_output, out, *sizes))

    return start


_layers: Kept[_Layer] = Kept()


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


class Quantizer(NamedTuple):
    """The quantizer's launch for inputs with so many rows.

    Attributes:
        slices: of the columns, each some blocks'.
        sums: bytes that they leave their sums in.
        tiles: of rows, each with a counter; 0 where nothing is left to be added up.
        width: columns of ``down``.
    """

    index: int
    kernel: Kernel
    sizes: tuple[int, ...]
    slices: int
    sums: int
    tiles: int
    width: int

    def start(
        self,
        stream: int,
        x: int,
        smooth_factor: int,
        proj_down: int,
        values: int,
        scale: int,
        down: int,
        down_scale: int,
        sums: int,
    ) -> None:
        """Start it, given where everything is."""
        counters = zero_counters(self.index, stream, self.tiles).data_ptr() if self.tiles else 0
        self.kernel.launch(
            stream,
            _QUANTIZE.pack(x, smooth_factor, proj_down, values, scale, down, down_scale, sums, counters, *self.sizes),
        )


@lru_cache(maxsize=4096)
def quantizer(index: int, m: int, k: int, rank: int, bf16: bool, output: int) -> Quantizer:
    """The plan's quantizer, of a rank that is a multiple of 8 and an ``output`` of ``plan``, on the current device."""
    shape = plan.nvfp4_quantize_launch(*card(index), m, k, rank, bf16, output)
    kernel = kernel_of(index, shape.build, shape.grid, shape.build.shared_bytes(shape.slice_groups, shape.warps))
    blocks, slices, rank_blocks = shape.grid
    tiles = blocks * shape.warps if rank and slices * rank_blocks > 1 else 0
    sums = tiles * slices * rank_blocks * shape.build.rows * shape.build.rank_tiles * 8 * 4
    width = down_width(rank)
    sizes = m, k, rank, width, shape.slice_groups
    return Quantizer(index, kernel._replace(threads=shape.warps * 32), sizes, slices, sums, tiles, width)


def _quantize(
    x: torch.Tensor,
    smooth_factor: torch.Tensor,
    proj_down: torch.Tensor,
    output: int,
    values: torch.Tensor,
    scale: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Fills ``values`` and ``scale``; returns values, down and its scale."""
    (m, k), index, bf16 = x.shape, x.device.index, x.dtype == torch.bfloat16
    proj_down = pad_rank(proj_down)
    rank = proj_down.shape[1]
    down = torch.empty((m, down_width(rank)), dtype=x.dtype, device=x.device)
    down_scale = None if bf16 or not rank else torch.empty(m, dtype=torch.float32, device=x.device)
    if m == 0:
        return values, down, down_scale
    with on(index):
        launch = quantizer(index, m, k, rank, bf16, output)
        sums = torch.empty(launch.sums, dtype=torch.int8, device=x.device) if launch.sums else None
        operands = x, smooth_factor, proj_down, values, scale, down, down_scale, sums
        launch.start(torch._C._cuda_getCurrentRawStream(index), *map(pointer, operands))
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
        torch.empty((m, down_width(rank)), dtype=dtype, device=device),
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
            counters = zero_counters(index, stream, -(-m // plan.MEDIUM.bm))
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
