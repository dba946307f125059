"""The compiled kernels against float64, on whatever card is there.

Cards from sm_90 on emulate the 4-bit product exactly, so this holds the very kernels that Ampere and Ada
run to account on any of them.
"""

from __future__ import annotations

import pytest
import torch

from svdq_core.kernels import launch, plan
from svdq_core.numerics import hadamard, int4
from svdq_core.ops import fused
from svdq_core.ops.cuda import register
from svdq_core.ops.int4 import linear_int4, quantize_act_int4

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 2e-3}


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def random(*shape: int, scale: float = 1.0, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return (torch.randn(*shape, device="cuda") * scale).to(dtype)


def layer(n: int, k: int, rank: int, dtype: torch.dtype) -> dict[str, torch.Tensor]:
    """Random operands of linear_int4 that belong to the weight."""
    return {
        "weight": int4.pack(torch.randint(-7, 8, (n, k), device="cuda")),
        "weight_scale": (torch.rand(k // 64, n, device="cuda") * 0.01 + 0.001).to(dtype),
        "proj_up": random(n, rank, scale=0.05, dtype=dtype),
        "bias": random(n, dtype=dtype),
    }


def activation(m: int, k: int, rank: int, unsigned: bool) -> dict[str, torch.Tensor]:
    """Random operands of linear_int4 that belong to the activation."""
    low, high = (0, 16) if unsigned else (-7, 8)
    return {
        "qact": int4.pack(torch.randint(low, high, (m, k), device="cuda")),
        "act_scale": torch.rand(k // 64, m, device="cuda") + 0.1,
        "down": random(m, rank),
    }


def exact(a: dict[str, torch.Tensor], w: dict[str, torch.Tensor], unsigned: bool) -> torch.Tensor:
    """The layer in float64."""
    x = int4.unpack(a["qact"], unsigned).double().unflatten(1, (-1, 64)) * a["act_scale"].double().t()[..., None]
    v = int4.unpack(w["weight"]).double().unflatten(1, (-1, 64)) * w["weight_scale"].double().t()[..., None]
    return x.flatten(1) @ v.flatten(1).t() + a["down"].double() @ w["proj_up"].double().t() + w["bias"].double()


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(out).all()
    return ((out.double() - expected).norm() / expected.norm()).item()


def call(a: dict[str, torch.Tensor], w: dict[str, torch.Tensor], unsigned: bool) -> torch.Tensor:
    return linear_int4(*a.values(), *w.values(), unsigned)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize(
    ("m", "n", "k"),
    [
        (1, 8, 64),
        (7, 72, 128),
        (77, 3072, 320),
        (130, 136, 192),
        (512, 256, 3072),
        (4608, 3072, 3072),
        (4607, 392, 640),
    ],
)
def test_linear(m: int, n: int, k: int, unsigned: bool, dtype: torch.dtype) -> None:
    a, w = activation(m, k, 32, unsigned), layer(n, k, 32, dtype)
    assert error(call(a, w, unsigned), exact(a, w, unsigned)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 1, 5, 8, 16, 24, 32, 48, 64, 128, 256])
def test_ranks(rank: int, dtype: torch.dtype) -> None:
    a, w = activation(300, 256, rank, False), layer(264, 256, rank, dtype)
    assert error(call(a, w, False), exact(a, w, False)) < TOLERANCE[dtype]


@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize("tile", [plan.LARGE, plan.MEDIUM, plan.SMALL], ids=lambda t: f"{t.bm}x{t.bn}")
def test_integer_part_is_exact(tile: plan.Tile, unsigned: bool) -> None:
    """Scales of 1 and small codes: every partial sum is an integer that float32 and fp16 hold."""
    m, n, k = 260, 256, 320
    a, w = activation(m, k, 0, unsigned), layer(n, k, 0, torch.float16)
    a["qact"] = int4.pack(torch.randint(0 if unsigned else -2, 3, (m, k), device="cuda"))
    a["act_scale"].fill_(1)
    w["weight"] = int4.pack(torch.randint(-2, 3, (n, k), device="cuda"))
    w["weight_scale"].fill_(1)
    w["bias"].zero_()
    build = plan.GemmBuild(False, unsigned, tile)
    out = launch.gemm(*a.values(), *w.values(), unsigned, build=build)
    torch.testing.assert_close(out.double(), exact(a, w, unsigned), rtol=0, atol=0)


def test_extreme_codes_and_scales() -> None:
    """All codes at their largest, fp16 scales that need all their bits: the offset must cancel exactly."""
    a, w = activation(64, 640, 16, True), layer(64, 640, 16, torch.float16)
    a["qact"] = int4.pack(torch.full((64, 640), 15, device="cuda"))
    a["act_scale"] *= 0.1
    w["weight"] = int4.pack(torch.full((64, 640), -7, device="cuda"))
    w["weight_scale"] = (1 + torch.rand(10, 64, device="cuda")).half()
    assert error(call(a, w, True), exact(a, w, True)) < 1e-3


@pytest.mark.parametrize("scale", [1e-30, 1e-6, 1.0, 3e5, 1e12])
def test_low_rank_out_of_fp16_range(scale: float) -> None:
    a, w = activation(200, 64, 32, False), layer(128, 64, 32, torch.float16)
    a["down"] = a["down"] * scale
    a["act_scale"] = a["act_scale"] * min(scale, 1e3)
    w["proj_up"] = (w["proj_up"].float() / max(scale, 1.0) * 1e-1).half()
    assert error(call(a, w, False), exact(a, w, False)) < TOLERANCE[torch.float16]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize(
    ("m", "k", "rank"),
    [(1, 128, 32), (7, 128, 0), (77, 3072, 32), (33, 320, 5), (512, 3072, 64), (4608, 3072, 32), (100, 12288, 128),
     (40, 640, 256), (65, 1280, 16), (16385, 640, 32)],
)  # fmt: skip
def test_quantize(m: int, k: int, rank: int, unsigned: bool, dtype: torch.dtype) -> None:
    x = random(m, k, scale=3, dtype=dtype)
    x[:, :64] = 0 if not unsigned else -int4.GELU_SHIFT
    smooth = (torch.rand(k, device="cuda") + 0.5).to(dtype)
    proj_down = random(k, rank, scale=k**-0.5, dtype=dtype)
    qact, act_scale, down = quantize_act_int4(x, smooth, proj_down, unsigned)
    again = quantize_act_int4(x, smooth, proj_down, unsigned)
    assert all(torch.equal(*pair) for pair in zip((qact, act_scale, down), again, strict=True))
    check_quantized(x, smooth, proj_down, unsigned, qact, act_scale, down)


def check_quantized(x, smooth, proj_down, unsigned, qact, act_scale, down, down_tolerance=1e-5) -> None:
    """Scales right to rounding, codes right except at ties, down right to float32's rounding."""
    shifted = x.double() + int4.GELU_SHIFT if unsigned else x.double()
    groups = (shifted / smooth.double()).unflatten(1, (-1, 64))
    limit = 15 if unsigned else 7
    largest = (groups if unsigned else groups.abs()).amax(-1).clamp(min=0)
    torch.testing.assert_close(act_scale.t().double(), largest / limit, rtol=2e-6, atol=1e-30)
    ideal = torch.where(largest[..., None] > 0, groups * limit / largest[..., None], 0.0)
    ideal = ideal.clamp(0 if unsigned else -limit, limit)
    codes = int4.unpack(qact, unsigned).double().unflatten(1, (-1, 64))
    assert (codes - ideal).abs().max() <= 0.5 + 1e-4
    if proj_down.shape[1]:
        assert error(down, x.double() @ proj_down.double()) < down_tolerance


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("m", "k", "rank"), [(1, 128, 32), (7, 128, 0), (77, 3072, 32), (33, 320, 5), (4608, 3072, 32), (100, 12288, 128)]
)
def test_quantize_rotated(m: int, k: int, rank: int, dtype: torch.dtype) -> None:
    x = random(m, k, scale=3, dtype=dtype)
    x[:, 64:128] = 0
    smooth = ((torch.rand(k, device="cuda") + 0.5) * torch.randn(k, device="cuda").sign()).to(dtype)
    proj_down = random(k, rank, scale=k**-0.5, dtype=dtype)
    qact, act_scale, down = quantize_act_int4(x, smooth, proj_down, False, True)
    # The quotient in 16 bits may differ in its last place, so codes may at ties, and scales by that much.
    smoothed = (x.double() / smooth.double()).to(dtype).double().unflatten(1, (-1, 64))
    rotated = smoothed @ hadamard.matrix(torch.float64).cuda()
    last_place = torch.finfo(dtype).eps * smoothed.abs().amax(-1, keepdim=True)
    largest = rotated.abs().amax(-1, keepdim=True)
    step = act_scale.t().double()[..., None]
    assert ((step * 7 - largest).abs() <= last_place + 1e-6 * largest).all()
    codes = int4.unpack(qact).double().unflatten(1, (-1, 64))
    assert ((codes * step - rotated).abs() <= 0.5001 * step + last_place).all()
    assert (codes[:, 1] == 0).all() and (step[:, 1] == 0).all()
    if rank:
        assert error(down, x.double() @ proj_down.double()) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_nothing_finite_makes_nan_rotated(dtype: torch.dtype) -> None:
    """Quotients beyond the type's range are cut off, in rows that have them."""
    x = random(96, 256, dtype=dtype)
    plain = quantize_act_int4(x, torch.full_like(x[0], 1e-3), random(256, 32, dtype=dtype), False, True)
    x[16:32, 5] = torch.finfo(dtype).max
    x[32:48] = torch.finfo(dtype).max
    x[48:64, ::2] = -torch.finfo(dtype).max
    smooth, proj_down = torch.full_like(x[0], 1e-3), random(256, 32, dtype=dtype)
    qact, act_scale, down = quantize_act_int4(x, smooth, proj_down, False, True)
    assert torch.isfinite(act_scale).all() and torch.isfinite(down).all()
    assert torch.equal(qact[64:], plain[0][64:]) and torch.equal(act_scale[:, 64:], plain[1][:, 64:])
    found = int4.dequantize(int4.unpack(qact), act_scale.t())[16:32, :64]
    assert torch.equal(found.abs() > 0, torch.ones_like(found, dtype=torch.bool)), "one outlier is everybody's"
    assert (act_scale[:, 32:64].amax(0) > torch.finfo(dtype).max / 8).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unsigned", [False, True])
def test_nothing_finite_makes_nan(unsigned: bool, dtype: torch.dtype) -> None:
    largest = torch.finfo(dtype).max
    x = torch.zeros(96, 256, device="cuda", dtype=dtype)
    x[0:32] = largest
    x[32:64, ::2] = -largest
    x[64, 3] = torch.finfo(dtype).tiny
    smooth = torch.full((256,), 1e-3, device="cuda", dtype=dtype)
    proj_down = random(256, 32, dtype=dtype)
    quantized = quantize_act_int4(x, smooth, proj_down, unsigned)
    assert all(torch.isfinite(tensor).all() for tensor in quantized[1:])
    assert (quantized[1][:, 65:] == 0).all() or unsigned
    w = layer(128, 256, 32, dtype)
    assert not torch.isnan(linear_int4(*quantized, *w.values(), unsigned)).any()


@pytest.mark.parametrize("dtype", DTYPES)
def test_prologues(dtype: torch.dtype) -> None:
    m, k, rank = 154, 640, 32
    x, proj_down = random(m, k, dtype=dtype), random(k, rank, scale=0.05, dtype=dtype)
    smooth = (torch.rand(k, device="cuda") + 0.5).to(dtype)
    for plain in (0, 128):
        y = torch.nn.functional.gelu(x[:, plain:].double(), approximate="tanh").to(dtype)
        y = torch.cat((x[:, :plain], y), 1)
        out = fused.gelu_quantize_act_int4(x[:, :plain].contiguous(), x[:, plain:], smooth, proj_down, not plain)
        # GELU's rounding to 16 bits may differ in the last place: compare what the codes stand for.
        check_close(out, y, smooth, proj_down, not plain, dtype)
    scale, shift = random(2, k, dtype=dtype), random(2, k, dtype=dtype)
    wide = [t.double().repeat_interleave(m // 2, 0) for t in (scale, shift)]
    y = (x.double() * (1 + wide[0]) + wide[1]).to(dtype)
    out = fused.modulate_quantize_act_int4(x, scale, shift, smooth, proj_down, False)
    check_close(out, y, smooth, proj_down, False, dtype)


def check_close(out, y, smooth, proj_down, unsigned, dtype, slack=1e-5) -> None:
    qact, act_scale, down = out
    shifted = y.double() + int4.GELU_SHIFT if unsigned else y.double()
    step = act_scale.t().double().repeat_interleave(64, 1)
    decoded = int4.unpack(qact, unsigned).double() * step
    last_place = shifted.abs() * 2.0 ** (-8 if dtype == torch.bfloat16 else -11)
    room = step * (0.5 + 1e-4) + (last_place + slack * y.double().std()) / smooth.double()
    assert ((decoded - shifted / smooth.double()).abs() <= room).all()
    assert error(down, y.double() @ proj_down.double()) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "rank"), [(77, 32), (300, 48), (4608, 32)])
def test_gelu_quantize_epilogue(m: int, rank: int, dtype: torch.dtype) -> None:
    n, k = 640, 256
    a, w = activation(m, k, 32, False), layer(n, k, 32, dtype)
    a["act_scale"] *= 0.3
    smooth = (torch.rand(n, device="cuda") + 0.5).to(dtype)
    proj_down = random(n, rank, scale=0.05, dtype=dtype)
    out = fused.linear_gelu_quantize_int4(*a.values(), *w.values(), False, smooth, proj_down)
    y = torch.nn.functional.gelu(exact(a, w, False), approximate="tanh").to(dtype)
    # What is quantized here is a GEMM's output: off by some of its tolerance, relative to its size.
    check_close(out, y, smooth, proj_down, True, dtype, slack=4 * TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("further", [0, 40, 1024], ids=lambda further: f"{further} more columns")
@pytest.mark.parametrize(("m", "positions"), [(7, 7), (301, 301), (2048, 512)])
def test_norm_rope_epilogue(m: int, positions: int, further: int, dtype: torch.dtype) -> None:
    heads, k, epsilon = 2, 192, 1e-6
    n = 3 * heads * 128 + further
    a, w = activation(m, k, 32, False), layer(n, k, 32, dtype)
    norm_q, norm_k = random(128, dtype=dtype), random(128, dtype=dtype)
    rope = random(positions, 64, 2, 2)
    out = fused.linear_norm_rope_int4(*a.values(), *w.values(), False, norm_q, norm_k, rope, heads, epsilon)
    expected = exact(a, w, False)
    matrices = rope.double().repeat(m // positions, 1, 1, 1).unsqueeze(1)
    for first, weight in ((0, norm_q), (heads * 128, norm_k)):
        columns = expected[:, first : first + heads * 128]
        head = columns.unflatten(1, (heads, 128))
        head = head * torch.rsqrt(head.square().mean(-1, keepdim=True) + epsilon) * weight.double()
        columns.copy_((matrices @ head.unflatten(-1, (-1, 2, 1))).flatten(1))
    assert error(out, expected) < TOLERANCE[dtype]


def test_graph_compile_and_streams() -> None:
    """The operators under CUDA graphs, torch.compile and another stream give what eager gives."""
    k, n, rank = 3072, 256, 32
    x = random(77, k, dtype=torch.bfloat16)
    smooth = torch.ones(k, device="cuda", dtype=torch.bfloat16)
    proj_down, w = random(k, rank, scale=0.02, dtype=torch.bfloat16), layer(n, k, rank, torch.bfloat16)

    def forward(x: torch.Tensor) -> torch.Tensor:
        return linear_int4(*quantize_act_int4(x, smooth, proj_down, False), *w.values(), False)

    eager = forward(x)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = forward(x)
    stream.synchronize()
    assert torch.equal(eager, other)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = forward(x)
    for _ in range(3):
        captured.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(eager, captured)
    assert torch.equal(eager, torch.compile(forward, fullgraph=True, backend="aot_eager")(x))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="one GPU")
def test_second_gpu() -> None:
    a, w = activation(77, 256, 32, False), layer(128, 256, 32, torch.float16)
    move = [{key: t.to("cuda:1") for key, t in d.items()} for d in (a, w)]
    assert torch.equal(call(a, w, False).cpu(), call(*move, False).cpu())
    with pytest.raises(launch.KernelInputError, match="on cuda:1"):
        call(a, {**w, "weight": move[1]["weight"]}, False)
