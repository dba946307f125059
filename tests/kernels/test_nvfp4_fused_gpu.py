"""NVFP4's GELU + quantize epilogue against float64, on whatever card is there."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from svdq_core.kernels import nvfp4, plan
from svdq_core.numerics import int4
from svdq_core.numerics import nvfp4 as numerics
from svdq_core.ops.cuda import register
from svdq_core.ops.nvfp4 import feed_forward_nvfp4

sys.path.insert(0, str(Path(__file__).parent))
from test_nvfp4_fused import exact, gelu, layer

pytestmark = pytest.mark.gpu
CUDA = torch.device("cuda")
DTYPES = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 2e-3}
TILES = [plan.MEDIUM, plan.LARGE]


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def inputs(m: int, k: int, dtype: torch.dtype) -> torch.Tensor:
    """Groups that differ a hundredfold; the second one is zero."""
    x = torch.randn(m, k, device="cuda") * torch.randn(m, k // 16, device="cuda").exp2().repeat_interleave(16, 1)
    x[:, 16:32] = 0
    return x.to(dtype)


def quantize_gelu(x: torch.Tensor, first: tuple, second: tuple, tile: plan.Tile | None = None) -> tuple:
    """What the epilogue makes of ``x``, by the plan's build or one of another tile."""
    build = None
    if tile:
        native = torch.cuda.get_device_capability() == (12, 0)
        build = plan.Nvfp4GemmBuild(x.dtype == torch.bfloat16, native, tile, plan.GELU_QUANTIZE)
    quantized = nvfp4.quantize(x, *first[:2])
    return nvfp4.multiply_gelu_quantize(*quantized, *first[2:], *second[:2], build=build)


def of_file(codes: torch.Tensor, scale: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (M, K) and scales (M, K / 16), as the reference has them."""
    return int4.unpack(codes, unsigned=True), scale.permute(1, 0, 2).reshape(scale.shape[1], -1)


def true_down(down: torch.Tensor, down_scale: torch.Tensor | None) -> torch.Tensor:
    return down.double() * (1 if down_scale is None else down_scale.double()[:, None])


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(out).all()
    return ((out.double() - expected).norm() / expected.norm()).item()


def check(out: tuple, y: torch.Tensor, smooth: torch.Tensor, proj_down: torch.Tensor) -> None:
    """That ``out`` is ``y`` (rounded to 16 bits) quantized; y may be off by the GEMM's tolerance."""
    codes, scale, down, down_scale = out
    dtype, rank = smooth.dtype, proj_down.shape[1]
    assert (down_scale is None) == (dtype == torch.bfloat16 or rank == 0)
    assert down.shape == (len(y), -(-rank // 64) * 64) and (down[:, rank:] == 0).all()
    if rank:
        assert error(true_down(down, down_scale)[:, :rank], y.double() @ proj_down.double()) < TOLERANCE[dtype]
    codes, scale = of_file(codes, scale)
    want_codes, want_scale = (t.cuda() for t in numerics.quantize_groups(y.float().cpu() / smooth.float().cpu()))
    # Scales are steps of an eighth or less: where the largest of a group is at a border, one apart.
    step = scale.view(torch.uint8).int() - want_scale.view(torch.uint8).int()
    other_codes = (codes != want_codes) & (step == 0).repeat_interleave(16, 1)
    assert step.abs().max() <= 1
    assert step.count_nonzero() <= 2 + 0.1 * step.numel() and other_codes.sum() <= 4 + 0.1 * codes.numel()
    decoded, wide = numerics.dequantize(codes, scale).double(), scale.double().repeat_interleave(16, 1)
    value = y.double() / smooth.double()
    # Half the distance between codes there; beyond the largest code, what a rounded scale leaves (6 / 16, and less).
    steps = value.abs() / wide.clamp(min=1e-30)
    half = torch.where(steps < 2, 0.25, torch.where(steps < 4, 0.5, 1.0))
    last_place = y.double().abs() * 2.0 ** (-8 if dtype == torch.bfloat16 else -11)
    slack = (last_place + 4 * TOLERANCE[dtype] * y.double().std()) / smooth.double().abs()
    # A group whose scale rounds to nothing is at most half the smallest scale times 6.
    room = torch.where(wide > 0, half * wide * (1 + 1e-4), 6 * 2.0**-10) + slack
    assert ((decoded - value).abs() <= room).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", TILES, ids=lambda tile: f"{tile.bm}x{tile.bn}")
@pytest.mark.parametrize(
    ("m", "k", "n", "rank"),
    [
        (1, 64, 64, 32),
        (7, 192, 192, 8),
        (77, 320, 640, 0),
        (300, 256, 448, 48),
        (131, 64, 128, 5),
        (520, 384, 320, 136),
    ],
)
def test_epilogue(m: int, k: int, n: int, rank: int, tile: plan.Tile, dtype: torch.dtype) -> None:
    x, first, second = inputs(m, k, dtype), layer(k, n, 32, dtype, CUDA), layer(n, 8, rank, dtype, CUDA)
    y = gelu(exact(x, first)).to(dtype)
    torch.full((4 * m * (n + 256),), float("nan"), device="cuda")  # what is not written must not read as zeros
    for _ in range(2):  # the second call finds the counters that the first one left
        out = quantize_gelu(x, first, second, tile)
        check(out, y, *second[:2])
    again = quantize_gelu(x, first, second, tile)
    assert torch.equal(out[0], again[0]) and torch.equal(out[1].view(torch.uint8), again[1].view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_flux_layer_without_options(dtype: torch.dtype) -> None:
    """Many tiles that finish together, no channel scale, no bias, negative smoothing factors, no first rank."""
    x, second = inputs(1111, 1024, dtype), layer(4096, 8, 32, dtype, CUDA)
    smooth, down, weight, scale, tensor_scale, _, up, _ = layer(1024, 4096, 0, dtype, CUDA)
    first = smooth, down, weight, scale, tensor_scale, None, up, None
    second = -second[0], *second[1:]
    check(quantize_gelu(x, first, second), gelu(exact(x, first)).to(dtype), *second[:2])


@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_zeros(dtype: torch.dtype) -> None:
    """Outputs that are zero, or that GELU makes zero: scale 0 and codes 0, and no other group touched."""
    x, second = inputs(45, 128, dtype), layer(192, 8, 16, dtype, CUDA)
    smooth, down, weight, scale, tensor_scale, channel, up, bias = layer(128, 192, 16, dtype, CUDA)
    scale.view(torch.uint8)[:, 16:48] = 0
    up[16:48] = 0
    bias[16:32] = 0
    bias[32:48] = -1000
    first = smooth, down, weight, scale, tensor_scale, channel, up, bias
    out = quantize_gelu(x, first, second)
    check(out, gelu(exact(x, first)).to(dtype), *second[:2])
    codes, scales = of_file(*out[:2])
    assert (codes[:, 16:48] == 0).all() and (scales.view(torch.uint8)[:, 1:3] == 0).all()


@pytest.mark.parametrize("scale", [1e-5, 1.0, 3e3])
def test_next_down_out_of_fp16_range(scale: float) -> None:
    dtype = torch.float16
    x, first = inputs(200, 256, dtype), layer(256, 128, 16, dtype, CUDA)
    smooth, proj_down, *rest = layer(128, 8, 32, dtype, CUDA)
    second = smooth, (proj_down.float() * scale).to(dtype), *rest
    y = gelu(exact(x, first)).to(dtype)
    out = quantize_gelu(x, first, second)
    assert error(true_down(*out[2:])[:, :32], y.double() @ second[1].double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_finite_makes_nan(dtype: torch.dtype) -> None:
    x, first, second = inputs(96, 256, dtype), layer(256, 128, 32, dtype, CUDA), layer(128, 8, 32, dtype, CUDA)
    largest = torch.finfo(dtype).max
    x.zero_()
    x[0:32] = largest
    x[32:64, ::2] = -largest
    x[64, 3] = torch.finfo(dtype).tiny
    first[0].fill_(1e-3)
    codes, scale, down, down_scale = quantize_gelu(x, first, second)
    assert (scale.view(torch.uint8) <= 0x7E).all(), "E4M3's largest, and not its NaN"
    assert not torch.isnan(true_down(down, down_scale)).any()
    quiet = codes[65:], scale[:, 65:], down[65:], None if down_scale is None else down_scale[65:]
    check(quiet, gelu(exact(x[65:], first)).to(dtype), *second[:2])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "inner"), [(1, 64), (77, 320), (300, 1280)])
def test_feed_forward(m: int, inner: int, dtype: torch.dtype) -> None:
    """The layer behind the epilogue takes what it left."""
    x, first, second = inputs(m, 256, dtype), layer(256, inner, 32, dtype, CUDA), layer(inner, 200, 32, dtype, CUDA)
    y = gelu(exact(x, first)).to(dtype)
    codes = of_file(*quantize_gelu(x, first, second)[:2])
    assert error(nvfp4.feed_forward(x, *first, *second), exact(y, second, codes)) < 2 * TOLERANCE[dtype]
    # Codes at a border may differ from those of a y that is exact: a few, by a step.
    assert error(feed_forward_nvfp4(x, *first, *second), exact(y, second)) < 0.05


def test_shapes_that_the_epilogue_does_not_take() -> None:
    for k, inner, n in ((80, 64, 40), (128, 48, 40), (128, 64, 20)):
        dtype = torch.float16
        x, first, second = inputs(5, k, dtype), layer(k, inner, 16, dtype, CUDA), layer(inner, n, 16, dtype, CUDA)
        expected = exact(gelu(exact(x, first)).to(dtype), second)
        assert error(feed_forward_nvfp4(x, *first, *second), expected) < 0.05


def test_no_rows() -> None:
    dtype = torch.bfloat16
    x, first, second = inputs(0, 128, dtype), layer(128, 64, 16, dtype, CUDA), layer(64, 40, 16, dtype, CUDA)
    assert feed_forward_nvfp4(x, *first, *second).shape == (0, 40)
    assert nvfp4.feed_forward(x, *first, *second).shape == (0, 40)


def test_graph() -> None:
    """Sums and counters start from zero in every replay."""
    dtype = torch.bfloat16
    x, first, second = inputs(300, 256, dtype), layer(256, 320, 32, dtype, CUDA), layer(320, 8, 32, dtype, CUDA)
    y = gelu(exact(x, first)).to(dtype)
    quantize_gelu(x, first, second)
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = quantize_gelu(x, first, second)
    for _ in range(3):
        graph.replay()
        torch.cuda.synchronize()
        check(out, y, *second[:2])
