"""A LoRA on the demo model, 16-bit and INT4: the paper's figure 9, with numbers.

    python -m benchmarks.demo_lora

Draws the same prompts and seeds with the 16-bit and the INT4 model, each without and with the style LoRA of
``demo/train/lora.py``, and writes PSNR to ``benchmarks/results/demo_lora.json`` and the images beside it. Needs
ComfyUI (``make test`` fetches it) and runs on the CPU.
"""

import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from demo.compare import psnr
from demo.in_process import DemoHost
from demo.settings import ASSETS, CALIBRATION_PROMPTS, PROMPTS, SAMPLING
from svdq_core.quantizer.pipeline import Settings, plan, quantize_checkpoint

RESULTS = Path(__file__).parent / "results"
LORA = ASSETS / "svdquant_demo_lora_duotone.safetensors"
DRAWN = PROMPTS[::2]
COLUMNS = ("16-bit", "16-bit + LoRA", "INT4", "INT4 + LoRA")
SHOWN = 8  # prompts in the picture


def main() -> None:
    """Draw everything, write the JSON and the picture."""
    start = time.monotonic()
    host = DemoHost()
    from svdq_core.host.source import ModelSource  # imports ComfyUI, which the line above made importable

    full = host.load_demo()
    source, settings = ModelSource(full), Settings()
    calibration = host.calibrate(full, plan(source, settings).layers, CALIBRATION_PROMPTS)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "quantized.safetensors"
        quantize_checkpoint(source, path, settings, calibration)
        quantized = host.load(path)
        full_lora, _ = host.apply_lora(full, LORA, 1.0)
        quantized_lora, report = host.apply_lora(quantized, LORA, 1.0)
        models = dict(zip(COLUMNS, (full, full_lora, quantized, quantized_lora), strict=True))
        images = {title: draw(host, model, title) for title, model in models.items()}
    result = {
        "command": "python -m benchmarks.demo_lora",
        "model": "demo/assets/svdquant_demo_flux.safetensors, quantized to INT4 (balanced, rank 32)",
        "lora": f"demo/assets/{LORA.name}",
        "lora_report": report,
        "prompts": len(DRAWN),
        "sampling": SAMPLING,
        "torch": torch.__version__,
        "host": host.version,
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads, float32",
        "psnr_int4_to_16bit": compared(images["INT4"], images["16-bit"]),
        "psnr_int4_lora_to_16bit_lora": compared(images["INT4 + LoRA"], images["16-bit + LoRA"]),
        "psnr_16bit_lora_to_16bit": compared(images["16-bit + LoRA"], images["16-bit"]),
        "seconds": round(time.monotonic() - start),
    }
    (RESULTS / "demo_lora.json").write_text(json.dumps(result, indent=2) + "\n")
    sheet(images).quantize(128).save(RESULTS / "demo_lora.png", optimize=True)
    print(json.dumps(result, indent=2))


def draw(host, model, title: str) -> list[Image.Image]:
    """The image of every prompt, seed = its place in the list."""
    return [host.draw(model, prompt, seed) for seed, prompt in enumerate(tqdm(DRAWN, desc=title, mininterval=10))]


def compared(images: list[Image.Image], references: list[Image.Image]) -> dict[str, float]:
    """Mean PSNR over the prompts, its standard error, and the worst."""
    ratios = [psnr(*pair) for pair in zip(images, references, strict=True)]
    return {
        "db": round(statistics.mean(ratios), 3),
        "standard_error": round(statistics.stdev(ratios) / len(ratios) ** 0.5, 3),
        "min": round(min(ratios), 3),
    }


def sheet(images: dict[str, list[Image.Image]]) -> Image.Image:
    """A row for each model, a column for each of the first prompts."""
    size, label = images["16-bit"][0].width, 110
    canvas = Image.new("RGB", (label + SHOWN * (size + 4), len(images) * (size + 4)), "white")
    pen, font = ImageDraw.Draw(canvas), ImageFont.load_default(size=14)
    for row, (title, drawn) in enumerate(images.items()):
        y = row * (size + 4)
        pen.text((6, y + size // 2 - 8), title, "#222222", font)
        for column, image in enumerate(drawn[:SHOWN]):
            canvas.paste(image, (label + column * (size + 4), y))
    return canvas


if __name__ == "__main__":
    main()
