"""What watching the demo model for calibration costs.

    python -m benchmarks.demo_calibration

Draws images by turns without and with every layer to quantize watched, all into one calibration, and writes the
seconds of an image to ``benchmarks/results/demo_calibration.json``. Needs ComfyUI (``make test`` fetches it) and runs
on the CPU.
"""

import json
import platform
import statistics
import time
from pathlib import Path

import torch
from tqdm import tqdm

from demo.in_process import DemoHost
from demo.settings import CALIBRATION_PROMPTS, SAMPLING
from svdq_core.quantizer.pipeline import Settings, plan
from svdq_core.quantizer.statistics import Calibration

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    """Draw everything and write the JSON."""
    host = DemoHost()
    from svdq_core.host.calibration import observed  # imports ComfyUI, which the line above made importable
    from svdq_core.host.source import ModelSource

    model = host.load_demo()
    layers = list(plan(ModelSource(model), Settings()).layers)
    calibration = Calibration()
    seconds: dict[str, list[float]] = {"plain": [], "watched": []}
    for seed, prompt in enumerate(tqdm(CALIBRATION_PROMPTS, mininterval=5)):
        seconds["plain"].append(drawing(host, model, prompt, seed))
        with observed(model.model.diffusion_model, layers, calibration):
            seconds["watched"].append(drawing(host, model, prompt, seed))
    slowdowns = [watched / plain - 1 for plain, watched in zip(*seconds.values(), strict=True)]
    result = {
        "command": "python -m benchmarks.demo_calibration",
        "model": "demo/assets/svdquant_demo_flux.safetensors, 16-bit",
        "layers": len(layers),
        "images": len(slowdowns),
        "sampling": SAMPLING,
        "torch": torch.__version__,
        "host": host.version,
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads, float32",
        "image_seconds": {name: round(statistics.median(found), 3) for name, found in seconds.items()},
        "slowdown": round(statistics.median(slowdowns), 3),
    }
    (RESULTS / "demo_calibration.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def drawing(host: DemoHost, model, prompt: str, seed: int) -> float:
    """Seconds of one image."""
    start = time.perf_counter()
    host.draw(model, prompt, seed)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
