"""INT4 codec: round trips, nearest values, scales."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from hypothesis.extra import numpy as hnp

from svdq_core.numerics import int4


def groups(magnitude=2.0**100):
    """Float32 matrices with K a multiple of 64."""
    floats = st.floats(-magnitude, magnitude, width=32, allow_subnormal=True)
    shapes = st.tuples(st.integers(1, 3), st.sampled_from((64, 128, 192)))
    return shapes.flatmap(lambda shape: hnp.arrays("float32", shape, elements=floats)).map(torch.from_numpy)


@given(hnp.arrays("int8", st.tuples(st.integers(1, 4), st.just(64)), elements=st.integers(-8, 7)))
def test_signed_codes_survive_packing(codes):
    codes = torch.from_numpy(codes)
    assert torch.equal(int4.unpack(int4.pack(codes)), codes)


@given(hnp.arrays("int8", st.tuples(st.integers(1, 4), st.just(64)), elements=st.integers(0, 15)))
def test_unsigned_codes_survive_packing(codes):
    codes = torch.from_numpy(codes)
    assert torch.equal(int4.unpack(int4.pack(codes), unsigned=True), codes)


def test_low_nibble_holds_the_even_column():
    packed = int4.pack(torch.tensor([[1, -1, 7, -7]]))
    assert packed.view(torch.uint8).tolist() == [[0xF1, 0x97]]


def test_packing_an_odd_row_is_refused():
    with pytest.raises(ValueError, match="even"):
        int4.pack(torch.zeros(3))


@given(groups(), st.booleans())
def test_values_come_back_within_half_a_step(values, unsigned):
    values = values.abs() if unsigned else values
    codes, scale = int4.quantize_groups(values, unsigned)
    steps = scale.repeat_interleave(int4.GROUP_SIZE, dim=-1)
    error = (int4.dequantize(codes, scale) - values).abs()
    # A group below float32's normal range is zero; everything else is rounded to the nearest step.
    tiny = torch.finfo(torch.float32).tiny * int4.UNSIGNED_MAX
    assert bool((error <= 0.5001 * steps + tiny).all())
    low, high = (0, 15) if unsigned else (-7, 7)
    assert low <= int(codes.min()) and int(codes.max()) <= high


@given(groups(magnitude=1e4))
def test_rounding_keeps_the_order_within_a_group(values):
    codes, _ = int4.quantize_groups(values)
    order = values.reshape(-1, int4.GROUP_SIZE).argsort(dim=-1)
    sorted_codes = codes.reshape(-1, int4.GROUP_SIZE).gather(-1, order)
    assert bool((sorted_codes.diff(dim=-1) >= 0).all())


def test_a_zero_group_has_scale_and_codes_zero():
    codes, scale = int4.quantize_groups(torch.zeros(2, 128))
    assert not codes.any() and not scale.any()


@pytest.mark.parametrize("value", [torch.finfo(torch.float32).max, 65504.0, 3e38])
def test_the_largest_values_stay_finite(value):
    values = torch.full((1, 64), value)
    codes, scale = int4.quantize_groups(values)
    assert torch.isfinite(int4.dequantize(codes, scale)).all() and int(codes.min()) == 7


def test_k_must_be_a_multiple_of_the_group():
    with pytest.raises(ValueError, match="not a multiple of 64"):
        int4.quantize_groups(torch.zeros(1, 96))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(data=st.data())
def test_scales_made_of_a_unit_are_found_again(dtype, data):
    largest = torch.from_numpy(data.draw(hnp.arrays("float32", 5, elements=st.floats(2.0**-18, 2.0**11, width=32))))
    unit = int4.scale_unit(largest, dtype)
    assert bool((unit * int4.MOST_STEPS >= largest).all())
    assert bool((unit <= largest / int4.MOST_STEPS * (1 + 2.0**-3) + 2.0**-24).all()), "no coarser than it must be"
    steps = torch.from_numpy(data.draw(hnp.arrays("int8", (4, 5), elements=st.integers(0, int4.MOST_STEPS))))
    scale = (steps * unit).to(dtype)
    assert torch.equal(scale.float(), steps * unit), "exact in 16 bits"
    found_unit, found_steps = int4.scale_grid(scale)
    assert torch.equal(found_unit * found_steps, scale.float())
    assert int(found_steps.abs().max()) <= int4.MOST_STEPS


def test_scales_of_zeros_have_a_unit():
    assert torch.equal(int4.scale_unit(torch.zeros(3), torch.float16), torch.zeros(3))
    unit, steps = int4.scale_grid(torch.zeros(2, 3))
    assert torch.isfinite(unit).all() and not steps.any()


def test_one_scale_off_the_grid_is_noticed():
    scale = torch.randint(1, 17, (48, 256)).bfloat16() * 0.25
    assert int4.scale_grid(scale) is not None
    scale[17, 200] = 3.015625
    assert int4.scale_grid(scale) is None


def test_a_negative_scale_has_negative_steps():
    unit, steps = int4.scale_grid(torch.tensor([[-1.5], [3.0], [0.75]]))
    assert torch.equal(unit * steps, torch.tensor([[-1.5], [3.0], [0.75]]))
