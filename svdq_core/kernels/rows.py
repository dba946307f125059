"""Inputs in 8 bits on Hopper: the launch of ``csrc/quantize_rows.cu``; rotated ones, and the product after them."""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import lru_cache
from typing import TYPE_CHECKING, NoReturn

import torch

from . import library, plan, w8a8
from .driver import clusters_at_once, grouped_tensor_map, tensor_map
from .launch import (
    SIXTEEN_BIT,
    Kernel,
    KernelInputError,
    card,
    check_limits,
    evenly_spaced,
    expect,
    kernel_of,
    on,
    pointer,
    whole,
)
from .ready import keep

if TYPE_CHECKING:
    from ..ops.as_int8 import Image

_ARGUMENTS = struct.Struct("128s128s128s5P8i56x")  # aligned to 64 bytes
_NO_MAP = bytes(128)
_NAME = "linear_as_int8"


class _Launches:
    """Of an image: its operands, checked, and for each kind of input the kernels and what they are told.

    A model has hundreds of such layers, which take about as long to launch as to run where there are few rows.
    """

    def __init__(self, image: Image):
        (n, k), dtype = image.weight.shape, image.inverse.dtype
        expect(_NAME, "smooth_factor", image.inverse, image.inverse, (k,), dtype)
        expect(_NAME, "weight", image.weight, image.inverse, (n, k), torch.int8)
        if image.bias is not None:
            expect(_NAME, "bias", image.bias, image.inverse, (n,), dtype)
        self.n, self.k, self.dtype, self.index = n, k, dtype, image.inverse.get_device()
        self.inverse = image.inverse.data_ptr()
        self.prepared: dict[tuple[int, int | None], tuple] = {}

    def prepare(self, image: Image, m: int, plain: int | None) -> tuple:
        """Kernels and the constant parts of their arguments, for m rows; ``plain`` as for the plan."""
        check_limits(_NAME, m, self.n, self.k)
        kernel, shape = _kernel(self.index, m, self.k, 0, self.dtype == torch.bfloat16, True, plain)
        of_output = map(pointer, (image.weight, image.weight_scale, None, image.bias))
        made = (
            kernel.launch,
            shape.box,
            (m, self.k, *_sizes(shape), (plain or 0) // plan.GROUP),
            w8a8.multiplier(self.index, m, self.n, self.k, 0, self.dtype == torch.bfloat16, *of_output),
        )
        return keep(self.prepared, (m, plain), made)

    def start(self, prepared: tuple, x_map: bytes, y_map: bytes, out: torch.Tensor) -> None:
        """Start both kernels, on an input of some rows."""
        quantize_launch, _, sizes, multiply = prepared
        m, k = sizes[:2]
        # Codes, and behind them their scales.
        codes = torch.empty(m * (k + 4), dtype=torch.int8, device=out.device)
        at = codes.data_ptr()
        stream = torch._C._cuda_getCurrentRawStream(self.index)
        quantize_launch(stream, _ARGUMENTS.pack(x_map, y_map, _NO_MAP, self.inverse, at, at + m * k, 0, 0, *sizes))
        multiply(stream, at, at + m * k, 0, 0, out.data_ptr())


def _launches(image: Image) -> _Launches:
    if image.launches is None:
        image.launches = _Launches(image)
    return image.launches


def _sizes(shape: plan.RowsLaunch) -> tuple[int, int, int, int, int]:
    return shape.boxes, shape.alone, shape.box.bit_length() - 1, shape.ring_boxes, shape.warps


def linear(x: torch.Tensor, image: Image) -> torch.Tensor:
    """``svdq::linear_as_int8`` of an image: (..., K) -> (..., N).

    Raises:
        KernelInputError: an operand that the kernels do not take.
    """
    launches = _launches(image)
    k, pointer = launches.k, x.data_ptr()
    if x.dtype != launches.dtype or x.shape[-1] != k or pointer & 15 or not x.is_contiguous():
        _refuse(x, launches, image.inverse)
    m = x.numel() // k
    out = torch.empty((*x.shape[:-1], launches.n), dtype=x.dtype, device=x.device)
    if not m:
        return out
    if x.get_device() != launches.index:
        _refuse(x, launches, image.inverse)
    with on(launches.index):
        prepared = launches.prepared.get((m, None)) or launches.prepare(image, m, None)
        x_map = grouped_tensor_map(pointer, m, 2 * k, plan.RowsBuild.rows, prepared[1])
        launches.start(prepared, x_map, _NO_MAP, out)
    return out


def linear_of_gelu(x: torch.Tensor, y: torch.Tensor, image: Image) -> torch.Tensor | None:
    """:func:`linear` of ``[x, GELU(y)]``, which is never written; None for operands that the kernels do not take.

    Args:
        x: (B, L, K - C), perhaps of no columns.
        y: (B, L, C), perhaps the last columns of something wider.
    """
    launches, index = _launches(image), y.get_device()
    plain, m = x.shape[-1], y.shape[0] * y.shape[1]
    if (
        m == 0
        or index != launches.index
        or y.dtype != launches.dtype
        or plain + y.shape[2] != launches.k
        or y.shape[2] % plan.GROUP
        or not evenly_spaced(y, y)
        or x.shape[:2] != y.shape[:2]
        or not whole(x, y)
        or _launch(index, m, launches.k, 0, y.dtype == torch.bfloat16, True, plain) is None
    ):
        return None
    out = torch.empty((*y.shape[:2], launches.n), dtype=y.dtype, device=y.device)
    with on(index):
        prepared = launches.prepared.get((m, plain)) or launches.prepare(image, m, plain)
        box = plan.RowsBuild.rows, prepared[1]
        x_map = grouped_tensor_map(x.data_ptr(), m, 2 * plain, *box) if plain else _NO_MAP
        y_map = grouped_tensor_map(y.data_ptr(), m, 2 * y.shape[2], *box, 2 * y.stride(1))
        launches.start(prepared, x_map, y_map, out)
    return out


def _refuse(x: torch.Tensor, launches: _Launches, like: torch.Tensor) -> NoReturn:
    """Raise for an input that does not fit the layer."""
    if x.dtype not in SIXTEEN_BIT or x.shape[-1] != launches.k:
        expected = f"expected (M, {launches.k}) {launches.dtype}"
        raise KernelInputError(f"svdq::{_NAME}: x is {tuple(x.shape)} {x.dtype}, {expected}")
    expect(_NAME, "x", x, like, tuple(x.shape), launches.dtype)
    raise AssertionError("expect() refuses what is refused here")


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
            start = quantizer(index, m, k, 0, x.dtype == torch.bfloat16, True, inverse.data_ptr(), 0)
            start(torch._C._cuda_getCurrentRawStream(index), x.data_ptr(), codes.data_ptr(), scale.data_ptr(), 0, 0)
    return codes, scale


def takes(index: int, m: int, k: int, rank: int, bf16: bool) -> bool:
    """Whether :func:`quantizer` has one for m rows that are not rotated, and so many ranks."""
    return card(index)[0] == plan.HOPPER and _launch(index, m, k, rank, bf16, False) is not None


def quantizer(
    index: int, m: int, k: int, rank: int, bf16: bool, rotate: bool, factor: int, proj_down: int
) -> Callable[..., None]:
    """What quantizes m rows, on the current device, with x . proj_down where there are ranks, a multiple of 8.

    Args:
        factor: where smooth_factor is, or what x is multiplied by if rotated.
        proj_down: where that is.

    Returns:
        The launch, given a stream and where x, codes, their scales, ``down``, its scales (0 for none) and memory that
        it does not need are.
    """
    kernel, shape = _kernel(index, m, k, rank, bf16, rotate, None)
    branch = _NO_MAP
    if rank:
        columns, ranks = min(shape.box, 4) * plan.GROUP, shape.build.rank_tiles * 8
        branch = tensor_map(proj_down, k, 2 * rank, columns, 2 * ranks, True)
    sizes = m, k, *_sizes(shape), 0

    def start(stream: int, x: int, codes: int, scale: int, down: int, down_scale: int, _: int = 0) -> None:
        x_map = grouped_tensor_map(x, m, 2 * k, plan.RowsBuild.rows, shape.box)
        kernel.launch(stream, _ARGUMENTS.pack(x_map, _NO_MAP, branch, factor, codes, scale, down, down_scale, *sizes))

    return start


@lru_cache(maxsize=4096)
def _kernel(
    index: int, m: int, k: int, rank: int, bf16: bool, rotate: bool, plain: int | None
) -> tuple[Kernel, plan.RowsLaunch]:
    shape = _launch(index, m, k, rank, bf16, rotate, plain)
    if shape is None:
        raise KernelInputError(f"svdq::{_NAME}: K = {k} is too long for what this card has of clusters of blocks")
    kernel = kernel_of(index, shape.build, (shape.blocks, 1, 1), shape.shared)
    return kernel._replace(threads=shape.threads, early=True), shape


def _launch(
    index: int, m: int, k: int, rank: int, bf16: bool, rotate: bool, plain: int | None = None
) -> plan.RowsLaunch | None:
    return plan.rows_launch(_at_once(index), m, k, rank, bf16, rotate, plain)


@lru_cache(maxsize=64)
def _at_once(index: int) -> tuple[int, ...]:
    """How many clusters of each size a card runs at once, of blocks that fill a multiprocessor."""
    capability, multiprocessors = card(index)

    def clusters(size: int) -> int:
        if size <= 2:  # as multiprocessors come
            return multiprocessors // size
        build = plan.RowsBuild(True, size, True)
        function = library.function(index, capability, build)
        return clusters_at_once(function, build.threads, build.shared_bytes(), size)

    with on(index):
        return tuple(map(clusters, plan.ROWS_CLUSTERS))
