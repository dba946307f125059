"""Image quality of the quantization methods on the demo model: the paper's ablation (figure 8).

    python -m benchmarks.demo_quality

Draws the same prompts and seeds with the 16-bit model and with each quantized one, and writes PSNR and
SSIM to ``benchmarks/results/demo_quality.json`` and a bar chart beside it. Needs ComfyUI (``make test``
fetches it) and runs on the CPU.
"""

import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import matplotlib
import torch
from PIL import Image
from tqdm import tqdm

from demo.compare import psnr, ssim
from demo.in_process import DemoHost
from demo.settings import CALIBRATION_PROMPTS, PROMPTS, SAMPLING
from svdq_core.quantizer.pipeline import Settings, plan, quantize_checkpoint
from svdq_core.quantizer.recipes import RECIPES, Recipe

matplotlib.use("agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
RANK = 32


# What each bar of the chart is: recipe and rank.
METHODS = {
    "naive rounding": (Recipe(smooth=False), 0),
    "smoothing only": (Recipe(), 0),
    "SVD only": (Recipe(smooth=False), RANK),
    "SVDQuant (balanced)": (RECIPES["balanced"], RANK),
    "best": (RECIPES["best"], RANK),
}


def main() -> None:
    """Run everything, write the JSON and the chart."""
    start = time.monotonic()
    host = DemoHost()
    from svdq_core.host.source import ModelSource  # imports ComfyUI, which the line above made importable

    model = host.load_demo()
    references = draw(host, model, "16-bit")
    source = ModelSource(model)
    calibration = host.calibrate(model, plan(source, Settings()).layers, CALIBRATION_PROMPTS)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for name, (recipe, rank) in METHODS.items():
            path = Path(folder) / "quantized.safetensors"
            report = quantize_checkpoint(source, path, Settings(rank=rank), calibration, overwrite=True, recipe=recipe)
            images = draw(host, host.load(path), name)
            rows[name] = {
                "rank": rank,
                "size_ratio": round(report.size_ratio, 3),
                "quantize_seconds": round(report.seconds, 2),
                **measure(images, references),
            }
            tqdm.write(f"{name:22} PSNR {rows[name]['psnr_db']:.2f} dB")
    result = {
        "command": "python -m benchmarks.demo_quality",
        "model": "demo/assets/svdquant_demo_flux.safetensors",
        "reference": "the 16-bit model, same prompts and seeds, all on the CPU in float32",
        "prompts": len(PROMPTS),
        "calibration_prompts": len(CALIBRATION_PROMPTS),
        "sampling": SAMPLING,
        "torch": torch.__version__,
        "host": host.version,
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "seconds": round(time.monotonic() - start),
        "methods": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    (RESULTS / "demo_quality.json").write_text(json.dumps(result, indent=2) + "\n")
    chart(rows, len(PROMPTS), RESULTS / "demo_quality.png")


def draw(host, model, title: str) -> list[Image.Image]:
    """The image of every prompt, seed = its place in the list."""
    return [
        host.draw(model, prompt, seed)
        for seed, prompt in enumerate(tqdm(PROMPTS, desc=title, leave=False, mininterval=5))
    ]


def measure(images: list[Image.Image], references: list[Image.Image]) -> dict[str, float]:
    """Means over the prompts, and the spread of PSNR between them."""
    pairs = list(zip(images, references, strict=True))
    ratios = [psnr(*pair) for pair in pairs]
    return {
        "psnr_db": round(statistics.mean(ratios), 3),
        "psnr_db_standard_error": round(statistics.stdev(ratios) / len(ratios) ** 0.5, 3),
        "psnr_db_min": round(min(ratios), 3),
        "ssim": round(statistics.mean(ssim(*pair) for pair in pairs), 4),
    }


def chart(rows: dict, prompts: int, path: Path) -> None:
    """Bars of mean PSNR with the standard error over prompts."""
    figure, axes = plt.subplots(figsize=(7, 3))
    names = list(rows)
    values = [rows[name]["psnr_db"] for name in names]
    errors = [rows[name]["psnr_db_standard_error"] for name in names]
    bars = axes.barh(names, values, xerr=errors, color="#4c78a8")
    axes.bar_label(bars, [f" {value:.1f}" for value in values], padding=6)
    axes.set_xlabel(f"PSNR against 16 bits, dB (mean of {prompts} prompts, standard error)")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0, max(values) * 1.12)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
