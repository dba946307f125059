"""FLUX.1's denoiser, small, written for training.

Module names are those of the published checkpoints, so a state dict goes straight into a host. The schedule is that of
FLUX.1-schnell: no guidance embedding, and the time that enters is the noise level in [0, 1].
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HEAD_DIM = 128
ROPE_AXES = (16, 56, 56)
ROPE_THETA = 10000.0
TIME_DIM = 256
PATCH = 2


@dataclass(frozen=True)
class Shape:
    """What the sizes of the tensors follow from."""

    hidden: int = 256
    double_blocks: int = 1
    single_blocks: int = 6
    context: int = 512
    pooled: int = 768
    latent_channels: int = 16

    @property
    def patch_features(self) -> int:
        return self.latent_channels * PATCH * PATCH


def time_features(t: Tensor) -> Tensor:
    """Noise levels (B,) -> cosines and sines (B, TIME_DIM)."""
    half = TIME_DIM // 2
    rates = torch.exp(torch.arange(half, device=t.device) * (-math.log(10000.0) / half))
    angles = 1000.0 * t.float()[:, None] * rates
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def rope_table(tokens: int, height: int, width: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Cosines and sines (tokens + height * width, HEAD_DIM / 2); text tokens all stand at the origin."""
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    places = torch.stack([torch.zeros_like(rows), rows, columns], dim=-1).reshape(-1, 3)
    places = torch.cat([torch.zeros(tokens, 3), places]).double()
    angles = []
    for axis, dim in enumerate(ROPE_AXES):
        rates = ROPE_THETA ** -(torch.arange(0, dim, 2, dtype=torch.float64) / dim)
        angles.append(places[:, axis, None] * rates)
    angle = torch.cat(angles, dim=-1)
    return angle.cos().float().to(device), angle.sin().float().to(device)


def rotate(x: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """Turns neighbouring pairs of (B, heads, L, HEAD_DIM) by the table's angles."""
    cos, sin = rope
    even, odd = x.float().unflatten(-1, (-1, 2)).unbind(-1)
    turned = torch.stack([even * cos - odd * sin, even * sin + odd * cos], dim=-1)
    return turned.flatten(-2).to(x.dtype)


def attention(q: Tensor, k: Tensor, v: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
    """(B, heads, L, HEAD_DIM) three times -> (B, L, heads * HEAD_DIM)."""
    mixed = F.scaled_dot_product_attention(rotate(q, rope), rotate(k, rope), v)
    return mixed.transpose(1, 2).flatten(2)


def layer_norm(x: Tensor) -> Tensor:
    return F.layer_norm(x, x.shape[-1:], eps=1e-6)


class RMSNorm(nn.Module):
    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.rms_norm(x, x.shape[-1:], self.scale.to(x.dtype), eps=1e-6)


class QKNorm(nn.Module):
    """Splits a fused projection into heads, and normalises queries and keys."""

    def __init__(self) -> None:
        super().__init__()
        self.query_norm = RMSNorm(HEAD_DIM)
        self.key_norm = RMSNorm(HEAD_DIM)

    def forward(self, qkv: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = qkv.unflatten(-1, (3, -1, HEAD_DIM)).permute(2, 0, 3, 1, 4)
        return self.query_norm(q), self.key_norm(k), v


class Embedder(nn.Module):
    def __init__(self, inputs: int, hidden: int) -> None:
        super().__init__()
        self.in_layer = nn.Linear(inputs, hidden)
        self.out_layer = nn.Linear(hidden, hidden)

    def forward(self, x: Tensor) -> Tensor:
        return self.out_layer(F.silu(self.in_layer(x)))


class Modulation(nn.Module):
    """Shifts, scales and gates from the conditioning vector; zero at the start."""

    def __init__(self, hidden: int, parts: int) -> None:
        super().__init__()
        self.parts = parts
        self.lin = nn.Linear(hidden, parts * hidden)
        nn.init.zeros_(self.lin.weight)
        nn.init.zeros_(self.lin.bias)

    def forward(self, vec: Tensor) -> tuple[Tensor, ...]:
        return self.lin(F.silu(vec))[:, None].chunk(self.parts, dim=-1)


class SelfAttention(nn.Module):
    """The projections of one stream's attention."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.qkv = nn.Linear(hidden, 3 * hidden)
        self.norm = QKNorm()
        self.proj = nn.Linear(hidden, hidden)


def mlp(hidden: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(hidden, 4 * hidden), nn.GELU(approximate="tanh"), nn.Linear(4 * hidden, hidden))


class DoubleBlock(nn.Module):
    """Image and text with weights of their own, meeting in attention."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.img_mod = Modulation(hidden, 6)
        self.img_attn = SelfAttention(hidden)
        self.img_mlp = mlp(hidden)
        self.txt_mod = Modulation(hidden, 6)
        self.txt_attn = SelfAttention(hidden)
        self.txt_mlp = mlp(hidden)

    def forward(self, img: Tensor, txt: Tensor, vec: Tensor, rope: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        i_shift1, i_scale1, i_gate1, i_shift2, i_scale2, i_gate2 = self.img_mod(vec)
        t_shift1, t_scale1, t_gate1, t_shift2, t_scale2, t_gate2 = self.txt_mod(vec)
        img_heads = self.img_attn.norm(self.img_attn.qkv(layer_norm(img) * (1 + i_scale1) + i_shift1))
        txt_heads = self.txt_attn.norm(self.txt_attn.qkv(layer_norm(txt) * (1 + t_scale1) + t_shift1))
        mixed = attention(*(torch.cat(pair, dim=2) for pair in zip(txt_heads, img_heads, strict=True)), rope)
        txt_mixed, img_mixed = mixed.split([txt.shape[1], img.shape[1]], dim=1)
        img = img + i_gate1 * self.img_attn.proj(img_mixed)
        img = img + i_gate2 * self.img_mlp(layer_norm(img) * (1 + i_scale2) + i_shift2)
        txt = txt + t_gate1 * self.txt_attn.proj(txt_mixed)
        txt = txt + t_gate2 * self.txt_mlp(layer_norm(txt) * (1 + t_scale2) + t_shift2)
        return img, txt


class SingleBlock(nn.Module):
    """Text and image as one sequence; attention and MLP side by side."""

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.modulation = Modulation(hidden, 3)
        self.linear1 = nn.Linear(hidden, 7 * hidden)
        self.norm = QKNorm()
        self.linear2 = nn.Linear(5 * hidden, hidden)

    def forward(self, x: Tensor, vec: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        shift, scale, gate = self.modulation(vec)
        hidden = x.shape[-1]
        qkv, up = self.linear1(layer_norm(x) * (1 + scale) + shift).split([3 * hidden, 4 * hidden], dim=-1)
        mixed = attention(*self.norm(qkv), rope)
        return x + gate * self.linear2(torch.cat([mixed, F.gelu(up, approximate="tanh")], dim=-1))


class FinalLayer(nn.Module):
    def __init__(self, hidden: int, outputs: int) -> None:
        super().__init__()
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 2 * hidden))
        self.linear = nn.Linear(hidden, outputs)
        for layer in (self.adaLN_modulation[1], self.linear):
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    def forward(self, x: Tensor, vec: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(vec)[:, None].chunk(2, dim=-1)
        return self.linear(layer_norm(x) * (1 + scale) + shift)


class Flux(nn.Module):
    """Predicts the velocity `noise - image` of noisy latents."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        hidden = shape.hidden
        self.img_in = nn.Linear(shape.patch_features, hidden)
        self.time_in = Embedder(TIME_DIM, hidden)
        self.vector_in = Embedder(shape.pooled, hidden)
        self.txt_in = nn.Linear(shape.context, hidden)
        self.double_blocks = nn.ModuleList(DoubleBlock(hidden) for _ in range(shape.double_blocks))
        self.single_blocks = nn.ModuleList(SingleBlock(hidden) for _ in range(shape.single_blocks))
        self.final_layer = FinalLayer(hidden, shape.patch_features)

    def forward(self, x: Tensor, t: Tensor, context: Tensor, pooled: Tensor, rope: tuple[Tensor, Tensor]) -> Tensor:
        """x (B, 16, H, W), t (B,), context (B, L, 512), pooled (B, 768) -> velocity, as x.

        `rope` is `rope_table(L, H / 2, W / 2)`.
        """
        rows, columns = x.shape[2] // PATCH, x.shape[3] // PATCH
        patches = x.unflatten(3, (columns, PATCH)).unflatten(2, (rows, PATCH))  # B C h p w q
        img = self.img_in(patches.permute(0, 2, 4, 1, 3, 5).flatten(3).flatten(1, 2))
        txt = self.txt_in(context)
        vec = self.time_in(time_features(t).to(x.dtype)) + self.vector_in(pooled)
        for block in self.double_blocks:
            img, txt = block(img, txt, vec, rope)
        both = torch.cat([txt, img], dim=1)
        for block in self.single_blocks:
            both = block(both, vec, rope)
        out = self.final_layer(both[:, txt.shape[1] :], vec)
        out = out.unflatten(2, (-1, PATCH, PATCH)).unflatten(1, (rows, columns))  # B h w C p q
        return out.permute(0, 3, 1, 4, 2, 5).flatten(4).flatten(2, 3)
