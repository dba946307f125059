"""W8A8: ``csrc/gemv_int8.cu`` for few rows; for more ``quantize_int8.cu`` and ``gemm_int8.cu``, or Hopper's own."""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch

from . import gemv, nvfp4, plan, rows, w8a8
from .kept import Kept
from .launch import (
    Kernel,
    KernelInputError,
    card,
    check_limits,
    check_quantizer_input,
    check_rows,
    down_width,
    expect,
    kernel_of,
    on,
    pad_rank,
    pointer,
    starts_early,
)
from .ready import Launches, ReadyLayer, evaluate, places

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
    operands = smooth_factor, proj_down, weight, weight_scale, proj_up, bias
    if proj_down.numel() == 0 and _are_few(x.shape[0], x.shape[-1], weight.shape[0]):
        _Layer.check(x, *operands)
        return gemv.evaluate(_FEW_ROWS, x, (smooth_factor, weight, weight_scale, bias), weight.shape[0])
    return evaluate(_layers, _Layer, x, weight, operands)


class _Layer(ReadyLayer):
    @staticmethod
    def check(x: torch.Tensor, smooth_factor, proj_down, weight, weight_scale, proj_up, bias) -> None:
        check_quantizer_input(_NAME, x, smooth_factor, proj_down)
        _check_weight(x, weight, weight_scale, bias)
        expect(_NAME, "proj_up", proj_up, x, (len(weight), proj_down.shape[1]), x.dtype)

    def prepare(self, m: int) -> Launches:
        k, n, rank, bf16 = self.k, self.n, self.rank, self.dtype == torch.bfloat16
        check_limits(_NAME, m, n, k)
        quantize, rest = _quantizer(self.index, m, k, rank, bf16, *self.of_input)
        if card(self.index)[0] == plan.HOPPER:
            multiply = w8a8.multiplier(self.index, m, n, k, rank, bf16, *self.of_output)
        else:
            multiply = _multiplier(_gemm_kernel(self.index, m, n, bf16), m, n, k, rank, *self.of_output)
        return Launches.laid_out(
            quantize,
            multiply,
            codes=m * k,
            scale=4 * m,
            down=2 * m * down_width(rank),
            down_scale=0 if bf16 or not rank else 4 * m,
            rest=rest,
        )


_layers: Kept[_Layer] = Kept()


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
    (m, k), index, bf16 = x.shape, x.device.index, x.dtype == torch.bfloat16
    proj_down = pad_rank(proj_down)
    rank = proj_down.shape[1]
    codes = torch.empty((m, k), dtype=torch.int8, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    down = torch.empty((m, down_width(rank)), dtype=x.dtype, device=x.device)
    down_scale = torch.empty(m, dtype=torch.float32, device=x.device) if rank and not bf16 else None
    if m:
        with on(index):
            start, room = _quantizer(index, m, k, rank, bf16, smooth_factor.data_ptr(), proj_down.data_ptr())
            rest = torch.empty(room, dtype=torch.int8, device=x.device)
            start(torch._C._cuda_getCurrentRawStream(index), *map(pointer, (x, codes, scale, down, down_scale, rest)))
    return codes, scale, down, down_scale


def _quantizer(
    index: int, m: int, k: int, rank: int, bf16: bool, smooth_factor: int, proj_down: int
) -> tuple[Callable[..., None], int]:
    """What starts the first half on m rows, on the current device: in one kernel where a card has that.

    Returns:
        It, given a stream and where x, codes, scales, ``down``, its scales (0 for none) and other memory are; and how
        many bytes of that it needs.
    """
    if rows.takes(index, m, k, rank, bf16):
        return rows.quantizer(index, m, k, rank, bf16, False, smooth_factor, proj_down), 0
    largest = nvfp4.quantizer(index, m, k, rank, bf16, plan.ABSMAX)
    encode, (_, sums, room) = _quantize_kernel(index, m, bf16), places(largest.slices * m * 4, largest.sums)

    def start(stream: int, x: int, codes: int, scale: int, down: int, down_scale: int, rest: int) -> None:
        largest.start(stream, x, smooth_factor, proj_down, rest, 0, down, down_scale, rest + sums)
        encode.launch(stream, _QUANTIZE.pack(x, smooth_factor, rest, codes, scale, m, k, largest.slices))

    return start, room


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
        of_output = map(pointer, (weight, weight_scale, proj_up, bias))
        start = _multiplier(kernel, m, n, k, proj_up.shape[1], *of_output)
        start(torch._C._cuda_getCurrentRawStream(index), *map(pointer, (codes, act_scale, down, down_scale, out)))
    return out


def _multiplier(
    kernel: Kernel, m: int, n: int, k: int, rank: int, weight: int, weight_scale: int, proj_up: int, bias: int
) -> Callable[..., None]:
    """What starts the second half, given a stream and where codes, scales, ``down``, its scales and outputs are."""
    sizes = m, n, k, rank, down_width(rank)

    def start(stream: int, codes: int, act_scale: int, down: int, down_scale: int, out: int) -> None:
        quantized = codes, act_scale, down, down_scale
        kernel.launch(stream, _GEMM.pack(*quantized, weight, weight_scale, proj_up, bias, out, *sizes))

    return start


@lru_cache(maxsize=4096)
def _gemm_kernel(index: int, m: int, n: int, bf16: bool) -> Kernel:
    build = plan.int8_gemm_build(card(index)[1], m, n, bf16)
    return kernel_of(index, build, build.grid(m, n), build.shared_bytes())
