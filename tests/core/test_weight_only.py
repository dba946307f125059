"""The codecs of weight-only formats: AWQ's asymmetric groups and NF4's quantiles."""

from collections.abc import Sequence

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from hypothesis.extra import numpy as hnp

from svdq_core.numerics import awq, int4, nf4
from svdq_core.quantizer import descent
from svdq_core.quantizer.codecs import AWQ
from svdq_core.quantizer.rounding import round_to_nearest


def groups(magnitude=1e4):
    """Float32 matrices with K a multiple of 64."""
    floats = st.floats(-magnitude, magnitude, width=32, allow_subnormal=True)
    shapes = st.tuples(st.integers(1, 3), st.sampled_from((64, 128)))
    return shapes.flatmap(lambda shape: hnp.arrays("float32", shape, elements=floats)).map(torch.from_numpy)


def steps_of(weight, scale, zero):
    """(w - zero) / scale, as the quantizer hands it to encode."""
    wide = weight.unflatten(-1, (-1, awq.GROUP_SIZE)) - zero.float()[..., None]
    return torch.where(scale[..., None] > 0, wide / scale.float()[..., None], 0.0).flatten(-2)


@given(groups(), st.sampled_from((torch.float32, torch.bfloat16)))
def test_an_asymmetric_group_comes_back_within_half_a_step(weight, dtype):
    scale, zero = awq.group_range(weight, dtype)
    codes = awq.encode(steps_of(weight, scale, zero))
    assert int(codes.min()) >= 0 and int(codes.max()) <= 15
    error = (awq.dequantize(codes, scale, zero) - weight).abs().unflatten(-1, (-1, 64))
    # What rounding scale and zero to the file's type may move the ends of the range by.
    low, high = weight.unflatten(-1, (-1, 64)).aminmax(dim=-1)
    slack = torch.finfo(dtype).eps * 8 * torch.maximum(low.abs(), high.abs()) + 1e-37
    assert bool((error <= (0.5001 * scale.float() + slack)[..., None]).all())


@given(groups())
def test_asymmetric_codes_keep_the_order_within_a_group(weight):
    weight = weight.unflatten(-1, (-1, 64)).sort(dim=-1).values.flatten(-2)
    scale, zero = awq.group_range(weight, torch.bfloat16)
    codes = awq.encode(steps_of(weight, scale, zero))
    assert bool((codes.unflatten(-1, (-1, 64)).diff(dim=-1) >= 0).all())


def test_one_sided_groups_use_all_their_codes():
    weight = torch.linspace(3.0, 5.0, 64)[None]
    scale, zero = awq.group_range(weight, torch.float32)
    codes = awq.encode(steps_of(weight, scale, zero))
    assert codes[0, 0] == 0 and codes[0, -1] == 15 and len(codes.unique()) == 16


@pytest.mark.parametrize("value", [0.0, 1.5, -3e38, 1e-40])
def test_a_group_of_equal_weights_is_its_zero(value):
    weight = torch.full((2, 64), value)
    scale, zero = awq.group_range(weight, torch.float32)
    codes = awq.encode(steps_of(weight, scale, zero))
    assert torch.equal(awq.dequantize(codes, scale, zero), weight) and not scale.any()


def test_the_published_formula_is_what_is_computed():
    packed = torch.tensor([[0x80, 0xF8] * 16], dtype=torch.uint8).view(torch.int8)
    weight = awq.dequantize(int4.unpack(packed, unsigned=True), torch.tensor([[2.0]]), torch.tensor([[0.25]]))
    assert weight[0, :4].tolist() == [-15.75, 0.25, 0.25, 14.25]


@given(groups())
def test_nf4_takes_the_nearest_entry_of_its_codebook(weight):
    absmax = nf4.group_absmax(weight)
    shares = weight.unflatten(-1, (-1, 64)).double() / absmax[..., None]
    shares = torch.where(absmax[..., None] > 0, shares, 0.0).flatten(-2)
    codes = nf4.encode(shares.float())
    nearest = (shares[..., None] - torch.tensor(nf4.CODEBOOK).double()).abs().amin(dim=-1)
    assert torch.allclose((nf4.decode(codes) - shares).abs(), nearest, atol=1e-6)
    assert torch.isfinite(nf4.dequantize(codes, absmax)).all()


def test_nf4_s_codebook_survives_the_round_trip():
    weight = torch.tensor([nf4.CODEBOOK * 4]) * 0.03
    absmax = nf4.group_absmax(weight)
    codes = nf4.encode(weight / absmax)
    assert codes[0].tolist() == list(range(16)) * 4
    assert torch.allclose(nf4.dequantize(codes, absmax), weight)


@pytest.mark.parametrize("quantize", [nf4.group_absmax, lambda weight: awq.group_range(weight, torch.bfloat16)])
def test_k_must_be_a_multiple_of_the_group(quantize):
    with pytest.raises(ValueError, match="not a multiple of 64"):
        quantize(torch.zeros(1, 96))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fitted_groups_are_closer_than_any_range_of_theirs(dtype):
    random = torch.Generator().manual_seed(0)
    weight = torch.randn((96, 256), generator=random)
    weight[3, 64:128], weight[5, :64] = 0.25, 0.0  # groups without any spread
    importance = torch.rand(256, generator=random).square()
    importance[128:192] = 0  # channels that were never used
    codec = AWQ()

    def error(scales):
        step, offset = codec.step(scales), codec.offset(scales)
        codes = round_to_nearest(weight - offset.repeat_interleave(64, dim=1), codec, step)
        values = awq.dequantize(codes, step, offset)
        assert torch.isfinite(values).all()
        return ((values - weight).square() * importance).sum()

    fitted = error(codec.fitted_scales(weight, dtype, importance))
    ranges = min(error(codec.scales(weight, dtype, reach)) for reach in (1.0, 0.9, 0.8, 0.7))
    assert fitted < 0.9 * ranges


def embeddings(rows: int, seed: int) -> torch.Tensor:
    """(rows, 256) inputs like a modulation's: a few directions in common, and something of each channel's own."""
    random = torch.Generator().manual_seed(0)
    directions = torch.randn((6, 256), generator=random)
    random.manual_seed(seed)
    common = torch.randn((rows, 6), generator=random) @ directions
    return common + 0.5 * torch.randn((rows, 256), generator=random) + 1.0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_descent_brings_outputs_of_unseen_inputs_closer(dtype):
    random = torch.Generator().manual_seed(1)
    weight = torch.randn((96, 256), generator=random) * 0.05
    weight[3, 64:128], weight[5] = 0.25, 0.0  # groups without any spread
    seen, unseen = embeddings(128, 2), embeddings(512, 3)
    covariance = descent.shrunk_covariance(seen)
    scales = AWQ().fitted_scales(weight, dtype, covariance.diagonal())
    ranges = scales["weight_scale"].t(), scales["weight_zero"].t()
    nearest = awq.encode(steps_of(weight, *ranges))
    codes, *fitted = descent.descend(weight, nearest, *ranges, covariance)

    def error(codes: torch.Tensor, ranges: Sequence[torch.Tensor], inputs: torch.Tensor) -> float:
        wrong = awq.dequantize(codes, *ranges) - weight
        return ((inputs - seen.mean(dim=0)) @ wrong.t()).square().sum().item()

    assert codes.dtype == torch.int8 and codes.min() >= 0 and codes.max() <= 15
    assert all(values.dtype == dtype and torch.isfinite(values).all() for values in fitted)
    assert error(codes, fitted, seen) < 0.3 * error(nearest, ranges, seen)
    assert error(codes, fitted, unseen) < 0.6 * error(nearest, ranges, unseen)


def test_a_group_of_equal_codes_keeps_its_range():
    """Its scale and zero are one unknown: least squares for both is rounding divided by rounding."""
    metric = torch.randn(256, 64)
    metric = metric.t() @ metric / 256
    steps, scale, zero = torch.full((64, 500), 3.0), torch.rand(500) + 0.1, torch.randn(500)
    group = descent.Group(metric, steps * scale + zero, steps, metric @ torch.randn(64, 500), scale, zero)
    before = scale.clone(), zero.clone()
    descent.improve(group, torch.float16)
    assert torch.equal(group.scale, before[0]) and torch.equal(group.zero, before[1])
    assert group.steps.unique().numel() > 1


def test_descent_never_ends_higher():
    random = torch.Generator().manual_seed(4)
    weight = torch.randn((32, 128), generator=random)
    square = torch.randn((128, 128), generator=random)
    metric = square @ square.t() / 128 + 0.01 * torch.eye(128)
    scales = AWQ().scales(weight, torch.bfloat16)
    ranges = scales["weight_scale"].t(), scales["weight_zero"].t()
    nearest = awq.encode(steps_of(weight, *ranges))
    start = awq.dequantize(nearest, *ranges) - weight
    codes, *fitted = descent.descend(weight, nearest, *ranges, metric)
    end = awq.dequantize(codes, *fitted) - weight
    before, after = (((wrong @ metric) * wrong).sum(dim=1) for wrong in (start, end))
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() < 0.6 * before.sum()


def test_channels_that_never_change_cost_nothing_to_get_wrong_but_stay_finite():
    inputs = torch.ones(40, 128)
    covariance = descent.shrunk_covariance(inputs)
    assert torch.equal(covariance, torch.eye(128))
    inputs[:, :64] += torch.randn((40, 64), generator=torch.Generator().manual_seed(5))
    assert (descent.shrunk_covariance(inputs).diagonal() > 0).all()


@pytest.mark.gpu
def test_descent_on_a_card_ends_as_low():
    random = torch.Generator().manual_seed(6)
    weight, covariance = torch.randn((201, 256), generator=random), descent.shrunk_covariance(embeddings(128, 7))
    scales = AWQ().fitted_scales(weight, torch.bfloat16, covariance.diagonal())
    ranges = scales["weight_scale"].t(), scales["weight_zero"].t()
    operands = weight, awq.encode(steps_of(weight, *ranges)), *ranges, covariance

    def cost(device: str) -> float:
        codes, *ranges = (found.cpu() for found in descent.descend(*(operand.to(device) for operand in operands)))
        wrong = awq.dequantize(codes, *ranges) - weight
        return ((wrong @ covariance) * wrong).sum().item()

    assert cost("cuda") == pytest.approx(cost("cpu"), rel=0.01)
