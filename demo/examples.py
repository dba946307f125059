"""The example workflows, with the demo model in the place of the models they name."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from demo.settings import DEMO, MODEL, SIZE, VAE
from svdq_core.quantizer.pipeline import FileSource, Settings, quantize_checkpoint
from tools.comfy_host import Graph
from tools.ui_graph import to_api

EXAMPLES = DEMO.parent / "example_workflows"
QUANTIZED = "svdquant/demo_int4.safetensors"
LORAS = {"lora_name": "style.safetensors", "lora_name_2": "detail.safetensors"}
FILES = {"unet_name": MODEL.name, "model_name": QUANTIZED, "vae_name": VAE, **LORAS}


def make_models(models: Path) -> None:
    """Put the files that :func:`with_demo_model` names into a server's ``models``."""
    file = models / "diffusion_models" / QUANTIZED
    file.parent.mkdir(parents=True, exist_ok=True)
    quantize_checkpoint(FileSource(MODEL), file, Settings(recipe="fast"), overwrite=True)
    (models / "loras").mkdir(exist_ok=True)
    for seed, name in enumerate(LORAS.values()):
        save_file(random_lora(seed), models / "loras" / name)


def random_lora(seed: int) -> dict[str, torch.Tensor]:
    """A LoRA that nobody trained, of rank 4, on two layers of the demo model."""
    random = torch.Generator().manual_seed(seed)
    shapes = FileSource(MODEL).specs
    tensors = {}
    for block in range(2):
        n, k = shapes[f"single_blocks.{block}.linear2.weight"].shape
        layer = f"lora_unet_single_blocks_{block}_linear2"
        tensors[f"{layer}.lora_up.weight"] = 0.02 * torch.randn((n, 4), generator=random)
        tensors[f"{layer}.lora_down.weight"] = torch.randn((4, k), generator=random)
    return tensors


def with_demo_model(workflow: Mapping[str, Any], types: Mapping[str, Any], **inputs: Any) -> Graph:
    """A saved graph for FLUX, to queue with the demo model: its files, its text encoder, its size.

    Args:
        workflow, types: as for :func:`to_api`.
        inputs: values for every input of these names.
    """
    graph = to_api(workflow, types)
    changes = {**FILES, "width": SIZE, "height": SIZE, "file_name": QUANTIZED, "overwrite": True, **inputs}
    clip = next(node_id for node_id, node in graph.nodes.items() if node["class_type"] == "DualCLIPLoader")
    graph.nodes[clip] = {"class_type": "SVDQuantDemoCLIP", "inputs": {}}
    for node in graph.nodes.values():
        # LoRA Apply would patch a CLIP's model, of which the demo's has none.
        if node["inputs"].pop("clip", None) and node["class_type"] != "SVDQuantLoraApply":
            node["inputs"]["clip"] = [clip, 0]
        for name in node["inputs"].keys() & changes.keys():
            if node["inputs"][name] != "None":  # an empty row of LoRA Apply
                node["inputs"][name] = changes[name]
    return graph
