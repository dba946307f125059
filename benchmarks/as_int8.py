"""What it takes to make the 8-bit weights of FLUX.1-dev's INT4 layers on a Hopper card, as when a LoRA is applied.

python -m benchmarks.as_int8
"""

import json
import time
from pathlib import Path

import torch

from benchmarks.flux_sizes import DOUBLE_BLOCKS, FLUX, HIDDEN, SINGLE_BLOCKS, layer_shapes
from svdq_core import bench
from svdq_core.architectures import BODY
from svdq_core.formats.comfy_quant import SVDQUANT_W4A4
from svdq_core.ops import as_int8

RESULTS = Path(__file__).parent / "results"
RANK, REPEATS = 32, 3


@torch.inference_mode()
def main() -> None:
    """Measure on the current CUDA card and write the JSON."""
    shapes = layer_shapes(HIDDEN, DOUBLE_BLOCKS, SINGLE_BLOCKS)
    layers = [shape for name, shape in shapes.items() if FLUX.kind(name) == BODY]
    operands = {}
    for n, k in set(layers):
        o = bench._operands(1, k, n, RANK, torch.bfloat16, False)
        scales = o["weight_scale"], None, None
        operands[n, k] = (o["smooth"], o["proj_down"], o["weight"], *scales, o["proj_up"], o["bias"])
    seconds, peak = [], 0
    for _ in range(REPEATS):
        images = []
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before, start = torch.cuda.memory_allocated(), time.perf_counter()
        for shape in layers:
            images.append(as_int8.image(operands[shape], SVDQUANT_W4A4, unsigned=False, rotated=True))
        torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        kept = sum(image.nbytes for image in images)
        peak = torch.cuda.max_memory_allocated() - before - kept
    result = {
        "command": "python -m benchmarks.as_int8",
        "environment": bench.environment(),
        "layers": len(layers),
        "rank": RANK,
        "seconds": round(min(seconds), 2),
        "first_seconds": round(seconds[0], 2),
        "kept_gb": round(kept / 1e9, 2),
        "most_beside_gb": round(peak / 1e9, 2),
    }
    print(json.dumps(result, indent=1))
    (RESULTS / "as_int8_h200.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
