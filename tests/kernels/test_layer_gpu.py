"""A whole layer on the GPU against the reference on the CPU."""

import pytest
import small_flux
import torch

from svdq_core import layers
from svdq_core.formats.comfy_quant import LayerSpec
from svdq_core.kernels import prefers_int8
from svdq_core.layers import Adapter
from svdq_core.quantizer.recipes import RECIPES, quantize_layer

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
