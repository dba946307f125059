"""NVFP4 codec: nearest values, ties, scales at both ends of E4M3."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from hypothesis.extra import numpy as hnp

from svdq_core.numerics import int4, nvfp4

GRID = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0]


def groups(magnitude):
    """Float32 matrices with K a multiple of 16."""
    floats = st.floats(-magnitude, magnitude, width=32, allow_subnormal=True)
    shapes = st.tuples(st.integers(1, 3), st.sampled_from((16, 32, 80)))
    return shapes.flatmap(lambda shape: hnp.arrays("float32", shape, elements=floats)).map(torch.from_numpy)


def test_the_codes_are_those_of_e2m1():
    codes = torch.arange(16, dtype=torch.int8)
    assert nvfp4.decode(codes).tolist() == GRID + [-value for value in GRID]
    assert torch.equal(nvfp4.encode(nvfp4.decode(codes)), codes)


@given(hnp.arrays("float32", 32, elements=st.floats(-8, 8, width=32)))
def test_a_value_gets_the_nearest_code_and_a_tie_the_even_one(values):
    values = torch.from_numpy(values)
    codes = nvfp4.encode(values)
    distance = (values.abs().clamp(max=6)[:, None].double() - torch.tensor(GRID).double()).abs()
    nearest = distance.amin(dim=1, keepdim=True)
    index = codes & 7
    assert torch.equal(distance.gather(1, index[:, None].long()), nearest)
    tied = (distance == nearest).sum(dim=1) == 2
    assert not (index[tied] % 2).any()
    assert torch.equal(nvfp4.decode(codes) < 0, (values < 0) & (index > 0))


@pytest.mark.parametrize("tie", [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0])
def test_every_tie_goes_to_the_even_code(tie):
    below, at, above = nvfp4.encode(torch.tensor([tie - 1e-6, tie, tie + 1e-6])).tolist()
    assert above == below + 1 and at % 2 == 0


@given(hnp.arrays("float32", 64, elements=st.floats(-100, 100, width=32)))
def test_rounding_keeps_the_order(values):
    ordered = torch.from_numpy(values).sort().values
    assert bool((nvfp4.decode(nvfp4.encode(ordered)).diff() >= 0).all())


@given(hnp.arrays("int8", st.tuples(st.integers(1, 4), st.just(32)), elements=st.integers(0, 15)))
def test_codes_survive_packing(codes):
    codes = torch.from_numpy(codes)
    assert torch.equal(int4.unpack(int4.pack(codes), unsigned=True), codes)


@given(groups(magnitude=448 * 6.0))
def test_a_group_s_values_are_nearest_for_its_scale(values):
    codes, scale = nvfp4.quantize_groups(values)
    restored = nvfp4.dequantize(codes, scale).unflatten(-1, (-1, 16))
    step = scale.float()[..., None]
    error, groups_ = (restored - values.unflatten(-1, (-1, 16))).abs(), values.unflatten(-1, (-1, 16)).abs()
    # E4M3 rounds a normal scale by up to 1 / 16, a subnormal one by up to half its step, 2^-10: the largest values
    # may lie so far beyond 6 steps. Elsewhere the error is at most half of the grid's widest gap.
    beyond = (groups_ - 6 * step).clamp(min=0)
    assert bool((error <= torch.maximum(step, beyond) * 1.0001).all())
    assert bool((beyond <= torch.maximum(6 * step / 15, torch.tensor(6 * 2.0**-10)) * 1.0001).all())


@given(groups(magnitude=100.0).filter(lambda values: bool((values.abs().amax(-1) > 1e-3).all())))
def test_a_tensor_scale_makes_the_range_the_weight_s_own(values):
    tensor_scale = values.abs().amax() / (6 * 448)
    scale = nvfp4.group_scale(values, tensor_scale)
    assert float(scale.float().max()) == 448
    doubled = nvfp4.group_scale(2 * values, 2 * tensor_scale)
    assert torch.equal(scale.float(), doubled.float())


@pytest.mark.parametrize("value", [2689.0, 1e10, 3e38])
def test_a_value_too_large_for_the_scale_saturates(value):
    values = torch.full((1, 16), value)
    codes, scale = nvfp4.quantize_groups(-values)
    assert torch.equal(nvfp4.dequantize(codes, scale), torch.full((1, 16), -448 * 6.0))


@pytest.mark.parametrize("value", [0.0, 1e-45, 1e-30, 5.8e-3])
def test_a_group_too_small_for_a_scale_is_zero(value):
    codes, scale = nvfp4.quantize_groups(torch.full((1, 32), value))
    assert not nvfp4.dequantize(codes, scale).any() and not scale.float().any()


def test_the_smallest_scale_is_a_subnormal():
    codes, scale = nvfp4.quantize_groups(torch.full((1, 16), 6 * 2.0**-9))
    assert scale.float().item() == 2.0**-9 and nvfp4.decode(codes).unique().tolist() == [6.0]


def test_k_must_be_a_multiple_of_the_group():
    with pytest.raises(ValueError, match="not a multiple of 16"):
        nvfp4.quantize_groups(torch.zeros(1, 24))


@given(st.lists(st.floats(-20, 20, width=32), min_size=1, max_size=64))
def test_nearest_values_are_those_of_the_nearest_codes(values):
    values = torch.tensor(values)
    assert torch.equal(nvfp4.nearest(values), nvfp4.decode(nvfp4.encode(values)))
