"""What watching a model for calibration costs: one step through FLUX.1-dev's linear layers at 1024 x 1024.

python -m benchmarks.calibration_cost

A run of 28 steps; in the first ones the samples of rows fill and change most, later ones cost less. Attention, norms
and the sampler are left out, which makes the slowdown larger than a real step's.
"""

import json
import statistics
import time
from pathlib import Path

import torch

from benchmarks.flux_sizes import DOUBLE_BLOCKS, FLUX, HIDDEN, SINGLE_BLOCKS, layer_shapes
from svdq_core import bench
from svdq_core.architectures import BODY
from svdq_core.quantizer.statistics import Calibration

RESULTS = Path(__file__).parent / "results"
IMAGE_TOKENS, TEXT_TOKENS, STEPS, EARLY = 4096, 512, 28, 9


def tokens(name: str) -> int:
    """Rows of a layer's input."""
    if name.startswith("single_blocks"):
        return IMAGE_TOKENS + TEXT_TOKENS
    return TEXT_TOKENS if ".txt_" in name else IMAGE_TOKENS


def step(layers: dict[str, tuple[int, int]], weights: dict, inputs: dict, calibration: Calibration | None) -> float:
    """Seconds of one pass through all layers."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    for name, shape in layers.items():
        x = inputs[shape[1]][: tokens(name)]
        if calibration is not None:
            calibration.observe(name, x)
        torch.nn.functional.linear(x, weights[shape])
    if calibration is not None:
        calibration.settle()
    torch.cuda.synchronize()
    return time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    """Measure on the current CUDA card and write the JSON."""
    shapes = layer_shapes(HIDDEN, DOUBLE_BLOCKS, SINGLE_BLOCKS)
    layers = {name: shape for name, shape in shapes.items() if FLUX.kind(name) == BODY}
    like = {"dtype": torch.bfloat16, "device": "cuda"}
    weights = {shape: torch.randn(shape, **like) * 0.02 for shape in set(layers.values())}
    inputs = {k: torch.randn(IMAGE_TOKENS + TEXT_TOKENS, k, **like) for _, k in weights}
    calibration = Calibration()
    seconds: dict[str, list[float]] = {"plain": [], "watched": []}
    for _ in range(STEPS):
        seconds["plain"].append(step(layers, weights, inputs, None))
        seconds["watched"].append(step(layers, weights, inputs, calibration))
    # The first steps fill the samples, and take the memory that later ones use again.
    median = {name: statistics.median(found[2:EARLY]) for name, found in seconds.items()}
    result = {
        "command": "python -m benchmarks.calibration_cost",
        "environment": bench.environment(),
        "layers": len(layers),
        "step_ms": {name: round(1e3 * value, 1) for name, value in median.items()},
        "first_step_ms": {name: round(1e3 * found[0], 1) for name, found in seconds.items()},
        "slowdown": round(median["watched"] / median["plain"] - 1, 3),
        "steps": STEPS,
        "slowdown_of_the_run": round(sum(seconds["watched"]) / sum(seconds["plain"]) - 1, 3),
    }
    print(json.dumps(result, indent=1))
    (RESULTS / "calibration_cost_h200.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
