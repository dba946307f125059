"""Peers that a user can pick natively, on the demo model: comfy-kitchen's ConvRot W4A4 and INT8 beside ours.

    python -m benchmarks.demo_peers

Quantizes the same layers in each, those of the body, and leaves the modulations in 16 bits; the prompts, seeds and
16-bit images are those of ``benchmarks.demo_quality``. comfy-kitchen (PyPI) runs on its eager backend. Writes
``benchmarks/results/demo_peers.json`` and a bar chart. Needs ComfyUI, runs on the CPU.
"""

import importlib.metadata
import platform
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import comfy_kitchen as kitchen
import torch

from benchmarks.demo_quality import RESULTS, Trial, chart, draw, measure, write
from demo.settings import CALIBRATION_PROMPTS, SAMPLING
from svdq_core.quantizer.pipeline import Settings, plan, quantize_checkpoint

MODULATIONS = "16bit"


class PeerLinear(torch.nn.Module):
    """A linear layer as a peer quantizes it; float32 outside, bfloat16 within, as it asks for."""

    def __init__(self, linear: Callable[[torch.Tensor], torch.Tensor]):
        super().__init__()
        self._linear = linear

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) -> (..., N)."""
        rows = self._linear(x.reshape(-1, x.shape[-1]).bfloat16())
        return rows.to(x.dtype).reshape(*x.shape[:-1], -1)


def convrot_w4a4(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable:
    """Rotation and rounding to 4 bits, without calibration."""
    packed, scales = kitchen.quantize_convrot_w4a4_weight(weight)
    return lambda x: kitchen.convrot_w4a4_linear(x, packed, scales, bias)


def int8(weight: torch.Tensor, bias: torch.Tensor | None) -> Callable:
    """8 bits, a scale per row."""
    packed, scale = kitchen.quantize_int8_rowwise(weight)
    return lambda x: kitchen.int8_linear(x, packed, scale, bias, x.dtype)


PEERS = {"comfy-kitchen ConvRot W4A4": convrot_w4a4, "comfy-kitchen INT8": int8}
OURS = {"ours, balanced": "int4", "ours, balanced, int8": "int8"}


def main() -> None:
    """Draw everything, write the JSON and the chart."""
    start = time.monotonic()
    trial = Trial()
    rows = {}
    for name, precision in OURS.items():
        settings = Settings(precision, modulations=MODULATIONS)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "quantized.safetensors"
            quantize_checkpoint(trial.source, path, settings, trial.calibration)
            rows[name] = measure(draw(trial.host, trial.host.load(path), name, trial.prompts), trial.references)
    for name, make in PEERS.items():
        model = trial.host.load_demo().clone()
        for layer in plan(trial.source, Settings(modulations=MODULATIONS)).layers:
            module = model.model.diffusion_model.get_submodule(layer)
            bias = None if module.bias is None else module.bias.detach().bfloat16()
            patched = PeerLinear(make(module.weight.detach().bfloat16(), bias))
            model.add_object_patch(f"diffusion_model.{layer}", patched)
        rows[name] = measure(draw(trial.host, model, name, trial.prompts), trial.references)
    result = {
        "command": "python -m benchmarks.demo_peers",
        "model": "demo/assets/svdquant_demo_flux.safetensors, modulations in 16 bits in all",
        "prompts": len(trial.prompts),
        "calibration_prompts": len(CALIBRATION_PROMPTS),
        "sampling": SAMPLING,
        "torch": torch.__version__,
        "comfy_kitchen": importlib.metadata.version("comfy-kitchen"),
        "host": trial.host.version,
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "seconds": round(time.monotonic() - start),
        "methods": rows,
    }
    write("demo_peers.json", result)
    chart(rows, len(trial.prompts), RESULTS / "demo_peers.png")


if __name__ == "__main__":
    main()
