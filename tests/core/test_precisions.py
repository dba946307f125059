"""Every precision as a file and as a layer: quality, adapters, mixtures, bad files."""

import json

import pytest
import small_flux
import torch
from safetensors.torch import load_file, save_file

from svdq_core.errors import CheckpointError, LayerError
from svdq_core.formats.comfy_quant import LAYOUTS, LayerSpec, QuantizedCheckpoint
from svdq_core.layers import Adapter, SVDQLinear
from svdq_core.numerics import nvfp4
from svdq_core.quantizer.pipeline import MODULATIONS, PRECISIONS, FileSource, Settings, plan, quantize_checkpoint
from svdq_core.quantizer.recipes import RECIPES, quantize_layer
from svdq_core.quantizer.statistics import Calibration
from svdq_core.summary import summarize_file

LAYER, AFTER_GELU, MODULATION = "double_blocks.0.img_mlp.0", "double_blocks.0.img_mlp.2", "double_blocks.0.img_mod.lin"


@pytest.fixture(scope="module")
def full(tmp_path_factory):
    path = tmp_path_factory.mktemp("full") / "full.safetensors"
    save_file(small_flux.state_dict(), path)
    return path


@pytest.fixture(scope="module")
def calibration():
    calibration = Calibration(seed=0, rows=256)
    for layer in small_flux.quantized_layers():
        calibration.observe(layer, small_flux.inputs(layer, rows=512))
    return calibration


@pytest.fixture(scope="module")
def files(full, calibration, tmp_path_factory):
    """A balanced file of each precision."""
    folder = tmp_path_factory.mktemp("files")
    for precision in PRECISIONS:
        settings = Settings(precision, rank=16)
        quantize_checkpoint(FileSource(full), folder / f"{precision}.safetensors", settings, calibration)
    return {precision: folder / f"{precision}.safetensors" for precision in PRECISIONS}


def layer_of(path, name) -> SVDQLinear:
    checkpoint = QuantizedCheckpoint(path)
    return SVDQLinear(checkpoint.layers[name], checkpoint.read_layer(name))


def output_error(path, name) -> float:
    """On inputs that calibration did not see."""
    full, x = small_flux.state_dict(), small_flux.inputs(name, seed=99)
    exact = torch.nn.functional.linear(x, full[f"{name}.weight"].float(), full[f"{name}.bias"].float())
    return float(torch.linalg.norm(layer_of(path, name)(x) - exact) / torch.linalg.norm(exact))


@pytest.mark.parametrize("name", small_flux.body_layers())
def test_errors_are_in_the_order_of_the_bits(files, name):
    errors = {precision: output_error(path, name) for precision, path in files.items()}
    assert errors["int8"] < 0.2 * min(errors["int4"], errors["nvfp4"], errors["nf4"])
    assert errors["nvfp4"] < 1.2 * errors["int4"] and max(errors.values()) < 0.2


@pytest.mark.parametrize("precision", [name for name, form in PRECISIONS.items() if LAYOUTS[form].low_rank])
def test_smoothing_and_low_rank_pay_in_every_format_that_has_them(full, calibration, tmp_path, precision):
    errors = []
    for recipe, rank in (("fast", 0), ("balanced", 0), ("balanced", 32), ("best", 32)):
        path = tmp_path / "q.safetensors"
        settings = Settings(precision, recipe, rank, skip=("single_blocks.*", "*txt*", "*attn*", "*.2"))
        quantize_checkpoint(FileSource(full), path, settings, calibration, overwrite=True)
        errors.append(output_error(path, LAYER))
    naive, smoothed, both, best = errors
    assert both < smoothed < naive and best < 1.05 * both


def test_only_int4_needs_unsigned_codes(files):
    for precision, path in files.items():
        assert QuantizedCheckpoint(path).layers[AFTER_GELU].act_unsigned == (precision == "int4")


def test_nvfp4_activations_lie_where_e4m3_scales_are_normal(files, calibration):
    """The smoothing factor carries the scale of the tensor: small inputs keep all their bits, large ones fit."""
    checkpoint = QuantizedCheckpoint(files["nvfp4"])
    for name in small_flux.body_layers():
        smooth = checkpoint.read_layer(name)["smooth_factor"].float()
        largest = (calibration.layers[name].sample.float() / smooth).abs().amax()
        assert 448 * 6 / 64 < largest < 448 * 6 / 4


def test_inputs_of_any_size_are_nvfp4_s_own(full, tmp_path):
    """Without a scale over the tensor, activations around 1e-3 would all fall among E4M3's subnormals."""
    calibration = Calibration(rows=256)
    for name in small_flux.body_layers():
        calibration.observe(name, 1e-4 * small_flux.inputs(name))
    path = tmp_path / "q.safetensors"
    quantize_checkpoint(FileSource(full), path, Settings("nvfp4", rank=16), calibration)
    layer, x = layer_of(path, LAYER), 1e-4 * small_flux.inputs(LAYER, seed=99)
    exact = x @ small_flux.state_dict()[f"{LAYER}.weight"].float().t()
    found = layer(x) - layer.bias.float()
    assert torch.linalg.norm(found - exact) < 0.15 * torch.linalg.norm(exact)
    assert nvfp4.quantize_groups(x)[1].float().count_nonzero() < 0.9 * x.numel() / 16  # what it would have lost


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", [LAYER, AFTER_GELU, MODULATION])
@pytest.mark.parametrize("delta", [False, True])
def test_an_adapter_is_exact_and_leaves_no_trace(files, precision, name, delta):
    layer = layer_of(files[precision], name)
    n, k = layer.out_features, layer.in_features
    random = torch.Generator().manual_seed(1)
    dense = torch.randn((n, k), generator=random) if delta else None
    adapter = Adapter(torch.randn((k, 5), generator=random), torch.randn((n, 5), generator=random), dense)
    x = small_flux.inputs(name, rows=7)
    before, state = layer(x), {key: value.clone() for key, value in layer.state_dict().items()}
    layer.set_adapter("a", adapter)
    wanted = adapter.up @ adapter.down.t() + (0 if dense is None else dense)
    change = layer(x) - before
    assert torch.linalg.norm(change - x @ wanted.t()) < 6e-3 * torch.linalg.norm(x @ wanted.t())
    found = layer.adapted_weight() - layer.dequantized_weight()
    assert torch.linalg.norm(found - wanted) < 6e-3 * torch.linalg.norm(wanted)
    layer.set_adapter("a", None)
    assert torch.equal(layer(x), before) and layer.state_dict().keys() == state.keys()
    # Compared as bytes: torch cannot compare E4M3 tensors.
    for key, value in layer.state_dict().items():
        assert torch.equal(value.reshape(-1).view(torch.uint8), state[key].reshape(-1).view(torch.uint8))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128,), (2, 3, 128), (0, 128)])
def test_any_leading_shape_and_type(files, precision, dtype, shape):
    layer = layer_of(files[precision], LAYER)
    y = layer(torch.randn(shape).to(dtype))
    assert y.shape == (*shape[:-1], layer.out_features) and y.dtype == dtype and torch.isfinite(y).all()


@pytest.mark.parametrize("precision", PRECISIONS)
def test_zero_and_outlier_weights_give_finite_outputs(precision, calibration):
    n, k = small_flux.layer_shapes()[LAYER]
    low_rank = LAYOUTS[PRECISIONS[precision]].low_rank
    spec = LayerSpec(LAYER, PRECISIONS[precision], n, k, 16 * low_rank, False, torch.bfloat16)
    weight = torch.randn((n, k), generator=torch.Generator().manual_seed(0))
    weight[3], weight[:, 5], weight[0, 0] = 0, 0, 1e4
    for tested in (weight, 1e-30 * weight, 0 * weight):
        quantized = quantize_layer(spec, tested, None, calibration.layers[LAYER], RECIPES["best"])
        layer = SVDQLinear(quantized.spec, quantized.tensors)
        y = layer(small_flux.inputs(LAYER))
        assert torch.isfinite(y).all()
    assert not y.any()


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("modulations", MODULATIONS)
def test_a_file_says_its_formats_layer_by_layer(full, tmp_path, precision, modulations):
    path = tmp_path / "q.safetensors"
    quantize_checkpoint(FileSource(full), path, Settings(precision, "fast", 16, modulations=modulations))
    checkpoint, summary = QuantizedCheckpoint(path), summarize_file(path)
    wanted = dict.fromkeys(small_flux.body_layers(), PRECISIONS[precision])
    if MODULATIONS[modulations]:
        wanted |= dict.fromkeys(small_flux.modulations(), MODULATIONS[modulations])
    assert {name: layer.format for name, layer in checkpoint.layers.items()} == wanted
    assert all(layer.rank == 0 for name, layer in checkpoint.layers.items() if name in small_flux.modulations())
    stored = {name: layer.stored_format for name, layer in checkpoint.layers.items()}
    assert {layer.name: layer.format for layer in summary.layers} == stored
    assert all(form in summary.text() for form in stored.values())
    assert sum(layer.nbytes for layer in checkpoint.layers.values()) == sum(
        tensor.nbytes for key, tensor in load_file(path).items() if key not in checkpoint.plain and "quant" not in key
    )


@pytest.mark.parametrize("precision", PRECISIONS)
def test_modulations_have_4_bits_unless_told_otherwise_and_8_where_the_body_has(full, tmp_path, precision):
    path = tmp_path / "q.safetensors"
    quantize_checkpoint(FileSource(full), path, Settings(precision, "fast", 16))
    checkpoint = QuantizedCheckpoint(path)
    expected = "svdquant_w8a8" if precision == "int8" else "awq_w4a16"
    assert {checkpoint.layers[name].format for name in small_flux.modulations()} == {expected}
    assert checkpoint.report["modulations"] == ("int8" if precision == "int8" else "awq_w4a16")


def test_8_bit_modulations_are_several_times_as_close(full, tmp_path, calibration):
    errors = {}
    for modulations in ("awq_w4a16", "int8"):
        settings = Settings("int8", "balanced", 16, skip=small_flux.body_layers()[1:], modulations=modulations)
        report = quantize_checkpoint(FileSource(full), tmp_path / modulations, settings, calibration)
        errors[modulations] = report.layers[MODULATION]["weight_error"]
    assert errors["int8"] < 0.25 * errors["awq_w4a16"]


def test_one_file_may_mix_them_all(files, tmp_path):
    """The formats are the layers', not the file's."""
    tensors = load_file(files["int4"])
    for name, precision in zip(small_flux.body_layers(), 3 * list(PRECISIONS), strict=False):
        tensors = {key: value for key, value in tensors.items() if not key.startswith(f"{name}.")}
        other = load_file(files[precision])
        tensors |= {key: value for key, value in other.items() if key.startswith(f"{name}.")}
    save_file(tensors, tmp_path / "mixed.safetensors")
    mixed = QuantizedCheckpoint(tmp_path / "mixed.safetensors")
    assert {layer.format for layer in mixed.layers.values()} == {*PRECISIONS.values(), "awq_w4a16"}
    assert output_error(tmp_path / "mixed.safetensors", LAYER) < 0.2


def test_a_channel_scale_is_a_factor_on_each_output(files, tmp_path):
    tensors = load_file(files["nvfp4"])
    n = tensors[f"{LAYER}.proj_up"].shape[0]
    scale = (torch.rand(n) + 0.5).to(torch.bfloat16)
    tensors[f"{LAYER}.weight_channel_scale"] = scale
    save_file(tensors, tmp_path / "q.safetensors")
    plain, scaled = layer_of(files["nvfp4"], LAYER), layer_of(tmp_path / "q.safetensors", LAYER)
    branch = plain.proj_up.float() @ plain.proj_down.float().t()
    expected = (plain.dequantized_weight() - branch) * scale.float()[:, None] + branch
    assert torch.allclose(scaled.dequantized_weight(), expected, atol=1e-5)
    x = small_flux.inputs(LAYER)
    exact = x @ expected.t() + plain.bias.float()
    assert torch.linalg.norm(scaled(x) - exact) < 0.15 * torch.linalg.norm(exact)


def test_nf4_needs_neither_calibration_nor_rank(full, tmp_path):
    planned = plan(FileSource(full), Settings("nf4", "best"))
    assert not planned.calibrates(RECIPES["best"])
    report = quantize_checkpoint(FileSource(full), tmp_path / "q.safetensors", Settings("nf4", "best"))
    assert set(report.layers) == set(small_flux.quantized_layers())
    assert QuantizedCheckpoint(tmp_path / "q.safetensors").report["rank"] == 0


@pytest.mark.parametrize("precision", ["int4", "int8"])
def test_a_calibration_saved_before_modulations_were_quantized_serves_on(full, tmp_path, calibration, precision):
    old = Calibration(rows=256)
    old.layers = {name: calibration.layers[name] for name in small_flux.body_layers()}
    report = quantize_checkpoint(FileSource(full), tmp_path / "q.safetensors", Settings(precision), old)
    assert "output_error" in report.layers[LAYER] and "output_error" not in report.layers[MODULATION]


def test_calibration_of_another_model_s_modulations_is_refused(full, tmp_path, calibration):
    other = Calibration(rows=256)
    other.layers = dict(calibration.layers)
    other.layers.pop(MODULATION)
    other.observe(MODULATION, torch.randn(8, 64))
    with pytest.raises(LayerError, match=f"{MODULATION} .*another model"):
        quantize_checkpoint(FileSource(full), tmp_path / "q.safetensors", Settings(), other)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_the_same_seed_gives_the_same_bytes(full, calibration, tmp_path, precision, recipe):
    settings = Settings(precision, recipe, 16, skip=("single_blocks.*", "*txt*", "*attn*"))
    for name in ("a", "b"):
        quantize_checkpoint(FileSource(full), tmp_path / name, settings, calibration)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()


def config(**entries):
    return torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8)


@pytest.mark.parametrize(
    ("precision", "name", "change", "why"),
    [
        ("nvfp4", LAYER, {"weight_tensor_scale": None}, "lacks its tensor 'weight_tensor_scale'"),
        ("nvfp4", LAYER, {"weight_scale": torch.zeros(8, 512)}, "weight_scale is"),
        ("nvfp4", LAYER, {"weight_tensor_scale": torch.zeros(2)}, "weight_tensor_scale is"),
        ("nvfp4", LAYER, {"weight_channel_scale": torch.zeros(3)}, "weight_channel_scale is"),
        ("int8", LAYER, {"weight_scale": torch.zeros(512, dtype=torch.bfloat16)}, "weight_scale is"),
        ("int8", LAYER, {"proj_up": None}, "lacks its tensor 'proj_up'"),
        ("int8", LAYER, {"weight": torch.zeros(512, 100).char()}, "K = 100"),
        ("nf4", LAYER, {"weight_scale": torch.zeros(2, 512, dtype=torch.float16)}, "weight_scale is"),
        ("int4", MODULATION, {"weight_zero": None}, "lacks its tensor 'weight_zero'"),
        ("int4", MODULATION, {"weight_zero": torch.zeros(1, 768)}, "weight_zero is"),
        ("int4", MODULATION, {"comfy_quant": config(format="awq_w4a16", group_size=128)}, "groups of 128"),
        ("int4", MODULATION, {"comfy_quant": config(format="awq_w3a16")}, "'awq_w3a16'.*awq_w4a16"),
        ("int4", MODULATION, {"comfy_quant": config(format=["awq_w4a16"])}, "has the format"),
        ("nvfp4", LAYER, {"comfy_quant": config(format="svdquant_nvfp5")}, "'svdquant_nvfp5'"),
    ],
)
def test_a_broken_layer_is_named_with_its_file(files, tmp_path, precision, name, change, why):
    tensors = load_file(files[precision])
    for tensor, value in change.items():
        tensors.pop(f"{name}.{tensor}", None)
        if value is not None:
            tensors[f"{name}.{tensor}"] = value
    path = tmp_path / "broken.safetensors"
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match=why) as caught:
        QuantizedCheckpoint(path)
    assert name in str(caught.value) and str(path) in str(caught.value)
