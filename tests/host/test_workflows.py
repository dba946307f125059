"""The example workflows: every one is right for the nodes as they are, and runs where the demo model can."""

import copy
import json
import shutil

import pytest

from demo.examples import EXAMPLES, QUANTIZED, make_models, with_demo_model
from tools.ui_graph import to_api

NAMES = {
    "quantize-your-checkpoint",
    "flux1-dev",
    "flux1-schnell",
    "sdxl",
    "sdxl-turbo",
    "pixart-sigma",
    "several-loras",
    "16-bit-against-4-bit",
}
RUN = sorted(NAMES - {"sdxl", "sdxl-turbo", "pixart-sigma"})


def load(name):
    """A workflow as the browser opens it."""
    return json.loads((EXAMPLES / f"{name}.json").read_text(encoding="utf-8"))


@pytest.fixture(scope="module")
def models(comfy):
    """The server, with what the examples need."""
    make_models(comfy.base / "models")
    yield comfy
    shutil.rmtree((comfy.base / "models" / "diffusion_models" / QUANTIZED).parent)


def test_all_are_there_and_the_host_offers_them(comfy):
    assert {path.stem for path in EXAMPLES.glob("*.json")} == NAMES
    assert {path.stem for path in EXAMPLES.glob("*.jpg")} == NAMES
    assert set(comfy.get("/workflow_templates").json()["ComfyUI-SVDQuant"]) == NAMES
    for name in NAMES:
        served = f"/api/workflow_templates/ComfyUI-SVDQuant/{name}"
        assert comfy.get(f"{served}.json").json() == load(name)
        assert comfy.get(f"{served}.jpg").headers["Content-Type"] == "image/jpeg"


@pytest.mark.parametrize("name", sorted(NAMES))
def test_each_fits_the_nodes_and_explains_itself(comfy, name):
    workflow = load(name)
    graph = to_api(workflow, comfy.object_info())
    assert any(node["class_type"].startswith("SVDQuant") for node in graph.nodes.values())
    assert all(node.get("title") for node in workflow["nodes"])
    assert any(node["type"] == "MarkdownNote" and len(node["widgets_values"][0]) > 100 for node in workflow["nodes"])


@pytest.mark.parametrize("name", RUN)
def test_those_for_flux_run_on_the_demo_model(models, name):
    result = models.run(with_demo_model(load(name), models.object_info(), steps=2))
    shown = result.images()
    assert shown and all(image.size == (128, 128) for image in shown)
    assert all(len(image.convert("RGB").getcolors(1 << 16)) > 50 for image in shown)
    texts = [text for output in result.outputs.values() for text in output.get("text", ())]
    if name == "16-bit-against-4-bit":
        assert any("PSNR" in text and "SSIM 0." in text for text in texts)
    if name == "quantize-your-checkpoint":
        assert any("28 layers quantized" in text for text in texts)


def broken(workflow, change):
    """A copy of a workflow that is wrong in one place."""
    workflow = copy.deepcopy(workflow)
    change({node["type"]: node for node in workflow["nodes"]}, workflow)
    return workflow


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda nodes, _: nodes["KSampler"].update(type="KSampler2"), "no KSampler2"),
        (lambda nodes, _: nodes["KSampler"]["inputs"][0].update(name="modell"), "no inputs"),
        (lambda nodes, _: nodes["KSampler"]["inputs"][0].update(link=None), "model is not connected"),
        (lambda nodes, _: nodes["KSampler"]["widgets_values"].pop(), "no value is saved for denoise"),
        (lambda nodes, _: nodes["KSampler"]["widgets_values"].append(1), "belong to no widget"),
        (lambda nodes, _: nodes["KSampler"]["widgets_values"].__setitem__(2, 0), "steps cannot be 0"),
        (lambda nodes, _: nodes["KSampler"]["widgets_values"].__setitem__(4, "eulr"), "sampler_name cannot be"),
        (lambda nodes, flow: flow["links"][0].__setitem__(1, nodes["VAELoader"]["id"]), "linked to something else"),
    ],
)
def test_the_check_finds_what_is_wrong(comfy, change, why):
    with pytest.raises(ValueError, match=why):
        to_api(broken(load("flux1-dev"), change), comfy.object_info())
