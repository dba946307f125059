"""Trains a small style LoRA for the demo model: everything in two colours, as a duotone print.

    python demo/train/lora.py emoji.npz demo/assets/svdquant_demo_lora_duotone.safetensors --seconds 40

Ends by the clock: on a GPU well under a minute is plenty, on a CPU take a few minutes and a batch of 24. The names in
the file are those of kohya's scripts, its type is bf16.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import autoencoder
import torch
from flux import PATCH, Flux, Shape, rope_table
from pictures import BACKGROUNDS, Pictures, prompt
from safetensors import safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import parametrize
from train import DEMO, UNCONDITIONAL, Log, hash_encoder, save_weights

ASSETS = DEMO / "assets"
DARK, LIGHT = (38, 20, 84), (255, 222, 140)
LUMINANCE = (0.299, 0.587, 0.114)  # Rec. 601
RANK = 8
POOL = 768  # pictures; a style is learnt from few
PEAK_RATE = 3e-3


class LowRank(nn.Module):
    """Adds a product of two thin matrices to a frozen weight; nothing at the start."""

    def __init__(self, layer: nn.Linear, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.randn(rank, layer.in_features) * layer.in_features**-0.5)
        self.up = nn.Parameter(torch.zeros(layer.out_features, rank))

    def forward(self, weight: Tensor) -> Tensor:
        return weight + self.up @ self.down


def duotone(images: Tensor) -> Tensor:
    """Pictures (B, 3, H, W) in [0, 1] -> their brightness between two colours."""
    weights, dark, light = (
        torch.tensor(values, device=images.device)[:, None, None] for values in (LUMINANCE, DARK, LIGHT)
    )
    return torch.lerp(dark / 255, light / 255, (images * weights).sum(dim=1, keepdim=True))


class Examples:
    """Latents of a pool of pictures in the style, and the encodings of their prompts."""

    def __init__(self, pictures: Pictures, encoder: nn.Module, count: int) -> None:
        device = pictures.device
        which = torch.randperm(len(pictures.names), device=device)[:count]
        background = torch.randint(len(BACKGROUNDS), (count,), device=device)
        images = duotone(pictures.compose(which, pictures.palette[background]))
        with torch.no_grad():
            self.latents = torch.cat([encoder(part) for part in images.split(32)])
        names = list(BACKGROUNDS)
        encoded = [
            hash_encoder.encode(prompt(pictures.names[w], names[b]))
            for w, b in zip(which.tolist(), background.tolist(), strict=True)
        ]
        self.contexts, self.pooled = (torch.stack(part).to(device) for part in zip(*encoded, strict=True))

    def batch(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, contexts and pooled vectors."""
        which = torch.randint(len(self.latents), (count,), device=self.latents.device)
        kept = (torch.rand(count, device=which.device) >= UNCONDITIONAL).float()
        return self.latents[which], self.contexts[which] * kept[:, None, None], self.pooled[which] * kept[:, None]


def add_lora(model: Flux, rank: int) -> dict[str, LowRank]:
    """Freeze the model; a low-rank product for every linear layer of the blocks but the modulations, by name."""
    model.requires_grad_(False)
    layers = {
        name: layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and "blocks" in name and "mod" not in name
    }
    products = {name: LowRank(layer, rank).to(layer.weight.device) for name, layer in layers.items()}
    for name, layer in layers.items():
        parametrize.register_parametrization(layer, "weight", products[name])
    return products


def train(model: Flux, parameters: list[Tensor], examples: Examples, batch_size: int, seconds: float) -> int:
    """Rectified flow, as the model's own training, until the time is over; returns the number of steps."""
    device = examples.latents.device
    rope = rope_table(hash_encoder.TOKENS, *(n // PATCH for n in examples.latents.shape[-2:]), device)
    optimizer = torch.optim.AdamW(parameters, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0)
    log = Log("lora", every=20)
    step, start, done = 0, time.monotonic(), 0.0
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * min(1, (step + 1) / 20) * (1 - done)
        clean, context, pooled = examples.batch(batch_size)
        noise = torch.randn_like(clean)
        t = torch.sigmoid(1.2 * torch.randn(batch_size, device=device))
        velocity = model(torch.lerp(clean, noise, t[:, None, None, None]), t, context, pooled, rope)
        loss = (velocity - (noise - clean)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        log(step, done, loss)
        step += 1
        done = (time.monotonic() - start) / seconds
    return step


def kohya(products: dict[str, LowRank]) -> dict[str, Tensor]:
    """The file's tensors."""
    tensors = {}
    for name, product in products.items():
        key = "lora_unet_" + name.replace(".", "_")
        tensors[f"{key}.lora_down.weight"] = product.down
        tensors[f"{key}.lora_up.weight"] = product.up
        tensors[f"{key}.alpha"] = torch.tensor(float(RANK))
    return tensors


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="what data.py wrote")
    parser.add_argument("output", type=Path, help="the LoRA, a .safetensors file")
    parser.add_argument("--seconds", type=float, default=40, help="time for the steps")
    parser.add_argument("--batch", type=int, default=256, help="examples per step")
    args = parser.parse_args()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    encoder = autoencoder.make_encoder().to(device)
    encoder.load_state_dict({k: v.float() for k, v in load_file(ASSETS / "taef1_encoder.safetensors").items()})
    examples = Examples(Pictures(args.data, device), encoder, POOL)
    file = ASSETS / "svdquant_demo_flux.safetensors"
    with safe_open(file, "pt") as opened:
        shape = Shape(**json.loads(opened.metadata()["shape"]))
    model = Flux(shape)
    model.load_state_dict({k: v.float() for k, v in load_file(file).items()})
    products = add_lora(model.to(device), RANK)
    parameters = [parameter for product in products.values() for parameter in product.parameters()]
    steps = train(model, parameters, examples, args.batch, args.seconds)
    facts = {
        "device": torch.cuda.get_device_name() if device.type == "cuda" else "CPU",
        "seconds": args.seconds,
        "steps": steps,
        "batch": args.batch,
        "pictures": POOL,
        "rank": RANK,
    }
    save_weights(kohya(products), torch.bfloat16, args.output, training=facts)
    print(json.dumps(facts))


if __name__ == "__main__":
    main()
