"""The inner step of coordinate descent against float64, on whatever card is there."""

from __future__ import annotations

import pytest
import torch

from svdq_core.kernels import descent as kernels
from svdq_core.kernels import launch
from svdq_core.numerics.awq import GROUP_SIZE as GROUP
from svdq_core.quantizer import descent

pytestmark = pytest.mark.gpu


def operands(n: int) -> list[torch.Tensor]:
    """Random operands of take_codes on the CPU: channels go together, some groups have no range."""
    inputs = torch.randn((256, 8)) @ torch.randn((8, GROUP)) + 0.5 * torch.randn((256, GROUP))
    value, scale = torch.randn((GROUP, n)), 0.1 + torch.rand(n)
    scale[::7] = 0
    steps = torch.full((GROUP, n), float("nan"))  # what is not written must not read as a code
    pull, zero = torch.randn((GROUP, n)), 0.3 * torch.randn(n)
    return [inputs.t() @ inputs / 256, value, steps, pull, scale, zero]


@pytest.mark.parametrize("n", [1, 63, 77, 3072, 18432])
def test_takes_the_reference_s_codes(n: int) -> None:
    wanted = operands(n)
    found = [t.cuda() for t in wanted]
    wanted = [t.double() for t in wanted]
    kernels.take_codes(*found)
    descent.take_codes(descent.Group(*wanted))
    _, value, steps, _, scale, zero = found
    # A tie may fall to the other side, and then the rest of that output's codes may be others.
    same = (steps.cpu() == wanted[2]).all(dim=0)
    assert same.sum() >= n - 1 - n // 500
    assert steps.min() >= -8 and steps.max() <= 7
    torch.testing.assert_close(value.cpu()[:, same], wanted[1][:, same].float())
    torch.testing.assert_close(value, zero + steps * scale)


def test_the_same_bits_every_time() -> None:
    first = [t.cuda() for t in operands(500)]
    second = [t.clone() for t in first]
    kernels.take_codes(*first)
    kernels.take_codes(*second)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_wrong_operands_are_named() -> None:
    good = [t.cuda() for t in operands(16)]
    for place, name, wrong in (
        (0, "metric", good[0][:32]),
        (1, "value", good[1].t()),
        (4, "scale", good[4].double()),
        (5, "zero", good[5].cpu()),
    ):
        with pytest.raises(launch.KernelInputError, match=name):
            kernels.take_codes(*good[:place], wrong, *good[place + 1 :])
