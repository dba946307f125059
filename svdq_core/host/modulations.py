"""The modulations of all of FLUX's blocks, computed at once.

They all have the same input, the embedding of a step's time, guidance and pooled prompt, of one row an image. So each
is a matrix that is read for one row, and a kernel for all of them saves 75 starts and ends, when a card reads little.
"""

import weakref
from collections.abc import Sequence

import comfy.ldm.flux.layers as layers
import comfy.ops
import torch

from ..layers import evaluate_together, goes_together
from .operations import QuantizedLinear


class Modulations:
    """What the blocks of one model ask for their modulations.

    The first block of a step has all of them computed, the others find theirs. One that is anything but a W4A16 layer,
    or one in INT8 without a low-rank branch, on the input's device (offloaded, hooked, patched by another pack) is
    computed by the host, when it is asked for.

    Args:
        modules: the host's, of all blocks.
    """

    def __init__(self, modules: Sequence[layers.Modulation]):
        self._modules = modules
        self._vec: weakref.ref | None = None
        self._version: int | None = None
        self._outputs: dict[layers.Modulation, torch.Tensor] = {}

    def __call__(self, module: layers.Modulation, vec: torch.Tensor) -> tuple:
        """As ``module(vec)``, for an embedding (B, K)."""
        if torch.compiler.is_compiling():
            return module(vec)
        version = None if vec.is_inference() else vec._version
        if self._vec is None or self._vec() is not vec or self._version != version:
            self._outputs = self._compute(vec)
            self._vec, self._version = weakref.ref(vec, self._forget), version
        output = self._outputs.get(module)
        if output is None:
            return module(vec)
        parts = output[:, None, :].chunk(module.multiplier, dim=-1)
        return layers.ModulationOut(*parts[:3]), layers.ModulationOut(*parts[3:]) if module.is_double else None

    def _forget(self, vec: weakref.ref) -> None:
        """Nobody can ask for the outputs of an input that is gone."""
        if vec is self._vec:
            self._outputs = {}

    def _compute(self, vec: torch.Tensor) -> dict[layers.Modulation, torch.Tensor]:
        modules = [module for module in self._modules if _is_plain(module, vec)]
        if not modules:
            return {}
        comfy.ops.run_every_op()  # where the host looks for an interrupt
        outputs = evaluate_together([module.lin for module in modules], torch.nn.functional.silu(vec))
        return dict(zip(modules, outputs, strict=True))


def _is_plain(module: layers.Modulation, vec: torch.Tensor) -> bool:
    """Whether the host's module would do nothing but evaluate a layer that goes together with others."""
    layer = module.lin
    return (
        type(module).forward.__module__ == layers.__name__
        and type(layer) is QuantizedLinear
        and layer.in_features == vec.shape[-1]
        and layer.is_plain_on(vec.device)
        and goes_together(layer)
        and not (module._forward_hooks or module._forward_pre_hooks)
    )
