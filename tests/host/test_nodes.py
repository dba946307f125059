"""The nodes in a running server: what a user can do with them, and what they are told when it goes wrong."""

import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import small_flux
import torch
from safetensors.torch import load_file, save_file

from tools.comfy_host import ComfyHost, Graph, GraphError, GraphInterrupted

ROOT = Path(__file__).parents[2]
NODES = {
    "SVDQuantModelLoader": "SVDQuant Model Loader",
    "SVDQuantQuantizeCheckpoint": "SVDQuant Quantize Checkpoint",
    "SVDQuantLoraApply": "SVDQuant LoRA Apply",
    "SVDQuantInspect": "SVDQuant Inspect",
    "SVDQuantCalibrate": "SVDQuant Calibrate",
    "SVDQuantPrompts": "SVDQuant Prompts",
    "SVDQuantReplaySteps": "SVDQuant Replay Steps",
}
LAYERS = len(small_flux.quantized_layers())


@pytest.fixture(scope="module")
def server(comfy: ComfyHost, tmp_path_factory) -> ComfyHost:
    """The server, with the small FLUX among its models."""
    file = tmp_path_factory.mktemp("models") / "small.safetensors"
    save_file(small_flux.state_dict(), file)
    comfy.add_model("diffusion_models", file)
    return comfy


@pytest.fixture
def models(server) -> Path:
    """The server's folder of diffusion models, emptied of what a test made."""
    folder = server.base / "models" / "diffusion_models"
    yield folder
    shutil.rmtree(folder / "made", ignore_errors=True)


def quantize(graph: Graph, name="made/small_int4", prompts=("a", "b"), model="small.safetensors", **widgets):
    """Add a quantizer of the small FLUX to a graph."""
    full = graph.add("UNETLoader", unet_name=model, weight_dtype="default")
    inputs = {
        "file_name": name,
        "precision": "int4",
        "recipe": "balanced",
        "rank": 16,
        "steps": 2,
        "cfg": 1.0,
        "sampler_name": "euler",
        "scheduler": "simple",
        "seed": 5,
        "skip_layers": "",
        "overwrite": False,
    }
    if prompts:
        encoded = [graph.add("SVDQuantDemoTextEncode", text=prompt)[0] for prompt in prompts]
        inputs["positive"] = encoded[0]
        for other in encoded[1:]:
            inputs["positive"] = graph.add(
                "ConditioningCombine", conditioning_1=inputs["positive"], conditioning_2=other
            )[0]
        inputs["latent"] = graph.add("EmptySD3LatentImage", width=128, height=128, batch_size=1)[0]
    return graph.add("SVDQuantQuantizeCheckpoint", model=full[0], **(inputs | widgets))


def sampled(graph: Graph, model, name="latent", seed=1):
    """Add a sampler whose latent is saved, and return the node that saves it."""
    prompt = graph.add("SVDQuantDemoTextEncode", text="red apple")
    latent = graph.add("EmptySD3LatentImage", width=128, height=128, batch_size=1)
    samples = graph.add(
        "KSampler",
        model=model,
        seed=seed,
        steps=2,
        cfg=1.0,
        sampler_name="euler",
        scheduler="simple",
        positive=prompt[0],
        negative=prompt[0],
        latent_image=latent[0],
        denoise=1.0,
    )
    return graph.add("SaveLatent", samples=samples[0], filename_prefix=name)


def latent_of(server, result, node):
    """The latent that a graph saved."""
    file = result.outputs[str(node)]["latents"][0]
    return load_file(server.base / "output" / file["subfolder"] / file["filename"])["latent_tensor"]


def test_every_node_explains_itself(server):
    info = server.object_info()
    for node, title in NODES.items():
        assert info[node]["display_name"] == title
        assert info[node]["category"] == "SVDQuant"
        assert len(info[node]["description"]) > 40
        assert all(info[node]["output_tooltips"])
        for group in info[node]["input"].values():
            for name, (kind, options) in group.items():
                assert len(options["tooltip"]) > 10, f"{node}.{name}"
                if isinstance(kind, list) and "default" in options:
                    assert options["default"] in kind, f"{node}.{name}"


def test_quantize_load_and_sample_in_one_graph(server, models):
    graph = Graph()
    quantizer = quantize(graph)
    direct = sampled(graph, quantizer[0], "direct")
    full = graph.add("UNETLoader", unet_name="small.safetensors", weight_dtype="default")
    reference = sampled(graph, full[0], "reference")
    result = server.run(graph)
    assert (models / "made/small_int4.safetensors").exists()

    report = result.outputs[str(quantizer)]["text"][0]
    assert f"{LAYERS} layers quantized" in report and "smaller" in report
    steps = [step for step in result.progress if step.node == str(quantizer)]
    values = [step.value for step in steps]
    assert values == sorted(values) and len(values) > 5  # newer hosts send one every 100 ms, older ones one a layer
    assert values[-1] == steps[-1].max

    loading = Graph()
    loader = loading.add("SVDQuantModelLoader", model_name="made/small_int4.safetensors")
    loaded = sampled(loading, loader[0], "loaded")
    latent = latent_of(server, server.run(loading), loaded)
    assert torch.equal(latent, latent_of(server, result, direct))
    exact = latent_of(server, result, reference)
    assert 0 < torch.linalg.norm(latent - exact) < 0.2 * torch.linalg.norm(exact)

    stored = Graph()
    loader = stored.add("SVDQuantModelLoader", model_name="made/small_int4.safetensors", evaluation="as stored")
    again = sampled(stored, loader[0], "stored")
    assert torch.equal(latent, latent_of(server, server.run(stored), again)), "the same, but on H100 and H200"

    replaying = Graph()
    loader = replaying.add("SVDQuantModelLoader", model_name="made/small_int4.safetensors")
    replayed = sampled(replaying, replaying.add("SVDQuantReplaySteps", model=loader[0])[0], "replayed")
    assert torch.equal(latent, latent_of(server, server.run(replaying), replayed)), "as ever, without a GPU"


@pytest.mark.parametrize("recipe", ["fast", "balanced"])
def test_the_command_line_gives_the_same_bytes(server, models, tmp_path, recipe):
    graph = Graph()
    prompts = () if recipe == "fast" else ("a", "b", "c")
    quantize(graph, f"made/{recipe}", prompts, recipe=recipe, save_calibration=recipe != "fast")
    server.run(graph)
    command = [sys.executable, "-m", "svdq_core", "quantize", str(models / "small.safetensors")]
    command += [str(tmp_path / "cli.safetensors"), "--rank", "16", "--seed", "5", "--recipe", recipe, "--device", "cpu"]
    if recipe != "fast":
        calibration = server.base / "output" / "made" / f"{recipe}.calibration.safetensors"
        command += ["--calibration", str(calibration)]
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert (tmp_path / "cli.safetensors").read_bytes() == (models / f"made/{recipe}.safetensors").read_bytes()


def test_an_interrupt_leaves_nothing_and_the_graph_works_again(server, models):
    graph = Graph()
    quantizer = quantize(graph, steps=50)
    once = threading.Event()

    def interrupt(step):
        if step.node == str(quantizer) and step.value > 3 and not once.is_set():
            once.set()
            server.interrupt()

    with pytest.raises(GraphInterrupted):
        server.run(graph, interrupt)
    assert once.is_set() and not list(models.glob("made/*"))
    graph.to_api()[str(quantizer)]["inputs"]["steps"] = 2
    server.run(graph)
    assert [path.name for path in models.glob("made/*")] == ["small_int4.safetensors"]


def test_after_an_interrupt_while_writing_the_same_graph_goes_on_to_the_same_bytes(server, models):
    graph = Graph()
    quantizer = quantize(graph, prompts=("a",), steps=1, recipe="best", rank=64)
    once = threading.Event()

    def interrupt(step):
        if step.node == str(quantizer) and step.value > 20 and not once.is_set():
            once.set()
            server.interrupt()

    with pytest.raises(GraphInterrupted):
        server.run(graph, interrupt)
    partial, journal = (models / f"made/.small_int4.safetensors.{end}" for end in ("partial", "partial.journal"))
    assert once.is_set() and sorted(models.glob("made/*")) == [partial, journal]
    done = journal.read_bytes().count(b"\n") - 1
    steps = []
    result = server.run(graph, steps.append)
    assert done > 10 and min(step.value for step in steps if step.node == str(quantizer) and step.value > 1) >= done
    assert f"{LAYERS} layers quantized" in result.outputs[str(quantizer)]["text"][0]
    graph.to_api()[str(quantizer)]["inputs"]["file_name"] = "made/whole"
    server.run(graph)
    assert [path.name for path in sorted(models.glob("made/*"))] == ["small_int4.safetensors", "whole.safetensors"]
    assert (models / "made/whole.safetensors").read_bytes() == (models / "made/small_int4.safetensors").read_bytes()


def test_an_existing_file_is_refused_before_calibration_and_replaced_if_asked(server, models):
    (models / "made").mkdir()
    (models / "made/small_int4.safetensors").write_bytes(b"precious")
    graph = Graph()
    quantizer = quantize(graph)
    steps = []
    with pytest.raises(GraphError, match="already exists"):
        server.run(graph, steps.append)
    assert not [step for step in steps if step.node == str(quantizer)]
    assert (models / "made/small_int4.safetensors").read_bytes() == b"precious"
    graph.to_api()[str(quantizer)]["inputs"]["overwrite"] = True
    server.run(graph)
    assert (models / "made/small_int4.safetensors").stat().st_size > 1000


@pytest.mark.parametrize(
    ("widgets", "why"),
    [
        ({"file_name": "../../escape"}, "inside"),
        ({"file_name": "/escape"}, "inside"),
        ({"file_name": "  "}, "inside"),
        ({"prompts": ()}, "connect positive"),
        ({"cfg": 3.0}, "connect negative"),
        ({"skip_layers": "*"}, "nothing is left"),
    ],
)
def test_inputs_that_make_no_sense_are_explained(server, models, widgets, why):
    graph = Graph()
    quantize(graph, **({"name": widgets.pop("file_name")} if "file_name" in widgets else {}), **widgets)
    with pytest.raises(GraphError, match=why) as caught:
        server.run(graph)
    assert caught.value.node_type == "SVDQuantQuantizeCheckpoint"


@pytest.mark.parametrize(
    ("change", "why"),
    [
        (lambda data: data[: len(data) // 2], "damaged or incomplete"),
        (lambda data: (2**60).to_bytes(8, "little") + data[8:], "damaged or incomplete"),
        (lambda data: b"PK\x03\x04" + data[4:], "damaged or incomplete"),
        (lambda data: data, "Load Diffusion Model"),
    ],
    ids=["truncated", "lying header", "no safetensors", "16-bit"],
)
def test_files_that_are_no_quantized_models_are_explained(server, models, change, why):
    bad = models / "made" / "bad.safetensors"
    bad.parent.mkdir()
    bad.write_bytes(change((models / "small.safetensors").read_bytes()))
    graph = Graph()
    loader = graph.add("SVDQuantModelLoader", model_name="made/bad.safetensors")
    sampled(graph, loader[0])
    with pytest.raises(GraphError, match=why) as caught:
        server.run(graph)
    assert "bad.safetensors" in caught.value.exception_message


def test_nan_in_the_weights_names_the_layer(server, models):
    tensors = small_flux.state_dict()
    tensors["single_blocks.0.linear2.weight"][3, 3] = float("nan")
    (models / "made").mkdir()
    save_file(tensors, models / "made/nan.safetensors")
    graph = Graph()
    quantize(graph, prompts=(), recipe="fast", model="made/nan.safetensors")
    with pytest.raises(GraphError, match=r"single_blocks\.0\.linear2.*NaN"):
        server.run(graph)
    assert [path.name for path in models.glob("made/*")] == ["nan.safetensors"]
    graph = Graph()
    quantize(graph, model="made/nan.safetensors")
    with pytest.raises(GraphError, match="NaN"):
        server.run(graph)


def test_a_quantized_model_cannot_be_quantized_again(server, models):
    graph = Graph()
    first = quantize(graph, prompts=(), recipe="fast")
    second = quantize(graph, "made/again", prompts=(), recipe="fast")
    graph.to_api()[str(second)]["inputs"]["model"] = first[0]
    with pytest.raises(GraphError, match="quantized already"):
        server.run(graph)


def test_a_lora_in_the_graph_is_baked_in(server, models, tmp_path):
    h = small_flux.HIDDEN
    lora = {
        "lora_unet_single_blocks_0_linear2.lora_up.weight": torch.randn(h, 4) * 0.3,
        "lora_unet_single_blocks_0_linear2.lora_down.weight": torch.randn(4, 5 * h) * 0.3,
    }
    save_file(lora, tmp_path / "style.safetensors")
    server.add_model("loras", tmp_path / "style.safetensors")
    graph = Graph()
    full = graph.add("UNETLoader", unet_name="small.safetensors", weight_dtype="default")
    adapted = graph.add("SVDQuantLoraApply", model=full[0], lora_name="style.safetensors", strength=1.0)
    quantizer = quantize(graph, prompts=(), recipe="fast")
    graph.to_api()[str(quantizer)]["inputs"]["model"] = adapted[0]
    baked, unbaked = sampled(graph, quantizer[0], "baked"), sampled(graph, adapted[0], "full")
    # The same LoRA by our node and by the stock one, on a quantized model.
    plain = quantize(graph, "made/plain", prompts=(), recipe="fast")
    ours = graph.add("SVDQuantLoraApply", model=plain[0], lora_name="style.safetensors", strength=1.0)
    stock = graph.add("LoraLoaderModelOnly", model=plain[0], lora_name="style.safetensors", strength_model=1.0)
    others = [sampled(graph, node[0], f"other{i}") for i, node in enumerate((ours, stock, plain))]
    result = server.run(graph)
    baked, full, ours, stock, plain = (latent_of(server, result, node) for node in (baked, unbaked, *others))
    for image in (baked, ours):
        assert torch.linalg.norm(image - full) < 0.2 * torch.linalg.norm(full)
    assert torch.equal(ours, stock)
    assert torch.linalg.norm(ours - plain) > 0.05 * torch.linalg.norm(plain)


def test_inspect_shows_files_and_models(server, models):
    graph = Graph()
    quantizer = quantize(graph, prompts=(), recipe="fast")
    model = graph.add("SVDQuantInspect", model_name="small.safetensors", model=quantizer[0])
    file = graph.add("SVDQuantInspect", model_name="small.safetensors")
    saved = graph.add("SaveImage", images=model[1], filename_prefix="plot")
    result = server.run(graph)
    text = result.outputs[str(model)]["text"][0]
    for layer in small_flux.quantized_layers():
        assert layer in text
    assert "svdquant_w4a4" in text and "rank 16" in text
    assert f"{LAYERS} layers to quantize, all in 16 bits" in result.outputs[str(file)]["text"][0]
    (plot,) = result.images(saved)
    assert plot.width > 600 and len(plot.convert("RGB").getcolors(1 << 20)) > 20

    graph = Graph()
    inspect = graph.add("SVDQuantInspect", model_name="made/small_int4.safetensors")
    text = server.run(graph).outputs[str(inspect)]["text"][0]
    assert "recipe fast" in text and "error: of the weight" in text


def test_models_survive_unloading(server, models):
    graph = Graph()
    quantizer = quantize(graph, prompts=(), recipe="fast")
    first = sampled(graph, quantizer[0], "first", seed=1)
    before = latent_of(server, server.run(graph), first)
    server.free()
    graph = Graph()
    loader = graph.add("SVDQuantModelLoader", model_name="made/small_int4.safetensors")
    again, other = sampled(graph, loader[0], "again", seed=1), sampled(graph, loader[0], "other", seed=2)
    result = server.run(graph)
    assert torch.equal(latent_of(server, result, again), before)
    assert not torch.equal(latent_of(server, result, other), before)
