"""What watching a model for calibration costs: FLUX.1-dev at 1024 x 1024, four prompts of 28 steps.

python -m benchmarks.calibration_cost

A step is the denoiser's linear layers and its attention. In the first steps the samples of rows fill and take their
memory, later ones cost less.
"""

import json
import time
from pathlib import Path

import torch

from benchmarks.flux_sizes import DOUBLE_BLOCKS, FLUX, HIDDEN, SINGLE_BLOCKS, layer_shapes
from svdq_core import bench
from svdq_core.architectures import BODY
from svdq_core.quantizer.statistics import Calibration

RESULTS = Path(__file__).parent / "results"
IMAGE_TOKENS, TEXT_TOKENS, HEAD, STEPS, PROMPTS = 4096, 512, 128, 28, 4


def tokens(name: str) -> int:
    """Rows of a layer's input."""
    if name.startswith("single_blocks"):
        return IMAGE_TOKENS + TEXT_TOKENS
    return TEXT_TOKENS if ".txt_" in name else IMAGE_TOKENS


def run(layers: dict[str, tuple[int, int]], weights: dict, inputs: dict, calibration: Calibration | None) -> float:
    """Seconds of all steps of a prompt."""
    heads = inputs[HIDDEN].view(1, -1, HIDDEN // HEAD, HEAD).transpose(1, 2)
    torch.cuda.synchronize()
    start = time.perf_counter()
    for _ in range(STEPS):
        for name, shape in layers.items():
            x = inputs[shape[1]][: tokens(name)]
            if calibration is not None:
                calibration.observe(name, x)
            torch.nn.functional.linear(x, weights[shape])
        for _ in range(DOUBLE_BLOCKS + SINGLE_BLOCKS):
            torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)
        torch.cuda.synchronize()  # as samplers do, which look at each step's result
    if calibration is not None:
        calibration.settle()
    return time.perf_counter() - start


@torch.inference_mode()
def main() -> None:
    """Measure on the current CUDA card and write the JSON."""
    shapes = layer_shapes(HIDDEN, DOUBLE_BLOCKS, SINGLE_BLOCKS)
    layers = {name: shape for name, shape in shapes.items() if FLUX.kind(name) == BODY}
    like = {"dtype": torch.bfloat16, "device": "cuda"}
    weights = {shape: torch.randn(shape, **like) * 0.02 for shape in set(layers.values())}
    inputs = {k: torch.randn(IMAGE_TOKENS + TEXT_TOKENS, k, **like) for _, k in weights}
    run(layers, weights, inputs, Calibration(rows=1))  # what is compiled and loaded once
    calibration = Calibration()
    plain, watched = [], []
    for _ in range(PROMPTS):
        plain.append(run(layers, weights, inputs, None))
        watched.append(run(layers, weights, inputs, calibration))
    result = {
        "command": "python -m benchmarks.calibration_cost",
        "environment": bench.environment(),
        "layers": len(layers),
        "steps": STEPS,
        "prompts_s": {
            "plain": [round(seconds, 3) for seconds in plain],
            "watched": [round(seconds, 3) for seconds in watched],
        },
        "slowdown_of_the_first_prompt": round(watched[0] / plain[0] - 1, 3),
        "slowdown_of_later_prompts": round(sum(watched[1:]) / sum(plain[1:]) - 1, 3),
    }
    print(json.dumps(result, indent=1))
    (RESULTS / "calibration_cost_h200.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
