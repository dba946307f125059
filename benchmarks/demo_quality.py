"""Image quality of the quantization methods on the demo model: the paper's ablation (figures 8, 10 and 11).

    python -m benchmarks.demo_quality

Draws the same prompts and seeds with the 16-bit model and with each quantized one, and writes PSNR and SSIM to
``benchmarks/results/demo_quality.json`` with a bar chart beside it; then quality and size against the rank of the
low-rank branch to ``rank_sweep.json`` and ``.png``. Needs ComfyUI (``make test`` fetches it) and runs on the CPU.
"""

import json
import math
import platform
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import matplotlib
import torch
from PIL import Image
from tqdm import tqdm

from benchmarks.methods import METHODS, PAPER, Method
from demo.compare import psnr, ssim
from demo.in_process import DemoHost
from demo.settings import CALIBRATION_PROMPTS, PROMPTS, SAMPLING
from svdq_core.quantizer.pipeline import Settings, plan, quantize_checkpoint

matplotlib.use("agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
MORE_PROMPTS = (
    "cookie",
    "tulip",
    "cat face",
    "turtle on a blue background",
    "bicycle",
    "bell on a yellow background",
    "key on a green background",
    "crescent moon on a black background",
)
RANKS = (0, 8, 16, 32, 64, 128)
SWEPT = (PAPER, "ours, balanced")
SWEEP_PROMPTS = 16


class Trial:
    """The demo model, its 16-bit images (of the first ``prompts``) and its calibration: what methods are tried on."""

    def __init__(self, prompts: int | None = None) -> None:
        self.host = DemoHost()
        from svdq_core.host.source import ModelSource  # imports ComfyUI, which the line above made importable

        model = self.host.load_demo()
        self.prompts = (*PROMPTS, *MORE_PROMPTS)[:prompts]
        self.references = draw(self.host, model, "16-bit", self.prompts)
        self.source = ModelSource(model)
        planned = plan(self.source, Settings())
        self.calibration = self.host.calibrate(model, planned.layers, CALIBRATION_PROMPTS)

    def measure(self, title: str, method: Method, prompts: int | None = None, seed: int = 0) -> dict[str, float]:
        """Size, seconds and quality of a method at a seed, over the first ``prompts`` or all of them."""
        settings = Settings(method.precision, rank=method.rank, max_error=math.inf, seed=seed)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "quantized.safetensors"
            report = quantize_checkpoint(self.source, path, settings, self.calibration, recipe=method.recipe)
            images = draw(self.host, self.host.load(path), title, self.prompts[:prompts])
        row = {
            "rank": method.rank,
            "size_ratio": round(report.size_ratio, 3),
            "quantize_seconds": round(report.seconds, 2),
            **measure(images, self.references[:prompts]),
        }
        tqdm.write(f"{title:24} rank {method.rank:3} PSNR {row['psnr_db']:.2f} dB")
        return row


def main() -> None:
    """Run everything, write the JSON files and the charts."""
    start = time.monotonic()
    RESULTS.mkdir(exist_ok=True)
    trial = Trial()
    about = {
        "command": "python -m benchmarks.demo_quality",
        "model": "demo/assets/svdquant_demo_flux.safetensors",
        "reference": "the 16-bit model, same prompts and seeds, all on the CPU in float32",
        "prompts": len(trial.prompts),
        "calibration_prompts": len(CALIBRATION_PROMPTS),
        "sampling": SAMPLING,
        "torch": torch.__version__,
        "host": trial.host.version,
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
    }
    rows = {name: trial.measure(name, method) for name, method in METHODS.items()}
    write("demo_quality.json", about | {"seconds": round(time.monotonic() - start), "methods": rows})
    chart(rows, len(trial.prompts), RESULTS / "demo_quality.png")

    start = time.monotonic()
    sweep = {
        name: [trial.measure(name, Method(METHODS[name].recipe, rank), SWEEP_PROMPTS) for rank in RANKS]
        for name in SWEPT
    }
    about |= {"prompts": SWEEP_PROMPTS, "seconds": round(time.monotonic() - start)}
    write("rank_sweep.json", about | {"methods": sweep})
    rank_chart(sweep, RESULTS / "rank_sweep.png")


def write(name: str, result: dict) -> None:
    """A result as JSON."""
    (RESULTS / name).write_text(json.dumps(result, indent=2) + "\n")


def draw(host, model, title: str, prompts: Sequence[str] = PROMPTS) -> list[Image.Image]:
    """The image of every prompt, seed = its place in the list."""
    return [
        host.draw(model, prompt, seed)
        for seed, prompt in enumerate(tqdm(prompts, desc=title, leave=False, mininterval=5))
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
    figure, axes = plt.subplots(figsize=(7, 3.8))
    names = list(rows)
    values = [rows[name]["psnr_db"] for name in names]
    errors = [rows[name]["psnr_db_standard_error"] for name in names]
    colours = ["#f58518" if name.startswith("ours") else "#4c78a8" for name in names]
    bars = axes.barh(names, values, xerr=errors, color=colours)
    axes.bar_label(bars, [f" {value:.1f}" for value in values], padding=6)
    axes.set_xlabel(f"PSNR against 16 bits, dB (mean of {prompts} prompts, standard error)")
    axes.invert_yaxis()
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlim(0, max(values) * 1.12)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def rank_chart(sweep: dict[str, list[dict]], path: Path) -> None:
    """Quality against rank and against size; beside them what rank costs in time, as ``benchmarks.hopper`` found."""
    figure, panels = plt.subplots(1, 3, figsize=(11, 3.2))
    panels[1].sharey(panels[0])
    for (name, rows), colour in zip(sweep.items(), ("#4c78a8", "#f58518"), strict=True):
        for axes, key in zip(panels[:2], ("rank", "size_ratio"), strict=True):
            axes.errorbar(
                [row[key] for row in rows],
                [row["psnr_db"] for row in rows],
                [row["psnr_db_standard_error"] for row in rows],
                marker="o",
                capsize=3,
                color=colour,
                label=name,
            )
    layers = json.loads((RESULTS / "hopper_h200.json").read_text())["results"]
    layers = [row for row in layers if row["m"] == 4608]  # FLUX's
    ranks = sorted(int(key[4:-3]) for key in layers[0] if key.startswith("rank") and key.endswith("_us"))
    for label, prefix, colour in (("exact W4A4", "exact_", "#4c78a8"), ("in 8 bits", "", "#f58518")):
        times = [sum(row[f"{prefix}rank{rank}_us"] for row in layers) / 1000 for rank in ranks]
        panels[2].plot(ranks, times, marker="o", color=colour, label=label)
    panels[2].set_ylim(bottom=0)
    panels[2].legend(frameon=False, loc="lower right")
    panels[2].set_xlabel("rank of the low-rank branch")
    panels[2].set_ylabel(f"ms, {len(layers)} FLUX layers on an H200")
    for axes in panels:
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_xlabel("rank of the low-rank branch")
    panels[1].set_xlabel("times smaller than 16 bits (quantized layers)")
    panels[0].set_ylabel("PSNR, dB")
    panels[0].legend(frameon=False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
