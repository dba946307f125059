"""The test host itself, with ComfyUI's own nodes only."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from tools.comfy_host import ComfyHost, Graph, GraphError, GraphInterrupted, HostError, Node


def picture(graph: Graph, width: int = 64, color: int = 0xFF8000) -> Node:
    """A plain image."""
    return graph.add("EmptyImage", width=width, height=64, batch_size=1, color=color)


def upscale(graph: Graph, width: int, color: int = 0) -> Node:
    """A node with a progress bar: a step for each tile of 512 pixels."""
    model = graph.add("UpscaleModelLoader", model_name="tiny_upscaler.safetensors")
    image = picture(graph, width, color)
    scaled = graph.add("ImageUpscaleWithModel", upscale_model=model[0], image=image[0])
    graph.add("PreviewImage", images=scaled[0])
    return scaled


@pytest.fixture(scope="module")
def upscaler(comfy: ComfyHost, tmp_path_factory: pytest.TempPathFactory) -> None:
    """The smallest upscaling model that ComfyUI recognizes."""
    file = tmp_path_factory.mktemp("models") / "tiny_upscaler.safetensors"
    tensors = {
        "body.0.weight": torch.zeros(4, 3, 3, 3),
        "body.0.bias": torch.zeros(4),
        "body.1.weight": torch.zeros(4),
        "body.2.weight": torch.zeros(12, 4, 3, 3),
        "body.2.bias": torch.zeros(12),
    }
    save_file(tensors, file)
    comfy.add_model("upscale_models", file)


def test_saves_an_image(comfy: ComfyHost) -> None:
    graph = Graph()
    saved = graph.add("SaveImage", images=picture(graph)[0], filename_prefix="stock")
    result = comfy.run(graph)
    assert result.status == "success"
    assert result.executed == ["1", "2"]
    assert [image.getpixel((5, 5)) for image in result.images(saved)] == [(255, 128, 0)]
    assert list((comfy.base / "output").glob("stock*.png"))


def test_reports_cached_nodes(comfy: ComfyHost) -> None:
    graph = Graph()
    graph.add("PreviewImage", images=picture(graph, color=1)[0])
    comfy.run(graph)
    again = comfy.run(graph)
    assert (again.executed, sorted(again.cached)) == ([], ["1", "2"])
    assert len(again.images()) == 1


def test_loads_an_uploaded_image(comfy: ComfyHost) -> None:
    name = comfy.upload_image(Image.new("RGB", (8, 8), "blue"), "blue.png")
    graph = Graph()
    graph.add("PreviewImage", images=graph.add("LoadImage", image=name)[0])
    [image] = comfy.run(graph).images()
    assert (image.size, image.getpixel((0, 0))) == ((8, 8), (0, 0, 255))


@pytest.mark.usefixtures("upscaler")
def test_reports_progress(comfy: ComfyHost) -> None:
    graph, steps = Graph(), []
    node = upscale(graph, width=1200)
    result = comfy.run(graph, steps.append)
    assert steps == result.progress
    assert steps[-1] == (node.id, 3, 3)
    assert set(steps) <= {(node.id, step, 3) for step in (1, 2, 3)}  # 0.29 leaves quick ones out
    assert result.images()[0].size == (2400, 128)


@pytest.mark.usefixtures("upscaler")
def test_interrupts(comfy: ComfyHost) -> None:
    graph = Graph()
    node = upscale(graph, width=16384, color=1)
    with pytest.raises(GraphInterrupted) as error:
        comfy.run(graph, lambda _: comfy.interrupt())
    assert error.value.node_id == node.id


def test_a_node_that_raises(comfy: ComfyHost) -> None:
    graph = Graph()
    big = graph.add("EmptyImage", width=64, height=64, batch_size=1, color=0)
    mask = graph.add("ImageToMask", image=big[0], channel="alpha")  # there is none
    graph.add("PreviewImage", images=graph.add("MaskToImage", mask=mask[0])[0])
    with pytest.raises(GraphError) as error:
        comfy.run(graph)
    assert (error.value.node_id, error.value.node_type) == (mask.id, "ImageToMask")
    assert error.value.exception_type == "IndexError"
    assert f"node {mask.id} (ImageToMask)" in str(error.value)
    assert "line" in error.value.traceback


def test_a_graph_that_is_refused(comfy: ComfyHost) -> None:
    graph = Graph()
    image = graph.add("EmptyImage", width=64, height=-1, batch_size=1, color=0)
    graph.add("PreviewImage", images=image[0])
    with pytest.raises(GraphError, match="height") as error:
        comfy.run(graph)
    assert error.value.exception_type == "prompt_outputs_failed_validation"
    assert error.value.node_id == image.id
    assert list(error.value.node_errors) == [image.id]


def test_a_node_type_that_is_missing(comfy: ComfyHost) -> None:
    with pytest.raises(GraphError, match="NoSuchNode"):
        comfy.run({"1": {"class_type": "NoSuchNode", "inputs": {}}})


def test_queues_and_frees(comfy: ComfyHost) -> None:
    graph = Graph()
    graph.add("PreviewImage", images=picture(graph, color=2)[0])
    prompt_id = comfy.queue(graph)
    comfy.run(graph)  # behind it
    assert comfy.history(prompt_id)["status"]["completed"]
    comfy.free()
    # The server forgets when it is idle: before the next graph, or right after it.
    assert ["1", "2"] in [comfy.run(graph).executed for _ in range(2)]


def test_knows_the_node_types(comfy: ComfyHost) -> None:
    assert {"KSampler", "UNETLoader"} <= comfy.object_info().keys()
    with pytest.raises(HostError, match="404"):
        comfy.get("/no/such/path")


def test_a_server_that_does_not_start(tmp_path: Path) -> None:
    with (
        pytest.raises(HostError, match="--no-such-option"),
        ComfyHost(tmp_path, options=["--no-such-option"]),
    ):
        pass
