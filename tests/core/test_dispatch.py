"""Operators that are called at once, and not by way of torch, compute the same."""

import sys
from pathlib import Path

import pytest
import torch

from svdq_core.formats import comfy_quant
from svdq_core.ops import block, cuda, dispatch, fused
from svdq_core.ops.as_int8 import linear_as_int8
from svdq_core.ops.int4 import linear_w4a4

sys.path.insert(0, str(Path(__file__).parent))
import test_block
import test_linears
import test_ops


def w4a4():
    case = test_ops.make_case()
    return linear_w4a4, (*case.values(), False, True)


def as_int8():
    case = test_ops.make_case()
    x, smooth_factor, proj_down, weight, weight_scale, *rest = case.values()
    operands = x, smooth_factor, proj_down, weight, weight_scale, None, None, *rest
    return linear_as_int8, (*operands, comfy_quant.SVDQUANT_W4A4, False, True)


def gelu_quantize():
    case = test_ops.make_case()
    return fused.gelu_quantize_act_int4, (
        case["x"][:, :64].contiguous(),
        case["x"][:, 64:].contiguous(),
        case["smooth_factor"],
        case["proj_down"],
        True,
    )


def cases():
    """(function, operands) by name."""
    found = {"w4a4": w4a4(), "as_int8": as_int8(), "gelu_quantize": gelu_quantize()}
    for name, make in zip(test_linears.IDS, test_linears.CASES, strict=True):
        found[name] = make(test_linears.Case(5, 16, torch.float32, True))[:2]
    for name, (operator, layer, _) in zip(test_linears.SEVERAL_IDS, test_linears.SEVERAL, strict=True):
        found[f"several {name}"] = operator, test_linears.several(layer)
    for name, operands in test_block.cases(torch.float32).items():
        found[name] = getattr(block, name), operands
    del found["nf4"]  # which no card has a kernel for
    return found


@pytest.fixture
def at_once(monkeypatch):
    """As on a card whose kernels do not run, so that its functions are the reference; what was called."""
    called = []

    def watched(name):
        called.append(name)
        return operator(name)

    operator = cuda.operator
    monkeypatch.setattr(dispatch, "runs_now", lambda x: isinstance(x, torch.Tensor))
    monkeypatch.setattr(cuda, "operator", watched)
    monkeypatch.setattr(cuda, "_runs", lambda *_: False)
    return called


@pytest.mark.parametrize("name", cases())
def test_a_call_at_once_gives_what_torch_s_operator_gives(name, at_once, monkeypatch):
    function, operands = cases()[name]
    found = function(*operands)
    assert at_once
    monkeypatch.undo()
    expected = function(*operands)
    for a, b in zip(*((y if isinstance(y, (list, tuple)) else [y]) for y in (found, expected)), strict=True):
        assert torch.equal(a, b)


def test_every_operator_has_a_function():
    for name in cuda._OPERATORS:
        assert hasattr(torch.ops.svdq, name) and callable(cuda.operator(name))


def test_only_plain_tensors_on_a_card_are_called_at_once():
    class OnCard(torch.Tensor):
        is_cuda = True

    assert not dispatch.runs_now(torch.ones(2))
    assert not dispatch.runs_now(torch.ones(2).as_subclass(OnCard))
