"""FLUX.1's blocks with one pass over memory for what lies between their linear layers (``ops.block``).

Where layers have 4 bits, the rest of a block takes as long as they do. These blocks compute what the host's do, by the
same modules, so that adapters, offloading, patches and other packs' hooks see what they know. Asked for anything that a
block of FLUX.1 at a plain step isn't (a patch inside of it, other modulations), they are the host's; and where another
pack has put a function of its own in the host's place, that is what they are.
"""

from functools import lru_cache

import comfy.ldm.flux.layers as layers
import comfy.model_management
import torch
from comfy.ldm.flux.math import attention

from ..ops import block as ops
from .modulations import Modulations
from .operations import QuantizedLinear

_INSIDE = ("attn1_patch", "attn1_output_patch")  # patches that newer hosts apply inside of a block


def fuse_blocks(diffusion_model: torch.nn.Module) -> None:
    """Make the blocks of a FLUX.1 model those below; others stay as they are."""
    classes = {"double_blocks": FusedDoubleStreamBlock, "single_blocks": FusedSingleStreamBlock}
    found = [
        (block, fused)
        for name, fused in classes.items()
        for block in getattr(diffusion_model, name, ())
        if fused.computes(block)
    ]
    modules = (module for block, _ in found for module in block.modules())
    modulations = Modulations([module for module in modules if isinstance(module, layers.Modulation)])
    for block, fused in found:
        block.__class__ = fused  # which has all that the host made
        block.modulations = modulations


def _is_gelu(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.GELU) and module.approximate == "tanh"


def _is_norm(module: torch.nn.Module) -> bool:
    return isinstance(module, torch.nn.LayerNorm) and module.weight is None and module.bias is None


def _is_plain(
    block: type, x: torch.Tensor, tokens: int, vec, pe, transformer_options: dict | None, others: dict
) -> bool:
    """Whether a block of this class of the host is asked for nothing else than what FLUX.1 is."""
    patches = (transformer_options or {}).get("patches", {})
    return (
        block.forward.__module__ == layers.__name__
        and isinstance(vec, torch.Tensor)
        and vec.ndim == 2
        and vec.shape[0] == x.shape[0]
        and isinstance(pe, torch.Tensor)
        and pe.dtype == torch.float32
        and pe.ndim == 6
        and pe.shape[0] in (1, x.shape[0])
        and pe.shape[1:3] == (1, tokens)
        and not any(patches.get(name) for name in _INSIDE)
        and all(value is None for value in others.values())
    )


def _norm_operands(norm: layers.QKNorm, like: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, float]:
    """Weights of q and k, and epsilon.

    The host's modules call a weight ``scale``, in newer hosts ``weight``; either may be in main memory.
    """
    found = (part.scale if hasattr(part, "scale") else part.weight for part in (norm.query_norm, norm.key_norm))
    norm_q, norm_k = (comfy.model_management.cast_to(weight, like.dtype, like.device) for weight in found)
    return norm_q, norm_k, _epsilon(norm, like.dtype)


def _epsilon(norm: layers.QKNorm, dtype: torch.dtype) -> float:
    """Of the host's norm, whose module has none in older hosts; and which means torch's own by None in newer ones."""
    epsilon = getattr(norm.query_norm, "eps", 1e-6)
    return torch_epsilon(dtype) if epsilon is None else epsilon


def torch_epsilon(dtype: torch.dtype) -> float:
    """What ``rms_norm`` adds to a mean square if it is not told: versions of torch differ."""
    return _seen_epsilon(dtype)


torch_epsilon._dynamo_marked_constant = True  # as kernels.prefers_int8


@lru_cache(maxsize=8)
def _seen_epsilon(dtype: torch.dtype) -> float:
    """Of what it makes of a small number."""
    small = 2.0**-12
    normed = torch.nn.functional.rms_norm(torch.full((8,), small, dtype=dtype), (8,))[0].item()
    return (small / normed) ** 2 - small**2


def _after_gelu(layer: torch.nn.Module, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    """``layer([x, GELU(y)])``."""
    return layer.of_gelu(x, y) if type(layer) is QuantizedLinear else layer(ops.gelu_concat(x, y))


def _feed_forward(mlp: torch.nn.Sequential, x: torch.Tensor) -> torch.Tensor:
    """The host's, of two layers with a GELU between."""
    if any(hooks for part in (mlp, mlp[1]) for hooks in (part._forward_hooks, part._forward_pre_hooks)):
        return mlp(x)
    y = mlp[0](x)
    return _after_gelu(mlp[2], y[..., :0], y)


def _attend(
    qkv: list[torch.Tensor], norms: list[tuple], heads: int, pe: torch.Tensor, mask, transformer_options
) -> torch.Tensor:
    """(B, L, C) of the outputs of the layers for q, k and v, whose tokens follow one another."""
    norm_q, norm_k, (epsilon, *_) = zip(*norms, strict=True)
    q, k, v = ops.norm_rope(qkv, list(norm_q), list(norm_k), pe, heads, epsilon)
    return attention(q, k, v, pe=None, mask=mask, transformer_options=transformer_options or {})


def _normed_heads(
    layer: torch.nn.Module, x: torch.Tensor, norm: tuple, heads: int, pe: torch.Tensor
) -> torch.Tensor | None:
    """``layer(x)``, in whose outputs q and k are normed and rotated as they are written; None where they cannot be."""
    if type(layer) is not QuantizedLinear:
        return None
    norm_q, norm_k, epsilon = norm
    return layer.normed_heads(x, norm_q, norm_k, pe, heads, epsilon)


class FusedDoubleStreamBlock(layers.DoubleStreamBlock):
    """The host's ``DoubleStreamBlock``, with fewer passes."""

    @staticmethod
    def computes(block: torch.nn.Module) -> bool:
        """Whether the host's block is FLUX.1's."""
        return (
            type(block) is layers.DoubleStreamBlock
            and block.modulation
            and not getattr(block, "flipped_img_txt", False)
            and all(len(mlp) == 3 and _is_gelu(mlp[1]) for mlp in (block.img_mlp, block.txt_mlp))
            and all(_is_norm(getattr(block, f"{stream}_norm{i}")) for stream in ("img", "txt") for i in (1, 2))
        )

    def forward(self, img, txt, vec, pe, attn_mask=None, transformer_options=None, **others):
        """As the host's: (img, txt), each (B, L, C)."""
        length = txt.shape[1]
        if not _is_plain(layers.DoubleStreamBlock, img, length + img.shape[1], vec, pe, transformer_options, others):
            options = transformer_options or {}
            return super().forward(img, txt, vec, pe, attn_mask, transformer_options=options, **others)
        img_mod1, img_mod2 = self.modulations(self.img_mod, vec)
        txt_mod1, txt_mod2 = self.modulations(self.txt_mod, vec)
        qkv = [
            part.qkv(ops.norm_modulate(x, mod.scale, mod.shift, norm.eps))
            for part, x, mod, norm in (
                (self.txt_attn, txt, txt_mod1, self.txt_norm1),
                (self.img_attn, img, img_mod1, self.img_norm1),
            )
        ]
        norms = [_norm_operands(part.norm, img) for part in (self.txt_attn, self.img_attn)]
        attn = _attend(qkv, norms, self.num_heads, pe, attn_mask, transformer_options)
        del qkv
        img = self._finish(img, attn[:, length:], self.img_attn, img_mod1, img_mod2, self.img_norm2, self.img_mlp)
        txt = self._finish(txt, attn[:, :length], self.txt_attn, txt_mod1, txt_mod2, self.txt_norm2, self.txt_mlp)
        return img, txt

    @staticmethod
    def _finish(x, attn, part, mod1, mod2, norm, mlp) -> torch.Tensor:
        """One stream from its attention on."""
        x, modulated = ops.gated_norm_modulate(x, part.proj(attn), mod1.gate, mod2.scale, mod2.shift, norm.eps)
        return ops.gated_sum(x, _feed_forward(mlp, modulated), mod2.gate)


class FusedSingleStreamBlock(layers.SingleStreamBlock):
    """The host's ``SingleStreamBlock``, with fewer passes."""

    @staticmethod
    def computes(block: torch.nn.Module) -> bool:
        """Whether the host's block is FLUX.1's."""
        return (
            type(block) is layers.SingleStreamBlock
            and block.modulation is not None
            and _is_gelu(block.mlp_act)
            and not getattr(block, "yak_mlp", False)
            and _is_norm(block.pre_norm)
        )

    def forward(self, x, vec, pe, attn_mask=None, transformer_options=None, **others):
        """As the host's: (B, L, C)."""
        if not _is_plain(layers.SingleStreamBlock, x, x.shape[1], vec, pe, transformer_options, others):
            return super().forward(x, vec, pe, attn_mask, transformer_options=transformer_options or {}, **others)
        mod, _ = self.modulations(self.modulation, vec)
        modulated = ops.norm_modulate(x, mod.scale, mod.shift, self.pre_norm.eps)
        widths = 3 * self.hidden_size, self.mlp_hidden_dim
        norm = _norm_operands(self.norm, x)
        y = _normed_heads(self.linear1, modulated, norm, self.num_heads, pe)
        if y is None:
            qkv, mlp = self.linear1(modulated).split(widths, dim=-1)
            attn = _attend([qkv], [norm], self.num_heads, pe, attn_mask, transformer_options)
        else:
            qkv, mlp = y.split(widths, dim=-1)
            q, k, v = qkv.unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)
            attn = attention(q, k, v, pe=None, mask=attn_mask, transformer_options=transformer_options or {})
        return ops.gated_sum(x, _after_gelu(self.linear2, attn, mlp), mod.gate)
