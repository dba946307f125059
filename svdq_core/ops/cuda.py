"""CUDA implementations of the operators of :mod:`.int4` and :mod:`.fused`.

Registering them is cheap: nothing is compiled, and no driver is touched, until the first call on a device.
Where the kernels cannot run (``svdq_core.kernels.status`` says why), and for float32 operands, which only
the reference takes, a call falls through to the reference.
"""

from __future__ import annotations

from functools import lru_cache

import torch

from ..kernels import plan, status
from . import fused, int4

_library: torch.library.Library | None = None


def register() -> None:
    """Register the CUDA implementations; calling it again does nothing."""
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("svdq", "IMPL", "CUDA")
    _library.impl("quantize_act_int4", _quantize_act)
    _library.impl("linear_int4", _linear)
    _library.impl("gelu_quantize_act_int4", _gelu_quantize_act)
    _library.impl("modulate_quantize_act_int4", _modulate_quantize_act)
    _library.impl("linear_gelu_quantize_int4", _linear_gelu_quantize)
    _library.impl("linear_norm_rope_int4", _linear_norm_rope)


def _compiled(activations: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether the compiled kernels take this call."""
    return _runs(activations.device.index, dtype)


@lru_cache(maxsize=256)
def _runs(index: int, dtype: torch.dtype) -> bool:
    if dtype == torch.float32 or not status(torch.device("cuda", index))[0]:
        return False
    return dtype != torch.bfloat16 or torch.cuda.get_device_capability(index)[0] >= 8


def _quantize_act(x, smooth_factor, proj_down, act_unsigned):
    if not _compiled(x, x.dtype):
        return int4._quantize_act_reference(x, smooth_factor, proj_down, act_unsigned)
    from ..kernels.launch import quantize

    return quantize(x, smooth_factor, proj_down, act_unsigned)


def _linear(qact, act_scale, down, weight, weight_scale, proj_up, bias, act_unsigned):
    if not _compiled(qact, proj_up.dtype):
        return int4._linear_reference(qact, act_scale, down, weight, weight_scale, proj_up, bias, act_unsigned)
    from ..kernels.launch import gemm

    return gemm(qact, act_scale, down, weight, weight_scale, proj_up, bias, act_unsigned)


def _gelu_quantize_act(x, smooth_factor, proj_down, act_unsigned):
    if not _compiled(x, x.dtype):
        return fused._gelu_quantize_act_reference(x, smooth_factor, proj_down, act_unsigned)
    from ..kernels.launch import quantize

    return quantize(x, smooth_factor, proj_down, act_unsigned, plan.GELU)


def _modulate_quantize_act(x, scale, shift, smooth_factor, proj_down, act_unsigned):
    if not _compiled(x, x.dtype):
        return fused._modulate_quantize_act_reference(x, scale, shift, smooth_factor, proj_down, act_unsigned)
    from ..kernels.launch import quantize

    return quantize(x, smooth_factor, proj_down, act_unsigned, plan.MODULATE, (scale, shift))


def _linear_gelu_quantize(
    qact, act_scale, down, weight, weight_scale, proj_up, bias, act_unsigned, next_smooth_factor, next_proj_down
):
    if not _compiled(qact, proj_up.dtype):
        return fused._linear_gelu_quantize_reference(
            qact,
            act_scale,
            down,
            weight,
            weight_scale,
            proj_up,
            bias,
            act_unsigned,
            next_smooth_factor,
            next_proj_down,
        )
    from ..kernels.launch import gemm

    return gemm(
        qact,
        act_scale,
        down,
        weight,
        weight_scale,
        proj_up,
        bias,
        act_unsigned,
        next_layer=(next_smooth_factor, next_proj_down),
    )


def _linear_norm_rope(
    qact, act_scale, down, weight, weight_scale, proj_up, bias, act_unsigned, norm_q, norm_k, rope, epsilon
):
    if not _compiled(qact, proj_up.dtype):
        return fused._linear_norm_rope_reference(
            qact,
            act_scale,
            down,
            weight,
            weight_scale,
            proj_up,
            bias,
            act_unsigned,
            norm_q,
            norm_k,
            rope,
            epsilon,
        )
    from ..kernels.launch import gemm

    return gemm(
        qact,
        act_scale,
        down,
        weight,
        weight_scale,
        proj_up,
        bias,
        act_unsigned,
        norm=(norm_q, norm_k, rope, epsilon),
    )
