"""SVDQuant Calibrate: statistics in a file, from which the quantizer works without sampling."""

import shutil
from pathlib import Path

import pytest
import small_flux
import torch
from safetensors.torch import save_file

from svdq_core.quantizer.statistics import Calibration
from tools.comfy_host import Graph, GraphError

QUANTIZER = {"precision": "int4", "recipe": "balanced", "rank": 16, "skip_layers": "*txt*", "overwrite": True}
SAMPLING = {"steps": 2, "cfg": 1.0, "sampler_name": "euler", "scheduler": "simple", "seed": 5}


@pytest.fixture(scope="module")
def server(comfy, tmp_path_factory):
    """The server, with the small FLUX among its models."""
    file = tmp_path_factory.mktemp("models") / "calibrated.safetensors"
    save_file(small_flux.state_dict(), file)
    comfy.add_model("diffusion_models", file)
    return comfy


@pytest.fixture
def folders(server):
    """Where quantized models and calibrations go, emptied of what a test made."""
    made = [server.base / "models/diffusion_models/made", server.base / "output/made"]
    yield made
    for folder in made:
        shutil.rmtree(folder, ignore_errors=True)


def sampled_inputs(graph: Graph, prompts=("a", "b")):
    encoded = [graph.add("SVDQuantDemoTextEncode", text=prompt)[0] for prompt in prompts]
    positive = encoded[0]
    for other in encoded[1:]:
        positive = graph.add("ConditioningCombine", conditioning_1=positive, conditioning_2=other)[0]
    latent = graph.add("EmptySD3LatentImage", width=128, height=128, batch_size=1)[0]
    return {"positive": positive, "latent": latent, **SAMPLING}


def calibrate(graph: Graph, prompts=("a", "b"), **widgets):
    model = graph.add("UNETLoader", unet_name="calibrated.safetensors", weight_dtype="default")[0]
    inputs = {"model": model, "file_name": "made/c", "if_exists": "stop", **sampled_inputs(graph, prompts)}
    return graph.add("SVDQuantCalibrate", **(inputs | widgets))


def quantize(graph: Graph, name: str, **inputs):
    model = graph.add("UNETLoader", unet_name="calibrated.safetensors", weight_dtype="default")[0]
    return graph.add("SVDQuantQuantizeCheckpoint", model=model, file_name=name, **(QUANTIZER | SAMPLING | inputs))


def load(folders) -> Calibration:
    return Calibration.load(folders[1] / "c.safetensors")


def test_the_quantizer_makes_the_same_bytes_from_the_file_as_by_sampling(server, folders):
    graph = Graph()
    calibration = calibrate(graph)
    linked = quantize(graph, "made/linked", calibration=calibration[0])
    quantize(graph, "made/sampled", **sampled_inputs(graph))
    steps = []
    result = server.run(graph, steps.append)
    values = [step.value for step in steps if step.node == str(calibration)]
    assert values == sorted(values) and values[-1] == 4
    assert f"{len(small_flux.quantized_layers())} layers" in result.outputs[str(calibration)]["text"][0]
    assert "layers quantized" in result.outputs[str(linked)]["text"][0]

    graph = Graph()
    quantize(graph, "made/named", calibration="made/c.safetensors")
    server.run(graph)
    made: Path = folders[0]
    files = [(made / f"{name}.safetensors").read_bytes() for name in ("linked", "sampled", "named")]
    assert files[0] == files[1] == files[2]


def test_what_happens_to_an_existing_file(server, folders):
    def run(**widgets):
        graph = Graph()
        calibrate(graph, **widgets)
        server.run(graph)
        return load(folders)

    first = run(prompts=("a",))
    with pytest.raises(GraphError, match="already exists"):
        run(prompts=("b",))
    again = run(prompts=("a",), if_exists="replace", seed=6)
    assert again.layers.keys() == set(small_flux.quantized_layers())
    both = run(prompts=("a",), if_exists="merge")
    for name, layer in both.layers.items():
        one, other = first.layers[name], again.layers[name]
        assert layer.count == one.count + other.count
        assert torch.equal(layer.minimum, torch.minimum(one.minimum, other.minimum))
        assert torch.allclose(layer.square_sum, one.square_sum + other.square_sum)


def test_both_branches_of_guidance_are_seen(server, folders):
    graph = Graph()
    negative = graph.add("SVDQuantDemoTextEncode", text="c")[0]
    calibrate(graph, ("a",), cfg=2.0, negative=negative)
    calibrate(graph, ("a",), file_name="made/plain")
    server.run(graph)
    plain = Calibration.load(folders[1] / "plain.safetensors")
    for name, layer in load(folders).layers.items():
        assert layer.count == 2 * plain.layers[name].count


def test_a_text_of_prompts_is_as_good_as_many_encoders(server, folders):
    graph = Graph()
    clip = graph.add("SVDQuantDemoCLIP")
    prompts = graph.add("SVDQuantPrompts", clip=clip[0], prompts="red apple\n\n  green frog on a pink background \n")
    calibrate(graph, ("red apple", "green frog on a pink background"))
    calibrate(graph, file_name="made/text", positive=prompts[0])
    steps = []
    server.run(graph, steps.append)
    assert (folders[1] / "text.safetensors").read_bytes() == (folders[1] / "c.safetensors").read_bytes()
    assert [step.value for step in steps if step.node == str(prompts)][-1] == 2


def test_a_text_without_prompts_is_an_error(server):
    graph = Graph()
    clip = graph.add("SVDQuantDemoCLIP")
    calibrate(graph, positive=graph.add("SVDQuantPrompts", clip=clip[0], prompts=" \n\n")[0])
    with pytest.raises(GraphError, match="write one in each line") as caught:
        server.run(graph)
    assert caught.value.node_type == "SVDQuantPrompts"


@pytest.mark.parametrize(
    ("widgets", "why"),
    [
        ({"file_name": "../escape"}, "inside"),
        ({"cfg": 3.0}, "connect negative"),
        ({"if_exists": "merge", "file_name": "made/other"}, "not a calibration file"),
    ],
)
def test_inputs_that_make_no_sense_are_explained(server, folders, widgets, why):
    folders[1].mkdir(parents=True)
    save_file({"a": torch.zeros(1)}, folders[1] / "other.safetensors")
    graph = Graph()
    calibrate(graph, **widgets)
    with pytest.raises(GraphError, match=why) as caught:
        server.run(graph)
    assert caught.value.node_type == "SVDQuantCalibrate"


def test_a_calibration_that_is_not_there_is_told_before_any_work(server, folders):
    graph = Graph()
    quantize(graph, "made/q", calibration="made/none")
    with pytest.raises(GraphError, match=r"none\.safetensors does not exist"):
        server.run(graph)
    assert not folders[0].exists()
