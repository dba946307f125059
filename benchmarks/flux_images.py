"""Whole images of FLUX.1-dev at 1024 x 1024 in ComfyUI: seconds, and memory of the card, in 16 bits and quantized.

python -m benchmarks.flux_images

The weights are random (they decide neither), quantized to INT4 by recipe ``fast``; the code is all ComfyUI's, but for
the loader's: the layers and what its blocks fuse, without which the same file is measured, too. At the end another
process takes the card's memory but for 16 GiB, and layers run the kernels of cards without ones of their
own, as a 16 GB card does; their 4-bit products are emulated on an H200, so that of these only memory is told.
"""

import json
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from benchmarks.flux_in_comfy import FluxHost, memory, seconds, smaller_card
from svdq_core import bench
from svdq_core.kernels import plan
from svdq_core.quantizer.pipeline import Settings, quantize_checkpoint

RESULTS = Path(__file__).parent / "results"
STEPS = 20


def drawn(host, model) -> dict[str, object]:
    """Images of a MODEL, the first after a short one that loads and compiles."""
    torch.cuda.reset_peak_memory_stats()
    host.draw(model, 1, 2)
    return {"image_s": [seconds(host.draw, model, 1, STEPS) for _ in range(3)], **memory(model)}


def in_16_bits(host, module: str) -> dict[str, object]:
    """What a result begins with: how it came about, and the host's own MODEL."""
    return {
        "command": f"python -m {module}",
        "environment": bench.environment() | {"comfyui": host.version},
        "steps": STEPS,
        "16 bits": drawn(host, host.model),
    }


def quantize(model, path: Path) -> None:
    """As SVDQuant Quantize Checkpoint does."""
    from svdq_core.host.source import ModelSource

    quantize_checkpoint(ModelSource(model), path, Settings("int4", "fast"), device="cuda")


@contextmanager
def host_blocks() -> Iterator[None]:
    """Meanwhile ComfyUI's own blocks run."""
    from svdq_core.host import flux

    is_plain, flux._is_plain = flux._is_plain, lambda *asked: False
    try:
        yield
    finally:
        flux._is_plain = is_plain


def on_a_small_card(host: FluxHost, path: Path) -> dict[str, object]:
    """Memory where 16 GiB are free."""
    plan.HOPPER = 0  # no card is one: all run what those from Turing on do
    model = host.load(path, exact=True)
    with smaller_card() as free_gb:
        latent = host.draw(model, 1, 2)[0]
        found = memory(model)
    assert torch.isfinite(latent).all()
    return {"free_gb": free_gb, **found}


@torch.inference_mode()
def main() -> None:
    """Measure on the current CUDA card and write the JSON."""
    host = FluxHost()
    result = in_16_bits(host, "benchmarks.flux_images")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "flux-int4.safetensors"
        quantize(host.model, path)
        host.unload_all()
        for name, exact in (("INT4", False), ("INT4, as stored", True)):
            result[name] = drawn(host, host.load(path, exact=exact))
            host.unload_all()
        with host_blocks():
            result["INT4, ComfyUI's blocks"] = drawn(host, host.load(path))
            host.unload_all()
        result["INT4, kernels of other cards, 16 GiB free"] = on_a_small_card(host, path)
    print(json.dumps(result, indent=1))
    (RESULTS / "flux_images_h200.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
