"""The W4A16 kernel against float64, on whatever card is there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from svdq_core.kernels import awq as kernels
from svdq_core.kernels import launch
from svdq_core.numerics import int4
from svdq_core.ops.awq import linear_awq_w4a16, linears_awq_w4a16
from svdq_core.ops.cuda import register

sys.path.insert(0, str(Path(__file__).parent))
from early import assert_waits_for

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16]
# (M, K): up to eight rows are the kernel's; its warps go through K once, or where it is longer, several times.
SHAPES = [
    *[(1, 64), (1, 3072), (2, 192), (7, 3072), (8, 320), (8, 4096), (5, 6208)],
    *[(9, 640), (16, 3072), (77, 320)],
]
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def operands(m: int, k: int, n: int, dtype: torch.dtype) -> dict:
    """Random operands of linear_awq_w4a16, zeros far from the middle of their groups."""

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, device="cuda")

    return {
        "x": random(m, k).to(dtype),
        "weight": int4.pack(torch.randint(0, 16, (n, k), device="cuda", dtype=torch.int8)),
        "weight_scale": (random(k // 64, n).abs() * 0.01).to(dtype),
        "weight_zero": (random(k // 64, n) * 0.02).to(dtype),
        "bias": random(n).to(dtype),
    }


def exact(o: dict) -> torch.Tensor:
    codes = int4.unpack(o["weight"], unsigned=True).double().unflatten(-1, (-1, 64)) - 8
    weight = codes * o["weight_scale"].t().double()[..., None] + o["weight_zero"].t().double()[..., None]
    y = o["x"].double() @ weight.flatten(-2).t()
    return y if o["bias"] is None else y + o["bias"].double()


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(out).all()
    return ((out.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [8, 12, 16, 24, 200, 9216])
@pytest.mark.parametrize(("m", "k"), SHAPES)
def test_layer(m: int, k: int, n: int, dtype: torch.dtype) -> None:
    o = operands(m, k, n, dtype)
    torch.full((m, n), float("nan"), dtype=dtype, device="cuda")  # what is not written must not read as zeros
    first, second = linear_awq_w4a16(**o), linear_awq_w4a16(**o)
    assert error(first, exact(o)) < TOLERANCE[dtype]
    assert torch.equal(first, second), "the same bits every time"
    o["bias"] = None
    assert error(linear_awq_w4a16(**o), exact(o)) < TOLERANCE[dtype]


def several(m: int, k: int, outputs: list[int], dtype: torch.dtype) -> list[dict]:
    """Operands of layers that have one input; every third has no bias."""
    layers = [operands(m, k, n, dtype) for n in outputs]
    return [o | {"x": layers[0]["x"], "bias": o["bias"] if i % 3 else None} for i, o in enumerate(layers)]


def together(layers: list[dict]) -> list[torch.Tensor]:
    names = ("weight", "weight_scale", "weight_zero", "bias")
    return linears_awq_w4a16(layers[0]["x"], *([o[name] for o in layers] for name in names))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "outputs",
    [
        [24],
        [16, 16, 24, 8 * 301, 16, 9216],
        [200] * 100,  # more than a launch takes
        [18432, 9216, 18432] * 3,  # more tiles than a block has room for at once
        [64, 20, 8, 256],  # some that the kernel does not take
        [],
    ],
    ids=len,
)
@pytest.mark.parametrize(("m", "k"), [(1, 3072), (8, 320), (8, 6208), (11, 192), (0, 64)])
def test_layers_of_one_input(m: int, k: int, outputs: list[int], dtype: torch.dtype) -> None:
    x = torch.randn(m, k, device="cuda").to(dtype)
    layers = [o | {"x": x} for o in several(m, k, outputs, dtype)]
    torch.full((m * sum(outputs),), float("nan"), dtype=dtype, device="cuda")
    names = ("weight", "weight_scale", "weight_zero", "bias")
    found, again = (linears_awq_w4a16(x, *([o[name] for o in layers] for name in names)) for _ in range(2))
    assert len(found) == len(outputs)
    for o, y, same in zip(layers, found, again, strict=True):
        assert y.shape == (m, len(o["weight"])) and y.dtype == dtype
        assert torch.equal(y, same), "the same bits every time"
        assert torch.isfinite(y).all()
        assert (y.double() - exact(o)).norm() <= TOLERANCE[dtype] * exact(o).norm()


def test_layers_of_one_input_in_a_graph() -> None:
    """The pointers of all layers are part of the launch: nothing outside of the graph is read for them."""
    layers = several(1, 3072, [9216, 64, 18432], torch.bfloat16)
    eager = together(layers)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = together(layers)
    for y in captured:
        y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))


def test_a_bad_operand_of_one_of_several_layers() -> None:
    layers = several(1, 256, [64, 128], torch.float16)
    layers[1]["weight_scale"] = layers[1]["weight_scale"].float()
    with pytest.raises(launch.KernelInputError, match="weight_scale is torch"):
        together(layers)


def test_many_rows_take_little_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_SLAB", 2**16)
    o = operands(40, 256, 3000, torch.bfloat16)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    out = linear_awq_w4a16(**o)
    assert torch.cuda.max_memory_allocated() - before < out.nbytes + 40 * 2**16
    assert error(out, exact(o)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_equal_weights_and_large_inputs(dtype: torch.dtype) -> None:
    o = operands(3, 256, 64, dtype)
    o["weight_scale"].zero_()
    assert error(linear_awq_w4a16(**o), exact(o)) < TOLERANCE[dtype]
    o["x"].fill_(torch.finfo(dtype).max)
    assert not torch.isnan(linear_awq_w4a16(**o)).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_inputs_far_from_zero(dtype: torch.dtype) -> None:
    """What is added to codes, and taken off again with the sum of x, leaves no more than the output's rounding."""
    o = operands(4, 3072, 1024, dtype) | {"bias": None}
    o["x"] = (torch.randn(4, 3072, device="cuda") + 30).to(dtype)
    expected = exact(o)
    rounding = error(expected.to(dtype), expected)
    assert error(linear_awq_w4a16(**o), expected) < 1.1 * rounding


def test_graph() -> None:
    o = operands(1, 3072, 256, torch.bfloat16)
    eager = linear_awq_w4a16(**o)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = linear_awq_w4a16(**o)
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(eager, captured)


# ---- a kernel that starts while the one in front of it ends: what that one writes is read behind the wait only

ROUNDS = 200


def _layers(count: int, m: int, k: int) -> list[dict]:
    """Square layers, of which each takes what the one before gives, at about the same scale."""
    layers = [operands(m, k, k, torch.bfloat16) | {"x": None} for _ in range(count)]
    for o in layers:
        for name in ("weight_scale", "weight_zero"):
            o[name] /= 0.05 * k**0.5
    return layers


def _chain(x: torch.Tensor, layers: list[dict]) -> list[torch.Tensor]:
    """SiLU and a layer, whose output the next one takes right away; nothing in between."""
    outputs = [torch.nn.functional.silu(x)]
    for o in layers:
        outputs.append(linear_awq_w4a16(**o | {"x": outputs[-1]}))
    return outputs


def _assert_chain(outputs: list[torch.Tensor], layers: list[dict]) -> None:
    """Each layer against float64 of the input that it should have had."""
    for o, x, y in zip(layers, outputs, outputs[1:], strict=False):
        assert error(y, exact(o | {"x": x})) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("in_graph", [False, True], ids=["stream", "graph"])
@pytest.mark.parametrize(("m", "k"), [(1, 3072), (8, 3072), (4, 512)])
def test_input_from_the_kernel_before(m: int, k: int, in_graph: bool) -> None:
    """x is torch's output and then another layer's, new ones every time."""
    layers = _layers(4, m, k)
    x = torch.empty(m, k, dtype=torch.bfloat16, device="cuda")
    inputs = torch.randn(ROUNDS, m, k, device="cuda").bfloat16()
    expected = []
    for value in inputs:  # one kernel at a time
        outputs = [torch.nn.functional.silu(value)]
        for o in layers:
            torch.cuda.synchronize()
            outputs.append(linear_awq_w4a16(**o | {"x": outputs[-1]}))
        expected.append(outputs)
    for outputs in expected[:: ROUNDS // 4]:
        _assert_chain(outputs, layers)
    seen = []
    if in_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = _chain(x, layers)
        for value in inputs:
            x.copy_(value)
            graph.replay()
            seen.append([y.clone() for y in captured])
    else:
        for value in inputs:
            x.copy_(value)
            seen.append(_chain(x, layers))
    torch.cuda.synchronize()
    for found, outputs in zip(seen, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, outputs, strict=True))


@pytest.mark.parametrize("in_graph", [False, True], ids=["stream", "graph"])
@pytest.mark.parametrize("written", ["weight", "weight_scale", "weight_zero", "bias"])
def test_operand_written_by_the_kernel_before(written: str, in_graph: bool) -> None:
    """An operand in place, by the kernel in front; the one before that is a layer that has just read it."""
    m, k, n = 2, 3072, 3072
    o = operands(m, k, n, torch.bfloat16)
    values = [operands(m, k, n, torch.bfloat16)[written] for _ in range(4)]
    expected = [linear_awq_w4a16(**o | {written: value}) for value in values]
    for value, y in zip(values, expected, strict=True):
        assert error(y, exact(o | {written: value})) < TOLERANCE[torch.bfloat16]
    assert_waits_for(linear_awq_w4a16, o, written, values, expected, ROUNDS, in_graph)


def test_output_is_where_the_kernel_before_reads() -> None:
    """A layer's output may take the place of an input that the layer in front is still reading."""
    first, second = (operands(8, 3072, 3072, torch.bfloat16) for _ in range(2))
    x, other = first.pop("x"), second.pop("x")
    expected = linear_awq_w4a16(x, **first), linear_awq_w4a16(other, **second)
    for _ in range(ROUNDS):
        copy = x.clone()
        y = linear_awq_w4a16(copy, **first)
        del copy  # torch gives its memory to the next output
        z = linear_awq_w4a16(other, **second)
        assert torch.equal(y, expected[0])
        assert torch.equal(z, expected[1])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weight", lambda t: t[:, :16].contiguous(), "weight has shape"),
        ("weight_scale", lambda t: t.float(), "weight_scale is torch.float32"),
        ("weight_zero", lambda t: t.cpu(), "weight_zero is on cpu"),
        ("bias", lambda t: t[:-1].contiguous(), "bias has shape"),
    ],
)
def test_bad_operands(name: str, change, message: str) -> None:
    o = operands(2, 128, 64, torch.bfloat16)
    o[name] = change(o[name])
    with pytest.raises(launch.KernelInputError, match=f"svdq::linear_awq_w4a16: {message}"):
        linear_awq_w4a16(**o)
