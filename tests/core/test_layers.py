"""SVDQLinear: adapters are exact, combine, and come off without a trace."""

import pytest
import torch

from svdq_core.formats.comfy_quant import LayerSpec
from svdq_core.layers import Adapter, SVDQLinear
from svdq_core.quantizer.recipes import RECIPES, quantize_layer


def make_layer(n=96, k=128, unsigned=False, bias=True):
    random = torch.Generator().manual_seed(0)
    spec = LayerSpec("layer", "svdquant_w4a4", n, k, 16, bias or unsigned, torch.bfloat16, unsigned)
    weight = torch.randn((n, k), generator=random)
    bias_values = torch.randn(n, generator=random) if bias else None
    quantized = quantize_layer(spec, weight, bias_values, None, RECIPES["fast"])
    return SVDQLinear(spec, quantized.tensors)


def make_adapter(n=96, k=128, rank=4, delta=False, seed=5):
    random = torch.Generator().manual_seed(seed)
    dense = torch.randn((n, k), generator=random) if delta else None
    return Adapter(torch.randn((k, rank), generator=random), torch.randn((n, rank), generator=random), dense)


def added(adapter):
    weight = adapter.up @ adapter.down.t()
    return weight if adapter.delta is None else weight + adapter.delta


@pytest.mark.parametrize("delta", [False, True])
def test_an_adapter_adds_exactly_its_product(delta):
    layer, adapter = make_layer(), make_adapter(delta=delta)
    x = torch.randn(7, 128)
    before = layer(x)
    layer.set_adapter("a", adapter)
    change, wanted = layer(x) - before, x @ added(adapter).t()
    assert torch.linalg.norm(change - wanted) < 5e-3 * torch.linalg.norm(wanted)  # bf16 factors
    assert torch.allclose(layer.adapted_weight() - layer.dequantized_weight(), added(adapter), atol=0.1)


def test_adapters_combine_and_leave_no_trace():
    layer, x = make_layer(), torch.randn(3, 128)
    state = {name: tensor.clone() for name, tensor in layer.state_dict().items()}
    before = layer(x)
    layer.set_adapter("a", make_adapter(seed=1))
    only_a = layer(x)
    layer.set_adapter("b", make_adapter(seed=2, delta=True))
    assert not torch.allclose(layer(x), only_a)
    layer.set_adapter("b", None)
    assert torch.equal(layer(x), only_a)
    layer.set_adapter("a", None)
    assert torch.equal(layer(x), before)
    assert all(torch.equal(tensor, state[name]) for name, tensor in layer.state_dict().items())
    assert layer.state_dict().keys() == state.keys()


@pytest.mark.parametrize("rank", [1, 4, 8, 13])
def test_an_adapter_s_rank_is_padded_for_the_kernels(rank):
    layer, adapter, x = make_layer(), make_adapter(rank=rank), torch.randn(7, 128)
    before = layer(x)
    layer.set_adapter("a", adapter)
    assert layer.active_tensors()["proj_up"].shape[1] % 16 == 0
    wanted = x @ added(adapter).t()
    assert torch.linalg.norm(layer(x) - before - wanted) < 5e-3 * torch.linalg.norm(wanted)


def test_replacing_an_adapter_does_not_add_up():
    layer, x = make_layer(), torch.randn(3, 128)
    layer.set_adapter("a", make_adapter(seed=1))
    once = layer(x)
    layer.set_adapter("a", make_adapter(seed=1))
    assert torch.equal(layer(x), once)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("shape", [(128,), (1, 128), (2, 3, 128), (0, 128)])
def test_any_leading_shape_and_type(shape, dtype):
    y = make_layer()(torch.randn(shape).to(dtype))
    assert y.shape == (*shape[:-1], 96) and y.dtype == dtype and torch.isfinite(y).all()


@pytest.mark.parametrize("unsigned", [False, True])
def test_a_layer_without_bias_works(unsigned):
    layer = make_layer(bias=False, unsigned=unsigned)
    x = torch.nn.functional.gelu(torch.randn(64, 128))
    exact = x @ layer.dequantized_weight().t()
    assert torch.linalg.norm(layer(x) - exact) < 0.15 * torch.linalg.norm(exact)
