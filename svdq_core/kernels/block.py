"""Between the linear layers of a FLUX block: launches of ``modulate.cu``, ``norm_rope.cu`` and ``gelu_concat.cu``.

Each function returns None for operands that its kernel does not take, which the reference does.
"""

from __future__ import annotations

import struct
from functools import lru_cache

import torch

from . import plan
from .launch import Kernel, evenly_spaced, kernel_of, on, starts_early, whole

_MODULATE = struct.Struct("7P4if4x")
_NORM_ROPE = struct.Struct("7P7if")
_GELU_CONCAT = struct.Struct("3P3i4x")


def modulate(
    x: torch.Tensor,
    gated: tuple[torch.Tensor, torch.Tensor] | None,
    normed: tuple[torch.Tensor, torch.Tensor, float] | None,
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The sum of x (B, L, C) and a gated layer's output, and its modulated norm; an empty tensor for what isn't asked.

    Args:
        gated: y (B, L, C) and gate (B, 1, C).
        normed: scale and shift (B, 1, C), and epsilon.
    """
    batch, length, columns = x.shape
    if columns % 8 or columns > plan.ModulateBuild.most_columns or not whole(x) or x.numel() >= 2**31:
        return None
    y_pointer = gate_pointer = scale_pointer = shift_pointer = gate_stride = norm_stride = 0
    epsilon = 0.0
    if gated is not None:
        y, gate = gated
        if y.shape != x.shape or not whole(y, x) or not _rows(gate, x):
            return None
        y_pointer, gate_pointer, gate_stride = y.data_ptr(), gate.data_ptr(), gate.stride(0)
    if normed is not None:
        scale, shift, epsilon = normed
        if not _rows(scale, x) or not _rows(shift, x) or scale.stride(0) != shift.stride(0):
            return None
        scale_pointer, shift_pointer, norm_stride = scale.data_ptr(), shift.data_ptr(), scale.stride(0)
    total = torch.empty_like(x) if gated is not None else x.new_empty(0)
    modulated = torch.empty_like(x) if normed is not None else x.new_empty(0)
    rows, index = batch * length, x.device.index
    if rows:
        build = plan.ModulateBuild(x.dtype == torch.bfloat16, gated is not None, normed is not None)
        _launch(
            index,
            build,
            (rows, 1, 1),
            _MODULATE.pack(
                x.data_ptr(),
                y_pointer,
                gate_pointer,
                scale_pointer,
                shift_pointer,
                total.data_ptr(),
                modulated.data_ptr(),
                columns,
                length,
                gate_stride,
                norm_stride,
                epsilon,
            ),
        )
    return total, modulated


def norm_rope(
    qkv: list[torch.Tensor],
    norm_q: list[torch.Tensor],
    norm_k: list[torch.Tensor],
    rope: torch.Tensor,
    heads: int,
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor] | None:
    """``ops.block.norm_rope``."""
    first = qkv[0]
    batch, _, width = first.shape
    head, tokens = width // (3 * heads), sum(x.shape[1] for x in qkv)
    shapes = (1, 1, tokens, head // 2, 2, 2), (batch, 1, tokens, head // 2, 2, 2)
    if (
        head not in plan.NormRopeBuild.heads
        or width != 3 * heads * head
        or rope.dtype != torch.float32
        or rope.shape not in shapes
        or not whole(rope)
        or batch >= 2**16
        or not all(evenly_spaced(x, first) and x.shape[::2] == (batch, width) for x in qkv)
        or not all(w.shape == (head,) and whole(w, first) for w in (*norm_q, *norm_k))
    ):
        return None
    q, k, v = (first.new_empty((batch, tokens, heads, head)).transpose(1, 2) for _ in range(3))
    build = plan.NormRopeBuild(first.dtype == torch.bfloat16, head)
    start, rope_batch = 0, 0 if rope.shape[0] == 1 else rope.stride(0)
    for x, weight_q, weight_k in zip(qkv, norm_q, norm_k, strict=True):
        length = x.shape[1]
        if batch and length:
            _launch(
                first.device.index,
                build,
                (-(-length // build.tokens), batch, 1),
                _NORM_ROPE.pack(
                    x.data_ptr(),
                    weight_q.data_ptr(),
                    weight_k.data_ptr(),
                    rope.data_ptr(),
                    q.data_ptr(),
                    k.data_ptr(),
                    v.data_ptr(),
                    batch,
                    length,
                    heads,
                    tokens,
                    start,
                    x.stride(1),
                    rope_batch,
                    epsilon,
                ),
            )
        start += length
    return q, k, v


def gelu_concat(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor | None:
    """``ops.block.gelu_concat``."""
    batch, length, columns = a.shape
    if b.shape[:2] != a.shape[:2] or columns % 8 or b.shape[2] % 8 or not whole(a) or not evenly_spaced(b, a):
        return None
    out = a.new_empty((batch, length, columns + b.shape[2]))
    if out.numel():
        build, eights = plan.GeluConcatBuild(a.dtype == torch.bfloat16), out.shape[2] // 8
        _launch(
            a.device.index,
            build,
            (batch * length, -(-out.shape[2] // build.columns), 1),
            _GELU_CONCAT.pack(a.data_ptr(), b.data_ptr(), out.data_ptr(), columns // 8, eights, b.stride(1)),
        )
    return out


def _launch(index: int, build: plan.Build, grid: tuple[int, int, int], arguments: bytes) -> None:
    with on(index):
        _kernel(index, build, grid).launch(torch._C._cuda_getCurrentRawStream(index), arguments)


@lru_cache(maxsize=4096)
def _kernel(index: int, build: plan.Build, grid: tuple[int, int, int]) -> Kernel:
    return kernel_of(index, build, grid, 0)._replace(early=starts_early(index))


def _rows(tensor: torch.Tensor, like: torch.Tensor) -> bool:
    """Whether it has a row for each image, of which the kernel reads 16 bytes at a time."""
    return (
        tensor.shape == (like.shape[0], 1, like.shape[2])
        and tensor.dtype == like.dtype
        and tensor.device == like.device
        and tensor.stride(2) == 1
        and tensor.stride(0) % 8 == 0
        and tensor.data_ptr() % 16 == 0
    )
