"""W8A8 and NVFP4 on Hopper: the launch of ``csrc/gemm_ungrouped.cu``.

It reads weights as a file has them, so nothing is made of them; activations come from the formats' own
quantizers (``quantize_wide`` for NVFP4), with ``down`` in 16 bits and a multiple of 64 ranks wide.
"""

from __future__ import annotations

import struct
from collections.abc import Callable
from functools import lru_cache

import torch

from . import plan
from .driver import tensor_map
from .launch import Kernel, card, kernel_of, on, pad_rank

_ARGUMENTS = struct.Struct("128s128s128s128s128s7P5i52x")  # aligned to 64 bytes
_NO_MAP = bytes(128)
_BOX = 128  # bytes of a row in a stage


def takes(n: int) -> bool:
    """Whether the NVFP4 build takes a weight of n rows: its scales are copied 16 at a time."""
    return n % 16 == 0


def multiply_int8(
    codes: torch.Tensor,
    act_scale: torch.Tensor,
    down: torch.Tensor,
    down_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    proj_up: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Outputs (M, N) of a W8A8 layer, operands checked.

    Args:
        codes: (M, K) int8.
        act_scale: (M,) float32.
        down: (M, 64 n) in 16 bits, at least proj_up's ranks.
        down_scale: (M,) float32 to multiply ``down`` by, or None.
        weight: (N, K) int8.
        weight_scale: (N,) float32.
        proj_up: (N, r) in the outputs' type.
        bias: (N,) likewise, or None.
    """
    (m, k), n = codes.shape, weight.shape[0]

    def maps(build: plan.UngroupedGemmBuild) -> tuple[bytes, bytes, bytes]:
        return (
            tensor_map(codes.data_ptr(), m, k, build.tokens // build.cluster, _BOX, True),
            tensor_map(weight.data_ptr(), n, k, build.rows, _BOX, True),
            _NO_MAP,
        )

    scales = act_scale.data_ptr(), _pointer(down_scale), weight_scale.data_ptr(), 0, 0
    return _multiply(m, n, -(-k // _BOX), maps, scales, down, proj_up, bias, nvfp4=False)


def int8_launch(
    index: int,
    m: int,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> tuple[Callable[[int, bytes], None], Callable[[int, int, int], bytes]]:
    """:func:`multiply_int8` of m rows without a low-rank branch, to be launched often on the same weight.

    Returns:
        The launch, given a stream and arguments; and what makes those of the codes', their scales' and the
        outputs' addresses.
    """
    n, k = weight.shape
    build, whole, kernel = _kernel(index, m, n, dtype == torch.bfloat16, False)
    box, stages = build.tokens // build.cluster, -(-k // _BOX)
    weight_map = tensor_map(weight.data_ptr(), n, k, build.rows, _BOX, True)
    constant = weight_scale.data_ptr(), 0, 0, 0, _pointer(bias), m, n, stages + stages % 2, 0, whole

    def arguments(codes: int, act_scale: int, out: int) -> bytes:
        return _ARGUMENTS.pack(
            tensor_map(codes, m, k, box, _BOX, True),
            weight_map,
            _NO_MAP,
            _NO_MAP,
            tensor_map(out, m, 2 * n, 32, _BOX, True),
            act_scale,
            0,
            *constant,
        )

    return kernel.launch, arguments


def multiply_nvfp4(
    values: torch.Tensor,
    down: torch.Tensor,
    down_scale: torch.Tensor | None,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_tensor_scale: torch.Tensor,
    weight_channel_scale: torch.Tensor | None,
    proj_up: torch.Tensor,
    bias: torch.Tensor | None,
) -> torch.Tensor:
    """Outputs (M, N) of an NVFP4 layer of which :func:`takes` is true, operands checked.

    Args:
        values: (M, K) float16, as ``quantize_wide`` orders it.
        down, down_scale, proj_up, bias: as for :func:`multiply_int8`.
        weight, weight_scale, weight_tensor_scale, weight_channel_scale: as a file has them.
    """
    (m, k), n = values.shape, weight.shape[0]

    def maps(build: plan.UngroupedGemmBuild) -> tuple[bytes, bytes, bytes]:
        return (
            tensor_map(values.data_ptr(), m, 2 * k, build.tokens // build.cluster, _BOX, True),
            tensor_map(weight.data_ptr(), n, k // 2, build.rows, 32, False),
            tensor_map(weight_scale.data_ptr(), k // 16, n, 4, build.rows, False),
        )

    scales = 0, _pointer(down_scale), 0, weight_tensor_scale.data_ptr(), _pointer(weight_channel_scale)
    return _multiply(m, n, k // plan.GROUP, maps, scales, down, proj_up, bias, nvfp4=True)


def _multiply(m, n, stages, maps, scales, down, proj_up, bias, nvfp4) -> torch.Tensor:
    """Stages are of 128 bytes of an activation's row; their number is made even with one of zeros."""
    out = torch.empty((m, n), dtype=proj_up.dtype, device=proj_up.device)
    if m == 0:
        return out
    proj_up = pad_rank(proj_up)
    rank, index = proj_up.shape[1], proj_up.device.index
    with on(index):
        build, whole, kernel = _kernel(index, m, n, out.dtype == torch.bfloat16, nvfp4)
        box = build.tokens // build.cluster
        down_map = tensor_map(down.data_ptr(), m, 2 * down.shape[1], box, _BOX, True) if rank else _NO_MAP
        kernel.launch(
            torch._C._cuda_getCurrentRawStream(index),
            _ARGUMENTS.pack(
                *maps(build),
                down_map,
                tensor_map(out.data_ptr(), m, 2 * n, 32, _BOX, True),
                *scales,
                proj_up.data_ptr(),
                _pointer(bias),
                m,
                n,
                stages + stages % 2,
                rank,
                whole,
            ),
        )
    return out


@lru_cache(maxsize=4096)
def _kernel(index: int, m: int, n: int, bf16: bool, nvfp4: bool) -> tuple[plan.UngroupedGemmBuild, int, Kernel]:
    """The build, how many tiles are not halved, and the kernel."""
    multiprocessors = card(index)[1]
    build = plan.ungrouped_build(multiprocessors, m, n, bf16, nvfp4)
    turns = build.turns(m, n, multiprocessors)
    kernel = kernel_of(index, build, (turns.clusters * build.cluster, 1, 1), build.shared_bytes())
    return build, turns.whole, kernel._replace(early=True)


def _pointer(tensor: torch.Tensor | None) -> int:
    return 0 if tensor is None else tensor.data_ptr()
