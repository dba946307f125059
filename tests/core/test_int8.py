"""INT8 codec: round trips, scales of rows."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given
from hypothesis.extra import numpy as hnp

from svdq_core.numerics import int8


def rows(magnitude):
    """Float32 matrices of any shape."""
    floats = st.floats(-magnitude, magnitude, width=32, allow_subnormal=True)
    shapes = st.tuples(st.integers(1, 3), st.integers(1, 70))
    return shapes.flatmap(lambda shape: hnp.arrays("float32", shape, elements=floats)).map(torch.from_numpy)


@given(rows(magnitude=2.0**100))
def test_values_come_back_within_half_a_step(values):
    codes, scale = int8.quantize_rows(values)
    error = (int8.dequantize(codes, scale) - values).abs()
    tiny = torch.finfo(torch.float32).tiny * int8.LARGEST  # a row below that is zero
    assert bool((error <= 0.5001 * scale + tiny).all())
    assert int(codes.min()) >= -127


@given(rows(magnitude=1e4))
def test_rounding_keeps_the_order_within_a_row(values):
    codes, _ = int8.quantize_rows(values.sort(dim=-1).values)
    assert bool((codes.int().diff(dim=-1) >= 0).all())


@given(hnp.arrays("int8", (2, 40), elements=st.integers(-127, 127)), st.floats(2.0**-20, 2.0**20, width=32))
def test_codes_at_full_range_survive_the_round_trip(codes, scale):
    codes = torch.from_numpy(codes)
    codes[:, 0] = 127
    found, _ = int8.quantize_rows(codes.float() * scale)
    assert torch.equal(found, codes)


def test_a_zero_row_has_scale_and_codes_zero():
    codes, scale = int8.quantize_rows(torch.zeros(2, 64))
    assert not codes.any() and not scale.any()


@pytest.mark.parametrize("value", [3e38, 65504.0])
def test_the_largest_values_stay_finite(value):
    codes, scale = int8.quantize_rows(torch.full((1, 64), value))
    assert torch.isfinite(int8.dequantize(codes, scale)).all() and int(codes.min()) == 127
