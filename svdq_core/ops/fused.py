"""The operators of :mod:`.int4` with their neighbours in a FLUX block fused to them.

=============================  ==========================================================================
``gelu_quantize_act_int4``     quantize_act([x, GELU(y)])
``modulate_quantize_act_int4`` quantize_act(x (1 + scale) + shift), as after a block's LayerNorm
``linear_gelu_quantize_int4``  quantize_act(GELU(linear(x))) for the next layer: fc1 never writes 16 bits
``linear_norm_rope_int4``      linear(x) = [q, k, v, ...]; q and k normalized per head and rotated
=============================  ==========================================================================
"""

from __future__ import annotations

import torch

from ..numerics import int4 as codec
from . import int4
from .dispatch import call

HEAD = 128

_LINEAR = (
    "Tensor qact, Tensor act_scale, Tensor down, Tensor weight, Tensor weight_scale, Tensor proj_up,"
    " Tensor? bias, bool act_unsigned"
)
_library = torch.library.Library("svdq", "FRAGMENT")
_library.define(
    "gelu_quantize_act_int4(Tensor x, Tensor y, Tensor smooth_factor, Tensor proj_down, bool act_unsigned,"
    " bool act_rotated=False) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    "modulate_quantize_act_int4(Tensor x, Tensor scale, Tensor shift, Tensor smooth_factor, Tensor proj_down,"
    " bool act_unsigned) -> (Tensor, Tensor, Tensor)"
)
_library.define(
    f"linear_gelu_quantize_int4({_LINEAR}, Tensor next_smooth_factor, Tensor next_proj_down)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.define(
    f"linear_norm_rope_int4({_LINEAR}, Tensor norm_q, Tensor norm_k, Tensor rope, int heads, float epsilon) -> Tensor"
)


def gelu_quantize_act_int4(
    x: torch.Tensor,
    y: torch.Tensor,
    smooth_factor: torch.Tensor,
    proj_down: torch.Tensor,
    act_unsigned: bool,
    act_rotated: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`.int4.quantize_act_int4` of ``[x, GELU(y)]``, tanh form, rounded to y's dtype in between.

    Args:
        x: (M, K - C), perhaps of no columns.
        y: (M, C), perhaps the last columns of something wider.
        smooth_factor, proj_down, act_unsigned, act_rotated: as there.
    """
    return call("gelu_quantize_act_int4", x, y, smooth_factor, proj_down, act_unsigned, act_rotated)


def modulate_quantize_act_int4(
    x: torch.Tensor,
    scale: torch.Tensor,
    shift: torch.Tensor,
    smooth_factor: torch.Tensor,
    proj_down: torch.Tensor,
    act_unsigned: bool,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`.int4.quantize_act_int4` of ``x (1 + scale) + shift``, rounded to x's dtype in between.

    Args:
        x: (M, K), a block's normalized input.
        scale, shift: (B, K), one row for each M / B rows of x.
    """
    return call("modulate_quantize_act_int4", x, scale, shift, smooth_factor, proj_down, act_unsigned)


def linear_gelu_quantize_int4(
    qact: torch.Tensor,
    act_scale: torch.Tensor,
    down: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    proj_up: torch.Tensor,
    bias: torch.Tensor | None,
    act_unsigned: bool,
    next_smooth_factor: torch.Tensor,
    next_proj_down: torch.Tensor,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """:func:`.int4.linear_int4`, then GELU, then unsigned quantization for the next layer.

    The compiled kernel adds up ``down`` with atomics: its last bits may differ from run to run.

    Args:
        next_smooth_factor: (N,) and
        next_proj_down: (N, r) of the layer that takes the result.

    Returns:
        that layer's qact (M, N / 2), act_scale (N / 64, M), down (M, r).
    """
    return call(
        "linear_gelu_quantize_int4",
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


def linear_norm_rope_int4(
    qact: torch.Tensor,
    act_scale: torch.Tensor,
    down: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    proj_up: torch.Tensor,
    bias: torch.Tensor | None,
    act_unsigned: bool,
    norm_q: torch.Tensor,
    norm_k: torch.Tensor,
    rope: torch.Tensor,
    heads: int,
    epsilon: float,
) -> torch.Tensor:
    """:func:`.int4.linear_int4` of q, k and v at once, with RMSNorm and rotation on q's and k's heads.

    Args:
        norm_q, norm_k: (128,) weights of the norms.
        rope: (R, 64, 2, 2) float32, a matrix for each pair of a head's columns; row m takes those of m % R.
        heads: of 128 columns each, of q, of k and of v; further columns are left as they are.
        epsilon: of the norms.

    Returns:
        (M, N), N at least 3 x heads x 128.
    """
    return call(
        "linear_norm_rope_int4",
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
        heads,
        epsilon,
    )


@torch.library.impl(_library, "gelu_quantize_act_int4", "CompositeExplicitAutograd")
def _gelu_quantize_act_reference(x, y, smooth_factor, proj_down, act_unsigned, act_rotated=False):
    activated = torch.nn.functional.gelu(y.float(), approximate="tanh").to(y.dtype)
    whole = torch.cat((x, activated), dim=1)
    return int4._quantize_act_reference(whole, smooth_factor, proj_down, act_unsigned, act_rotated)


@torch.library.impl(_library, "modulate_quantize_act_int4", "CompositeExplicitAutograd")
def _modulate_quantize_act_reference(x, scale, shift, smooth_factor, proj_down, act_unsigned):
    rows = x.shape[0] // max(scale.shape[0], 1)
    wide_scale = scale.float().repeat_interleave(rows, dim=0)
    wide_shift = shift.float().repeat_interleave(rows, dim=0)
    y = torch.addcmul(wide_shift, x.float(), 1 + wide_scale).to(x.dtype)
    return int4._quantize_act_reference(y, smooth_factor, proj_down, act_unsigned)


def _linear_float(qact, act_scale, down, weight, weight_scale, proj_up, bias, act_unsigned):
    """The linear layer's output before it is rounded to 16 bits."""
    wide_bias = None if bias is None else bias.float()
    return int4._linear_reference(qact, act_scale, down, weight, weight_scale, proj_up.float(), wide_bias, act_unsigned)


@torch.library.impl(_library, "linear_gelu_quantize_int4", "CompositeExplicitAutograd")
def _linear_gelu_quantize_reference(
    qact, act_scale, down, weight, weight_scale, proj_up, bias, act_unsigned, next_smooth_factor, next_proj_down
):
    y = _linear_float(qact, act_scale, down, weight, weight_scale, proj_up, bias, act_unsigned)
    y = torch.nn.functional.gelu(y, approximate="tanh").to(proj_up.dtype)
    return int4._quantize_act_reference(y, next_smooth_factor, next_proj_down, True)


@torch.library.impl(_library, "linear_norm_rope_int4", "CompositeExplicitAutograd")
def _linear_norm_rope_reference(
    qact, act_scale, down, weight, weight_scale, proj_up, bias, act_unsigned, norm_q, norm_k, rope, heads, epsilon
):
    y = _linear_float(qact, act_scale, down, weight, weight_scale, proj_up, bias, act_unsigned)
    matrices = rope.repeat(y.shape[0] // max(rope.shape[0], 1), 1, 1, 1).unsqueeze(1)  # (M, 1, 64, 2, 2)
    width = heads * HEAD
    for columns, weight_of_norm in ((y[:, :width], norm_q), (y[:, width : 2 * width], norm_k)):
        head = columns.unflatten(1, (heads, HEAD))
        normalized = head * torch.rsqrt(head.square().mean(-1, keepdim=True) + epsilon) * weight_of_norm.float()
        columns.copy_((matrices @ normalized.unflatten(-1, (-1, 2, 1))).flatten(1))
    return y.to(proj_up.dtype)


def _fake_quantized(x, k, proj_down):
    m = x.shape[0]
    return (
        x.new_empty((m, k // 2), dtype=torch.int8),
        x.new_empty((k // codec.GROUP_SIZE, m), dtype=torch.float32),
        x.new_empty((m, proj_down.shape[1]), dtype=torch.float32),
    )


@torch.library.register_fake("svdq::gelu_quantize_act_int4")
def _gelu_quantize_act_fake(x, y, smooth_factor, proj_down, act_unsigned, act_rotated=False):
    return _fake_quantized(y, x.shape[1] + y.shape[1], proj_down)


@torch.library.register_fake("svdq::modulate_quantize_act_int4")
def _modulate_quantize_act_fake(x, scale, shift, smooth_factor, proj_down, act_unsigned):
    return _fake_quantized(x, x.shape[1], proj_down)


@torch.library.register_fake("svdq::linear_gelu_quantize_int4")
def _linear_gelu_quantize_fake(
    qact, act_scale, down, weight, weight_scale, proj_up, bias, act_unsigned, next_smooth_factor, next_proj_down
):
    return _fake_quantized(qact, weight.shape[0], next_proj_down)


@torch.library.register_fake("svdq::linear_norm_rope_int4")
def _linear_norm_rope_fake(
    qact, act_scale, down, weight, weight_scale, proj_up, bias, act_unsigned, norm_q, norm_k, rope, heads, epsilon
):
    return proj_up.new_empty((qact.shape[0], weight.shape[0]))
