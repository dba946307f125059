"""What watching a model for calibration costs: FLUX.1-dev at 1024 x 1024, drawn by ComfyUI with and without.

python -m benchmarks.calibration_cost

The weights are random, the code is all ComfyUI's: its loader, its sampler, its memory management. At the end another
process takes the card's memory but for 16 GiB, and the model, now larger than what is left, is watched again.
"""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch

from benchmarks.full_size import flux, weight
from svdq_core import bench
from tools.comfy_in_process import InProcessHost

RESULTS = Path(__file__).parent / "results"
LATENT, TEXT = (1, 16, 128, 128), (1, 512, 4096)
RUNS = {"4 prompts of 20 steps": (4, 20), "1 prompt of 8 steps": (1, 8)}
OFFLOADED_STEPS, LEFT = 4, 16 * 2**30  # bytes of the card
SEED = 0

_TAKE = """
import sys, torch
memory = torch.empty(int(sys.argv[1]), dtype=torch.uint8, device="cuda")
print(flush=True)
sys.stdin.read()
"""


class Flux:
    """A MODEL of FLUX.1-dev's shapes in the host."""

    def __init__(self) -> None:
        self.host = InProcessHost(())
        import comfy.sd

        tensors = {name: weight(name, shape, "cuda").cpu() for name, shape in flux(None).items()}
        self.model = comfy.sd.load_diffusion_model_state_dict(tensors)

    def prompts(self, count: int) -> list:
        """Of no text encoder."""
        random = torch.Generator().manual_seed(SEED)
        about = {"pooled_output": torch.randn((1, 768), generator=random), "guidance": 3.5}
        return [[torch.randn(TEXT, generator=random), about] for _ in range(count)]

    def draw(self, prompts: int, steps: int) -> None:
        """As KSampler does."""
        for index, prompt in enumerate(self.prompts(prompts)):
            self.host.sample(self.model, [prompt], [prompt], LATENT, SEED + index, steps)

    def watch(self, prompts: int, steps: int):
        """As SVDQuant Calibrate does; the statistics."""
        from svdq_core.host.calibration import calibrate
        from svdq_core.host.source import ModelSource
        from svdq_core.quantizer.pipeline import quantizable_layers

        positive, latent = self.prompts(prompts), {"samples": torch.zeros(LATENT)}
        layers = quantizable_layers(ModelSource(self.model))
        sampling = (steps, 1.0, "euler", "simple", SEED)
        return calibrate(self.model, layers, positive, positive, latent, *sampling, lambda done, total: None)


def seconds(work: Callable[..., object], *arguments: int) -> float:
    """Of one run."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work(*arguments)
    torch.cuda.synchronize()
    return round(time.perf_counter() - start, 3)


def compare(model: Flux, prompts: int, steps: int) -> dict[str, object]:
    """Drawn, watched, and drawn again."""
    times = [seconds(work, prompts, steps) for work in (model.draw, model.watch, model.draw)]
    plain, watched = [times[0], times[2]], times[1]
    return {"plain_s": plain, "watched_s": watched, "slowdown": round(watched / (sum(plain) / 2) - 1, 4)}


def on_a_small_card(model: Flux) -> dict[str, object]:
    """The same where the model does not fit: what it costs, and that it finds the same."""
    expected = model.watch(1, OFFLOADED_STEPS).digest()
    model.host.unload_all()
    torch.cuda.empty_cache()
    take = torch.cuda.mem_get_info()[0] - LEFT
    with subprocess.Popen([sys.executable, "-c", _TAKE, str(take)], stdin=subprocess.PIPE, stdout=subprocess.PIPE) as p:
        p.stdout.readline()
        torch.cuda.reset_peak_memory_stats()
        left = torch.cuda.mem_get_info()[0]
        model.draw(1, 1)  # loads what fits
        resident = model.model.model.model_loaded_weight_memory
        compared = compare(model, 1, OFFLOADED_STEPS)
        found = model.watch(1, OFFLOADED_STEPS).digest()
        p.stdin.close()
    return {
        "free_gb": round(left / 1e9, 2),
        "model_gb": round(model.model.model_size() / 1e9, 2),
        "resident_gb": round(resident / 1e9, 2),
        "peak_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
        "steps": OFFLOADED_STEPS,
        **compared,
        "same_statistics_as_on_the_whole_card": found == expected,
    }


@torch.inference_mode()
def main() -> None:
    """Measure on the current CUDA card and write the JSON."""
    model = Flux()
    model.draw(1, 1)
    layers = len(model.watch(1, 1).layers)  # what is loaded and compiled once
    result = {
        "command": "python -m benchmarks.calibration_cost",
        "environment": bench.environment() | {"comfyui": model.host.version},
        "layers": layers,
        **{name: compare(model, *run) for name, run in RUNS.items()},
        "more than the card holds": on_a_small_card(model),
    }
    print(json.dumps(result, indent=1))
    (RESULTS / "calibration_cost_h200.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
