"""The reference operators against float64, and how torch sees them."""

import pytest
import torch

from svdq_core.numerics import int4
from svdq_core.ops.int4 import linear_int4, quantize_act_int4


def make_case(m=7, k=192, n=40, rank=16, dtype=torch.float32, seed=0):
    random = torch.Generator().manual_seed(seed)

    def normal(*shape):
        return torch.randn(shape, generator=random)

    codes, scale = int4.quantize_groups(normal(n, k))
    return {
        "x": normal(m, k).to(dtype),
        "smooth_factor": (normal(k).abs() + 0.5).to(dtype),
        "proj_down": (normal(k, rank) * 0.1).to(dtype),
        "weight": int4.pack(codes),
        "weight_scale": scale.t().contiguous().to(dtype),
        "proj_up": normal(n, rank).to(dtype),
        "bias": normal(n).to(dtype),
    }


def in_float64(case, act_unsigned):
    """The layer from the same codes, one number at a time in float64."""
    qact, act_scale, _ = quantize_act_int4(case["x"], case["smooth_factor"], case["proj_down"], act_unsigned)
    activation = int4.unpack(qact, act_unsigned).double().unflatten(-1, (-1, 64))
    activation = (activation * act_scale.t().double()[..., None]).flatten(-2)
    weight = int4.unpack(case["weight"]).double().unflatten(-1, (-1, 64))
    weight = (weight * case["weight_scale"].t().double()[..., None]).flatten(-2)
    low_rank = case["x"].double() @ case["proj_down"].double() @ case["proj_up"].double().t()
    return activation @ weight.t() + low_rank + case["bias"].double()


def run(case, act_unsigned):
    quantized = quantize_act_int4(case["x"], case["smooth_factor"], case["proj_down"], act_unsigned)
    return linear_int4(
        *quantized,
        case["weight"],
        case["weight_scale"],
        case["proj_up"],
        case["bias"],
        act_unsigned,
    )


@pytest.mark.parametrize("act_unsigned", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize(("m", "rank"), [(1, 0), (7, 16), (77, 33)])
def test_reference_matches_float64(m, rank, dtype, tolerance, act_unsigned):
    case = make_case(m=m, rank=rank, dtype=dtype)
    expected = in_float64(case, act_unsigned)
    found = run(case, act_unsigned)
    assert found.dtype == dtype
    assert torch.linalg.norm(found.double() - expected) < tolerance * torch.linalg.norm(expected)


def test_quantization_error_is_that_of_four_bits():
    case = make_case(m=64, k=512, rank=0)
    case["bias"].zero_()
    weight = int4.dequantize(int4.unpack(case["weight"]), case["weight_scale"].t())
    exact = (case["x"] / case["smooth_factor"]) @ weight.t()
    error = torch.linalg.norm(run(case, False) - exact) / torch.linalg.norm(exact)
    assert 0.01 < error < 0.2


def test_unsigned_codes_hold_the_shifted_input():
    case = make_case(k=64)
    case["x"] = torch.nn.functional.gelu(case["x"])
    qact, scale, _ = quantize_act_int4(case["x"], case["smooth_factor"], case["proj_down"], True)
    restored = int4.dequantize(int4.unpack(qact, unsigned=True), scale.t())
    wanted = (case["x"] + int4.GELU_SHIFT) / case["smooth_factor"]
    assert bool(((restored - wanted).abs() <= 0.5001 * scale.t()).all())


@pytest.mark.parametrize("act_unsigned", [False, True])
def test_operators_satisfy_torch(act_unsigned):
    case = make_case()
    arguments = (case["x"], case["smooth_factor"], case["proj_down"], act_unsigned)
    torch.library.opcheck(torch.ops.svdq.quantize_act_int4, arguments)
    quantized = quantize_act_int4(*arguments)
    tail = (case["weight"], case["weight_scale"], case["proj_up"], case["bias"], act_unsigned)
    torch.library.opcheck(torch.ops.svdq.linear_int4, (*quantized, *tail))
    layer = (*arguments[:3], *tail)
    for act_rotated in (False, True)[: 1 if act_unsigned else 2]:
        torch.library.opcheck(torch.ops.svdq.quantize_act_int4, (*arguments, act_rotated))
        torch.library.opcheck(torch.ops.svdq.linear_w4a4, (*layer, act_rotated))


def test_a_compiled_layer_is_one_graph_with_the_same_result():
    case = make_case()
    compiled = torch.compile(run, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(case, False), run(case, False))
