"""A whole layer on the GPU against the reference on the CPU."""

import pytest
import small_flux
import torch

from svdq_core import layers
from svdq_core.formats import comfy_quant
from svdq_core.formats.comfy_quant import LayerSpec
from svdq_core.kernels import prefers_int8
from svdq_core.layers import Adapter
from svdq_core.ops import block
from svdq_core.ops.int4 import _linear_w4a4_reference
from svdq_core.quantizer.recipes import RECIPES, quantize_layer
from svdq_core.quantizer.statistics import Calibration

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", small_flux.quantized_layers())
@pytest.mark.parametrize("adapted", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_a_layer_on_the_gpu_matches_the_reference(name, dtype, adapted, exact, monkeypatch):
    prefers = prefers_int8(torch.device("cuda", 0), 64, 64)
    n, k = small_flux.layer_shapes()[name]
    full = small_flux.state_dict(dtype)
    spec = LayerSpec(name, "svdquant_w4a4", n, k, 32, True, dtype, name.endswith("mlp.2"))
    quantized = quantize_layer(spec, full[f"{name}.weight"], full[f"{name}.bias"], None, RECIPES["fast"])
    layer = layers.SVDQLinear(quantized.spec, quantized.tensors)
    if adapted:
        random = torch.Generator().manual_seed(1)
        layer.set_adapter("lora", Adapter(torch.randn((k, 5), generator=random), torch.randn((n, 5), generator=random)))
    x = small_flux.inputs(name, rows=77).to(dtype)
    layer.exact = exact
    with monkeypatch.context() as patch:
        patch.setattr(layers, "prefers_int8", lambda *_: prefers)  # as the card does
        expected = layer(x).float()
    found = layer.cuda()(x.cuda()).cpu().float()
    # Codes at a tie may fall either way; everything else is rounding to 16 bits.
    assert torch.linalg.norm(found - expected) < 1e-2 * torch.linalg.norm(expected)


def on_the_gpu(name, dtype, unsigned=False):
    n, k = small_flux.layer_shapes()[name]
    full = small_flux.state_dict(dtype)
    spec = LayerSpec(name, "svdquant_w4a4", n, k, 32, True, dtype, unsigned)
    quantized = quantize_layer(spec, full[f"{name}.weight"], full[f"{name}.bias"], None, RECIPES["fast"])
    return layers.SVDQLinear(quantized.spec, quantized.tensors).cuda()


@pytest.mark.parametrize("evaluated", ["as the card prefers", "exactly", "as on other cards"])
@pytest.mark.parametrize(
    ("name", "plain"), [("double_blocks.0.img_mlp.2", 0), ("single_blocks.0.linear2", small_flux.HIDDEN)]
)
def test_a_layer_takes_the_gelu_along(name, plain, evaluated, monkeypatch):
    layer = on_the_gpu(name, torch.bfloat16, unsigned=not plain)
    n, k = layer.out_features, layer.in_features
    layer.exact = evaluated == "exactly"
    if evaluated == "as on other cards":
        monkeypatch.setattr(layers, "prefers_int8", lambda *_: False)
    y = torch.randn(2, 45, k - plain + 64, device="cuda").bfloat16()[..., 64:]
    x = torch.randn(2, 45, plain, device="cuda").bfloat16()
    expected = layer(torch.cat((x, torch.nn.functional.gelu(y, approximate="tanh")), -1)).float()
    with monkeypatch.context() as patch:
        if evaluated != "exactly" or not prefers_int8(torch.device("cuda", 0), n, k):
            patch.setattr(layers, "gelu_concat", None)  # is not needed
        found = layer.of_gelu(x, y).float()
    assert torch.linalg.norm(found - expected) < 1e-2 * torch.linalg.norm(expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("batch", [1, 2])
def test_a_layer_norms_and_rotates_the_heads_it_writes(batch, dtype, monkeypatch):
    layer, hidden = on_the_gpu("single_blocks.0.linear1", dtype), small_flux.HIDDEN
    x = torch.randn(batch, 77, hidden, device="cuda").to(dtype)
    norm_q, norm_k = torch.rand(2, 128, device="cuda").to(dtype)
    rope = torch.randn(1, 1, 77, 64, 2, 2, device="cuda")
    operands = norm_q, norm_k, rope, hidden // 128, 1e-6
    if prefers_int8(x.device, layer.out_features, hidden):
        assert layer.normed_heads(x, *operands) is None
    monkeypatch.setattr(layers, "prefers_int8", lambda *_: False)
    found = layer.normed_heads(x, *operands)
    with monkeypatch.context() as patch:
        patch.setattr(layers, "linear_w4a4", _linear_w4a4_reference)
        y = layer(x)
    q, k, v = block._norm_rope_reference([y[..., : 3 * hidden]], [norm_q], [norm_k], rope, hidden // 128, 1e-6)
    expected = torch.cat((*(part.transpose(1, 2).flatten(2) for part in (q, k, v)), y[..., 3 * hidden :]), -1)
    assert found.shape == y.shape
    assert torch.linalg.norm((found - expected).float()) < 1e-2 * torch.linalg.norm(expected.float())


def test_a_layer_that_leaves_the_gpu_takes_all_its_memory_along():
    name = small_flux.quantized_layers()[0]
    n, k = small_flux.layer_shapes()[name]
    full = small_flux.state_dict(torch.bfloat16)
    spec = LayerSpec(name, "svdquant_w4a4", n, k, 32, True, torch.bfloat16)
    quantized = quantize_layer(spec, full[f"{name}.weight"], full[f"{name}.bias"], None, RECIPES["fast"])
    layer, x = layers.SVDQLinear(quantized.spec, quantized.tensors), small_flux.inputs(name, rows=7).bfloat16().cuda()
    layer.cuda()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    first = layer(x)
    del first
    layer.cpu()
    freed = sum(p.nbytes for p in layer.parameters())
    assert torch.cuda.memory_allocated() <= before - freed
    assert torch.isfinite(layer.cuda()(x)).all()


@pytest.mark.parametrize("exact", [False, True])
def test_a_compiled_layer_is_the_layer(exact):
    name = "double_blocks.0.img_mlp.2"
    n, k = small_flux.layer_shapes()[name]
    full = small_flux.state_dict(torch.bfloat16)
    spec = LayerSpec(name, "svdquant_w4a4", n, k, 32, True, torch.bfloat16, True)
    quantized = quantize_layer(spec, full[f"{name}.weight"], full[f"{name}.bias"], None, RECIPES["fast"])
    layer, x = layers.SVDQLinear(quantized.spec, quantized.tensors), small_flux.inputs(name, rows=7).bfloat16().cuda()
    layer.cuda().exact = exact
    assert torch.equal(torch.compile(layer, fullgraph=True)(x), layer(x))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("format_name", list(comfy_quant.LAYOUTS))
def test_a_layer_is_the_same_on_a_second_gpu(format_name, exact):
    """Its operands decide where it runs, and not which device is current."""
    name = "double_blocks.0.img_mod.lin" if format_name == comfy_quant.AWQ_W4A16 else "double_blocks.0.img_mlp.0"
    n, k = small_flux.layer_shapes()[name]
    full = small_flux.state_dict(torch.bfloat16)
    rank = 32 if comfy_quant.LAYOUTS[format_name].low_rank else 0
    spec = LayerSpec(name, format_name, n, k, rank, True, torch.bfloat16)
    quantized = quantize_layer(spec, full[f"{name}.weight"], full[f"{name}.bias"], None, RECIPES["fast"])
    layer, x = layers.SVDQLinear(quantized.spec, quantized.tensors), small_flux.inputs(name, rows=7).bfloat16()
    layer.exact = exact
    found = [layer.to(device)(x.to(device)) for device in ("cuda:1", "cuda:0", "cuda:1")]
    assert [y.device.index for y in found] == [1, 0, 1]
    assert torch.isfinite(found[0]).all() and all(torch.equal(y.cpu(), found[0].cpu()) for y in found)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("format_name", [comfy_quant.AWQ_W4A16, comfy_quant.SVDQUANT_W8A8])
def test_layers_of_one_input_are_the_same_on_a_second_gpu(format_name):
    name = "double_blocks.0.img_mod.lin"
    n, k = small_flux.layer_shapes()[name]
    full = small_flux.state_dict(torch.bfloat16)
    spec = LayerSpec(name, format_name, n, k, 0, True, torch.bfloat16)
    tensors = quantize_layer(spec, full[f"{name}.weight"], full[f"{name}.bias"], None, RECIPES["fast"]).tensors
    several, x = [layers.SVDQLinear(spec, tensors) for _ in range(3)], torch.randn((2, k)).bfloat16()

    def on(device):
        return layers.evaluate_together([layer.to(device) for layer in several], x.to(device))

    first, second = on("cuda:0"), on("cuda:1")
    assert [y.device.index for y in second] == [1] * 3
    assert all(torch.equal(a.cpu(), b.cpu()) for a, b in zip(first, second, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_a_second_gpu_is_calibrated():
    """Rows of both on their way at once."""
    x = torch.randn((300, 320)).bfloat16()
    found = Calibration(rows=64)
    for _ in range(3):
        for device in ("cuda:1", "cuda:0"):
            found.observe(device, x.to(device))
    found.check(found.layers)
    expected = Calibration(rows=64)
    for _ in range(3):
        for device in ("cuda:1", "cuda:0"):
            expected.observe(device, x)
    for name, layer in expected.layers.items():
        assert torch.equal(layer.sample, found.layers[name].sample)
        assert torch.equal(layer.minimum, found.layers[name].minimum.cpu())
