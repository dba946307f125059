"""Image quality of four-bit files as H100 and H200 evaluate them, in 8 bits, against the files' own arithmetic.

    python -m benchmarks.demo_evaluation

Quantizes the demo model to INT4 and NVFP4 and draws the same prompts and seeds with both evaluations, on the CPU by
the reference of each; writes PSNR and SSIM against 16 bits to ``benchmarks/results/demo_evaluation.json``. Needs
ComfyUI (``make test`` fetches it).
"""

import json
import platform
import tempfile
from pathlib import Path
from unittest import mock

import torch
from tqdm import tqdm

from benchmarks.demo_quality import draw, measure
from demo.in_process import DemoHost
from demo.settings import CALIBRATION_PROMPTS, PROMPTS
from svdq_core import layers
from svdq_core.quantizer.pipeline import Settings, plan, quantize_checkpoint

RESULTS = Path(__file__).parent / "results"


def runs_as_int8(layer: layers.SVDQLinear, *_) -> bool:
    """As on a card that prefers it; this host computes in float32, which no card is asked to."""
    return layer.spec.format in layers.FOUR_BITS


def main() -> None:
    """Run everything and write the JSON."""
    host = DemoHost()
    from svdq_core.host.source import ModelSource  # imports ComfyUI, which the line above made importable

    model = host.load_demo()
    references = draw(host, model, "16-bit")
    source = ModelSource(model)
    calibration = host.calibrate(model, plan(source, Settings()).layers, CALIBRATION_PROMPTS)
    rows = {}
    with tempfile.TemporaryDirectory() as folder:
        for precision in ("int4", "nvfp4"):
            for modulations in ("awq_w4a16", "16bit"):
                path = Path(folder) / "quantized.safetensors"
                settings = Settings(precision=precision, modulations=modulations)
                quantize_checkpoint(source, path, settings, calibration, overwrite=True)
                quantized, title = host.load(path), f"{precision}, modulations {modulations}"
                stored = measure(draw(host, quantized, title), references)
                with mock.patch.object(layers.SVDQLinear, "_runs_as_int8", runs_as_int8):
                    in_8_bits = measure(draw(host, quantized, f"{title}, in 8 bits"), references)
                rows[title] = {"as stored": stored, "in 8 bits": in_8_bits}
                tqdm.write(f"{title}: {stored['psnr_db']:.2f} dB, in 8 bits {in_8_bits['psnr_db']:.2f}")
    result = {
        "command": "python -m benchmarks.demo_evaluation",
        "reference": "the 16-bit model, same prompts and seeds, all on the CPU in float32",
        "recipe": f"{Settings().recipe}, rank {Settings().rank}",
        "prompts": len(PROMPTS),
        "torch": torch.__version__,
        "host": host.version,
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
        "files": rows,
    }
    (RESULTS / "demo_evaluation.json").write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
