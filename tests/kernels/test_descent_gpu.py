"""A group's round of coordinate descent against float64, on whatever card is there."""

from __future__ import annotations

import pytest
import torch

from svdq_core.kernels import descent as kernels
from svdq_core.kernels import launch
from svdq_core.numerics.awq import GROUP_SIZE as GROUP
from svdq_core.quantizer import descent

pytestmark = pytest.mark.gpu

DTYPES = [torch.bfloat16, torch.float16]


def operands(n: int, dtype: torch.dtype) -> descent.Group:
    """A random group on the CPU: channels go together; some outputs have no range, some the same code everywhere."""
    inputs = torch.randn((256, 8)) @ torch.randn((8, GROUP)) + 0.5 * torch.randn((256, GROUP))
    steps, scale, zero = torch.randint(-8, 8, (GROUP, n)).float(), 0.1 + torch.rand(n), 0.3 * torch.randn(n)
    scale[::7], steps[:, ::5] = 0, 3
    scale, zero = (t.to(dtype).float() for t in (scale, zero))
    metric, value = inputs.t() @ inputs / 256, steps * scale + zero
    return descent.Group(metric, value, steps, metric @ (0.3 * torch.randn((GROUP, n))), scale, zero)


def cost(group: descent.Group, before: descent.Group) -> torch.Tensor:
    """(N,) float64: what the objective has changed by, by the definition of the gradient."""
    metric, start, pull = (getattr(before, name).double().cpu() for name in ("metric", "value", "pull"))
    change = group.value.double().cpu() - start
    return ((2 * pull + metric @ change) * change).sum(dim=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [1, 63, 77, 3072, 18432])
def test_improves_as_the_reference(n: int, dtype: torch.dtype) -> None:
    before = operands(n, dtype)
    found, wanted = (descent.Group(*(to(t) for t in before)) for to in (torch.Tensor.cuda, torch.Tensor.double))
    kernels.improve(*found, dtype)
    descent.improve(wanted, dtype)
    scale, zero, steps = found.scale.cpu(), found.zero.cpu(), found.steps.cpu()
    # A number between two of the type may become the other one, and a tie of codes fall to the other side.
    same_range = (scale == wanted.scale) & (zero == wanted.zero)
    assert same_range.sum() >= n - 1 - n // 50
    assert ((scale - wanted.scale).abs() <= torch.finfo(dtype).eps * wanted.scale).all()
    assert (steps == wanted.steps).all(dim=0)[same_range].sum() >= same_range.sum() - 1 - n // 500
    assert steps.min() >= -8 and steps.max() <= 7
    assert (cost(found, before) <= 0.99 * cost(wanted, before) + 1e-3).all()
    torch.testing.assert_close(found.value, found.zero + found.steps * found.scale)


def test_equal_codes_leave_the_range() -> None:
    before = operands(70, torch.bfloat16)
    found = descent.Group(*(t.cuda() for t in before))
    kernels.improve(*found, torch.bfloat16)
    assert torch.equal(found.scale.cpu()[::5], before.scale[::5])
    assert torch.equal(found.zero.cpu()[::5], before.zero[::5])
    assert not torch.equal(found.scale.cpu(), before.scale)


def test_the_same_bits_every_time() -> None:
    first = [t.cuda() for t in operands(500, torch.float16)]
    second = [t.clone() for t in first]
    kernels.improve(*first, torch.float16)
    kernels.improve(*second, torch.float16)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_wrong_operands_are_named() -> None:
    good = [t.cuda() for t in operands(16, torch.bfloat16)]
    for place, name, wrong in (
        (0, "metric", good[0][:32]),
        (1, "value", good[1].t()),
        (4, "scale", good[4].double()),
        (5, "zero", good[5].cpu()),
    ):
        with pytest.raises(launch.KernelInputError, match=name):
            kernels.improve(*good[:place], wrong, *good[place + 1 :], torch.bfloat16)
