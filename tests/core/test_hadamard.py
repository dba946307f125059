"""Rotation in groups: an exact, orthogonal, symmetric matrix, and nothing else is mixed."""

import pytest
import torch

from svdq_core.numerics import hadamard


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_matrix_is_exact_in_every_type_and_its_own_inverse(dtype):
    matrix = hadamard.matrix(dtype).double()
    assert torch.equal(matrix.abs(), torch.full((64, 64), 0.125, dtype=torch.float64))
    assert torch.equal(matrix @ matrix, torch.eye(64, dtype=torch.float64))
    assert torch.equal(matrix, matrix.t())


def test_groups_are_rotated_on_their_own_and_keep_their_length():
    x = torch.randn(5, 3, 192, dtype=torch.float64)
    rotated = hadamard.rotate(x)
    torch.testing.assert_close(hadamard.rotate(rotated), x)
    torch.testing.assert_close(rotated.unflatten(-1, (-1, 64)).norm(dim=-1), x.unflatten(-1, (-1, 64)).norm(dim=-1))
    other = x.clone()
    other[..., 64:128] = 0
    changed = hadamard.rotate(other) != rotated
    assert not changed[..., :64].any() and not changed[..., 128:].any()


def test_an_outlier_is_spread_over_its_group():
    x = torch.zeros(1, 128)
    x[0, 70] = 8.0
    assert torch.equal(hadamard.rotate(x)[0, 64:].abs(), torch.ones(64))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_smoothed_input_is_rotated_as_its_own_type_holds_it(dtype):
    x, factor = (torch.randn(9, 128) * 3).to(dtype), (torch.rand(128) + 0.5).to(dtype)
    smoothed = (x.float() / factor.float()).to(dtype).double()
    exact = (smoothed.unflatten(-1, (2, 64)) @ hadamard.matrix(torch.float64)).flatten(-2)
    torch.testing.assert_close(hadamard.smooth_and_rotate(x, factor).double(), exact, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_nothing_finite_makes_nan(dtype):
    x = torch.full((3, 128), torch.finfo(dtype).max, dtype=dtype)
    x[1, ::2] *= -1
    x[2] = 0
    factor = torch.full((128,), -0.01, dtype=dtype)
    assert torch.isfinite(hadamard.smooth_and_rotate(x, factor)).all()
