"""Inputs in 8 bits on Hopper: the launch of ``csrc/quantize_rows.cu``; rotated ones, and the product after them."""

from __future__ import annotations

import struct
from functools import lru_cache

import torch

from . import library, plan, ungrouped
from .driver import clusters_at_once, grouped_tensor_map, tensor_map
from .launch import SIXTEEN_BIT, Kernel, KernelInputError, card, check_limits, expect, kernel_of, on, pad_rank

_ARGUMENTS = struct.Struct("128s128s5P6i")  # aligned to 64 bytes
_RANKS = 64  # columns of ``down``
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
    codes, scale, _, _ = _quantize(x, inverse, None, True)
    return codes, scale


def takes(x: torch.Tensor, rank: int) -> bool:
    """Whether :func:`quantize_with_branch` takes an input and so many ranks."""
    index = x.device.index
    return (
        card(index)[0] == plan.HOPPER and _launch(index, *x.shape, rank, x.dtype == torch.bfloat16, False) is not None
    )


def quantize_with_branch(
    x: torch.Tensor, smooth_factor: torch.Tensor, proj_down: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """``kernels.int8.quantize`` in one kernel, of what :func:`takes` is true of."""
    return _quantize(x, smooth_factor, pad_rank(proj_down), False)


def _quantize(
    x: torch.Tensor, factor: torch.Tensor, proj_down: torch.Tensor | None, rotate: bool
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    (m, k), index, bf16 = x.shape, x.device.index, x.dtype == torch.bfloat16
    rank = 0 if proj_down is None else proj_down.shape[1]
    codes = torch.empty((m, k), dtype=torch.int8, device=x.device)
    scale = torch.empty(m, dtype=torch.float32, device=x.device)
    down = torch.empty((m, _RANKS if rank else 0), dtype=x.dtype, device=x.device)
    down_scale = torch.empty(m, dtype=torch.float32, device=x.device) if rank and not bf16 else None
    if m:
        with on(index):
            kernel, shape = _kernel(index, m, k, rank, bf16, rotate)
            kernel.launch(
                torch._C._cuda_getCurrentRawStream(index),
                _ARGUMENTS.pack(
                    grouped_tensor_map(x.data_ptr(), m, 2 * k, plan.RowsBuild.rows, shape.box),
                    _branch_map(proj_down, shape) if rank else bytes(128),
                    factor.data_ptr(),
                    codes.data_ptr(),
                    scale.data_ptr(),
                    down.data_ptr(),
                    0 if down_scale is None else down_scale.data_ptr(),
                    m,
                    k,
                    shape.boxes,
                    shape.box.bit_length() - 1,
                    shape.ring_boxes,
                    shape.warps,
                ),
            )
    return codes, scale, down, down_scale


def _branch_map(proj_down: torch.Tensor, shape: plan.RowsLaunch) -> bytes:
    k, rank = proj_down.shape
    columns, ranks = min(shape.box, 4) * plan.GROUP, shape.build.rank_tiles * 8
    return tensor_map(proj_down.data_ptr(), k, 2 * rank, columns, 2 * ranks, True)


@lru_cache(maxsize=4096)
def _kernel(index: int, m: int, k: int, rank: int, bf16: bool, rotate: bool) -> tuple[Kernel, plan.RowsLaunch]:
    shape = _launch(index, m, k, rank, bf16, rotate)
    if shape is None:
        raise KernelInputError(f"svdq::{_NAME}: K = {k} is too long for what this card has of clusters of blocks")
    kernel = kernel_of(index, shape.build, (shape.blocks, 1, 1), shape.shared)
    return kernel._replace(threads=shape.threads, early=True), shape


def _launch(index: int, m: int, k: int, rank: int, bf16: bool, rotate: bool) -> plan.RowsLaunch | None:
    return plan.rows_launch(_at_once(index), m, k, rank, bf16, rotate)


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
