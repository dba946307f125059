"""FLUX.1-dev's shapes with random weights, in ComfyUI's own code on this card: for benchmarks of whole images."""

import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch

from benchmarks.full_size import flux, weight
from tools.comfy_in_process import InProcessHost

LATENT, TEXT = (1, 16, 128, 128), (1, 512, 4096)  # 1024 x 1024
SEED = 0

_LEFT = 16 * 2**30  # bytes
_TAKE = """
import sys, torch
memory = torch.empty(int(sys.argv[1]), dtype=torch.uint8, device="cuda")
print(flush=True)
sys.stdin.read()
"""


class FluxHost(InProcessHost):
    """The host, and its 16-bit MODEL."""

    def __init__(self) -> None:
        super().__init__(())
        import comfy.sd

        tensors = {name: weight(name, shape, "cuda").cpu() for name, shape in flux(None).items()}
        self.model = comfy.sd.load_diffusion_model_state_dict(tensors)

    def prompts(self, count: int) -> list:
        """Of no text encoder."""
        random = torch.Generator().manual_seed(SEED)
        about = {"pooled_output": torch.randn((1, 768), generator=random), "guidance": 3.5}
        return [[torch.randn(TEXT, generator=random), about] for _ in range(count)]

    def draw(self, model, prompts: int, steps: int) -> list[torch.Tensor]:
        """A latent for each prompt, as KSampler draws it."""
        return [
            self.sample(model, [prompt], [prompt], LATENT, SEED + index, steps)
            for index, prompt in enumerate(self.prompts(prompts))
        ]


def seconds(work: Callable[..., object], *arguments) -> float:
    """Of one run."""
    torch.cuda.synchronize()
    start = time.perf_counter()
    work(*arguments)
    torch.cuda.synchronize()
    return round(time.perf_counter() - start, 3)


@contextmanager
def smaller_card() -> Iterator[float]:
    """Meanwhile another process has the card's memory but for 16 GiB; yields what is free, GB."""
    torch.cuda.empty_cache()
    take = torch.cuda.mem_get_info()[0] - _LEFT
    pipe = subprocess.PIPE
    with subprocess.Popen([sys.executable, "-c", _TAKE, str(take)], stdin=pipe, stdout=pipe) as process:
        process.stdout.readline()
        torch.cuda.reset_peak_memory_stats()
        try:
            yield round(torch.cuda.mem_get_info()[0] / 1e9, 2)
        finally:
            process.stdin.close()


def memory(model) -> dict[str, float]:
    """Of a MODEL that was drawn with, GB."""
    return {
        "model_gb": round(model.model_size() / 1e9, 2),
        "resident_gb": round(model.model.model_loaded_weight_memory / 1e9, 2),
        "peak_gb": round(torch.cuda.max_memory_reserved() / 1e9, 2),
    }
