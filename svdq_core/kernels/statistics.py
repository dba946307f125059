"""Calibration's statistics of channels: the launch of ``csrc/channel_statistics.cu``."""

from __future__ import annotations

import struct
from functools import lru_cache

import torch

from . import plan
from .launch import SIXTEEN_BIT, Kernel, card, kernel_of, on, zero_counters

_ARGUMENTS = struct.Struct("6P3i4x")


def takes(rows: torch.Tensor) -> bool:
    """Whether the kernel reads such rows; status says whether it runs on their device."""
    return (
        rows.dtype in SIXTEEN_BIT
        and rows.shape[1] % 8 == 0
        and rows.is_contiguous()
        and rows.data_ptr() % 16 == 0
        and (rows.dtype != torch.bfloat16 or card(rows.device.index)[0] >= 80)
    )


def take_in(rows: torch.Tensor, minimum: torch.Tensor, maximum: torch.Tensor, square_sum: torch.Tensor) -> None:
    """Update a layer's statistics by more of its inputs, in place and on the current stream.

    Args:
        rows: (M, K), of which :func:`takes` is true.
        minimum, maximum: (K,) float32 on its device.
        square_sum: (K,) float64 likewise.
    """
    (m, k), index = rows.shape, rows.device.index
    if not m:
        return
    with on(index):
        kernel, slice_rows = _kernel(index, m, k, rows.dtype == torch.bfloat16)
        stream = torch._C._cuda_getCurrentRawStream(index)
        columns, slices, _ = kernel.grid
        partial = torch.empty(3 * slices * k, dtype=torch.float32, device=rows.device)
        kernel.launch(
            stream,
            _ARGUMENTS.pack(
                rows.data_ptr(),
                minimum.data_ptr(),
                maximum.data_ptr(),
                square_sum.data_ptr(),
                partial.data_ptr(),
                zero_counters(rows, stream, columns).data_ptr(),
                m,
                k,
                slice_rows,
            ),
        )


@lru_cache(maxsize=4096)
def _kernel(index: int, m: int, k: int, bf16: bool) -> tuple[Kernel, int]:
    build = plan.StatisticsBuild(bf16)
    grid, slice_rows = build.grid(m, k, card(index)[1])
    return kernel_of(index, build, grid, build.shared_bytes()), slice_rows
