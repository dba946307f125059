"""The whole-layer operators of every precision against float64, and how torch sees them."""

import pytest
import torch

from svdq_core.numerics import awq, int4, int8, nf4, nvfp4
from svdq_core.ops.awq import linear_awq_w4a16, linears_awq_w4a16
from svdq_core.ops.int8 import linear_int8, linears_int8
from svdq_core.ops.nf4 import linear_nf4
from svdq_core.ops.nvfp4 import linear_nvfp4

K, N = 192, 40


class Case:
    """One operator's operands, and the same layer in float64 from the same codes."""

    def __init__(self, m, rank, dtype, bias, seed=0):
        random = torch.Generator().manual_seed(seed)

        def normal(*shape):
            return torch.randn(shape, generator=random)

        self.x = normal(m, K).to(dtype)
        self.codes = normal(N, K)
        self.smooth = (normal(K).abs() + 0.5).to(dtype)
        self.down = (normal(K, rank) * 0.1).to(dtype)
        self.up = normal(N, rank).to(dtype)
        self.bias = normal(N).to(dtype) if bias else None
        self.extra = (normal(N).abs() + 0.5).to(dtype)

    def smoothed(self):
        return self.x.float() / self.smooth.float()

    def around(self, product):
        """The product with the low-rank branch and the bias, in float64."""
        return self.plain(product + self.x.double() @ self.down.double() @ self.up.double().t())

    def plain(self, product):
        return product if self.bias is None else product + self.bias.double()


def nvfp4_case(case, channel_scale=True):
    tensor_scale = case.codes.abs().amax() / (6 * 448)
    scale = nvfp4.group_scale(case.codes, tensor_scale)
    codes = nvfp4.encode((case.codes.unflatten(-1, (-1, 16)) / scale.float()[..., None] / tensor_scale).flatten(-2))
    channel = case.extra if channel_scale else None
    arguments = (
        case.x,
        case.smooth,
        case.down,
        int4.pack(codes),
        scale.t().contiguous(),
        tensor_scale,
        channel,
        case.up,
        case.bias,
    )
    weight = nvfp4.dequantize(codes, scale).double() * tensor_scale.double()
    if channel_scale:
        weight *= channel.double()[:, None]
    activation = nvfp4.dequantize(*nvfp4.quantize_groups(case.smoothed())).double()
    return linear_nvfp4, arguments, case.around(activation @ weight.t())


def int8_case(case):
    codes, scale = int8.quantize_rows(case.codes)
    arguments = (case.x, case.smooth, case.down, codes, scale.flatten(), case.up, case.bias)
    activation, act_scale = int8.quantize_rows(case.smoothed())
    product = activation.double() @ codes.double().t() * act_scale.double() * scale.double().t()
    return linear_int8, arguments, case.around(product)


def awq_case(case):
    scale, zero = awq.group_range(case.codes, case.x.dtype)
    codes = (case.codes * 4).round().clamp(-8, 7).to(torch.int8) + 8
    arguments = (case.x, int4.pack(codes), scale.t().contiguous(), zero.t().contiguous(), case.bias)
    wide = (codes.double() - 8).unflatten(-1, (-1, 64)) * scale.double()[..., None] + zero.double()[..., None]
    return linear_awq_w4a16, arguments, case.plain(case.x.double() @ wide.flatten(-2).t())


def nf4_case(case):
    absmax = nf4.group_absmax(case.codes)
    codes = nf4.encode((case.codes.unflatten(-1, (-1, 64)) / absmax[..., None]).flatten(-2))
    arguments = (case.x, int4.pack(codes), absmax.t().contiguous(), case.bias)
    return linear_nf4, arguments, case.plain(case.x.double() @ nf4.dequantize(codes, absmax).double().t())


CASES = [nvfp4_case, lambda case: nvfp4_case(case, channel_scale=False), int8_case, awq_case, nf4_case]
IDS = ["nvfp4", "nvfp4-no-channel-scale", "int8", "awq", "nf4"]


@pytest.mark.parametrize("make", CASES, ids=IDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.float16, 2e-3), (torch.bfloat16, 5e-3)])
@pytest.mark.parametrize(("m", "rank", "bias"), [(1, 0, True), (7, 16, False), (77, 33, True), (0, 8, True)])
def test_reference_matches_float64(make, m, rank, bias, dtype, tolerance):
    operator, arguments, expected = make(Case(m, rank, dtype, bias))
    found = operator(*arguments)
    assert found.dtype == dtype and found.shape == (m, N)
    assert torch.linalg.norm(found.double() - expected) <= tolerance * torch.linalg.norm(expected)


@pytest.mark.parametrize("make", CASES, ids=IDS)
def test_operators_satisfy_torch(make):
    operator, arguments, _ = make(Case(5, 16, torch.float32, True))
    checks = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    if operator is not linear_nvfp4:  # torch cannot compare E4M3 tensors, which test_schema does
        checks += ("test_schema",)
    torch.library.opcheck(getattr(torch.ops.svdq, operator.__name__), arguments, test_utils=checks)
    compiled = torch.compile(operator, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*arguments), operator(*arguments))


def awq_layer(case):
    return awq_case(case)[1][1:]


def int8_layer(case):
    _, smooth, _, codes, scale, _, bias = int8_case(case)[1]
    return smooth, codes, scale, bias


def int8_alone(x, smooth, codes, scale, bias):
    return linear_int8(x, smooth, x.new_empty((K, 0)), codes, scale, x.new_empty((N, 0)), bias)


SEVERAL = [(linears_awq_w4a16, awq_layer, linear_awq_w4a16), (linears_int8, int8_layer, int8_alone)]
SEVERAL_IDS = ["awq", "int8"]


def several(layer, dtype=torch.float32):
    """x, and the operands of three layers, by kind."""
    layers = [layer(Case(5, 0, dtype, bias, seed)) for seed, bias in ((0, True), (1, False), (2, True))]
    return Case(5, 0, dtype, True).x, *map(list, zip(*layers, strict=True))


@pytest.mark.parametrize(("operator", "layer", "alone"), SEVERAL, ids=SEVERAL_IDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_one_input_are_what_each_is(operator, layer, alone, dtype):
    x, *operands = several(layer, dtype)
    found = operator(x, *operands)
    assert len(found) == 3
    for y, *one in zip(found, *operands, strict=True):
        assert torch.equal(y, alone(x, *one))
    assert operator(x, [], [], [], []) == []


@pytest.mark.parametrize(("operator", "layer", "alone"), SEVERAL, ids=SEVERAL_IDS)
def test_the_operator_of_several_layers_satisfies_torch(operator, layer, alone):
    arguments = several(layer)
    torch.library.opcheck(getattr(torch.ops.svdq, operator.__name__), arguments)
    compiled = torch.compile(operator, backend="aot_eager", fullgraph=True)
    assert all(map(torch.equal, compiled(*arguments), operator(*arguments)))
