"""Trains the demo model from scratch within a time budget: first the autoencoder, then the denoiser.

    python demo/train/train.py emoji.npz OUTPUT_FOLDER --seconds 500

Writes the three safetensors files of `demo/assets`, `training.json` (the loss curves), and two contact sheets:
reconstructions of the autoencoder and samples for `demo/prompts.txt`.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import sys
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

import autoencoder
import torch
from flux import PATCH, Flux, Shape, rope_table
from pictures import BACKGROUNDS, Pictures, prompt, without_a_word
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor, nn

DEMO = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(DEMO / "custom_nodes"))
from svdquant_demo import hash_encoder  # noqa: E402

AUTOENCODER_SHARE = 0.24  # of the time budget
VARIANTS = 8  # pictures per drawing and background
PLAIN, INCOMPLETE, UNCONDITIONAL = 0.4, 0.15, 0.1  # chances of a prompt
PEAK_RATE = 1.5e-3


class Log:
    """Mean losses over stretches of steps, without waiting for the device at each step."""

    def __init__(self, title: str, every: int) -> None:
        self.title, self.every = title, every
        self.start = time.monotonic()
        self.curve: list[dict[str, float]] = []
        self.losses: list[Tensor] = []

    def __call__(self, step: int, done: float, loss: Tensor) -> None:
        self.losses.append(loss.detach())
        if (step + 1) % self.every == 0:
            mean = torch.stack(self.losses).mean().item()
            self.losses.clear()
            seconds = round(time.monotonic() - self.start, 1)
            self.curve.append({"step": step + 1, "seconds": seconds, "loss": round(mean, 5)})
            print(f"{self.title} {done:4.0%} step {step + 1} {seconds} s loss {mean:.4f}", flush=True)


class Examples:
    """Latents of every drawing on every background, and the encodings of their prompts, all on the device."""

    def __init__(self, pictures: Pictures, encoder: nn.Module) -> None:
        device = pictures.device
        self.drawings, self.backgrounds = len(pictures.names), len(BACKGROUNDS)
        which = torch.arange(self.drawings, device=device)
        latents = []
        with torch.no_grad(), torch.autocast(device.type, torch.bfloat16):
            for colour in pictures.palette:
                for _ in range(VARIANTS):
                    images = pictures.compose(which, colour.expand(self.drawings, 3))
                    images = images.contiguous(memory_format=torch.channels_last)
                    encoded = [encoder(part).bfloat16().contiguous() for part in images.split(128)]
                    latents.append(torch.cat(encoded))
        self.latents = torch.stack(latents).unflatten(0, (self.backgrounds, VARIANTS))
        chance = random.Random(0)
        contexts, pooled = [], []
        for background in BACKGROUNDS:
            for shorten in (False, True):
                for name in pictures.names:
                    text = without_a_word(name, chance) if shorten else name
                    context, vector = hash_encoder.encode(prompt(text, background))
                    contexts.append(context.bfloat16())
                    pooled.append(vector.bfloat16())
        shape = (self.backgrounds, 2, self.drawings)
        self.contexts = torch.stack(contexts).to(device).unflatten(0, shape)
        self.pooled = torch.stack(pooled).to(device).unflatten(0, shape)

    def batch(self, count: int) -> tuple[Tensor, Tensor, Tensor]:
        """Latents, contexts and pooled vectors."""
        device = self.latents.device
        which = torch.randint(self.drawings, (count,), device=device)
        background = torch.randint(1, self.backgrounds, (count,), device=device)
        background *= torch.rand(count, device=device) >= PLAIN
        variant = torch.randint(VARIANTS, (count,), device=device)
        shorten = (torch.rand(count, device=device) < INCOMPLETE).long()
        kept = (torch.rand(count, device=device) >= UNCONDITIONAL).bfloat16()
        context = self.contexts[background, shorten, which] * kept[:, None, None]
        pooled = self.pooled[background, shorten, which] * kept[:, None]
        return self.latents[background, variant, which], context, pooled


def train_denoiser(
    model: Flux, examples: Examples, deadline: float, log: Log, batch_size: int
) -> tuple[dict[str, Tensor], int]:
    """Rectified flow until the deadline; returns the averaged weights and the number of steps."""
    device = examples.latents.device
    rope = rope_table(hash_encoder.TOKENS, *(n // PATCH for n in examples.latents.shape[-2:]), device)
    parameters = list(model.parameters())
    average = [p.detach().clone() for p in parameters]
    optimizer = torch.optim.AdamW(
        parameters, lr=PEAK_RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=device.type == "cuda"
    )
    for block in [*model.double_blocks, *model.single_blocks]:
        block.compile()
    step, start, done = 0, time.monotonic(), 0.0
    while done < 1:
        for group in optimizer.param_groups:
            group["lr"] = PEAK_RATE * min(1, (step + 1) / 300) * max(1 - done, 0.002)
        clean, context, pooled = examples.batch(batch_size)
        clean = clean.float()
        noise = torch.randn_like(clean)
        t = torch.sigmoid(1.2 * torch.randn(batch_size, device=device))
        mixed = torch.lerp(clean, noise, t[:, None, None, None])
        with torch.autocast(device.type, torch.bfloat16):
            velocity = model(mixed.bfloat16(), t, context, pooled, rope)
        loss = (velocity.float() - (noise - clean)).square().mean()
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        decay = min(0.999, (step + 1) / (step + 10))
        torch._foreach_lerp_(average, [p.detach() for p in parameters], 1 - decay)
        log(step, done, loss)
        step += 1
        if step == 1:  # the first step compiled; the schedule starts here
            print(f"first denoiser step took {time.monotonic() - start:.1f} s", flush=True)
            start = time.monotonic()
        done = (time.monotonic() - start) / max(deadline - start, 1)
    names = [name for name, _ in model.named_parameters()]
    return dict(zip(names, average, strict=True)), step


@torch.no_grad()
def sample(
    model: Flux, prompts: list[str], size: int, device: torch.device, steps: int = 20, cfg: float = 2.5
) -> Tensor:
    """Latents for the prompts by Euler's method with classifier-free guidance."""
    encoded = [hash_encoder.encode(text) for text in prompts]
    context, pooled = (torch.stack(part).to(device) for part in zip(*encoded, strict=True))
    context = torch.cat([context, torch.zeros_like(context)])
    pooled = torch.cat([pooled, torch.zeros_like(pooled)])
    rope = rope_table(hash_encoder.TOKENS, size // PATCH, size // PATCH, device)
    shape = (len(prompts), autoencoder.LATENT_CHANNELS, size, size)
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(device)
    levels = torch.linspace(1, 0, steps + 1).tolist()
    for level, following in itertools.pairwise(levels):
        t = torch.full((2 * len(prompts),), level, device=device)
        with torch.autocast(device.type, torch.bfloat16):
            velocity = model(torch.cat([x, x]).bfloat16(), t, context, pooled, rope).float()
        positive, negative = velocity.chunk(2)
        x = x + (following - level) * (negative + cfg * (positive - negative))
    return x


def save_sheet(images: Tensor, columns: int, file: Path) -> None:
    """Pictures (N, 3, H, W) in [0, 1] as one PNG, row by row."""
    rows = [torch.cat(list(row), dim=2) for row in images.split(columns)]
    pixels = torch.cat(rows, dim=1).clamp(0, 1).mul(255).round().byte().permute(1, 2, 0)
    Image.fromarray(pixels.cpu().numpy()).save(file, optimize=True)


def save_weights(weights: dict[str, Tensor], dtype: torch.dtype, file: Path, **facts: object) -> None:
    metadata = {key: value if isinstance(value, str) else json.dumps(value) for key, value in facts.items()}
    save_file({k: v.detach().to(dtype).contiguous() for k, v in weights.items()}, file, metadata)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="what data.py wrote")
    parser.add_argument("output", type=Path, help="folder for the results")
    parser.add_argument("--seconds", type=float, default=500, help="time for all of the training")
    parser.add_argument("--batch", type=int, default=1024, help="examples per step of the denoiser")
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    begin = time.monotonic()
    torch.manual_seed(0)
    torch.set_float32_matmul_precision("high")
    torch.backends.cudnn.benchmark = True
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    chip = torch.cuda.get_device_name() if device.type == "cuda" else "CPU"
    pictures = Pictures(args.data, device)

    encoder, decoder = (
        make().to(device, memory_format=torch.channels_last)
        for make in (autoencoder.make_encoder, autoencoder.make_decoder)
    )
    share = AUTOENCODER_SHARE * args.seconds
    progress: Callable[[], float] = lambda: (time.monotonic() - begin) / share  # noqa: E731
    ae_log = Log("autoencoder", every=100)
    ae_steps = autoencoder.train(
        encoder, decoder, pictures.random, progress, ae_log, batch_size=max(4, args.batch // 16)
    )
    for name, part in (("encoder", encoder), ("decoder", decoder)):
        save_weights(part.state_dict(), torch.float16, args.output / f"taef1_{name}.safetensors", steps=ae_steps)
    with torch.no_grad():
        originals = pictures.random(24)
        copies = decoder(encoder(originals))
        error = (copies.clamp(0, 1) - originals).square().mean(dim=(1, 2, 3))
        psnr = -10 * error.log10().mean().item()
    print(f"autoencoder: {ae_steps} steps, PSNR {psnr:.1f} dB", flush=True)
    save_sheet(torch.cat([originals[:12], copies[:12]]), 12, args.output / "reconstructions.png")

    examples = Examples(pictures, encoder)
    print(f"examples ready after {time.monotonic() - begin:.1f} s", flush=True)
    shape = Shape()
    model = Flux(shape).to(device)
    log = Log("denoiser", every=200)
    weights, steps = train_denoiser(model, examples, begin + args.seconds, log, args.batch)
    facts = {
        "model": "SVDQuant demo: FLUX.1's architecture, 128-pixel emoji, trained from scratch",
        "shape": asdict(shape),
        "training": {
            "device": chip,
            "seconds": round(time.monotonic() - begin),
            "drawings": len(pictures.names),
            "autoencoder_steps": ae_steps,
            "autoencoder_psnr_db": round(psnr, 2),
            "denoiser_steps": steps,
            "denoiser_batch": args.batch,
            "denoiser_loss": log.curve[-1]["loss"] if log.curve else None,
        },
    }
    save_weights(weights, torch.bfloat16, args.output / "svdquant_demo_flux.safetensors", **facts)
    curves = {"autoencoder": ae_log.curve, "denoiser": log.curve}
    (args.output / "training.json").write_text(json.dumps(facts | {"curves": curves}) + "\n")
    model.load_state_dict(weights)
    prompts = (DEMO / "prompts.txt").read_text().split("\n")[:-1]
    latents = sample(model, prompts, examples.latents.shape[-1], device)
    with torch.no_grad():
        save_sheet(decoder(latents), 8, args.output / "samples.png")
    print(json.dumps(facts["training"]), flush=True)


if __name__ == "__main__":
    main()
