"""SVDQLinear: adapters are exact, combine, and come off without a trace."""

import dataclasses

import pytest
import torch

from svdq_core.formats.comfy_quant import LayerSpec
from svdq_core.layers import Adapter, SVDQLinear, evaluate_together, goes_together
from svdq_core.numerics import int4
from svdq_core.ops.block import norm_rope
from svdq_core.quantizer.recipes import Recipe, quantize_layer


def make_layer(n=96, k=128, unsigned=False, bias=True):
    random = torch.Generator().manual_seed(0)
    spec = LayerSpec("layer", "svdquant_w4a4", n, k, 16, bias or unsigned, torch.bfloat16, unsigned)
    weight = torch.randn((n, k), generator=random)
    bias_values = torch.randn(n, generator=random) if bias else None
    quantized = quantize_layer(spec, weight, bias_values, None, Recipe(refit=True))
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
    torch.manual_seed(0)
    layer, adapter, x = make_layer(), make_adapter(rank=rank), torch.randn(7, 128)
    before = layer(x)
    layer.set_adapter("a", adapter)
    assert layer.active_tensors()["proj_up"].shape[1] % 16 == 0
    wanted = x @ added(adapter).t()
    assert torch.linalg.norm(layer(x) - before - wanted) < 5e-3 * torch.linalg.norm(wanted)


def make_rotated_layer(n=96, k=192):
    """By hand: the tensors of a plain layer, said to be rotated; some smoothing factors are negative."""
    plain = make_layer(n, k)
    tensors = dict(plain.state_dict())
    random = torch.Generator().manual_seed(1)
    signs = 1 - 2 * torch.randint(0, 2, (k,), generator=random)
    tensors["smooth_factor"] = (signs * (0.5 + torch.rand(k, generator=random))).to(torch.bfloat16)
    return SVDQLinear(dataclasses.replace(plain.spec, rotated=True), tensors)


def rotated_input(layer, x):
    """(M, K) float64: what the layer quantizes."""
    groups = (x.double() / layer.smooth_factor.double()).unflatten(-1, (-1, 64))
    hadamard = torch.ones(1, 1, dtype=torch.float64)
    for _ in range(6):
        hadamard = torch.cat((torch.cat((hadamard, hadamard), 1), torch.cat((hadamard, -hadamard), 1)))
    return (groups @ hadamard / 8).flatten(-2)


def test_a_rotated_layer_quantizes_the_rotated_input():
    torch.manual_seed(0)  # one code on the other side of a tie would be half of the tolerance
    layer, x = make_rotated_layer(), torch.randn(7, 192)
    inside = rotated_input(layer, x)
    codes, scale = int4.quantize_groups(inside.float())
    weight = int4.dequantize(int4.unpack(layer.weight), layer.weight_scale.t()).double()
    expected = int4.dequantize(codes, scale).double() @ weight.t() + layer.bias.double()
    low_rank = layer.proj_up.double() @ layer.proj_down.double().t()
    expected += x.double() @ low_rank.t()
    assert torch.linalg.norm(layer(x).double() - expected) < 5e-3 * torch.linalg.norm(expected)
    # And stands for a weight of the input itself.
    exact = inside @ weight.t() + x.double() @ low_rank.t()
    torch.testing.assert_close(x.double() @ layer.dequantized_weight().double().t(), exact, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("delta", [False, True])
def test_an_adapter_of_a_rotated_layer_adds_its_product_of_the_input(delta):
    layer, adapter, x = make_rotated_layer(), make_adapter(k=192, delta=delta), torch.randn(7, 192)
    before, weight = layer(x), layer.adapted_weight()
    layer.set_adapter("a", adapter)
    change, wanted = layer(x) - before, x @ added(adapter).t()
    assert torch.linalg.norm(change - wanted) < 8e-3 * torch.linalg.norm(wanted)  # bf16 factors
    moved = layer.adapted_weight() - weight
    assert torch.linalg.norm(moved - added(adapter)) < 8e-3 * torch.linalg.norm(added(adapter))
    layer.set_adapter("a", None)
    assert torch.equal(layer(x), before)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_rotated_layer_on_a_device_is_the_one_on_the_cpu(dtype):
    layer, x = make_rotated_layer(256, 320), torch.randn(77, 320, dtype=dtype)
    layer.set_adapter("a", make_adapter(256, 320))
    layer.exact = True
    expected = layer(x.float())
    found = layer.cuda()(x.cuda()).cpu().float()
    assert torch.linalg.norm(found - expected) < 3e-2 * torch.linalg.norm(expected), "codes may differ by one at ties"


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


def make_rank_0_layer(n, layer_format="awq_w4a16", k=128, seed=0, bias=True):
    random = torch.Generator().manual_seed(seed)
    spec = LayerSpec(f"layer{seed}", layer_format, n, k, 0, bias, torch.bfloat16)
    weight = torch.randn((n, k), generator=random)
    bias_values = torch.randn(n, generator=random) if bias else None
    return SVDQLinear(spec, quantize_layer(spec, weight, bias_values, None, Recipe()).tensors)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_layers_of_one_input_give_what_each_gives(dtype):
    layers = [make_rank_0_layer(96), make_rank_0_layer(32, seed=1, bias=False), make_rank_0_layer(64, seed=2)]
    layers[0].set_adapter("a", make_adapter())
    layers[2].set_adapter("a", make_adapter(n=64, delta=True))
    x = torch.randn(3, 128, dtype=dtype)
    together = evaluate_together(layers, x)
    assert [y.shape for y in together] == [(3, 96), (3, 32), (3, 64)]
    for y, layer in zip(together, layers, strict=True):
        assert torch.equal(y, layer(x))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_layers_of_one_input_may_have_formats_of_their_own(dtype):
    layers = [make_rank_0_layer(n, "svdquant_w8a8", seed=n, bias=n < 64) for n in (48, 96, 64)]
    layers.insert(1, make_rank_0_layer(32))
    layers[3].set_adapter("a", make_adapter(n=64, rank=0, delta=True))
    assert all(map(goes_together, layers))
    x = torch.randn(3, 128, dtype=dtype)
    for y, layer in zip(evaluate_together(layers, x), layers, strict=True):
        assert y.dtype == dtype and torch.equal(y, layer(x))


def test_a_branch_keeps_an_int8_layer_for_itself():
    layer = make_rank_0_layer(96, "svdquant_w8a8")
    assert goes_together(layer)
    layer.set_adapter("a", make_adapter())
    assert not goes_together(layer)
    layer.set_adapter("a", None)
    assert goes_together(layer)
    assert not goes_together(make_layer())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize(("unsigned", "plain"), [(False, 0), (True, 0), (False, 64), (True, 64)])
@pytest.mark.parametrize("adapted", ["", "branch", "dense"])
def test_a_gelu_in_front_may_be_left_to_the_layer(unsigned, plain, adapted, dtype):
    layer = make_layer(unsigned=unsigned)
    if adapted:
        layer.set_adapter("a", make_adapter(delta=adapted == "dense"))
    y = torch.randn(2, 5, 200, dtype=dtype)[..., 200 - 128 + plain :]
    x = torch.randn(2, 5, plain, dtype=dtype)
    expected = layer(torch.cat((x, torch.nn.functional.gelu(y, approximate="tanh")), -1))
    found = layer.of_gelu(x, y)
    assert found.shape == (2, 5, 96) and found.dtype == dtype
    # GELU may be the next number of 16 bits.
    assert torch.linalg.norm(found.float() - expected.float()) < 5e-3 * torch.linalg.norm(expected.float())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("batch", [1, 2])
def test_heads_are_normed_and_rotated_as_they_are_written(batch, dtype):
    layer = make_layer(n=3 * 256 + 72)
    layer.set_adapter("a", make_adapter(n=3 * 256 + 72))
    x, (norm_q, norm_k) = torch.randn(batch, 5, 128, dtype=dtype), torch.rand(2, 128, dtype=dtype)
    rope = torch.randn(1, 1, 5, 64, 2, 2)
    found = layer.normed_heads(x, norm_q, norm_k, rope, 2, 1e-6)
    if dtype == torch.float32:
        assert found is None, "the layer's type is another"
        return
    y = layer(x)
    q, k, v = norm_rope([y[..., :768]], [norm_q], [norm_k], rope, 2, 1e-6)
    expected = torch.cat((*(part.transpose(1, 2).flatten(2) for part in (q, k, v)), y[..., 768:]), -1)
    assert torch.linalg.norm((found - expected).float()) < 5e-3 * torch.linalg.norm(expected.float())


def test_heads_of_what_the_kernel_does_not_compute_are_left_to_others():
    layer, x = make_layer(n=3 * 256), torch.randn(1, 5, 128).bfloat16()
    ones, rope = torch.ones(128).bfloat16(), torch.randn(1, 1, 5, 64, 2, 2)
    assert layer.normed_heads(x, ones, ones, rope, 2, 1e-6) is not None
    assert layer.normed_heads(x, ones[:64], ones[:64], rope[:, :, :, :32], 4, 1e-6) is None
    layer.set_adapter("a", make_adapter(n=3 * 256, delta=True))
    assert layer.normed_heads(x, ones, ones, rope, 2, 1e-6) is None
    assert make_rank_0_layer(3 * 256).normed_heads(x, ones, ones, rope, 2, 1e-6) is None
