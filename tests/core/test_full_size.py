"""The generator of full-size models: true names and shapes, outliers, and a run on a few blocks of them."""

import json
import math

import pytest
import torch

from benchmarks import full_size
from benchmarks.flux_sizes import PARAMETERS
from svdq_core.architectures import detect


@pytest.mark.parametrize(("model", "parameters"), [("flux1-dev", PARAMETERS), ("sdxl", 2_567_463_684)])
def test_a_model_has_the_parameters_of_the_published_one(model, parameters):
    shapes = full_size.MODELS[model](None)
    assert sum(math.prod(shape) for shape in shapes.values()) == parameters
    assert detect(shapes, model)[0].name in model


def test_weights_and_inputs_have_the_outliers_of_real_ones():
    weight = full_size.weight("a.weight", (512, 1024), "cpu").float()
    assert torch.equal(weight, full_size.weight("a.weight", (512, 1024), "cpu").float())
    x = full_size.inputs("a", 1024, False, "cpu").float()
    size = x.abs().median(0).values
    outliers = size / size.median() > 8
    assert 0.005 < outliers.float().mean() < 0.02 and 10 < (size / size.median()).max() < 200
    assert x.abs().amax(1).max() > 5 * x.abs().amax(1).median()
    values = torch.linalg.svdvals(weight)
    assert values[0] > 1.5 * values[100]


def test_make_and_run_measure_a_small_part(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(full_size, "HIDDEN", 128)
    path, results = tmp_path / "flux.safetensors", tmp_path / "results.json"
    for command in (
        ["make", "flux1-dev", str(path), "--layers", "1"],
        ["run", str(path), "--recipe", "balanced", "--rank", "16", "--results", str(results)],
    ):
        monkeypatch.setattr("sys.argv", ["full_size", *command, "--device", "cpu"])
        full_size.main()
    measured = json.loads(results.read_text())["models"]["flux1-dev"]["balanced, int4, rank 16"]
    assert measured["layers"] == 13 and 0 < measured["error"]["mean"] < 0.5
    assert set(measured["stages"]) == {"read", "quantize", "write"}
    assert not path.with_suffix(".quantized.safetensors").exists()
