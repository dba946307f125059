"""The autoencoder: the architecture of TAESD with 16 latent channels, and how it is trained.

Layers are numbered as in TAESD's files, so that a host's `taef1` loader takes the result. The host shows the diffusion
model the encoder's plain output; the training therefore gives that output zero mean and unit variance per channel.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

LATENT_CHANNELS = 16
WIDTH = 64


class SoftClamp(nn.Module):
    """Squeezes latents into (-3, 3)."""

    def forward(self, x: Tensor) -> Tensor:
        return 3 * torch.tanh(x / 3)


class Residual(nn.Module):
    """Three convolutions around a skip."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Sequential(conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH), nn.ReLU(), conv(WIDTH, WIDTH))

    def forward(self, x: Tensor) -> Tensor:
        return F.relu(self.conv(x) + x)


def conv(inputs: int, outputs: int, stride: int = 1, bias: bool = True) -> nn.Conv2d:
    return nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=bias)


def make_encoder() -> nn.Sequential:
    """RGB in [0, 1] (B, 3, H, W) -> latents (B, 16, H/8, W/8)."""
    layers: list[nn.Module] = [conv(3, WIDTH), Residual()]
    for _ in range(3):
        layers += [conv(WIDTH, WIDTH, stride=2, bias=False), Residual(), Residual(), Residual()]
    return nn.Sequential(*layers, conv(WIDTH, LATENT_CHANNELS))


def make_decoder() -> nn.Sequential:
    """Latents (B, 16, H/8, W/8) -> RGB near [0, 1] (B, 3, H, W)."""
    layers: list[nn.Module] = [SoftClamp(), conv(LATENT_CHANNELS, WIDTH), nn.ReLU()]
    for _ in range(3):
        layers += [Residual(), Residual(), Residual()]
        layers += [nn.Upsample(scale_factor=2), conv(WIDTH, WIDTH, bias=False)]
    return nn.Sequential(*layers, Residual(), conv(WIDTH, 3))


def reconstruction_loss(output: Tensor, target: Tensor) -> Tensor:
    """L1 of colours and of their gradients, at three scales."""
    loss = output.new_zeros(())
    for _ in range(3):
        loss = loss + F.l1_loss(output, target)
        loss = loss + F.l1_loss(output.diff(dim=-1), target.diff(dim=-1))
        loss = loss + F.l1_loss(output.diff(dim=-2), target.diff(dim=-2))
        output, target = F.avg_pool2d(output, 2), F.avg_pool2d(target, 2)
    return loss


def moment_penalty(latents: Tensor) -> Tensor:
    """How far the channels of a batch are from zero mean and unit variance."""
    variance, mean = torch.var_mean(latents, dim=(0, 2, 3))
    return mean.square().mean() + (variance - 1).square().mean()


@torch.no_grad()
def normalise(encoder: nn.Sequential, images: Tensor) -> None:
    """Folds into the last convolution what makes the latents of `images` exactly zero-mean, unit-variance."""
    deviation, mean = torch.std_mean(encoder(images), dim=(0, 2, 3))
    last = encoder[-1]
    last.weight /= deviation[:, None, None, None]
    last.bias.copy_((last.bias - mean) / deviation)


def train(
    encoder: nn.Sequential,
    decoder: nn.Sequential,
    batch: Callable[[int], Tensor],
    progress: Callable[[], float],
    log: Callable[[int, float, Tensor], None],
    batch_size: int,
    peak_rate: float = 8e-4,
) -> int:
    """Trains until `progress()` reaches 1; returns the number of steps.

    For the first 70 % encoder and decoder learn together; then the encoder is normalised and frozen, and the decoder
    learns to read its latents under more noise, as a denoiser will hand them over.
    """
    device = next(encoder.parameters()).device
    amp = torch.autocast(device.type, torch.bfloat16)
    parameters = [*encoder.parameters(), *decoder.parameters()]
    optimizer = torch.optim.AdamW(parameters, lr=peak_rate, betas=(0.9, 0.99), weight_decay=1e-3)
    step, joint = 0, True
    while (done := progress()) < 1:
        if joint and done > 0.7:
            joint = False
            normalise(encoder, batch(8 * batch_size))
            encoder.requires_grad_(False)
        for group in optimizer.param_groups:
            group["lr"] = peak_rate * min(1, (step + 1) / 200) * (1 - done)
        images = batch(batch_size)
        with amp:
            latents = encoder(images).float()
            strength = 0.1 if joint else 0.3 * torch.rand(batch_size, 1, 1, 1, device=device)
            output = decoder(latents + strength * torch.randn_like(latents))
        loss = reconstruction_loss(output.float(), images)
        total = loss + 0.02 * moment_penalty(latents) if joint else loss
        optimizer.zero_grad(set_to_none=True)
        total.backward()
        nn.utils.clip_grad_norm_([p for p in parameters if p.requires_grad], 1.0)
        optimizer.step()
        log(step, done, loss)
        step += 1
    return step
