"""Image quality of every precision on the demo model, against 16 bits.

    python -m benchmarks.demo_precisions

Quantizes the demo model to each precision, with the modulation layers in W4A16, INT8 and 16 bits, draws the same
prompts and seeds with each, and writes PSNR, SSIM, LPIPS (where its weights are installed) and sizes to
``benchmarks/results/demo_precisions.json`` and a chart beside it. Needs ComfyUI (``make test`` fetches it) and runs
on the CPU.
"""

import json
import math
import platform
import tempfile
import time
from pathlib import Path

import matplotlib
import numpy
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.demo_quality import draw, measure
from demo.in_process import DemoHost
from demo.settings import CALIBRATION_PROMPTS, MODEL, PROMPTS, SAMPLING
from svdq_core.compare import compare
from svdq_core.quantizer.pipeline import MODULATIONS, PRECISIONS, Settings, plan, quantize_checkpoint

matplotlib.use("agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
COLOURS = {"16bit": "#2f5f8f", "int8": "#6ba3d6", "awq_w4a16": "#b9d9f0"}


def main() -> None:
    """Run everything, write the JSON and the chart."""
    start = time.monotonic()
    assert not set(PROMPTS) & set(CALIBRATION_PROMPTS)
    host = DemoHost()
    from svdq_core.host.source import ModelSource  # imports ComfyUI, which the line above made importable

    model = host.load_demo()
    references = draw(host, model, "16-bit")
    source = ModelSource(model)
    calibration = host.calibrate(model, plan(source, Settings()).layers, CALIBRATION_PROMPTS)
    rows, notes = {}, set()
    with tempfile.TemporaryDirectory() as folder:
        for precision in PRECISIONS:
            for modulations in MODULATIONS:
                path = Path(folder) / "quantized.safetensors"
                settings = Settings(precision=precision, modulations=modulations)
                report = quantize_checkpoint(source, path, settings, calibration, overwrite=True)
                title = f"{precision}, modulations {modulations}"
                images = draw(host, host.load(path), title)
                lpips, missing = perceptual(images, references)
                notes.update(missing)
                rows[title] = {
                    "precision": precision,
                    "modulations": modulations,
                    "file_mb": round(report.file_bytes / 1e6, 3),
                    "size_ratio": round(report.size_ratio, 3),
                    **measure(images, references),
                    "lpips": lpips,
                }
                tqdm.write(f"{title}: PSNR {rows[title]['psnr_db']:.2f} dB")
    result = {
        "command": "python -m benchmarks.demo_precisions",
        "model": "demo/assets/svdquant_demo_flux.safetensors",
        "reference": "the 16-bit model, same prompts and seeds, all on the CPU in float32",
        "recipe": f"{Settings().recipe}, rank {Settings().rank} where a format has a low-rank branch",
        "prompts": len(PROMPTS),
        "calibration_prompts": len(CALIBRATION_PROMPTS),
        "sampling": SAMPLING,
        "file_mb_16bit": round(MODEL.stat().st_size / 1e6, 3),
        "missing": sorted(notes),
        "torch": torch.__version__,
        "host": host.version,
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "seconds": round(time.monotonic() - start),
        "precisions": rows,
    }
    (RESULTS / "demo_precisions.json").write_text(json.dumps(result, indent=2) + "\n")
    chart(rows, len(PROMPTS), RESULTS / "demo_precisions.png")


def perceptual(images: list[Image.Image], references: list[Image.Image]) -> tuple[float | None, tuple[str, ...]]:
    """Mean LPIPS, or None and why it could not be had."""
    compared = compare(as_tensor(images), as_tensor(references), 1.0)
    return (None if math.isnan(compared.lpips) else round(compared.lpips, 4)), compared.notes


def as_tensor(images: list[Image.Image]) -> torch.Tensor:
    """(images, height, width, 3) in [0, 1]."""
    return torch.from_numpy(numpy.stack([numpy.asarray(image) for image in images]) / numpy.float32(255))


def chart(rows: dict, prompts: int, path: Path) -> None:
    """Bars of mean PSNR with the standard error over prompts, one of each kind of modulations for each precision."""
    figure, axes = plt.subplots(figsize=(7, 4.6))
    height = 0.8 / len(MODULATIONS)
    for place, modulations in enumerate(reversed(MODULATIONS)):
        chosen = [row for row in rows.values() if row["modulations"] == modulations]
        bars = axes.barh(
            [index + (place - (len(MODULATIONS) - 1) / 2) * height for index in range(len(chosen))],
            [row["psnr_db"] for row in chosen],
            height,
            xerr=[row["psnr_db_standard_error"] for row in chosen],
            color=COLOURS[modulations],
            label=f"modulations {modulations}",
        )
        axes.bar_label(bars, [f" {row['psnr_db']:.1f} dB, {row['file_mb']:.1f} MB" for row in chosen], padding=6)
    axes.set_yticks(range(len(PRECISIONS)), PRECISIONS)
    axes.set_xlabel(f"PSNR against 16 bits, dB (mean of {prompts} prompts, standard error)")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0, max(row["psnr_db"] for row in rows.values()) * 1.35)
    axes.legend(frameon=False, loc="lower right")
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
