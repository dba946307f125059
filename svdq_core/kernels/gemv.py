"""Layers of at most eight rows, and several of one input: the launches of ``csrc/gemv_awq.cu`` and ``gemv_int8.cu``.

The two take the same arguments but for what a layer's four pointers are, which is said in either source.
"""

from __future__ import annotations

import struct
from collections.abc import Callable, Sequence
from functools import lru_cache

import torch

from . import plan
from .launch import Kernel, KernelInputError, card, kernel_of, on, pointer, starts_early

_HEAD, _LAYER = struct.Struct("2P6i"), struct.Struct("4P2i")  # Arguments, and its Layer

Kind = type[plan.GemvAwqBuild] | type[plan.GemvInt8Build]
Layer = tuple[torch.Tensor | None, ...]  # a layer's operands but x, in the order of the kernel's pointers


def evaluate(kind: Kind, x: torch.Tensor, layer: Layer, n: int) -> torch.Tensor:
    """(M, N) of one layer; operands are checked, and the kernel takes their sizes."""
    out = x.new_empty((x.shape[0], n))
    if len(x):
        _launch(kind, x, [layer], (n,), out)
    return out


def evaluate_several(
    name: str,
    kind: Kind,
    x: torch.Tensor,
    layers: Sequence[Layer],
    outputs: tuple[int, ...],
    taken: bool,
    linear: Callable[..., torch.Tensor],
) -> torch.Tensor:
    """Outputs (M, N) of layers of one input, one after the other; operands are checked.

    Args:
        name: of the operator.
        outputs: N of each layer.
        taken: whether the kernel takes all of them; otherwise each is evaluated by itself,
        linear: by this, of x and a layer.

    Raises:
        KernelInputError: more outputs than one launch may have.
    """
    m = x.shape[0]
    out = x.new_empty(m * sum(outputs))
    if out.numel() >= 2**31:
        raise KernelInputError(f"svdq::{name}: {len(layers)} layers have more than 2^31 outputs; split them")
    parts = out.split([m * n for n in outputs])
    if not taken:
        for part, layer, n in zip(parts, layers, outputs, strict=True):
            part.view(m, n).copy_(linear(x, *layer))
    elif m:
        for first in range(0, len(layers), kind.most_layers):
            some = slice(first, first + kind.most_layers)
            _launch(kind, x, layers[some], outputs[some], parts[first])
    return out


def _launch(kind: Kind, x: torch.Tensor, layers: Sequence[Layer], outputs: tuple[int, ...], out: torch.Tensor) -> None:
    """Start the kernel on at least one row; ``out`` begins with the first layer's outputs."""
    (m, k), index = x.shape, x.device.index
    with on(index):
        kernel, shape = _kernel(kind, index, m, outputs, k, x.dtype == torch.bfloat16)
        arguments = bytearray(_HEAD.size + _LAYER.size * shape.build.layers)
        _HEAD.pack_into(
            arguments,
            0,
            x.data_ptr(),
            out.data_ptr(),
            m,
            k,
            shape.rounds,
            shape.tiles,
            shape.longer,
            shape.batch,
        )
        before = 0
        for i, (layer, n) in enumerate(zip(layers, outputs, strict=True)):
            _LAYER.pack_into(arguments, _HEAD.size + _LAYER.size * i, *map(pointer, layer), n, before)
            before += n
        kernel.launch(torch._C._cuda_getCurrentRawStream(index), bytes(arguments))


@lru_cache(maxsize=4096)
def _kernel(
    kind: Kind, index: int, m: int, outputs: tuple[int, ...], k: int, bf16: bool
) -> tuple[Kernel, plan.GemvLaunch]:
    shape = plan.gemv_launch(kind, *card(index), m, outputs, k, bf16)
    kernel = kernel_of(index, shape.build, (shape.blocks, 1, 1), shape.shared)
    return kernel._replace(threads=shape.warps * 32, early=starts_early(index)), shape
