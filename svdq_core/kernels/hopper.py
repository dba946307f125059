"""W4A4 on Hopper: operands in the layout of ``csrc/gemm_hopper.cu``, and its launch.

Hopper multiplies bytes, so codes are kept as bytes there. A weight's image is made once, the first time it
is used on a device, and lives as long as the weight: N K bytes beside the file's N K / 2. It can be told to
go (:func:`forget`), and is made again when it is needed. Weights whose scales lie on a grid have a simpler image
and another kernel (:mod:`.grid`); the one here takes any scales:

    image     [K / 128][rows][8 chunks of 16 bytes], chunk c of row r at place c ^ (r % 8)
    chunk     4 (group % 2) + q: columns 8q .. 8q + 7, then 32 + 8q .. 32 + 8q + 7, of the group

The columns' order is the one in which a lane of the quantizer holds them; both operands have it.
"""

from __future__ import annotations

import struct
from functools import lru_cache
from typing import NamedTuple

import torch
from torch.utils.weak import WeakTensorKeyDictionary

from ..numerics import int4
from . import grid, plan, state_of
from .launch import (
    Kernel,
    QuantizerOutputs,
    card,
    check_int4_layer,
    kernel_of,
    launch_quantizer,
    on,
    pad_rank,
)

_GEMM = struct.Struct("12P6iP")
_BUILD = plan.HopperGemmBuild
_STAGE = 128  # columns of K
_CHUNK = plan.CHUNK_GROUPS * plan.GROUP
_RANKS = 64  # of an image of a low-rank factor: 128 bytes
_GUARD = 256  # rows of columns that a tile may read beyond the last
_ROOM = 2.0**20  # taken from a bfloat16 activation's scale, given to the weight's: no sum overflows float32


class WeightImage(NamedTuple):
    """A quantized weight as the kernel reads it.

    Attributes:
        codes: (K / 128, padded N, 128) uint8, with a guard behind.
        scale: (K / 128, padded N, 2) float16, dealt to threads, with a guard behind.
        column_scale: (padded N + guard,) float32: a power of two for each output column.
        rows: padded N.
    """

    codes: torch.Tensor
    scale: torch.Tensor
    column_scale: torch.Tensor
    rows: int

    @property
    def nbytes(self) -> int:
        return self.codes.nbytes + self.scale.nbytes + self.column_scale.nbytes


class UpImage(NamedTuple):
    """``proj_up`` as the kernel reads it: relative to the weight's column scales.

    Attributes:
        factors: (rank / 64, padded N, 64), with a guard behind.
        scale: (1,) float32: a power of two taken out of all of it (float16 only, else 1).
    """

    factors: torch.Tensor
    scale: torch.Tensor


_weights: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
_ups: WeakTensorKeyDictionary = WeakTensorKeyDictionary()


def linear(
    x: torch.Tensor,
    smooth_factor: torch.Tensor,
    proj_down: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    proj_up: torch.Tensor,
    bias: torch.Tensor | None,
    act_unsigned: bool,
    act_rotated: bool = False,
) -> torch.Tensor:
    """``svdq::linear_w4a4``.

    Raises:
        KernelInputError: an operand that the kernels do not take.
    """
    name = "linear_w4a4"
    check_int4_layer(name, x, smooth_factor, proj_down, weight, weight_scale, proj_up, bias)
    m, n, rank = x.shape[0], weight.shape[0], proj_down.shape[1]
    if m == 0:
        return x.new_empty((m, n))
    prologue = plan.ROTATE if act_rotated else plan.PLAIN
    with on(x.device.index):
        # Codes of a rotated or shifted input have a sign of their own, or none.
        image = _weight_image(weight, weight_scale, None if act_rotated or act_unsigned else smooth_factor)
        if isinstance(image, grid.GridImage):
            quantized = grid.quantize(x, smooth_factor, pad_rank(proj_down), act_unsigned, prologue)
            return grid.multiply(quantized, image, proj_up, bias, act_unsigned)
        quantized = quantize(x, smooth_factor, pad_rank(proj_down), act_unsigned, prologue)
        out = x.new_empty((m, n))
        _multiply(quantized, image, _up_image(proj_up, image), bias, rank, out)
    return out


def quantize(
    x: torch.Tensor,
    smooth_factor: torch.Tensor,
    proj_down: torch.Tensor,
    act_unsigned: bool,
    prologue: int = plan.PLAIN,
) -> QuantizerOutputs:
    """The activations' half of a layer; ``proj_down`` has a multiple of 8 ranks."""
    (m, k), rank = x.shape, proj_down.shape[1]
    rows = -(-m // _BUILD.bm) * _BUILD.bm
    stages, rank_blocks = -(-k // _STAGE), -(-rank // _RANKS)
    # Of an odd number of groups the last stage's other half is not written, and must not be NaN.
    allocate = torch.zeros if k % _STAGE else torch.empty
    device = x.device
    out = QuantizerOutputs(
        plan.IMAGE,
        rows,
        allocate((stages, rows, _STAGE), dtype=torch.uint8, device=device),
        allocate((stages, rows, 4), dtype=torch.float16, device=device),
        torch.empty((rank_blocks, rows, _RANKS), dtype=x.dtype, device=device),
        torch.empty((-(-k // _CHUNK), rows), dtype=torch.float32, device=device),
        torch.empty((rank_blocks, rows), dtype=torch.float32, device=device) if x.dtype == torch.float16 else None,
    )
    launch_quantizer(x, smooth_factor, proj_down, act_unsigned, out, prologue)
    return out


def _multiply(
    quantized: QuantizerOutputs,
    image: WeightImage,
    up: UpImage,
    bias: torch.Tensor | None,
    rank: int,
    out: torch.Tensor,
) -> None:
    (m, n), index = out.shape, out.device.index
    kernel = _gemm_kernel(index, m, n, out.dtype == torch.bfloat16)
    stages = quantized.qact.shape[0]
    parked = None
    segments = _BUILD(out.dtype == torch.bfloat16).segments(stages * _STAGE)
    if segments > 1:
        parked = out.new_empty((segments - 1, kernel.grid[0], _BUILD.bm * _BUILD.bn))
    arguments = _GEMM.pack(
        quantized.qact.data_ptr(),
        quantized.act_scale.data_ptr(),
        quantized.chunk_scale.data_ptr(),
        quantized.down.data_ptr(),
        0 if quantized.down_scale is None else quantized.down_scale.data_ptr(),
        image.codes.data_ptr(),
        image.scale.data_ptr(),
        image.column_scale.data_ptr(),
        up.factors.data_ptr(),
        up.scale.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        m,
        n,
        stages,
        rank,
        quantized.padded_rows,
        image.rows,
        0 if parked is None else parked.data_ptr(),
    )
    kernel.launch(torch._C._cuda_getCurrentRawStream(index), arguments)


@lru_cache(maxsize=4096)
def _gemm_kernel(index: int, m: int, n: int, bf16: bool) -> Kernel:
    build = plan.HopperGemmBuild(bf16)
    return kernel_of(index, build, build.grid(m, n, card(index)[1]), build.shared_bytes())


def memory(weight: torch.Tensor) -> int:
    """Bytes that a weight's image takes now, beside the weight itself."""
    found = _weights.get(weight)
    return 0 if found is None else found[1].nbytes


def forget(tensor: torch.Tensor) -> None:
    """Free the image of a weight or of a ``proj_up``, e.g. because the layer leaves the device."""
    _weights.pop(tensor, None)
    _ups.pop(tensor, None)


def _weight_image(
    weight: torch.Tensor, weight_scale: torch.Tensor, smooth_factor: torch.Tensor | None
) -> WeightImage | grid.GridImage:
    key = (*state_of(weight), weight_scale.dtype, smooth_factor is None)
    found = _weights.get(weight)
    if found is None or found[0] != key:
        # While a graph is captured nothing is computed, so that scales cannot be looked at, and what is made then
        # belongs to the graph.
        capturing = torch.cuda.is_current_stream_capturing()
        image = None if capturing else grid.image(weight, weight_scale)
        found = key, image or weight_image(weight, weight_scale, smooth_factor)
        if not capturing:
            _weights[weight] = found
    return found[1]


def _up_image(proj_up: torch.Tensor, image: WeightImage) -> UpImage:
    key = (*state_of(proj_up), image.column_scale.data_ptr())
    found = _ups.get(proj_up)
    if found is None or found[0] != key:
        found = key, up_image(proj_up, image)
        if not torch.cuda.is_current_stream_capturing():
            _ups[proj_up] = found
    return found[1]


def _guarded(tensor: torch.Tensor, row_bytes: int) -> torch.Tensor:
    """The same values, with readable memory for ``_GUARD`` rows behind them."""
    guard = tensor.new_zeros(_GUARD * row_bytes // tensor.element_size())
    return torch.cat([tensor.reshape(-1), guard])[: tensor.numel()].view(tensor.shape)


def _swizzle(chunks: torch.Tensor) -> torch.Tensor:
    """(..., rows, 8, 16 bytes): chunk c of row r to c ^ (r % 8)."""
    place = torch.arange(8, device=chunks.device)
    order = place[:, None] ^ place[None, :]  # (row % 8, chunk)
    blocks = chunks.unflatten(-3, (-1, 8))
    index = order[..., None].expand(*blocks.shape)
    return blocks.gather(-2, index).flatten(-4, -3)


def weight_image(weight: torch.Tensor, weight_scale: torch.Tensor, smooth_factor: torch.Tensor | None) -> WeightImage:
    """A weight of the file as the kernel reads it.

    Args:
        weight: (N, K / 2) int8, signed codes.
        weight_scale: (K / 64, N).
        smooth_factor: (K,) whose sign the weight takes over, since codes of a signed activation have x's; or None.
    """
    n, k = weight.shape[0], 2 * weight.shape[1]
    rows, stages = -(-n // 32) * 32, -(-k // _STAGE)
    codes = int4.unpack(weight).half().to(torch.float8_e4m3fn).view(torch.uint8)
    if smooth_factor is not None:
        codes ^= (smooth_factor < 0).to(torch.uint8) << 7
    codes = torch.nn.functional.pad(codes, (0, stages * _STAGE - k, 0, rows - n))
    # (rows, stages, 2 groups, 2 halves, 4 q, 8) -> (stages, rows, 8 chunks, 16)
    codes = codes.view(rows, stages, 2, 2, 4, 8).permute(1, 0, 2, 4, 3, 5).reshape(stages, rows, 8, 16)
    codes = _swizzle(codes).reshape(stages, rows, _STAGE)

    scale = torch.nn.functional.pad(weight_scale.float(), (0, rows - n, 0, 2 * stages - weight_scale.shape[0]))
    largest = scale.abs().amax(dim=0).clamp_min(torch.finfo(torch.float32).tiny)
    column_scale = torch.exp2(torch.ceil(torch.log2(largest)).clamp(-100, 100))
    relative = (scale / column_scale).half()
    # (stages, 2 groups, rows / 32, 4 j, 4 q, 2) -> (stages, rows / 32, 2 groups, 4 q, 4 j, 2)
    relative = relative.view(stages, 2, rows // 32, 4, 4, 2).permute(0, 2, 1, 4, 3, 5).reshape(stages, rows, 2)
    room = _ROOM if weight_scale.dtype == torch.bfloat16 else 1.0
    column_scale = torch.nn.functional.pad(column_scale * room, (0, _GUARD))
    return WeightImage(_guarded(codes, _STAGE), _guarded(relative, 4), column_scale, rows)


def up_image(proj_up: torch.Tensor, image: WeightImage) -> UpImage:
    """(N, r) ``proj_up`` as the kernel reads it."""
    n, rank = proj_up.shape
    blocks = -(-rank // _RANKS)
    factors = proj_up.float() / image.column_scale[:n, None]
    scale = torch.ones(1, dtype=torch.float32, device=proj_up.device)
    if proj_up.dtype == torch.float16 and rank:
        largest = factors.abs().amax().clamp_min(2.0**-20)
        scale = torch.exp2(torch.ceil(torch.log2(largest)) - 10).reshape(1)
        factors = factors / scale
    factors = torch.nn.functional.pad(factors.to(proj_up.dtype), (0, blocks * _RANKS - rank, 0, image.rows - n))
    factors = factors.view(image.rows, blocks, 8, 8).transpose(0, 1).contiguous()
    factors = _swizzle(factors.view(torch.uint8)).reshape(blocks, image.rows, 2 * _RANKS).view(proj_up.dtype)
    return UpImage(_guarded(factors, 2 * _RANKS), scale)
