"""The kernels between a FLUX block's linear layers against float64, on whatever card is there."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from svdq_core.kernels import block as kernels
from svdq_core.ops import block
from svdq_core.ops.cuda import register

sys.path.insert(0, str(Path(__file__).parent.parent / "core"))
from test_block import EPSILON, NAMES, assert_near, cases, norm_operands, normal, rope_operands

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 1e-3}


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


@pytest.fixture(autouse=True)
def taken(monkeypatch: pytest.MonkeyPatch) -> list[bool]:
    """Whether each call was a kernel's."""
    found: list[bool] = []

    def watched(launch: Callable) -> Callable:
        def call(*operands):
            result = launch(*operands)
            found.append(result is not None)
            return result

        return call

    for name in ("modulate", "norm_rope", "gelu_concat"):
        monkeypatch.setattr(kernels, name, watched(getattr(kernels, name)))
    return found


def poison() -> None:
    """What is not written must not look right: memory that outputs will get holds NaN."""
    torch.full((2**24,), float("nan"), device="cuda")


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("name", NAMES)
def test_matches_float64(name: str, dtype: torch.dtype, taken: list[bool]) -> None:
    operands = cases(dtype, device="cuda")[name]
    poison()
    assert_near(name, operands, TOLERANCE[dtype])
    assert taken == [True]


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
@pytest.mark.parametrize("name", NAMES)
def test_a_second_gpu(name: str, taken: list[bool]) -> None:
    """Operands decide where a kernel runs, and not which device is current."""
    assert_near(name, cases(torch.bfloat16, device="cuda:1")[name], TOLERANCE[torch.bfloat16])
    assert taken == [True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("columns", [8, 256, 264, 1536, 3072, 4096])
@pytest.mark.parametrize(("batch", "length"), [(1, 1), (3, 7), (2, 513)])
def test_rows_of_every_length(columns: int, batch: int, length: int, dtype: torch.dtype, taken: list[bool]) -> None:
    x, y, gate, scale, shift = norm_operands(dtype, batch, length, columns, "cuda")
    poison()
    assert_near("norm_modulate", (x, scale, shift, EPSILON), TOLERANCE[dtype])
    assert_near("gated_sum", (x, y, gate), TOLERANCE[dtype])
    assert_near("gated_norm_modulate", (x, y, gate, scale, shift, EPSILON), TOLERANCE[dtype])
    assert taken == [True] * 3


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("head", [64, 128])
@pytest.mark.parametrize(
    ("lengths", "heads", "batch", "rope_batch"),
    [((1,), 1, 1, 1), ((7, 30), 24, 2, 1), ((77,), 5, 3, 3), ((512, 4096), 24, 1, 1), ((0, 9), 2, 1, 1)],
)
def test_heads(lengths, heads, batch, rope_batch, head, dtype, taken: list[bool]) -> None:
    operands = rope_operands(dtype, lengths, heads, head, batch, 64, rope_batch, "cuda")
    poison()
    assert_near("norm_rope", operands, TOLERANCE[dtype])
    assert taken == [True]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("rows", "a", "b"), [(1, 8, 8), (77, 128, 512), (4608, 3072, 12288), (3, 24, 16384)])
def test_columns_beside_each_other(rows: int, a: int, b: int, dtype: torch.dtype, taken: list[bool]) -> None:
    wide = normal(1, rows, 64 + b, dtype=dtype, device="cuda")
    poison()
    assert_near("gelu_concat", (normal(1, rows, a, dtype=dtype, device="cuda"), wide[..., 64:]), TOLERANCE[dtype])
    assert taken == [True]


def test_more_rows_than_a_grid_is_high(taken: list[bool]) -> None:
    a, b = (torch.randn(3, 30000, 8, device="cuda").half() for _ in range(2))
    assert_near("gelu_concat", (a, b), 1e-3)
    assert taken == [True]


def test_what_the_kernels_do_not_take_is_right(taken: list[bool]) -> None:
    dtype = torch.bfloat16
    x, y, gate, scale, shift = norm_operands(dtype, 2, 3, 60, "cuda")
    assert_near("gated_norm_modulate", (x, y, gate, scale, shift, EPSILON), TOLERANCE[dtype])
    assert_near("norm_modulate", (x.transpose(0, 1), scale[:1], shift[:1], EPSILON), TOLERANCE[dtype])
    assert_near("norm_rope", rope_operands(dtype, head=32, device="cuda"), TOLERANCE[dtype])
    qkv, *rest = rope_operands(dtype, device="cuda")
    assert_near("norm_rope", ([torch.stack((part, part), -1)[..., 0] for part in qkv], *rest), TOLERANCE[dtype])
    assert_near("gelu_concat", (x, y[..., :5]), TOLERANCE[dtype])
    assert taken == [False] * 5


def test_sums_in_fp16_stay_finite() -> None:
    x, y = (torch.full((1, 1, 8), value, device="cuda").half() for value in (6e4, 3.0))
    gate = torch.tensor([1e4, -6e4, 0, 1, float("inf"), float("nan"), 2e4, 0], device="cuda").half().view(1, 1, 8)
    assert torch.equal(block.gated_sum(x, y, gate), block.gated_sum(x.cpu(), y.cpu(), gate.cpu()).cuda())


def test_same_bits_in_a_graph_and_on_another_stream() -> None:
    operands = {name: cases(torch.bfloat16, device="cuda")[name] for name in NAMES}

    def run() -> list[torch.Tensor]:
        found = []
        for name, values in operands.items():
            result = getattr(block, name)(*values)
            found += result if isinstance(result, tuple) else [result]
        return found

    expected = run()
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        found = run()
    torch.cuda.current_stream().wait_stream(stream)
    assert all(map(torch.equal, found, expected))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        found = run()
    for tensor in found:
        tensor.zero_()
    graph.replay()
    assert all(map(torch.equal, found, expected))
