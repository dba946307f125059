"""Four-bit layers evaluated in 8 bits: what the image stands for, and when a layer is evaluated so."""

import pytest
import small_flux
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svdq_core import layers
from svdq_core.formats.comfy_quant import LAYOUTS, SVDQUANT_NVFP4, SVDQUANT_W4A4, LayerSpec
from svdq_core.formats.weights import of_outputs, quantized_part
from svdq_core.kernels import prefers_int8
from svdq_core.layers import Adapter, SVDQLinear
from svdq_core.numerics import hadamard, int8
from svdq_core.ops import as_int8
from svdq_core.quantizer.recipes import RECIPES, quantize_layer

NAMES = ("double_blocks.0.img_attn.qkv", "double_blocks.0.img_mlp.2")


def make(name: str, layer_format: str, dtype: torch.dtype = torch.bfloat16, bias: bool = True) -> SVDQLinear:
    n, k = small_flux.layer_shapes()[name]
    full = small_flux.state_dict(dtype)
    unsigned = layer_format == SVDQUANT_W4A4 and name.endswith("mlp.2")
    spec = LayerSpec(name, layer_format, n, k, 32, bias, dtype, unsigned)
    made = quantize_layer(spec, full[f"{name}.weight"], full[f"{name}.bias"] if bias else None, None, RECIPES["fast"])
    return SVDQLinear(made.spec, {name: tensor.contiguous() for name, tensor in made.tensors.items()})


def error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return ((found.double() - expected.double()).norm() / expected.double().norm()).item()


@pytest.fixture
def in_8_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """As on a card that prefers it."""
    monkeypatch.setattr(layers, "prefers_int8", lambda *_: True)


@pytest.mark.usefixtures("in_8_bits")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("layer_format", [SVDQUANT_W4A4, SVDQUANT_NVFP4])
@pytest.mark.parametrize("name", NAMES)
def test_a_layer_is_its_full_weight_within_8_bits(name, layer_format, dtype):
    layer = make(name, layer_format, dtype)
    x = small_flux.inputs(name, rows=77).to(dtype)
    expected = x.double() @ layer.adapted_weight().double().t() + layer.bias.double() - layer.bias_shift()
    in_8_bits = error(layer(x), expected)
    assert in_8_bits < 0.016
    layer.exact = True
    assert error(layer(x), expected) > 1.5 * in_8_bits, "four-bit inputs cost more"


@pytest.mark.usefixtures("in_8_bits")
@pytest.mark.parametrize("layer_format", [SVDQUANT_W4A4, SVDQUANT_NVFP4])
def test_adapters_are_part_of_the_weight(layer_format):
    layer = make(NAMES[0], layer_format)
    x, random = small_flux.inputs(NAMES[0], rows=33).bfloat16(), torch.Generator().manual_seed(0)
    before = layer(x)
    n, k = layer.out_features, layer.in_features
    layer.set_adapter("lora", Adapter(torch.randn((k, 5), generator=random), torch.randn((n, 5), generator=random)))
    expected = x.double() @ layer.adapted_weight().double().t() + layer.bias.double()
    assert error(layer(x), expected) < 0.016 and error(before, expected) > 0.5
    layer.set_adapter("lora", None)
    assert torch.equal(layer(x), before)


def test_who_evaluates_in_8_bits(monkeypatch):
    layer = make(NAMES[0], SVDQUANT_W4A4)
    x = small_flux.inputs(NAMES[0], rows=5).bfloat16()
    exact = layer(x)
    asked = []
    monkeypatch.setattr(layers, "prefers_int8", lambda *about: not asked.append(about))
    rounded = layer(x)
    assert asked == [(x.device, layer.out_features, layer.in_features)]
    assert not torch.equal(rounded, exact)
    assert not torch.equal(layer(x.half()).bfloat16(), layer(x)), "cast for one call: as the format says"
    assert len(asked) == 2
    moved = {name: tensor.clone() if tensor is not None else None for name, tensor in layer.active_tensors().items()}
    assert torch.equal(layer._evaluate(x, moved), exact), "moved for one call: as the format says"
    patched = layer.active_tensors() | {"bias": layer.bias.clone()}
    assert torch.equal(layer._evaluate(x, patched), exact), "patched for one call: likewise"
    layer.exact = True
    assert torch.equal(layer(x), exact)


def test_torch_compile_asks_once_and_does_not_look_inside(monkeypatch):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda index: (9, 0))
    ask = lambda x: x + prefers_int8(torch.device("cuda", 0), 1, 1)  # noqa: E731
    x = torch.zeros(3)
    assert torch.equal(torch.compile(ask, fullgraph=True, backend="eager")(x), ask(x))


@pytest.mark.usefixtures("in_8_bits")
@pytest.mark.parametrize("layer_format", [SVDQUANT_W4A4, SVDQUANT_NVFP4])
def test_a_compiled_layer_is_the_layer(layer_format):
    layer, x = make(NAMES[1], layer_format), small_flux.inputs(NAMES[1], rows=5).bfloat16()
    compiled = torch.compile(layer, fullgraph=True, backend="eager")
    in_8_bits = layer(x)
    assert torch.equal(compiled(x), in_8_bits)
    layer.exact = True
    assert torch.equal(compiled(x), layer(x)) and not torch.equal(layer(x), in_8_bits)


@settings(max_examples=25, deadline=None)
@given(
    layer_format=st.sampled_from([SVDQUANT_W4A4, SVDQUANT_NVFP4]),
    name=st.sampled_from(NAMES),
    piece=st.integers(1, 2**17),
    bias=st.booleans(),
)
def test_an_image_does_not_depend_on_its_pieces(layer_format, name, piece, bias):
    layer = make(name, layer_format, bias=bias)
    tensors = layer.active_tensors()
    operands = tuple(tensors.get(operand) for operand in as_int8.NAMES)
    form = layer.spec.format, layer.spec.act_unsigned, layer.spec.rotated
    whole = as_int8.image(operands, *form)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(as_int8, "_PIECE", piece)
        pieces = as_int8.image(operands, *form)
    assert error(whole.weight_scale, pieces.weight_scale) < 1e-5
    assert (whole.weight.int() - pieces.weight.int()).abs().max() <= 1, "sums may be taken in another order"
    restored = hadamard.rotate(int8.dequantize(whole.weight, whole.weight_scale[:, None])) * whole.inverse.float()
    assert error(restored, layer.adapted_weight()) < 0.011
    assert (whole.bias is None) == (not bias)


def test_an_image_leaves_what_it_is_made_of_alone():
    layer = make("double_blocks.0.img_mlp.2", SVDQUANT_W4A4)
    operands = [layer.active_tensors().get(operand) for operand in as_int8.NAMES]
    operands[-1] = operands[-1].float()
    before = [tensor if tensor is None else tensor.clone() for tensor in operands]
    image = as_int8.image(tuple(operands), layer.spec.format, layer.spec.act_unsigned, layer.spec.rotated)
    assert not torch.equal(image.bias, before[-1])
    assert all(a is b is None or torch.equal(a, b) for a, b in zip(operands, before, strict=True))


def test_the_input_s_codes_are_of_the_rotated_input():
    x = torch.randn(40, 192, dtype=torch.float64)
    x[7] = 0
    x[8, 100] = 300
    inverse = torch.rand(192) + 0.5
    codes, scale = as_int8.quantize_input(x.float(), inverse)
    expected = (x * inverse).unflatten(1, (-1, 64)) @ hadamard.matrix(torch.float64)
    expected = expected.flatten(1)
    assert torch.allclose(scale.double(), expected.abs().amax(1, keepdim=True) / 127, rtol=1e-5)
    assert ((codes * scale - expected).abs() <= 0.501 * scale).all() and not codes[7].any()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_no_finite_input_makes_nan(dtype):
    x = torch.full((3, 128), torch.finfo(dtype).max, dtype=dtype)
    x[1] = torch.finfo(dtype).tiny
    codes, scale = as_int8.quantize_input(x, torch.full((128,), 4.0).to(dtype))
    assert torch.isfinite(scale).all() and not (codes * scale).isnan().any()
    assert codes[0].any() and codes[1].any() == (dtype == torch.float16)


def test_some_outputs_of_a_layer_are_those_of_all():
    for layer_format in LAYOUTS:
        if layer_format not in (SVDQUANT_W4A4, SVDQUANT_NVFP4):
            continue
        layer = make(NAMES[0], layer_format)
        tensors, some = layer.active_tensors(), slice(30, 70)
        part = quantized_part(layer_format, of_outputs(layer_format, tensors, some), layer.spec.rotated)
        whole = quantized_part(layer_format, tensors, layer.spec.rotated)
        assert torch.allclose(part, whole[some], rtol=1e-5, atol=1e-6)
