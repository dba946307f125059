"""Calibration's statistics of channels: the launch of ``csrc/channel_statistics.cu``."""

from __future__ import annotations

import struct
from functools import lru_cache

import numpy
import torch

from . import plan
from .launch import SIXTEEN_BIT, Kernel, card, kernel_of, on, starts_early, zero_counters

_ARGUMENTS = struct.Struct("7P4i2048s")
_MOST_CHOSEN = 512


def takes(rows: torch.Tensor) -> bool:
    """Whether the kernel reads such rows; status says whether it runs on their device."""
    return (
        rows.dtype in SIXTEEN_BIT
        and rows.shape[1] % 8 == 0
        and rows.is_contiguous()
        and rows.data_ptr() % 16 == 0
        and (rows.dtype != torch.bfloat16 or card(rows.device.index)[0] >= 80)
    )


def take_in(
    rows: torch.Tensor,
    minimum: torch.Tensor,
    maximum: torch.Tensor,
    square_sum: torch.Tensor,
    chosen: numpy.ndarray,
) -> torch.Tensor:
    """Update a layer's statistics by more of its inputs, in place and on the current stream.

    Args:
        rows: (M, K), of which :func:`takes` is true.
        minimum, maximum: (K,) float32 on its device.
        square_sum: (K,) float64 likewise.
        chosen: (R,) int64, which rows to copy.

    Returns:
        (R, K) as ``rows``: those.
    """
    (m, k), index = rows.shape, rows.device.index
    count = len(chosen)
    if not m:
        return rows
    if count > _MOST_CHOSEN:
        copies, count = rows.index_select(0, torch.from_numpy(chosen).to(rows.device, non_blocking=True)), 0
    else:
        copies = rows.new_empty((count, k))
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
                zero_counters(index, stream, columns).data_ptr(),
                copies.data_ptr(),
                m,
                k,
                slice_rows,
                count,
                chosen[:count].astype(numpy.int32).tobytes(),
            ),
        )
    return copies


@lru_cache(maxsize=4096)
def _kernel(index: int, m: int, k: int, bf16: bool) -> tuple[Kernel, int]:
    build = plan.StatisticsBuild(bf16)
    grid, slice_rows = build.grid(m, k, card(index)[1])
    kernel = kernel_of(index, build, grid, build.shared_bytes())
    return kernel._replace(early=starts_early(index)), slice_rows
