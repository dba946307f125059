"""INT8 layers of few rows, and several of one input, against float64, on whatever card is there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from svdq_core.kernels import int8 as kernels
from svdq_core.kernels import launch
from svdq_core.numerics import int8
from svdq_core.ops.cuda import register
from svdq_core.ops.int8 import linear_int8, linears_int8

sys.path.insert(0, str(Path(__file__).parent))
from early import assert_waits_for

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 2e-3}
NAMES = ("smooth_factor", "weight", "weight_scale", "bias")
ROUNDS = 200


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def input_of(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Rows that differ a hundredfold, with channels that are outliers."""
    x = torch.randn(m, k, device="cuda") * torch.randn(m, 1, device="cuda").exp2()
    x[:, ::37] *= 8
    return x.to(dtype)


def layer_of(k: int, n: int, dtype: torch.dtype) -> dict:
    """Random operands of a layer without a branch, but its input."""
    weight, weight_scale = int8.quantize_rows(torch.randn(n, k, device="cuda") * k**-0.5)
    return {
        "smooth_factor": (torch.rand(k, device="cuda") + 0.5).to(dtype),
        "weight": weight,
        "weight_scale": weight_scale.reshape(-1).contiguous(),
        "bias": torch.randn(n, device="cuda").to(dtype),
    }


def linear(x: torch.Tensor, **layer) -> torch.Tensor:
    """``linear_int8`` without a branch."""
    none = {"proj_down": x.new_empty((x.shape[1], 0)), "proj_up": x.new_empty((len(layer["weight"]), 0))}
    return linear_int8(x, **none, **layer)


def together(x: torch.Tensor, layers: list[dict]) -> list[torch.Tensor]:
    return linears_int8(x, *([layer[name] for layer in layers] for name in NAMES))


def exact(x: torch.Tensor, layer: dict) -> torch.Tensor:
    """In float64, of the reference's codes, made on the CPU, where torch divides exactly."""
    codes, scale = int8.quantize_rows(x.float().cpu() / layer["smooth_factor"].float().cpu())
    y = codes.double().cuda() @ layer["weight"].double().t() * scale.double().cuda() * layer["weight_scale"].double()
    return y if layer["bias"] is None else y + layer["bias"].double()


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(out).all()
    return ((out.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [8, 16, 24, 200, 9216])
# Up to eight rows and 3072 columns are the kernel's.
@pytest.mark.parametrize(
    ("m", "k"), [(1, 64), (1, 3072), (2, 192), (3, 320), (5, 2880), (7, 3072), (8, 512), (8, 3136), (9, 640)]
)
def test_layer(m: int, k: int, n: int, dtype: torch.dtype) -> None:
    x, layer = input_of(m, k, dtype), layer_of(k, n, dtype)
    torch.full((m, n), float("nan"), dtype=dtype, device="cuda")  # what is not written must not read as zeros
    first, second = linear(x, **layer), linear(x, **layer)
    assert error(first, exact(x, layer)) < TOLERANCE[dtype]
    assert torch.equal(first, second), "the same bits every time"
    layer["bias"] = None
    assert error(linear(x, **layer), exact(x, layer)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 8])
def test_codes_are_those_of_the_quantizer(m: int, dtype: torch.dtype) -> None:
    """With ones on the diagonal for a weight outputs are codes times scales; at a tie they may be neighbours.

    Both are rounded to the outputs' type, where a large code's last place may be half of a scale.
    """
    k = 3072
    x, layer = input_of(m, k, dtype), layer_of(k, k, dtype) | {"bias": None}
    layer["weight"] = torch.eye(k, device="cuda", dtype=torch.int8)
    layer["weight_scale"].fill_(1)
    codes, scale, _, _ = kernels.quantize(x, layer["smooth_factor"], x.new_empty((k, 0)))
    found = linear(x, **layer)
    expected = (codes.float() * scale[:, None]).to(dtype)
    assert (found != expected).sum() <= 2 + 1e-4 * found.numel()
    rounding = expected.float().abs() * torch.finfo(dtype).eps
    assert ((found.float() - expected.float()).abs() <= scale[:, None] * 1.01 + rounding).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    "outputs",
    [
        [24],
        [16, 16, 24, 8 * 301, 16, 9216],
        [200] * 100,  # more than a launch takes
        [18432, 9216, 18432] * 2,  # more tiles than a block finishes at once
        [64, 24, 8, 256],  # one that the kernel does not take
        [64, 20],  # nor any kernel
        [],
    ],
    ids=len,
)
@pytest.mark.parametrize(("m", "k"), [(1, 3072), (8, 320), (4, 2112), (11, 192), (2, 3136), (0, 64)])
def test_layers_of_one_input(m: int, k: int, outputs: list[int], dtype: torch.dtype) -> None:
    """Each has smoothing factors, and so codes, of its own."""
    x = input_of(m, k, dtype)
    layers = [layer_of(k, n, dtype) for n in outputs]
    for layer in layers[::3]:
        layer["bias"] = None
    torch.full((m * sum(outputs),), float("nan"), dtype=dtype, device="cuda")
    found, again = together(x, layers), together(x, layers)
    assert len(found) == len(outputs)
    for layer, y, same in zip(layers, found, again, strict=True):
        assert y.shape == (m, len(layer["weight"])) and y.dtype == dtype
        assert torch.equal(y, same), "the same bits every time"
        assert torch.equal(y, linear(x, **layer)), "as by itself"
        assert torch.isfinite(y).all()
        expected = exact(x, layer)
        assert (y.double() - expected).norm() <= TOLERANCE[dtype] * expected.norm()


def test_layers_of_one_input_in_a_graph() -> None:
    """The pointers of all layers are part of the launch: nothing outside of the graph is read for them."""
    x = input_of(1, 3072, torch.bfloat16)
    layers = [layer_of(3072, n, torch.bfloat16) for n in (9216, 64, 18432)]
    eager = together(x, layers)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = together(x, layers)
    for y in captured:
        y.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(eager, captured, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_finite_makes_nan(dtype: torch.dtype) -> None:
    x, layer = torch.zeros(8, 256, dtype=dtype, device="cuda"), layer_of(256, 128, dtype)
    x[0:2] = torch.finfo(dtype).max
    x[2:4, ::2] = -torch.finfo(dtype).max
    x[4, 3] = torch.finfo(dtype).tiny
    layer["smooth_factor"].fill_(-1e-3)
    out = linear(x, **layer)
    assert not torch.isnan(out).any()
    assert torch.equal(out[5:], layer["bias"].expand(3, -1)), "rows of zeros"


@pytest.mark.parametrize("dtype", DTYPES)
def test_outputs_saturate(dtype: torch.dtype) -> None:
    layer = layer_of(256, 64, dtype)
    layer["smooth_factor"].fill_(1)
    layer["weight"].fill_(127)
    layer["weight_scale"].fill_(1)
    x = torch.full((3, 256), torch.finfo(dtype).max, dtype=dtype, device="cuda")
    assert (linear(x, **layer) == torch.finfo(dtype).max).all()
    assert (linear(-x, **layer) == -torch.finfo(dtype).max).all()


# ---- a kernel that starts while the one in front of it ends: what that one writes is read behind the wait only


@pytest.mark.parametrize("in_graph", [False, True], ids=["stream", "graph"])
@pytest.mark.parametrize(("m", "k"), [(1, 3072), (8, 512)])
def test_input_from_the_kernel_before(m: int, k: int, in_graph: bool) -> None:
    """x is torch's output and then another layer's, new ones every time."""
    layers = [layer_of(k, k, torch.bfloat16) for _ in range(4)]

    def chain(x: torch.Tensor, wait: bool = False) -> list[torch.Tensor]:
        outputs = [torch.nn.functional.silu(x)]
        for layer in layers:
            if wait:
                torch.cuda.synchronize()
            outputs.append(linear(outputs[-1], **layer))
        return outputs

    x = torch.empty(m, k, dtype=torch.bfloat16, device="cuda")
    inputs = torch.randn(ROUNDS, m, k, device="cuda").bfloat16()
    expected = [chain(value, wait=True) for value in inputs]
    for outputs in expected[:: ROUNDS // 4]:
        for layer, before, y in zip(layers, outputs, outputs[1:], strict=False):
            assert error(y, exact(before, layer)) < TOLERANCE[torch.bfloat16]
    if in_graph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = chain(x)
    seen = []
    for value in inputs:
        x.copy_(value)
        if in_graph:
            graph.replay()
        seen.append([y.clone() for y in captured] if in_graph else chain(x))
    torch.cuda.synchronize()
    for found, outputs in zip(seen, expected, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(found, outputs, strict=True))


@pytest.mark.parametrize("in_graph", [False, True], ids=["stream", "graph"])
@pytest.mark.parametrize("written", NAMES)
def test_operand_written_by_the_kernel_before(written: str, in_graph: bool) -> None:
    """An operand in place, by the kernel in front; the one before that is a layer that has just read it."""
    x, layer = input_of(2, 3072, torch.bfloat16), layer_of(3072, 3072, torch.bfloat16)
    values = [layer_of(3072, 3072, torch.bfloat16)[written] for _ in range(4)]
    expected = [linear(x, **layer | {written: value}) for value in values]
    for value, y in zip(values, expected, strict=True):
        assert error(y, exact(x, layer | {written: value})) < TOLERANCE[torch.bfloat16]
    assert_waits_for(linear, layer | {"x": x}, written, values, expected, ROUNDS, in_graph)


def test_output_is_where_the_kernel_before_reads() -> None:
    """A layer's output may take the place of an input that the layer in front is still reading."""
    layers = [layer_of(3072, 3072, torch.bfloat16) for _ in range(2)]
    x, other = input_of(8, 3072, torch.bfloat16), input_of(8, 3072, torch.bfloat16)
    expected = linear(x, **layers[0]), linear(other, **layers[1])
    for _ in range(ROUNDS):
        copy = x.clone()
        y = linear(copy, **layers[0])
        del copy  # torch gives its memory to the next output
        z = linear(other, **layers[1])
        assert torch.equal(y, expected[0])
        assert torch.equal(z, expected[1])


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("smooth_factor", lambda t: t[:64].contiguous(), "smooth_factor has shape"),
        ("weight", lambda t: t[:, :64].contiguous(), "weight has shape"),
        ("weight_scale", lambda t: t.half(), "weight_scale is torch.float16"),
        ("bias", lambda t: t.cpu(), "bias is on cpu"),
    ],
)
def test_bad_operand_of_one_of_several_layers(name: str, change, message: str) -> None:
    layers = [layer_of(128, n, torch.float16) for n in (64, 128)]
    layers[1][name] = change(layers[1][name])
    with pytest.raises(launch.KernelInputError, match=f"svdq::linear_int8: {message}"):
        together(input_of(1, 128, torch.float16), layers)
