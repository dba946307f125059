"""What a FLUX block computes between its linear layers, each in one pass over memory.

=========================  ===========================================================================
``norm_modulate``          norm(x) (1 + scale) + shift
``gated_sum``              x + gate y
``gated_norm_modulate``    both: the sum, and what the next layer takes of it
``norm_rope``              q, k and v of all heads from a fused layer's output, q and k normed and rotated
``gelu_concat``            [a, GELU(b)]
=========================  ===========================================================================

The norm of the first ones is LayerNorm's without weights. Sums are float32 everywhere, and only results are rounded;
the 16-bit model rounds in between, too. fp16 sums are saturated, and what is no number in them is zero, as ComfyUI's
blocks end.
"""

from __future__ import annotations

import torch

from .dispatch import call

_library = torch.library.Library("svdq", "FRAGMENT")
_library.define("norm_modulate(Tensor x, Tensor scale, Tensor shift, float epsilon) -> Tensor")
_library.define("gated_sum(Tensor x, Tensor y, Tensor gate) -> Tensor")
_library.define(
    "gated_norm_modulate(Tensor x, Tensor y, Tensor gate, Tensor scale, Tensor shift, float epsilon)"
    " -> (Tensor, Tensor)"
)
_library.define(
    "norm_rope(Tensor[] qkv, Tensor[] norm_q, Tensor[] norm_k, Tensor rope, int heads, float epsilon)"
    " -> (Tensor, Tensor, Tensor)"
)
_library.define("gelu_concat(Tensor a, Tensor b) -> Tensor")


def norm_modulate(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, epsilon: float) -> torch.Tensor:
    """``norm(x) (1 + scale) + shift``.

    Args:
        x: (B, L, C).
        scale, shift: (B, 1, C), of the same strides.
        epsilon: of the norm.

    Returns:
        (B, L, C) in ``x``'s dtype.
    """
    return call("norm_modulate", x, scale, shift, epsilon)


def gated_sum(x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor) -> torch.Tensor:
    """``x + gate y`` with x and y (B, L, C), gate (B, 1, C)."""
    return call("gated_sum", x, y, gate)


def gated_norm_modulate(
    x: torch.Tensor, y: torch.Tensor, gate: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor, epsilon: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """:func:`gated_sum`, and :func:`norm_modulate` of it."""
    return call("gated_norm_modulate", x, y, gate, scale, shift, epsilon)


def norm_rope(
    qkv: list[torch.Tensor],
    norm_q: list[torch.Tensor],
    norm_k: list[torch.Tensor],
    rope: torch.Tensor,
    heads: int,
    epsilon: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Attention's operands from the outputs of one layer or more, whose tokens follow one another.

    Args:
        qkv: each (B, L_i, 3 heads D), perhaps the first columns of something wider.
        norm_q, norm_k: of each, (D,) weights of the root-mean-square norms.
        rope: (B or 1, 1, L, D / 2, 2, 2) float32: a matrix for each pair of columns, L the sum of all L_i.
        heads: their number.
        epsilon: of the norms.

    Returns:
        q, k, v, each (B, heads, L, D), in memory (B, L, heads, D): attention gives its output in the order of q, and
        then has it as the next layer takes it.
    """
    return call("norm_rope", qkv, norm_q, norm_k, rope, heads, epsilon)


def gelu_concat(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """``[a, GELU(b)]`` along the last dimension, GELU in tanh form; a (B, L, A), b (B, L, B)."""
    return call("gelu_concat", a, b)


def _finite(h: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    if dtype != torch.float16:
        return h.to(dtype)
    largest = torch.finfo(dtype).max
    return torch.nan_to_num(h, nan=0.0, posinf=largest, neginf=-largest).clamp(-largest, largest).to(dtype)


@torch.library.impl(_library, "norm_modulate", "CompositeExplicitAutograd")
def _norm_modulate_reference(x, scale, shift, epsilon):
    normed = torch.nn.functional.layer_norm(x.float(), x.shape[-1:], eps=epsilon)
    return torch.addcmul(shift.float(), normed, 1 + scale.float()).to(x.dtype)


@torch.library.impl(_library, "gated_sum", "CompositeExplicitAutograd")
def _gated_sum_reference(x, y, gate):
    return _finite(torch.addcmul(x.float(), gate.float(), y.float()), x.dtype)


@torch.library.impl(_library, "gated_norm_modulate", "CompositeExplicitAutograd")
def _gated_norm_modulate_reference(x, y, gate, scale, shift, epsilon):
    h = _gated_sum_reference(x, y, gate)
    return h, _norm_modulate_reference(h, scale, shift, epsilon)


@torch.library.impl(_library, "norm_rope", "CompositeExplicitAutograd")
def _norm_rope_reference(qkv, norm_q, norm_k, rope, heads, epsilon):
    parts = []
    for x, weight_q, weight_k in zip(qkv, norm_q, norm_k, strict=True):
        q, k, v = x.unflatten(-1, (3, heads, -1)).unbind(2)  # each (B, L_i, heads, D)
        parts.append((_normed(q, weight_q, epsilon), _normed(k, weight_k, epsilon), v))
    q, k, v = (torch.cat(part, dim=1) for part in zip(*parts, strict=True))
    dtype = qkv[0].dtype
    return _rotated(q, rope).to(dtype).transpose(1, 2), _rotated(k, rope).to(dtype).transpose(1, 2), v.transpose(1, 2)


def _normed(x: torch.Tensor, weight: torch.Tensor, epsilon: float) -> torch.Tensor:
    x = x.float()
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + epsilon) * weight.float()


def _rotated(x: torch.Tensor, rope: torch.Tensor) -> torch.Tensor:
    """(B, L, heads, D)."""
    pairs, rope = x.unflatten(-1, (-1, 1, 2)), rope.transpose(1, 2)
    return torch.addcmul(rope[..., 0] * pairs[..., 0], rope[..., 1], pairs[..., 1]).flatten(-2)


@torch.library.impl(_library, "gelu_concat", "CompositeExplicitAutograd")
def _gelu_concat_reference(a, b):
    return torch.cat((a, torch.nn.functional.gelu(b, approximate="tanh")), dim=-1)


@torch.library.register_fake("svdq::norm_modulate")
def _norm_modulate_fake(x, scale, shift, epsilon):
    return torch.empty_like(x)


@torch.library.register_fake("svdq::gated_sum")
def _gated_sum_fake(x, y, gate):
    return torch.empty_like(x)


@torch.library.register_fake("svdq::gated_norm_modulate")
def _gated_norm_modulate_fake(x, y, gate, scale, shift, epsilon):
    return torch.empty_like(x), torch.empty_like(x)


@torch.library.register_fake("svdq::norm_rope")
def _norm_rope_fake(qkv, norm_q, norm_k, rope, heads, epsilon):
    batch, _, width = qkv[0].shape
    shape = batch, sum(x.shape[1] for x in qkv), heads, width // (3 * heads)
    return tuple(qkv[0].new_empty(shape).transpose(1, 2) for _ in range(3))


@torch.library.register_fake("svdq::gelu_concat")
def _gelu_concat_fake(a, b):
    return a.new_empty((*a.shape[:-1], a.shape[-1] + b.shape[-1]))
