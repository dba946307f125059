"""Layers whose kernels start while the one in front of them ends: an operand may be what that one writes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from svdq_core.ops.cuda import register
from svdq_core.ops.int8 import linear_int8
from svdq_core.ops.nvfp4 import linear_nvfp4

sys.path.insert(0, str(Path(__file__).parent))
import test_int8_gpu
import test_nvfp4_gpu
from early import assert_waits_for

pytestmark = pytest.mark.gpu
ROUNDS = 100
M, K, N = 512, 3072, 3072  # the quantizer's last blocks end well after its first
LAYERS = {
    "int8": (linear_int8, lambda: test_int8_gpu.operands(M, K, N, 32, torch.bfloat16)),
    "int8, more ranks than one kernel takes": (
        linear_int8,
        lambda: test_int8_gpu.operands(M, K, N, 128, torch.bfloat16),
    ),
    "nvfp4": (linear_nvfp4, lambda: test_nvfp4_gpu.operands(M, K, N, 32, torch.bfloat16)),
}
OPERANDS = ["x", "smooth_factor", "proj_down", "weight", "weight_scale", "proj_up", "bias"]


@pytest.mark.parametrize("in_graph", [False, True], ids=["stream", "graph"])
@pytest.mark.parametrize("written", OPERANDS)
@pytest.mark.parametrize("kind", LAYERS)
def test_operand_written_by_the_kernel_before(kind: str, written: str, in_graph: bool) -> None:
    """In place, by the kernel in front; the one before that is a layer that has just read it."""
    register()
    linear, operands = LAYERS[kind]
    o = operands()
    values = [operands()[written] for _ in range(4)]
    expected = []
    for value in values:
        expected.append(linear(**o | {written: value}))
        torch.cuda.synchronize()
    assert_waits_for(linear, o, written, values, expected, ROUNDS, in_graph)


@pytest.mark.parametrize("kind", LAYERS)
def test_each_layer_takes_what_the_one_before_gives(kind: str) -> None:
    """Nothing in between, and outputs in the place of inputs that were read just before."""
    register()
    linear, operands = LAYERS[kind]
    layers = [operands() for _ in range(4)]
    x = layers[0]["x"]
    expected = [x]
    for o in layers:
        y = linear(**o | {"x": expected[-1]})
        expected.append(y / y.std())
        torch.cuda.synchronize()
    for _ in range(ROUNDS // 4):
        y = x.clone()
        for o in layers:
            y = linear(**o | {"x": y})
            y = y / y.std()
        assert torch.equal(y, expected[-1])
