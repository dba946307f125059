"""Quantizing layers and checkpoints: quality, determinism, bad input."""

import os

import pytest
import small_flux
import torch
from safetensors.torch import load_file, save_file

from svdq_core.errors import CheckpointError, LayerError, SVDQuantError
from svdq_core.formats.comfy_quant import LayerSpec, QuantizedCheckpoint
from svdq_core.layers import SVDQLinear
from svdq_core.quantizer.lowrank import truncated_svd
from svdq_core.quantizer.pipeline import FileSource, Settings, plan, quantize_checkpoint
from svdq_core.quantizer.recipes import RECIPES, Recipe, quantize_layer
from svdq_core.quantizer.statistics import Calibration

LAYER = "double_blocks.0.img_mlp.0"


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    path = tmp_path_factory.mktemp("full") / "full.safetensors"
    save_file(small_flux.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def calibration():
    calibration = Calibration(seed=0, rows=512)
    for layer in small_flux.quantized_layers():
        calibration.observe(layer, small_flux.inputs(layer, rows=1024))
    return calibration


def spec(name=LAYER, rank=32, unsigned=False):
    n, k = small_flux.layer_shapes()[name]
    return LayerSpec(name, "svdquant_w4a4", n, k, rank, True, torch.bfloat16, unsigned)


def quantize(recipe, calibration, name=LAYER, rank=32, unsigned=False):
    full = small_flux.state_dict()
    statistics = calibration.layers[name] if calibration else None
    return quantize_layer(
        spec(name, rank, unsigned),
        full[f"{name}.weight"],
        full[f"{name}.bias"],
        statistics,
        recipe,
    )


def output_error(name, quantized):
    """On inputs that calibration did not see."""
    full = small_flux.state_dict()
    x = small_flux.inputs(name, seed=99)
    exact = torch.nn.functional.linear(x, full[f"{name}.weight"].float(), full[f"{name}.bias"].float())
    layer = SVDQLinear(quantized.spec, quantized.tensors)
    return float(torch.linalg.norm(layer(x) - exact) / torch.linalg.norm(exact))


def test_each_step_of_the_method_pays(calibration):
    """The paper's ablation (figure 8) on one layer: rounding < smoothing < both with low rank."""
    naive = output_error(LAYER, quantize(Recipe(), calibration, rank=0))
    smoothed = output_error(LAYER, quantize(Recipe(smooth="grid"), calibration, rank=0))
    low_rank = output_error(LAYER, quantize(Recipe(), calibration))
    both = output_error(LAYER, quantize(Recipe(smooth="grid"), calibration))
    assert both < smoothed < naive and both < low_rank < naive


def test_unsigned_codes_serve_a_gelu_better(calibration):
    name = "double_blocks.0.img_mlp.2"
    signed = output_error(name, quantize(RECIPES["balanced"], calibration, name))
    unsigned = output_error(name, quantize(RECIPES["balanced"], calibration, name, unsigned=True))
    assert unsigned < 0.8 * signed


def test_reported_errors_are_the_layer_s(calibration):
    quantized = quantize(RECIPES["balanced"], calibration)
    full = small_flux.state_dict()[f"{LAYER}.weight"].float()
    layer = SVDQLinear(quantized.spec, quantized.tensors)
    error = torch.linalg.norm(layer.dequantized_weight() - full) / torch.linalg.norm(full)
    assert quantized.weight_error == pytest.approx(float(error), rel=1e-4)
    assert quantized.output_error == pytest.approx(output_error(LAYER, quantized), rel=0.3)


@pytest.mark.parametrize("rank", [0, 5, 32])
def test_truncated_svd_is_nearly_the_best_of_its_rank(rank):
    random = torch.Generator().manual_seed(0)
    matrix = torch.randn((96, 64), generator=random) @ torch.diag(0.9 ** torch.arange(64.0))
    up, down = truncated_svd(matrix, rank, torch.Generator().manual_seed(1))
    values = torch.linalg.svdvals(matrix)
    best = values[rank:].square().sum().sqrt()
    assert up.shape == (96, rank) and down.shape == (64, rank)
    assert torch.linalg.norm(matrix - up @ down.t()) <= 1.001 * best


def test_truncated_svd_of_a_thin_matrix_pads_with_zeros():
    matrix = torch.randn(8, 64)
    up, down = truncated_svd(matrix, 32, torch.Generator().manual_seed(1))
    assert up.shape == (8, 32) and torch.allclose(up @ down.t(), matrix, atol=1e-5)


@pytest.mark.parametrize("recipe", RECIPES)
def test_the_same_seed_gives_the_same_bytes(full, calibration, tmp_path, recipe):
    files = []
    for name in ("a", "b"):
        path = tmp_path / f"{name}.safetensors"
        quantize_checkpoint(FileSource(full), path, Settings(recipe=recipe), calibration)
        files.append(path.read_bytes())
    assert files[0] == files[1]


def test_the_file_says_how_it_was_made(full, calibration, tmp_path):
    path = tmp_path / "q.safetensors"
    steps = []
    report = quantize_checkpoint(
        FileSource(full), path, Settings(rank=16), calibration, lambda *step: steps.append(step)
    )
    about = QuantizedCheckpoint(path).report
    assert about["recipe"] == "balanced" and about["rank"] == 16
    assert about["calibration"]["rows"] == 1024 * len(small_flux.quantized_layers())
    assert set(about["layers"]) == set(small_flux.quantized_layers())
    assert all(0 < layer["output_error"] < 0.3 for layer in about["layers"].values())
    assert report.file_bytes == path.stat().st_size
    done = [step[0] for step in steps]
    assert done == sorted(done) and done[-1] == steps[-1][1]


def test_skipped_layers_stay_as_they_were(full, tmp_path):
    path = tmp_path / "q.safetensors"
    settings = Settings(recipe="fast", skip=("double_blocks.*", "single_blocks.0.linear2", "*.modulation.lin"))
    quantize_checkpoint(FileSource(full), path, settings)
    assert set(QuantizedCheckpoint(path).layers) == {"single_blocks.0.linear1"}
    key = "single_blocks.0.linear2.weight"
    assert torch.equal(load_file(path)[key], small_flux.state_dict()[key])


def test_a_full_checkpoint_s_prefix_is_stripped(full, tmp_path):
    tensors = {f"model.diffusion_model.{k}": v for k, v in small_flux.state_dict().items()}
    tensors["first_stage_model.decoder.weight"] = torch.zeros(2)
    save_file(tensors, tmp_path / "checkpoint.safetensors")
    paths = []
    for source in (full, tmp_path / "checkpoint.safetensors"):
        paths.append(tmp_path / f"q{len(paths)}.safetensors")
        quantize_checkpoint(FileSource(source), paths[-1], Settings(recipe="fast"))
    assert paths[0].read_bytes() == paths[1].read_bytes()


@pytest.mark.parametrize(("weights", "stored"), [(torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16)])
@pytest.mark.parametrize("held_in_float32", [False, True])
def test_the_file_keeps_the_model_s_16_bit_type(tmp_path, weights, stored, held_in_float32):
    tensors = small_flux.state_dict(weights)
    if held_in_float32:
        tensors = {name: tensor.float() for name, tensor in tensors.items()}
    save_file(tensors, tmp_path / "full.safetensors")
    planned = plan(FileSource(tmp_path / "full.safetensors"), Settings())
    assert {spec.dtype for spec in (*planned.plain.values(), *planned.layers.values())} == {stored}


def broken(tmp_path, change):
    tensors = small_flux.state_dict()
    change(tensors)
    save_file(tensors, tmp_path / "broken.safetensors")
    return FileSource(tmp_path / "broken.safetensors")


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("key", [f"{LAYER}.weight", f"{LAYER}.bias", "img_in.weight"])
def test_nan_in_the_weights_names_file_and_layer(tmp_path, key, value):
    source = broken(tmp_path, lambda tensors: tensors[key].view(-1)[3:4].fill_(value))
    with pytest.raises(LayerError, match=r"broken\.safetensors") as caught:
        quantize_checkpoint(source, tmp_path / "q.safetensors", Settings(recipe="fast"))
    assert key.removesuffix(".weight").removesuffix(".bias") in str(caught.value)
    assert os.listdir(tmp_path) == ["broken.safetensors"]


def test_k_not_a_multiple_of_64_is_refused_before_any_work(tmp_path):
    def shrink(tensors):
        tensors[f"{LAYER}.weight"] = tensors[f"{LAYER}.weight"][:, :96].contiguous()

    source = broken(tmp_path, shrink)
    with pytest.raises(LayerError, match=f"{LAYER} has 96 .* skip"):
        plan(source, Settings())
    assert LAYER not in plan(source, Settings(skip=(LAYER,))).layers


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_nan_in_the_calibration_names_the_layer(full, tmp_path, value):
    calibration = Calibration()
    for layer in small_flux.quantized_layers():
        x = small_flux.inputs(layer)
        if layer == LAYER:
            x[5, 5] = value
        calibration.observe(layer, x)
    with pytest.raises(LayerError, match=LAYER):
        quantize_checkpoint(FileSource(full), tmp_path / "q", Settings(), calibration)
    assert not os.listdir(tmp_path)


def test_calibration_of_another_model_is_refused(full, tmp_path, calibration):
    with pytest.raises(SVDQuantError, match="needs calibration"):
        quantize_checkpoint(FileSource(full), tmp_path / "q", Settings())
    with pytest.raises(LayerError, match="no calibration data"):
        quantize_checkpoint(FileSource(full), tmp_path / "q", Settings(), Calibration())
    other = Calibration()
    for layer in small_flux.quantized_layers():
        other.observe(layer, torch.randn(8, 64))
    with pytest.raises(LayerError, match="of another model"):
        quantize_checkpoint(FileSource(full), tmp_path / "q", Settings(), other)


@pytest.mark.parametrize(
    "settings",
    [
        {"recipe": "magic"},
        {"rank": 257},
        {"rank": -1},
        {"precision": "int3"},
        {"modulations": "int4"},
        {"skip": ("*",)},
    ],
)
def test_settings_that_make_no_sense_are_refused(full, tmp_path, settings):
    with pytest.raises(SVDQuantError):
        quantize_checkpoint(FileSource(full), tmp_path / "q", Settings(**settings))


def test_other_models_and_quantized_ones_are_refused(full, tmp_path):
    save_file({"a.weight": torch.zeros(64, 64)}, tmp_path / "other.safetensors")
    with pytest.raises(CheckpointError, match=r"other\.safetensors .* flux, sdxl, pixart"):
        FileSource(tmp_path / "other.safetensors")
    eight_bit = {k: v.to(torch.float8_e4m3fn) for k, v in small_flux.state_dict().items()}
    save_file(eight_bit, tmp_path / "fp8.safetensors")
    with pytest.raises(CheckpointError, match="16-bit"):
        plan(FileSource(tmp_path / "fp8.safetensors"), Settings())
    quantize_checkpoint(FileSource(full), tmp_path / "q.safetensors", Settings(recipe="fast"))
    with pytest.raises(CheckpointError, match="quantized already"):
        plan(FileSource(tmp_path / "q.safetensors"), Settings())
