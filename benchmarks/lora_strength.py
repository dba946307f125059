"""How long a change of a LoRA's strength takes, on a quantized model with all of FLUX.1's layers.

    python -m benchmarks.lora_strength

Makes a model of 19 double and 38 single blocks with random weights and a small hidden size, quantizes it, and
puts a LoRA for every layer on it, named as diffusers does, which counts q, k and v apart. Times what queueing
a graph with another strength costs: applying the LoRA again as *SVDQuant LoRA Apply* does, and having the host
patch the loaded model. What is timed is therefore the work per layer, not the bytes of a 12B model. Writes
``benchmarks/results/lora_strength.json``. Needs ComfyUI (``make test`` fetches it) and runs on the CPU.
"""

import json
import platform
import statistics
import tempfile
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

from demo.train.flux import Flux, Shape
from svdq_core.quantizer.pipeline import FileSource, Settings, quantize_checkpoint
from tools.comfy_in_process import InProcessHost

RESULTS = Path(__file__).parent / "results"
SHAPE = Shape(hidden=256, double_blocks=19, single_blocks=38)
RANK = 16
STRENGTHS = [round(0.1 * step, 1) for step in range(1, 22)]


def main() -> None:
    """Time it and write the JSON."""
    host = InProcessHost()
    import comfy.model_management

    from svdq_core.host.lora import LoraFiles, LoraRow, apply_loras

    with tempfile.TemporaryDirectory() as folder:
        full, quantized, lora = (Path(folder) / f"{name}.safetensors" for name in ("full", "quantized", "lora"))
        weights = random_weights()
        save_file(weights, full)
        report = quantize_checkpoint(FileSource(full), quantized, Settings(recipe="fast"))
        save_file(adapters(), lora)
        model = host.load(quantized)
        comfy.model_management.load_models_gpu([model])
        files, applying, patching = LoraFiles(), [], []
        for strength in STRENGTHS:
            start = time.perf_counter()
            patched, _, (told,) = apply_loras(model, None, [LoraRow(lora, strength)], files=files)
            applied = time.perf_counter()
            comfy.model_management.load_models_gpu([patched])
            applying.append(applied - start)
            patching.append(time.perf_counter() - applied)
    changes = [sum(pair) for pair in zip(applying, patching, strict=True)][1:]
    result = {
        "command": "python -m benchmarks.lora_strength",
        "model": f"{SHAPE.double_blocks} double and {SHAPE.single_blocks} single blocks, hidden size {SHAPE.hidden}, "
        "random weights, INT4 with modulations in W4A16",
        "quantized_layers": len(report.layers),
        "lora": f"rank {RANK}, diffusers names",
        "lora_layers": told.matched,
        "strength_changes": len(changes),
        "first_seconds": round(applying[0] + patching[0], 3),
        "change_seconds": round(statistics.median(changes), 4),
        "change_seconds_max": round(max(changes), 4),
        "apply_seconds": round(statistics.median(applying[1:]), 4),
        "patch_seconds": round(statistics.median(patching[1:]), 4),
        "torch": torch.__version__,
        "host": host.version,
        "machine": f"{platform.system()} {platform.machine()}, {torch.get_num_threads()} threads",
    }
    (RESULTS / "lora_strength.json").write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


def random_weights() -> dict[str, torch.Tensor]:
    """The model in bf16, no weight zero."""
    torch.manual_seed(0)
    model = Flux(SHAPE)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=SHAPE.hidden**-0.5)
    return {name: tensor.to(torch.bfloat16) for name, tensor in model.state_dict().items()}


def adapters() -> dict[str, torch.Tensor]:
    """A LoRA on every layer of the blocks, as diffusers' trainers write it."""
    h, shapes = SHAPE.hidden, {}
    for index in range(SHAPE.double_blocks):
        block = f"transformer.transformer_blocks.{index}."
        for part in ("to_q", "to_k", "to_v", "to_out.0", "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out"):
            shapes[f"{block}attn.{part}"] = (h, h)
        for stream in ("ff", "ff_context"):
            shapes[f"{block}{stream}.net.0.proj"] = (4 * h, h)
            shapes[f"{block}{stream}.net.2"] = (h, 4 * h)
        for norm in ("norm1", "norm1_context"):
            shapes[f"{block}{norm}.linear"] = (6 * h, h)
    for index in range(SHAPE.single_blocks):
        block = f"transformer.single_transformer_blocks.{index}."
        for part in ("to_q", "to_k", "to_v"):
            shapes[f"{block}attn.{part}"] = (h, h)
        shapes[f"{block}proj_mlp"] = (4 * h, h)
        shapes[f"{block}proj_out"] = (h, 5 * h)
        shapes[f"{block}norm.linear"] = (3 * h, h)
    tensors = {}
    for name, (n, k) in shapes.items():
        tensors[f"{name}.lora_A.weight"] = 0.1 * torch.randn(RANK, k)
        tensors[f"{name}.lora_B.weight"] = 0.1 * torch.randn(n, RANK)
    return {name: tensor.to(torch.bfloat16) for name, tensor in tensors.items()}


if __name__ == "__main__":
    main()
