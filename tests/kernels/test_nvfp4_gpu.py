"""The NVFP4 kernels against the reference and float64, on whatever card is there.

Cards without the block-scaled product multiply the same registers in fp16, so the layouts that it needs are held
to account on any of them.
"""

from __future__ import annotations

import pytest
import torch

from svdq_core.kernels import launch, nvfp4, plan, wide
from svdq_core.numerics import int4
from svdq_core.numerics import nvfp4 as numerics
from svdq_core.ops.cuda import register
from svdq_core.ops.nvfp4 import linear_nvfp4

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def on_hopper() -> bool:
    return torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)


def operands(m: int, k: int, n: int, rank: int, dtype: torch.dtype, channel: bool = True) -> dict:
    """Random operands of linear_nvfp4; groups of activations differ a hundredfold, one column of groups is zero."""

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, device="cuda") * scale).to(dtype)

    x = torch.randn(m, k, device="cuda") * torch.randn(m, k // 16, device="cuda").exp2().repeat_interleave(16, 1)
    x[:, 16:32] = 0
    scale = (torch.rand(k // 16, n, device="cuda") * 8 + 0.01).to(torch.float8_e4m3fn)
    return {
        "x": x.to(dtype),
        "smooth_factor": (torch.rand(k, device="cuda") + 0.5).to(dtype),
        "proj_down": random(k, rank, scale=k**-0.5),
        "weight": int4.pack(torch.randint(0, 16, (n, k), device="cuda", dtype=torch.int8)),
        "weight_scale": scale,
        "weight_tensor_scale": torch.tensor(0.003, device="cuda"),
        "weight_channel_scale": (torch.rand(n, device="cuda") + 0.5).to(dtype) if channel else None,
        "proj_up": random(n, rank, scale=0.3),
        "bias": random(n),
    }


def reference_codes(x: torch.Tensor, smooth_factor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """On the CPU, where torch divides exactly: on a card it multiplies by the reciprocal of a number."""
    return numerics.quantize_groups(x.float().cpu() / smooth_factor.float().cpu())


def exact(o: dict) -> torch.Tensor:
    """The layer in float64, of the reference's codes."""
    activation = numerics.dequantize(*reference_codes(o["x"], o["smooth_factor"])).double().cuda()
    weight = numerics.dequantize(int4.unpack(o["weight"], unsigned=True), o["weight_scale"].t()).double()
    y = activation @ weight.t() * o["weight_tensor_scale"].double()
    if o["weight_channel_scale"] is not None:
        y *= o["weight_channel_scale"].double()
    y += o["x"].double() @ o["proj_down"].double() @ o["proj_up"].double().t()
    return y if o["bias"] is None else y + o["bias"].double()


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(out).all()
    return ((out.double() - expected).norm() / expected.norm()).item()


def row_scales(scale: torch.Tensor) -> torch.Tensor:
    """(K / 64, M, 4) as the kernels keep them -> the bytes of (M, K / 16), on the CPU."""
    return scale.permute(1, 0, 2).reshape(scale.shape[1], -1).cpu().view(torch.uint8)


def in_order(values: torch.Tensor) -> torch.Tensor:
    """What quantize_wide returns -> the columns' own order."""
    m, k = values.shape
    return values.view(m, k // 64, 4, 2, 4, 2).permute(0, 1, 4, 2, 3, 5).reshape(m, k)


def check_codes(x: torch.Tensor, smooth_factor: torch.Tensor) -> None:
    """Codes and scales have the reference's bits."""
    want, want_scale = reference_codes(x, smooth_factor)
    none = x.new_empty((x.shape[1], 0))
    codes, scale, _, _ = nvfp4.quantize(x, smooth_factor, none)
    assert torch.equal(row_scales(scale), want_scale.view(torch.uint8))
    assert torch.equal(int4.unpack(codes, unsigned=True).cpu(), want)
    if on_hopper():
        values, _, _ = nvfp4.quantize_wide(x, smooth_factor, none)
        assert torch.equal(in_order(values).float().cpu(), numerics.dequantize(want, want_scale))


# ---- the quantizer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), [(1, 64), (7, 128), (77, 3072), (300, 640), (33, 12288), (4608, 3072)])
def test_codes_are_the_references(m: int, k: int, dtype: torch.dtype) -> None:
    o = operands(m, k, 8, 0, dtype)
    check_codes(o["x"], o["smooth_factor"])
    check_codes(o["x"], -o["smooth_factor"])


def test_every_scale() -> None:
    """All E4M3 scales, subnormal ones too, and groups beyond the largest and below half the smallest."""
    scale = torch.arange(127, dtype=torch.uint8).view(torch.float8_e4m3fn).float()
    scale = torch.cat([scale, torch.tensor([2.0**-11, 600.0, 9000.0])])
    x = torch.rand(len(scale), 32, 64) * 12 - 6
    x[..., ::16] = 6
    x = (x * scale[:, None, None]).flatten(0, 1).half().cuda()
    check_codes(x, torch.ones(64, dtype=torch.float16, device="cuda"))


@pytest.mark.parametrize("dtype", DTYPES)
def test_ties_and_every_number(dtype: torch.dtype) -> None:
    """Every finite number; and quotients that are ties exactly, though neither operand is a short number."""
    bits = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype)
    x = bits[torch.isfinite(bits) & (bits.abs() < 1e4)]
    x = x[torch.randperm(len(x))][: len(x) // 64 * 64].view(-1, 64).cuda()
    check_codes(x, (torch.randn(64, device="cuda") * 2).exp2().to(dtype))
    smooth = (torch.randint(128, 256, (64,), device="cuda") / 128).to(dtype)
    quarters = torch.randint(-24, 25, (512, 64), device="cuda") / 4
    quarters[:, ::16] = 6
    x = (quarters * smooth).to(dtype)
    x[(x.float() != quarters * smooth) | (torch.rand_like(x) < 0.2)] = 0
    check_codes(x, smooth)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 5, 8, 16, 32, 48, 128, 256])
@pytest.mark.parametrize(("m", "k"), [(1, 64), (77, 1280), (300, 3072)])
def test_low_rank_product(m: int, k: int, rank: int, dtype: torch.dtype) -> None:
    o = operands(m, k, 8, rank, dtype)
    call = nvfp4.quantize_wide if on_hopper() else nvfp4.quantize
    torch.full((4 * m * 256 + 4 * m,), float("nan"), device="cuda")  # what is not written must not read as zeros
    for _ in range(2):  # the second call finds the counters that the first one left
        *_, down, down_scale = call(o["x"], o["smooth_factor"], o["proj_down"])
    assert (down_scale is None) == (dtype == torch.bfloat16 or rank == 0)
    assert down.shape == (m, -(-rank // 64) * 64)
    if rank:
        assert (down[:, rank:] == 0).all()
        true = down.double() * (1 if down_scale is None else down_scale.double()[:, None])
        assert error(true[:, :rank], o["x"].double() @ o["proj_down"].double()) < TOLERANCE[dtype]


# ---- the layer


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("n", [8, 200, 3072])
@pytest.mark.parametrize(("m", "k"), [(1, 64), (7, 192), (77, 3072), (300, 320)])
def test_layer(m: int, k: int, n: int, dtype: torch.dtype) -> None:
    o = operands(m, k, n, 32, dtype)
    first, second = linear_nvfp4(**o), linear_nvfp4(**o)
    assert error(first, exact(o)) < TOLERANCE[dtype]
    assert torch.equal(first, second), "the same bits every time"
    o |= {"weight_channel_scale": None, "bias": None}
    assert error(linear_nvfp4(**o), exact(o)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 5, 16, 24, 32, 128, 256, 400])
@pytest.mark.parametrize("n", [264, 272])
def test_ranks(n: int, rank: int, dtype: torch.dtype) -> None:
    o = operands(300, 256, n, rank, dtype)
    assert error(linear_nvfp4(**o), exact(o)) < TOLERANCE[dtype]


@pytest.mark.parametrize("tokens", plan.WIDE_TOKENS)
def test_every_width_of_a_tile(tokens: int, monkeypatch: pytest.MonkeyPatch) -> None:
    if not on_hopper():
        pytest.skip("a Hopper kernel")
    monkeypatch.setattr(plan, "WIDE_TOKENS", (tokens,))
    for cache in (plan.wide_build, wide._kernel):
        cache.cache_clear()
    for dtype in DTYPES:
        o = operands(3 * tokens + 5, 704, 528, 40, dtype)
        assert error(linear_nvfp4(**o), exact(o)) < TOLERANCE[dtype]
    for cache in (plan.wide_build, wide._kernel):
        cache.cache_clear()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tile", [plan.LARGE, plan.MEDIUM, plan.SMALL], ids=lambda tile: f"{tile.bm}x{tile.bn}")
@pytest.mark.parametrize("m", [1, 7, 77, 300])
def test_gemm(m: int, tile: plan.Tile, dtype: torch.dtype) -> None:
    """The kernel that cards without one of their own run; whatever memory held before, no NaN comes through."""
    o = operands(m, 320, 200, 16, dtype)
    quantized = nvfp4.quantize(o["x"], o["smooth_factor"], o["proj_down"])
    native = torch.cuda.get_device_capability() == (12, 0)
    build = plan.Nvfp4GemmBuild(dtype == torch.bfloat16, native, tile)
    torch.full((m, 200), float("nan"), dtype=dtype, device="cuda")
    out = nvfp4.multiply(*quantized, *list(o.values())[3:], build=build)
    assert error(out, exact(o)) < TOLERANCE[dtype]


def test_products_are_exact() -> None:
    """Each code against each, under every scale: sums that fp16 and float32 hold, bit for bit."""
    m = n = 128
    o = operands(m, 64, n, 0, torch.float16, channel=False)
    o |= {"weight_tensor_scale": torch.tensor(1.0, device="cuda"), "bias": None}
    x = torch.zeros(m, 64, device="cuda")
    group, column = torch.arange(m, device="cuda") % 4, torch.arange(m, device="cuda") % 16
    x[range(m), group * 16 + column] = torch.tensor([0.5, 1, 1.5, 2, 3, 4, 6, -3], device="cuda")[
        torch.randint(0, 8, (m,), device="cuda")
    ]
    o["x"] = x.half()
    o["smooth_factor"].fill_(1)
    o["weight_scale"] = torch.randint(0, 72, (4, n), dtype=torch.uint8, device="cuda").view(torch.float8_e4m3fn)
    assert torch.equal(linear_nvfp4(**o).double(), exact(o).half().double())


@pytest.mark.parametrize("scale", [1e-6, 1.0, 3e3])
def test_low_rank_out_of_fp16_range(scale: float) -> None:
    o = operands(200, 256, 128, 32, torch.float16)
    o["proj_down"] = (o["proj_down"].float() * scale).half()
    o["proj_up"] = (o["proj_up"].float() / max(scale, 1.0)).half()
    o["x"] *= 10
    assert error(linear_nvfp4(**o), exact(o)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_finite_makes_nan(dtype: torch.dtype) -> None:
    o = operands(96, 256, 128, 32, dtype)
    largest = torch.finfo(dtype).max
    o["x"].zero_()
    o["x"][0:32] = largest
    o["x"][32:64, ::2] = -largest
    o["x"][64, 3] = torch.finfo(dtype).tiny
    o["smooth_factor"].fill_(1e-3)
    out = linear_nvfp4(**o)
    assert not torch.isnan(out).any()
    assert error(out[65:], exact(o)[65:]) < TOLERANCE[dtype]


def test_shapes_that_no_kernel_takes() -> None:
    """A file's K may be any multiple of 16 and its N anything: the reference runs."""
    for k, n in ((80, 64), (128, 60)):
        o = operands(5, k, n, 16, torch.float16)
        assert error(linear_nvfp4(**o), exact(o)) < TOLERANCE[torch.float16]


def test_no_rows() -> None:
    o = operands(0, 128, 64, 16, torch.bfloat16)
    assert linear_nvfp4(**o).shape == (0, 64)


def test_graph_compile_and_streams() -> None:
    o = operands(77, 3072, 256, 32, torch.bfloat16)
    rest = list(o.values())[1:]

    def forward(x: torch.Tensor) -> torch.Tensor:
        return linear_nvfp4(x, *rest)

    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward(o["x"])
    eager = forward(o["x"])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = forward(o["x"])
    stream.synchronize()
    assert torch.equal(eager, other)
    assert torch.equal(eager, torch.compile(forward, fullgraph=True, backend="aot_eager")(o["x"]))
    o["weight_tensor_scale"].mul_(2)  # a graph reads it when it is replayed
    doubled = forward(o["x"])
    for _ in range(2):
        captured.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(doubled, captured)
    assert not torch.equal(eager, captured)


def test_operand_on_another_device() -> None:
    o = operands(8, 128, 64, 16, torch.bfloat16)
    with pytest.raises(launch.KernelInputError, match="svdq::linear_nvfp4: weight_tensor_scale is on cpu"):
        linear_nvfp4(**{**o, "weight_tensor_scale": o["weight_tensor_scale"].cpu()})
