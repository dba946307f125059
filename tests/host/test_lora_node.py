"""SVDQuant LoRA Apply in a running server: its rows, its report, and what the browser is told."""

import pytest
import small_flux
import torch
from safetensors.torch import save_file

from svdq_core.quantizer.pipeline import FileSource, Settings, quantize_checkpoint
from tools.comfy_host import Graph, GraphError

OUTPUT = "lora_unet_single_blocks_0_linear2"


@pytest.fixture(scope="module")
def server(comfy, tmp_path_factory):
    """The server, with a quantized FLUX and two LoRAs."""
    folder = tmp_path_factory.mktemp("models")
    save_file(small_flux.state_dict(), folder / "full.safetensors")
    model = folder / "for_loras.safetensors"
    quantize_checkpoint(FileSource(folder / "full.safetensors"), model, Settings(recipe="fast"))
    comfy.add_model("diffusion_models", model)
    h = small_flux.HIDDEN
    for name, layer in {"first": OUTPUT, "second": OUTPUT, "other": "lora_unet_input_blocks_4_1_proj_in"}.items():
        random = torch.Generator().manual_seed(len(name))
        lora = {
            f"{layer}.lora_up.weight": torch.randn((h, 4), generator=random),
            f"{layer}.lora_down.weight": torch.randn((4, 5 * h), generator=random),
        }
        save_file(lora, folder / f"{name}.safetensors")
        comfy.add_model("loras", folder / f"{name}.safetensors")
    return comfy


def apply(server, **rows):
    """The rows' values for the browser, and the report."""
    graph = Graph()
    model = graph.add("SVDQuantModelLoader", model_name="for_loras.safetensors")
    node = graph.add("SVDQuantLoraApply", model=model[0], **rows)
    graph.add("PreviewAny", source=node[1])
    output = server.run(graph).outputs[str(node)]
    return output["svdquant_lora"], output["text"][0]


def test_rows_that_are_on_are_applied_and_reported(server):
    rows, report = apply(
        server,
        lora_name="first.safetensors",
        strength=0.5,
        lora_name_2="None",
        lora_name_3="second.safetensors",
        strength_3=-1.0,
        lora_name_4="other.safetensors",
        on_4=False,
        lora_name_5="second.safetensors",
        strength_5=0.0,
    )
    assert [(row["name"], row["matched"]) for row in rows] == [
        ("first.safetensors", 1),
        ("second.safetensors", 1),
        ("second.safetensors", 0),
    ]
    assert rows[2]["message"] == "strength 0, not applied"
    assert rows[1]["rank"] == 8 and rows[1]["bytes"] == 2 * 8 * 6 * small_flux.HIDDEN
    assert report.count("1 of 1 layers matched") == 2 and "% more work" in report


def test_none_leaves_the_model_as_it_is(server):
    assert apply(server, lora_name="None", strength=1.0) == ([], "no LoRA chosen")


def test_a_lora_of_another_model_says_which(server):
    with pytest.raises(GraphError, match=r"other\.safetensors: none of its 2 tensors fits.*looks to be for a UNet"):
        apply(server, lora_name="first.safetensors", strength=1.0, lora_name_2="other.safetensors")
