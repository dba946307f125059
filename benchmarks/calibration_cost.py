"""What watching a model for calibration costs: FLUX.1-dev at 1024 x 1024, drawn by ComfyUI with and without.

python -m benchmarks.calibration_cost

The weights are random, the code is all ComfyUI's: its loader, its sampler, its memory management. At the end another
process takes the card's memory but for 16 GiB, and the model, now larger than what is left, is watched again.
"""

import json
from pathlib import Path

import torch

from benchmarks.flux_in_comfy import LATENT, SEED, FluxHost, memory, seconds, smaller_card
from svdq_core import bench
from svdq_core.quantizer.statistics import Calibration

RESULTS = Path(__file__).parent / "results"
RUNS = {"4 prompts of 20 steps": (4, 20), "1 prompt of 8 steps": (1, 8)}
OFFLOADED_STEPS = 4


def watch(host: FluxHost, prompts: int, steps: int) -> Calibration:
    """As SVDQuant Calibrate does."""
    from svdq_core.host.calibration import calibrate
    from svdq_core.host.source import ModelSource
    from svdq_core.quantizer.pipeline import quantizable_layers

    positive, latent = host.prompts(prompts), {"samples": torch.zeros(LATENT)}
    layers = quantizable_layers(ModelSource(host.model))
    sampling = (steps, 1.0, "euler", "simple", SEED)
    return calibrate(host.model, layers, positive, positive, latent, *sampling, lambda done, total: None)


def compare(host: FluxHost, prompts: int, steps: int) -> dict[str, object]:
    """Drawn, watched, and drawn again."""
    plain = [seconds(host.draw, host.model, prompts, steps)]
    watched = seconds(watch, host, prompts, steps)
    plain.append(seconds(host.draw, host.model, prompts, steps))
    return {"plain_s": plain, "watched_s": watched, "slowdown": round(watched / (sum(plain) / 2) - 1, 4)}


def on_a_small_card(host: FluxHost) -> dict[str, object]:
    """The same where the model does not fit: what it costs, and that it finds the same."""
    expected = watch(host, 1, OFFLOADED_STEPS).digest()
    host.unload_all()
    with smaller_card() as free_gb:
        host.draw(host.model, 1, 1)  # loads what fits
        compared = compare(host, 1, OFFLOADED_STEPS)
        found = watch(host, 1, OFFLOADED_STEPS).digest()
    return {
        "free_gb": free_gb,
        **memory(host.model),
        "steps": OFFLOADED_STEPS,
        **compared,
        "same_statistics_as_on_the_whole_card": found == expected,
    }


@torch.inference_mode()
def main() -> None:
    """Measure on the current CUDA card and write the JSON."""
    host = FluxHost()
    host.draw(host.model, 1, 1)
    layers = len(watch(host, 1, 1).layers)  # what is loaded and compiled once
    result = {
        "command": "python -m benchmarks.calibration_cost",
        "environment": bench.environment() | {"comfyui": host.version},
        "layers": layers,
        **{name: compare(host, *run) for name, run in RUNS.items()},
        "more than the card holds": on_a_small_card(host),
    }
    print(json.dumps(result, indent=1))
    (RESULTS / "calibration_cost_h200.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
