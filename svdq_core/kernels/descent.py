"""A group's round of coordinate descent: the launch of ``csrc/descent.cu``."""

from __future__ import annotations

import struct
from functools import lru_cache

import torch

from . import plan
from .launch import Kernel, expect, kernel_of, on

_ARGUMENTS = struct.Struct("6P2i")


def improve(
    metric: torch.Tensor,
    value: torch.Tensor,
    steps: torch.Tensor,
    pull: torch.Tensor,
    scale: torch.Tensor,
    zero: torch.Tensor,
    dtype: torch.dtype,
) -> None:
    """As ``quantizer.descent.improve``, on the current stream of their CUDA device; ``pull`` stays as it is.

    Raises:
        KernelInputError: an operand is not what the kernel reads.
    """
    group, n = plan.GROUP, value.shape[1]
    for name, tensor, shape in (
        ("metric", metric, (group, group)),
        ("value", value, (group, n)),
        ("steps", steps, (group, n)),
        ("pull", pull, (group, n)),
        ("scale", scale, (n,)),
        ("zero", zero, (n,)),
    ):
        expect("descent", name, tensor, value, shape, torch.float32)
    index, pointers = value.device.index, (t.data_ptr() for t in (metric, value, steps, pull, scale, zero))
    with on(index):
        _kernel(index, n).launch(
            torch._C._cuda_getCurrentRawStream(index), _ARGUMENTS.pack(*pointers, n, dtype == torch.bfloat16)
        )


@lru_cache(maxsize=256)
def _kernel(index: int, n: int) -> Kernel:
    build = plan.DescentBuild()
    return kernel_of(index, build, build.grid(n), build.shared_bytes())
