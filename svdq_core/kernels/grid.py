"""W4A4 on Hopper for weights whose scales lie on a grid: the launch of ``csrc/gemm_grid.cu``."""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple

import torch

from ..numerics import int4
from . import plan
from .driver import tensor_map
from .launch import Kernel, QuantizerOutputs, card, kernel_in_turns, launch_quantizer, on, pad_rank

_ARGUMENTS = struct.Struct("128s128s128s128s128s128s3P7i12x")  # aligned to 64 bytes
_NO_MAP = bytes(128)
_BOX = 128  # bytes of a row in a stage
_RANKS = 64  # of `down` in a stage
_LARGEST_WEIGHT = 128
_LARGEST_SUM = 2**22  # of the kernel's integer sums


class GridImage(NamedTuple):
    """A weight as the kernel reads it.

    Attributes:
        codes: (N, K) int8: codes times their group's whole number.
        unit: (N,) float32: what one of them is worth.
    """

    codes: torch.Tensor
    unit: torch.Tensor

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.unit.nbytes


def image(weight: torch.Tensor, weight_scale: torch.Tensor) -> GridImage | None:
    """A weight of the file as the kernel reads it, or None where its scales are not on a grid.

    Args:
        weight: (N, K / 2) int8, signed codes.
        weight_scale: (K / 64, N) in 16 bits.
    """
    found = int4.scale_grid(weight_scale)
    if found is None:
        return None
    unit, steps = found
    codes = int4.unpack(weight).unflatten(1, (-1, plan.GROUP)).short() * steps.t().unsqueeze(2)
    low, high = codes.aminmax()
    if low < -_LARGEST_WEIGHT or high >= _LARGEST_WEIGHT:  # the code -8 in a group whose scale is negative
        return None
    return GridImage(codes.to(torch.int8).flatten(1), unit)


def quantize(
    x: torch.Tensor,
    smooth_factor: torch.Tensor,
    proj_down: torch.Tensor,
    act_unsigned: bool,
    prologue: int = plan.PLAIN,
) -> QuantizerOutputs:
    """The activations' half of a layer, operands checked; ``proj_down`` has a multiple of 8 ranks.

    Returns:
        qact (M, K) int8; act_scale (K / 64, M padded) float32; down (M, rank to a multiple of 64) in 16 bits, of which
        what is behind the rank says nothing; down_scale (rank / 64, M padded) float32 to multiply it by, for float16.
    """
    (m, k), rank, device = x.shape, proj_down.shape[1], x.device
    rows, rank_blocks = -(-m // 4) * 4, -(-rank // _RANKS)
    out = QuantizerOutputs(
        plan.BYTES,
        rows,
        torch.empty((m, k), dtype=torch.int8, device=device),
        torch.empty((k // plan.GROUP, rows), dtype=torch.float32, device=device),
        torch.empty((m, rank_blocks * _RANKS), dtype=x.dtype, device=device),
        None,
        torch.empty((rank_blocks, rows), dtype=torch.float32, device=device) if x.dtype == torch.float16 else None,
    )
    launch_quantizer(x, smooth_factor, proj_down, act_unsigned, out, prologue)
    return out


def multiply(
    quantized: QuantizerOutputs, image: GridImage, proj_up: torch.Tensor, bias: torch.Tensor | None, act_unsigned: bool
) -> torch.Tensor:
    """Outputs (M, N) of a layer, operands checked.

    Args:
        quantized: by :func:`quantize`.
        image: of the weight.
        proj_up: (N, r) in the outputs' type.
        bias: (N,) likewise, or None.
        act_unsigned: whether activations' codes are.
    """
    codes, act_scale, down = quantized.qact, quantized.act_scale, quantized.down
    down_scale, act_limit = quantized.down_scale, int4.UNSIGNED_MAX if act_unsigned else int4.SIGNED_MAX
    (m, k), n = codes.shape, image.codes.shape[0]
    out = torch.empty((m, n), dtype=proj_up.dtype, device=codes.device)
    proj_up = pad_rank(proj_up)
    rank, index = proj_up.shape[1], codes.device.index
    with on(index):
        build, whole, kernel = _kernel(index, m, n, out.dtype == torch.bfloat16)
        share = build.columns // build.cluster
        ranks = (
            (
                tensor_map(down.data_ptr(), m, 2 * down.shape[1], build.rows, _BOX, True),
                tensor_map(proj_up.data_ptr(), n, 2 * rank, share, _BOX, True),
            )
            if rank
            else (_NO_MAP, _NO_MAP)
        )
        kernel.launch(
            torch._C._cuda_getCurrentRawStream(index),
            _ARGUMENTS.pack(
                tensor_map(codes.data_ptr(), m, k, build.rows, _BOX, True),
                tensor_map(image.codes.data_ptr(), n, k, share, _BOX, True),
                tensor_map(act_scale.data_ptr(), act_scale.shape[0], 4 * act_scale.shape[1], 3, 256, False),
                *ranks,
                tensor_map(out.data_ptr(), m, 2 * n, 64, 2 * build.piece, False),
                0 if down_scale is None else down_scale.data_ptr(),
                image.unit.data_ptr(),
                0 if bias is None else bias.data_ptr(),
                m,
                n,
                -(-k // _BOX),
                rank,
                quantized.padded_rows,
                (_LARGEST_SUM - 1) // (_BOX * act_limit * _LARGEST_WEIGHT),
                whole,
            ),
        )
    return out


@lru_cache(maxsize=4096)
def _kernel(index: int, m: int, n: int, bf16: bool) -> tuple[plan.GridGemmBuild, int, Kernel]:
    """The build, how many tiles are not halved, and the kernel."""
    build = plan.grid_build(card(index)[1], m, n, bf16)
    return build, *kernel_in_turns(index, build, m, n)
