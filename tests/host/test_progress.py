"""What the server tells the browser while it quantizes."""

import contextlib
import json

import pytest
import websocket

from demo.examples import EXAMPLES, QUANTIZED, with_demo_model


@pytest.fixture(scope="module")
def events(comfy):
    """(node id, its events, what it showed at the end) of one calibrated quantization."""
    workflow = json.loads((EXAMPLES / "quantize-your-checkpoint.json").read_text(encoding="utf-8"))
    graph = with_demo_model(workflow, comfy.object_info(), steps=2)
    [quantizer] = [key for key, node in graph.nodes.items() if node["class_type"] == "SVDQuantQuantizeCheckpoint"]
    events, shown = [], None
    address = f"{comfy.url.replace('http', 'ws')}/ws?clientId=watcher"
    with contextlib.closing(websocket.create_connection(address, timeout=120)) as connection:
        comfy.queue(graph, "watcher")
        while True:
            message = connection.recv()
            if isinstance(message, bytes):
                continue
            message = json.loads(message)
            data = message["data"]
            if message["type"] == "svdquant.progress":
                events.append(data)
            elif message["type"] == "executed" and data["node"] == quantizer:
                shown = data["output"]
            elif message["type"] in ("execution_success", "execution_error"):
                break
    yield quantizer, events, shown
    (comfy.base / "models" / "diffusion_models" / QUANTIZED).unlink()


def test_stages_come_in_order_and_the_count_goes_up_to_its_end(events):
    quantizer, told, _ = events
    stages = [event["stage"] for event in told]
    order = ["calibrating", "copying", "quantizing", "finishing"]
    assert list(dict.fromkeys(stages)) == order and stages == sorted(stages, key=order.index)
    assert {event["node"] for event in told} == {quantizer}
    done = [event["done"] for event in told]
    assert done == sorted(done) and done[-1] == told[-1]["total"] == told[0]["total"]


def test_each_step_is_named_with_the_time_left_and_the_error_so_far(events):
    _, told, shown = events
    layers = [event for event in told if event["stage"] == "quantizing"]
    assert [event["step"] for event in layers] == [layer["name"] for layer in shown["svdquant_layers"]]
    assert layers[0]["error"] is None and layers[0]["seconds_left"] is None
    assert all(0 < event["seconds_left"] < 600 for event in layers[1:])
    errors = [layer["error"] for layer in shown["svdquant_layers"]]
    assert told[-1]["error"] == pytest.approx(sum(errors) / len(errors), abs=1e-4)
    assert any(event["seconds_left"] for event in told if event["stage"] == "calibrating")
