"""The W4A16 kernel against float64, on whatever card is there."""

from __future__ import annotations

import pytest
import torch

from svdq_core.kernels import awq as kernels
from svdq_core.kernels import launch
from svdq_core.numerics import int4
from svdq_core.ops.awq import linear_awq_w4a16
from svdq_core.ops.cuda import register

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
