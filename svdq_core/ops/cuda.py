"""CUDA implementations of the operators of this package; NF4's, a baseline only, has none.

Registering them is cheap: nothing is compiled, and no driver is touched, until the first call on a device.
Where the kernels cannot run (``svdq_core.kernels.status`` says why), and for float32 operands, which only
the reference takes, a call falls through to the reference.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import lru_cache
from importlib import import_module
from types import ModuleType
from typing import NamedTuple

import torch

from ..kernels import plan, prefers_int8, status
from ..kernels.kept import Kept
from . import as_int8, awq, block, fused, int4, int8, nvfp4


class _Operator(NamedTuple):
    """An operator's two implementations, and the operand whose type decides between them.

    ``kernel`` is given the module ``kernels.launch``, which is imported at the first call only.
    """

    reference: Callable
    kernel: Callable
    decides: int

    def __call__(self, *operands):
        if not _runs(operands[0].device.index, operands[self.decides].dtype):
            return self.reference(*operands)
        return self.kernel(_kernels("launch"), *operands)


class _BlockOperator(NamedTuple):
    """An operator of :mod:`.block`. Its kernel says None to operands that it does not take; the first one decides."""

    reference: Callable
    kernel: Callable

    def __call__(self, *operands):
        first = operands[0] if isinstance(operands[0], torch.Tensor) else operands[0][0]
        found = self.kernel(_kernels("block"), *operands) if _runs(first.device.index, first.dtype) else None
        return self.reference(*operands) if found is None else found


def _norm_modulate(kernels, x, *norm):
    found = kernels.modulate(x, None, norm)
    return None if found is None else found[1]


def _gated_sum(kernels, x, *gated):
    found = kernels.modulate(x, gated, None)
    return None if found is None else found[0]


@lru_cache(maxsize=8)
def _kernels(name: str) -> ModuleType:
    """A module of ``kernels``, imported at the first call only."""
    return import_module(f"..kernels.{name}", __package__)


def _quantize_act(launch, x: torch.Tensor, smooth_factor, proj_down, act_unsigned, act_rotated=False):
    prologue = plan.ROTATE if act_rotated else plan.PLAIN
    return launch.quantize(x, smooth_factor, proj_down, act_unsigned, prologue)


def _gelu_quantize_act(launch, x: torch.Tensor, y, smooth_factor, proj_down, act_unsigned, act_rotated=False):
    prologue = plan.GELU_ROTATE if act_rotated else plan.GELU
    return launch.quantize(x, smooth_factor, proj_down, act_unsigned, prologue, y=y)


def _linear_w4a4(launch, x: torch.Tensor, *operands) -> torch.Tensor:
    """A whole layer: with kernels of its own on Hopper, elsewhere its two halves."""
    module = "hopper" if launch.card(x.device.index)[0] == plan.HOPPER else "w4a4"
    return _kernels(module).linear(x, *operands)


def _linear_int8(_launch, x: torch.Tensor, smooth_factor, proj_down, weight, *operands) -> torch.Tensor:
    """Outputs are written 16 bytes at a time; a file's N may be any."""
    if weight.shape[0] % 8:
        return int8._linear_int8_reference(x, smooth_factor, proj_down, weight, *operands)
    return _kernels("int8").linear(x, smooth_factor, proj_down, weight, *operands)


def _linears_int8(_launch, x: torch.Tensor, smooth_factor, weight, *operands) -> torch.Tensor:
    if any(each.shape[0] % 8 for each in weight):
        return int8._linears_int8_reference(x, smooth_factor, weight, *operands)
    return _kernels("int8").linears(x, smooth_factor, weight, *operands)


def _linear_as_int8(_launch, x: torch.Tensor, *operands) -> torch.Tensor:
    """A fast kernel on Hopper, and there for the sizes that a layer asks about before it comes here."""
    weight = operands[as_int8.WEIGHT]
    if not prefers_int8(x.device, weight.shape[0], x.shape[-1]):
        return as_int8._linear_as_int8_reference(x, *operands)
    return linear_as_int8_now(x, operands[: as_int8.OPERANDS], operands[as_int8.OPERANDS :])


def linear_as_int8_now(x: torch.Tensor, operands: tuple[torch.Tensor | None, ...], form: tuple) -> torch.Tensor:
    """``svdq::linear_as_int8`` where ``prefers_int8``, but not by way of torch's operators: that is half of its time.

    Args:
        x: (..., K), contiguous; of a type of its own it has to go by that way, and while torch traces.
        operands: ``ops.as_int8.NAMES``.
        form: the operator's last arguments.
    """
    return _kernels("rows").linear(x, as_int8.kept_image(operands, *form))


def linear_as_int8_of_gelu_now(
    x: torch.Tensor, y: torch.Tensor, operands: tuple[torch.Tensor | None, ...], form: tuple
) -> torch.Tensor | None:
    """:func:`linear_as_int8_now` of ``[x, GELU(y)]``; None for what the kernels do not take.

    Args:
        x: (B, L, K - C), perhaps of no columns.
        y: (B, L, C).
    """
    return _kernels("rows").linear_of_gelu(x, y, as_int8.kept_image(operands, *form))


def _linear_awq(_launch, *operands) -> torch.Tensor:
    return _kernels("awq").linear(*operands)


def _linears_awq(_launch, *operands) -> torch.Tensor:
    return _kernels("awq").linears(*operands)


def _linear_nvfp4(_launch, x: torch.Tensor, smooth_factor, proj_down, weight, *operands) -> torch.Tensor:
    """A file may have shapes that the kernels do not take: groups are 16 wide, and rows of y not 16 bytes."""
    if x.shape[-1] % plan.GROUP or weight.shape[0] % 8:
        return nvfp4._linear_nvfp4_reference(x, smooth_factor, proj_down, weight, *operands)
    return _kernels("nvfp4").linear(x, smooth_factor, proj_down, weight, *operands)


def _feed_forward_nvfp4(launch, x: torch.Tensor, *operands) -> torch.Tensor:
    """Its parts on Hopper, where another kernel multiplies, and for shapes that the fused one does not take."""
    weight, next_weight = operands[2], operands[10]
    if (
        launch.card(x.device.index)[0] == plan.HOPPER
        or x.shape[-1] % plan.GROUP
        or weight.shape[0] % plan.GROUP
        or next_weight.shape[0] % 8
    ):
        y = nvfp4.linear_nvfp4(x, *operands[:8])
        return nvfp4.linear_nvfp4(torch.nn.functional.gelu(y, approximate="tanh"), *operands[8:])
    return _kernels("nvfp4").feed_forward(x, *operands)


# The first eight operands of every linear are those of ``linear_int4``; the sixth is ``proj_up``.
_OPERATORS = {
    "quantize_act_int4": _Operator(int4._quantize_act_reference, _quantize_act, 0),
    "linear_w4a4": _Operator(int4._linear_w4a4_reference, _linear_w4a4, 0),
    "linear_int4": _Operator(int4._linear_reference, lambda launch, *operands: launch.gemm(*operands), 5),
    "gelu_quantize_act_int4": _Operator(fused._gelu_quantize_act_reference, _gelu_quantize_act, 0),
    "modulate_quantize_act_int4": _Operator(
        fused._modulate_quantize_act_reference,
        lambda launch, x, scale, shift, *rest: launch.quantize(x, *rest, plan.MODULATE, (scale, shift)),
        0,
    ),
    "linear_gelu_quantize_int4": _Operator(
        fused._linear_gelu_quantize_reference,
        lambda launch, *operands: launch.gemm(*operands[:8], next_layer=operands[8:]),
        5,
    ),
    "linear_norm_rope_int4": _Operator(
        fused._linear_norm_rope_reference,
        lambda launch, *operands: launch.gemm(*operands[:8], norm=operands[8:]),
        5,
    ),
    "linear_int8": _Operator(int8._linear_int8_reference, _linear_int8, 0),
    "linears_int8": _Operator(int8._linears_int8_reference, _linears_int8, 0),
    "linear_as_int8": _Operator(as_int8._linear_as_int8_reference, _linear_as_int8, 0),
    "linear_awq_w4a16": _Operator(awq._linear_awq_w4a16_reference, _linear_awq, 0),
    "linears_awq_w4a16": _Operator(awq._linears_awq_w4a16_reference, _linears_awq, 0),
    "linear_nvfp4": _Operator(nvfp4._linear_nvfp4_reference, _linear_nvfp4, 0),
    "feed_forward_nvfp4": _Operator(nvfp4._feed_forward_nvfp4_reference, _feed_forward_nvfp4, 0),
    "norm_modulate": _BlockOperator(block._norm_modulate_reference, _norm_modulate),
    "gated_sum": _BlockOperator(block._gated_sum_reference, _gated_sum),
    "gated_norm_modulate": _BlockOperator(
        block._gated_norm_modulate_reference,
        lambda kernels, x, y, gate, *norm: kernels.modulate(x, (y, gate), norm),
    ),
    "norm_rope": _BlockOperator(block._norm_rope_reference, lambda kernels, *operands: kernels.norm_rope(*operands)),
    "gelu_concat": _BlockOperator(
        block._gelu_concat_reference, lambda kernels, *operands: kernels.gelu_concat(*operands)
    ),
}

_library: torch.library.Library | None = None


def operator(name: str) -> _Operator | _BlockOperator:
    """What is registered for CUDA under a name."""
    return _OPERATORS[name]


def register() -> None:
    """Register the CUDA implementations; calling it again does nothing."""
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("svdq", "IMPL", "CUDA")
    for name, operator in _OPERATORS.items():
        _library.impl(name, operator.__call__)


_releases = 0


def release_count() -> int:
    """How often :func:`release` was called: another number, and some layer may be computed from other memory."""
    return _releases


def release(tensors: Iterable[torch.Tensor]) -> None:
    """Free what a device made of a layer's tensors for its kernels; it is made again when needed."""
    global _releases
    _releases += 1
    for tensor in tensors:
        _kernels("hopper").forget(tensor)
        Kept.forget_all(tensor)


@lru_cache(maxsize=256)
def _runs(index: int, dtype: torch.dtype) -> bool:
    """Whether the compiled kernels take operands of this type on this device."""
    if dtype == torch.float32 or not status(torch.device("cuda", index))[0]:
        return False
    return dtype != torch.bfloat16 or torch.cuda.get_device_capability(index)[0] >= 8
