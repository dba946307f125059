"""The INT8 kernels against the reference and float64, on whatever card is there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from svdq_core.kernels import int8 as kernels
from svdq_core.kernels import launch, plan, rows, w8a8
from svdq_core.numerics import int8
from svdq_core.ops.cuda import register
from svdq_core.ops.int8 import linear_int8

sys.path.insert(0, str(Path(__file__).parent))
from test_as_int8_gpu import only_cluster

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def operands(m: int, k: int, n: int, rank: int, dtype: torch.dtype) -> dict:
    """Random operands of linear_int8; rows of x differ a hundredfold, some channels are outliers."""

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, device="cuda") * scale).to(dtype)

    x = torch.randn(m, k, device="cuda") * torch.randn(m, 1, device="cuda").exp2()
    x[:, ::37] *= 8
    weight, weight_scale = int8.quantize_rows(torch.randn(n, k, device="cuda") * k**-0.5)
    return {
        "x": x.to(dtype),
        "smooth_factor": (torch.rand(k, device="cuda") + 0.5).to(dtype),
        "proj_down": random(k, rank, scale=k**-0.5),
        "weight": weight,
        "weight_scale": weight_scale.reshape(-1).contiguous(),
        "proj_up": random(n, rank, scale=0.3),
        "bias": random(n),
    }


def quantized(o: dict) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's codes, after a check that they are the reference's: at a tie they may be neighbours."""
    want, want_scale = int8.quantize_rows(o["x"].float().cpu() / o["smooth_factor"].float().cpu())
    codes, scale, _, _ = kernels.quantize(o["x"], o["smooth_factor"], o["proj_down"])
    torch.testing.assert_close(scale.cpu(), want_scale.reshape(-1), rtol=1e-6, atol=0)
    difference = (codes.cpu().int() - want.int()).abs()
    assert difference.max() <= 1 and (difference > 0).sum() <= 2 + 1e-4 * codes.numel()
    return codes.double(), scale.double()


def exact(o: dict) -> torch.Tensor:
    """The layer in float64, of the kernel's codes."""
    codes, scale = quantized(o)
    y = codes @ o["weight"].double().t() * scale[:, None] * o["weight_scale"].double()
    y += o["x"].double() @ o["proj_down"].double() @ o["proj_up"].double().t()
    return y if o["bias"] is None else y + o["bias"].double()


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(out).all()
    return ((out.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [8, 200, 3072])
@pytest.mark.parametrize(("m", "k"), [(1, 64), (7, 192), (77, 3072), (300, 320), (4608, 3072)])
def test_layer(m: int, k: int, n: int, dtype: torch.dtype) -> None:
    o = operands(m, k, n, 32, dtype)
    torch.full((m, n), float("nan"), dtype=dtype, device="cuda")  # what is not written must not read as zeros
    first, second = linear_int8(**o), linear_int8(**o)
    assert error(first, exact(o)) < TOLERANCE[dtype]
    assert torch.equal(first, second), "the same bits every time"
    o["bias"] = None
    assert error(linear_int8(**o), exact(o)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 5, 16, 24, 32, 72, 128, 256, 500])
def test_ranks(rank: int, dtype: torch.dtype) -> None:
    o = operands(300, 256, 264, rank, dtype)
    assert error(linear_int8(**o), exact(o)) < TOLERANCE[dtype]


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="a Hopper kernel"
)
@pytest.mark.parametrize("columns", plan.ROWS_COLUMNS)
def test_every_width_of_a_tile(columns: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Halved tiles and (of 80 clusters' worth of rows) many, with and without a branch, and of next to no K."""
    monkeypatch.setattr(plan, "ROWS_COLUMNS", (columns,))
    for cache in (plan.rows_gemm_build, w8a8._kernel):
        cache.cache_clear()
    for dtype in DTYPES:
        for m, k, n, rank in (
            (300, 704, 3 * columns + 8, 40),
            (300, 704, 3 * columns + 8, 500),  # stages of ranks that no ring has room for
            (300, 704, columns - 8, 0),
            (80 * 256, 704, columns, 0),
            (150 * 256 - 1, 192, columns, 0),
        ):
            o = operands(m, k, n, rank, dtype)
            torch.full((m, n), float("nan"), dtype=dtype, device="cuda")
            assert error(linear_int8(**o), exact(o)) < TOLERANCE[dtype]
            o["bias"] = None
            assert error(linear_int8(**o), exact(o)) < TOLERANCE[dtype]
    for cache in (plan.rows_gemm_build, w8a8._kernel):
        cache.cache_clear()


@pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="a Hopper kernel"
)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "rank"), [(700, 1600, 24), (5000, 3072, 32), (33, 15360, 8), (50, 320, 64)])
def test_every_cluster_s_branch(m: int, k: int, rank: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """More rows than clusters run at once, columns that boxes do not divide, and a last tile that is not full."""
    o, found = operands(m, k, 8, rank, dtype), []
    for cluster, at_once in zip(plan.ROWS_CLUSTERS, rows._at_once(0), strict=True):
        with only_cluster(monkeypatch, cluster, at_once):
            if not rows.takes(0, m, k, rank, dtype == torch.bfloat16):
                continue
            quantized(o)  # are the reference's
            codes, scale, down, down_scale = kernels.quantize(o["x"], o["smooth_factor"], o["proj_down"])
            again = kernels.quantize(o["x"], o["smooth_factor"], o["proj_down"])
            assert torch.equal(down, again[2]), "the same bits every time"
        found.append((codes, scale))
        exact_down = o["x"].double() @ o["proj_down"].double()
        scaled = down.double() if down_scale is None else down.double() * down_scale.double()[:, None]
        assert error(scaled[:, :rank], exact_down) < TOLERANCE[dtype]
        assert not scaled[:, rank:].any()
    assert found
    assert all(torch.equal(a, b) for pair in found[1:] for a, b in zip(found[0], pair, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_finite_makes_nan(dtype: torch.dtype) -> None:
    o = operands(96, 256, 128, 32, dtype)
    o["x"].zero_()
    o["x"][0:32] = torch.finfo(dtype).max
    o["x"][32:64, ::2] = -torch.finfo(dtype).max
    o["x"][64, 3] = torch.finfo(dtype).tiny
    o["smooth_factor"].fill_(-1e-3)
    out = linear_int8(**o)
    assert not torch.isnan(out).any()
    assert torch.equal(out[65:], o["bias"].expand(31, -1)), "rows of zeros"


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e3])
def test_low_rank_out_of_fp16_range(scale: float) -> None:
    o = operands(200, 256, 128, 32, torch.float16)
    o["proj_down"] = (o["proj_down"].float() * scale).half()
    o["proj_up"] = (o["proj_up"].float() / max(scale, 1.0)).half()
    assert error(linear_int8(**o), exact(o)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", plan.INT8_TILES)
@pytest.mark.parametrize(
    ("m", "k", "n", "rank"),
    [(1, 64, 8, 0), (7, 128, 200, 5), (77, 192, 3072, 16), (300, 3072, 264, 32), (130, 15360, 136, 128)],
)
def test_product_of_every_card(
    m: int, k: int, n: int, rank: int, tile: plan.Tile, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``gemm_int8.cu``, which Hopper has no use for but runs."""
    o = operands(m, k, n, rank, dtype)
    build = plan.Int8GemmBuild(dtype == torch.bfloat16, tile)
    activations = kernels.quantize(o["x"], o["smooth_factor"], o["proj_down"])
    weights = o["weight"], o["weight_scale"], o["proj_up"]
    expected = exact(o)
    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *args, **kwargs: empty(*args, **kwargs).fill_(float("nan")))
    assert error(kernels.multiply(*activations, *weights, o["bias"], build), expected) < TOLERANCE[dtype]
    without = kernels.multiply(*activations, *weights, None, build)
    assert error(without, expected - o["bias"].double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("scale", [0.0, 1e-6, 3e3])
def test_product_of_every_card_with_down_of_any_size(scale: float) -> None:
    o = operands(200, 256, 128, 32, torch.float16)
    o["proj_down"] = (o["proj_down"].float() * scale).half()
    o["proj_up"] = (o["proj_up"].float() / max(scale, 1.0)).half()
    activations = kernels.quantize(o["x"], o["smooth_factor"], o["proj_down"])
    out = kernels.multiply(*activations, o["weight"], o["weight_scale"], o["proj_up"], o["bias"])
    assert error(out, exact(o)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_product_of_every_card_saturates(dtype: torch.dtype) -> None:
    o = operands(8, 256, 64, 16, dtype)
    o["x"].fill_(torch.finfo(dtype).max)
    o["smooth_factor"].fill_(1)
    o["weight"].fill_(127)
    o["weight_scale"].fill_(1)
    o["proj_down"].zero_()
    activations = kernels.quantize(o["x"], o["smooth_factor"], o["proj_down"])
    out = kernels.multiply(*activations, o["weight"], o["weight_scale"], o["proj_up"], o["bias"])
    assert (out == torch.finfo(dtype).max).all()


def test_negative_smoothing_factors() -> None:
    o = operands(77, 256, 128, 16, torch.bfloat16)
    o["smooth_factor"][::3] *= -1
    assert error(linear_int8(**o), exact(o)) < TOLERANCE[torch.bfloat16]


def test_no_rows() -> None:
    assert linear_int8(**operands(0, 128, 64, 16, torch.bfloat16)).shape == (0, 64)


def test_graph() -> None:
    o = operands(77, 3072, 256, 32, torch.bfloat16)
    eager = linear_int8(**o)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = linear_int8(**o)
    captured.zero_()
    graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(eager, captured)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("weight", lambda t: t[:, :64].contiguous(), "weight has shape"),
        ("weight_scale", lambda t: t.half(), "weight_scale is torch.float16"),
        ("proj_up", lambda t: t.cpu(), "proj_up is on cpu"),
        ("bias", lambda t: t[:-8].contiguous(), "bias has shape"),
    ],
)
def test_bad_operands(name: str, change, message: str) -> None:
    o = operands(8, 128, 64, 16, torch.bfloat16)
    o[name] = change(o[name])
    with pytest.raises(launch.KernelInputError, match=f"svdq::linear_int8: {message}"):
        linear_int8(**o)
