"""Whole INT4 layers through whatever kernels the card has, against float64 of the same codes.

On Hopper these are kernels of their own; elsewhere this runs the two halves that other tests hold to account.
"""

from __future__ import annotations

import pytest
import torch

from svdq_core.kernels import grid, hopper, launch, plan
from svdq_core.numerics import hadamard, int4
from svdq_core.ops.int4 import linear_w4a4, quantize_act_int4

pytestmark = pytest.mark.gpu
DTYPES = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 2e-3}
needs_hopper = pytest.mark.skipif(
    not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0), reason="needs a Hopper card"
)


@pytest.fixture(params=[False, True], ids=["any-scales", "scales-on-a-grid"])
def on_grid(request: pytest.FixtureRequest) -> bool:
    return request.param


def operands(
    m: int, k: int, n: int, rank: int, dtype: torch.dtype, unsigned: bool = False, on_grid: bool = False
) -> dict:
    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, device="cuda") * scale).to(dtype)

    x = random(m, k)
    x[:, : k // 8] *= 20  # outlier channels
    if unsigned:
        x = torch.nn.functional.gelu(x.float()).to(dtype)
    weight_scale = torch.rand(k // 64, n, device="cuda") * 0.01 + 0.001
    if on_grid:
        unit = int4.scale_unit(weight_scale.amax(dim=0), dtype)
        weight_scale = (weight_scale / unit).ceil() * unit
    return {
        "x": x,
        "smooth_factor": (torch.rand(k, device="cuda") + 0.5).to(dtype),
        "proj_down": random(k, rank, scale=k**-0.5),
        "weight": int4.pack(torch.randint(-7, 8, (n, k), device="cuda", dtype=torch.int8)),
        "weight_scale": weight_scale.to(dtype),
        "proj_up": random(n, rank, scale=0.05),
        "bias": random(n),
    }


def call(o: dict, unsigned: bool = False, rotated: bool = False) -> torch.Tensor:
    return linear_w4a4(*o.values(), unsigned, rotated)


def bytes_to_codes(qact: torch.Tensor, m: int, k: int) -> torch.Tensor:
    """The codes in Hopper's image of activations: swizzle, order of columns and sign bit undone."""
    stages, rows, _ = qact.shape
    place = torch.arange(8, device="cuda")[None, :] ^ (torch.arange(rows, device="cuda") % 8)[:, None]
    chunks = qact.view(stages, rows, 8, 16).gather(2, place[None, :, :, None].expand(stages, rows, 8, 16))
    columns = chunks.transpose(0, 1).reshape(rows, -1)[:m, :k]
    columns = columns.view(m, k // 64, 4, 2, 8).transpose(2, 3).reshape(m, k).int()
    return torch.where(columns >= 128, 128 - columns, columns)


def exact(o: dict, unsigned: bool = False, rotated: bool = False) -> torch.Tensor:
    """The layer in float64, of the codes that the card's own quantizer makes."""
    m, k = o["x"].shape
    x = o["x"].float() + (int4.GELU_SHIFT if unsigned else 0.0)
    smoothed = hadamard.smooth_and_rotate(o["x"], o["smooth_factor"]) if rotated else x / o["smooth_factor"].float()
    _, scale = int4.quantize_groups(smoothed, unsigned)
    quantizer = o["x"], o["smooth_factor"], launch.pad_rank(o["proj_down"]), unsigned
    prologue = plan.ROTATE if rotated else plan.PLAIN
    if torch.cuda.get_device_capability() != (9, 0):
        codes = int4.unpack(quantize_act_int4(*quantizer, rotated)[0], unsigned)
    elif runs_grid(o):
        codes = grid.quantize(*quantizer, prologue).qact
    else:
        codes = bytes_to_codes(hopper.quantize(*quantizer, prologue).qact, m, k)
    activation = codes.double() * scale.reshape(m, -1).double().repeat_interleave(64, 1)
    activation *= o["smooth_factor"].double().sign() if not unsigned and not rotated and hopper_signs(o) else 1.0
    weight = int4.dequantize(int4.unpack(o["weight"]), o["weight_scale"].t()).double()
    low_rank = (o["x"].double() @ o["proj_down"].double()) @ o["proj_up"].double().t()
    return activation @ weight.t() + low_rank + o["bias"].double()


def runs_grid(o: dict) -> bool:
    return grid.image(o["weight"], o["weight_scale"]) is not None


def hopper_signs(o: dict) -> bool:
    """Whether codes lack the smoothing factor's sign, which Hopper's weights carry instead."""
    hopper_card = torch.cuda.get_device_capability() == (9, 0)
    return hopper_card and not runs_grid(o) and bool((o["smooth_factor"] < 0).any())


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(out).all()
    return ((out.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unsigned", [False, True])
@pytest.mark.parametrize(
    ("m", "k", "n"),
    [
        (1, 64, 8),
        (7, 128, 72),
        (77, 320, 3072),
        (257, 640, 168),
        (512, 3072, 256),
        (4608, 3072, 3072),
        (300, 12288, 328),
        (129, 15360, 160),
    ],
)
def test_layer(m: int, k: int, n: int, unsigned: bool, dtype: torch.dtype, on_grid: bool) -> None:
    o = operands(m, k, n, 32, dtype, unsigned, on_grid)
    assert not on_grid or runs_grid(o)
    first, second = call(o, unsigned), call(o, unsigned)
    assert error(first, exact(o, unsigned)) < TOLERANCE[dtype]
    assert torch.equal(first, second), "the same bits every time"


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k", "n"), [(1, 64, 8), (77, 320, 72), (257, 3072, 168), (4608, 3072, 3072)])
def test_rotated_layer(m: int, k: int, n: int, dtype: torch.dtype, on_grid: bool) -> None:
    o = operands(m, k, n, 32, dtype, on_grid=on_grid)
    o["smooth_factor"][::3] *= -1
    found = call(o, rotated=True)
    assert error(found, exact(o, rotated=True)) < TOLERANCE[dtype]
    # The quantizer's codes were taken for granted so far: they are the reference's, but for ties.
    quantized = {key: value.cpu().float() if value.is_floating_point() else value.cpu() for key, value in o.items()}
    assert error(found.cpu(), call(quantized, rotated=True).double()) < 0.1


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("rank", [0, 1, 5, 8, 16, 24, 32, 48, 64, 72, 128, 200, 256])
def test_ranks(rank: int, dtype: torch.dtype, on_grid: bool) -> None:
    o = operands(300, 256, 264, rank, dtype, on_grid=on_grid)
    assert error(call(o), exact(o)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_low_rank_beside_nothing(dtype: torch.dtype, on_grid: bool) -> None:
    """Weights of zero leave the low-rank branch alone, whatever its size."""
    for scale in (1e-3, 1.0, 1e2):
        o = operands(200, 256, 160, 32, dtype, on_grid=on_grid)
        o["weight"].zero_()
        o["proj_up"] = (o["proj_up"].float() * scale).to(dtype)
        assert error(call(o), exact(o)) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unsigned", [False, True])
def test_nothing_finite_makes_nan(unsigned: bool, dtype: torch.dtype, on_grid: bool) -> None:
    o = operands(96, 256, 128, 32, dtype, on_grid=on_grid)
    largest = torch.finfo(dtype).max
    o["x"].zero_()
    o["x"][0:32] = largest
    o["x"][32:64, ::2] = -largest
    o["x"][64, 3] = torch.finfo(dtype).tiny
    o["smooth_factor"].fill_(1e-3)
    out = call(o, unsigned)
    assert not torch.isnan(out).any()
    assert error(out[65:], exact(o, unsigned)[65:]) < TOLERANCE[dtype]


@needs_hopper
def test_negative_smoothing_factors(on_grid: bool) -> None:
    o = operands(64, 128, 64, 16, torch.bfloat16, on_grid=on_grid)
    o["smooth_factor"][::3] *= -1
    assert error(call(o), exact(o)) < TOLERANCE[torch.bfloat16]


@needs_hopper
def test_codes_are_the_references(m: int = 77, k: int = 640) -> None:
    """The bytes are the reference's codes, but for ties, where the last bit of a reciprocal decides."""
    for unsigned in (False, True):
        o = operands(m, k, 64, 32, torch.bfloat16, unsigned)
        out = hopper.quantize(o["x"], o["smooth_factor"], o["proj_down"], unsigned)
        x = o["x"].float() + (int4.GELU_SHIFT if unsigned else 0.0)
        codes, scale = int4.quantize_groups(x / o["smooth_factor"].float(), unsigned)
        stages, rows, _ = out.qact.shape
        found = bytes_to_codes(out.qact, m, k)
        assert (found != codes.int()).float().mean() < 1e-3
        assert (found - codes.int()).abs().max() <= 1
        relative = out.act_scale.view(stages, rows, 2, 2)[..., 0].permute(1, 0, 2).reshape(rows, -1)[:m, : k // 64]
        chunk = out.chunk_scale.t()[:m].repeat_interleave(8, 1)[:, : k // 64] * 2.0**20
        torch.testing.assert_close(relative.float() / 512 * chunk, scale.reshape(m, -1), rtol=2**-10, atol=0)


@needs_hopper
@pytest.mark.parametrize("half", plan.GRID_HALVES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_width_of_a_grid_s_tile(half: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(plan, "GRID_HALVES", (half,))
    caches = plan.grid_build, grid._kernel
    for cache in caches:
        cache.cache_clear()
    o = operands(700, 704, 520, 40, dtype, on_grid=True)
    assert error(call(o), exact(o)) < TOLERANCE[dtype]
    for cache in caches:
        cache.cache_clear()


@needs_hopper
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("unsigned", [False, True])
def test_sums_as_large_as_they_can_be(unsigned: bool, dtype: torch.dtype) -> None:
    """Every product of a row has the same sign and the largest codes: integer sums must not run over."""
    o = operands(130, 12288, 200, 0, dtype, on_grid=True)
    o["x"] = torch.ones_like(o["x"])
    o["smooth_factor"].fill_(1)
    o["weight"] = int4.pack(torch.full((200, 12288), 7, device="cuda"))
    o["weight_scale"] = torch.full_like(o["weight_scale"], 0.25)
    assert error(call(o, unsigned), exact(o, unsigned)) < TOLERANCE[dtype]


@needs_hopper
@pytest.mark.parametrize("dtype", DTYPES)
def test_groups_of_very_different_scales(dtype: torch.dtype) -> None:
    """What one group's scale is far above the next's costs no more than the tolerance."""
    o = operands(256, 3072, 384, 32, dtype, on_grid=True)
    o["x"] *= torch.where(torch.rand(48, device="cuda") < 0.1, 30.0, 1.0).repeat_interleave(64).to(dtype)
    assert error(call(o), exact(o)) < TOLERANCE[dtype]


@needs_hopper
def test_image_lives_as_long_as_the_weight(on_grid: bool) -> None:
    o = operands(8, 128, 64, 16, torch.bfloat16, on_grid=on_grid)
    assert hopper.memory(o["weight"]) == 0
    before = call(o)
    assert hopper.memory(o["weight"]) > o["weight"].nbytes
    o["weight"].copy_(int4.pack(torch.randint(-7, 8, (64, 128), device="cuda", dtype=torch.int8)))
    changed = call(o)
    assert not torch.equal(before, changed), "a weight that changes is read again"
    assert error(changed, exact(o)) < TOLERANCE[torch.bfloat16]
    hopper.forget(o["weight"])
    assert hopper.memory(o["weight"]) == 0
    assert torch.equal(call(o), changed)
    count = len(hopper._weights)
    del o["weight"]
    assert len(hopper._weights) == count - 1


def test_graph_compile_and_streams() -> None:
    o = operands(77, 3072, 256, 32, torch.bfloat16)
    rest = list(o.values())[1:]

    def forward(x: torch.Tensor) -> torch.Tensor:
        return linear_w4a4(x, *rest, False)

    graph = torch.cuda.CUDAGraph()  # captured first: what a capture makes must not be taken for made
    with torch.cuda.graph(graph):
        captured = forward(o["x"])
    eager = forward(o["x"])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        other = forward(o["x"])
    stream.synchronize()
    assert torch.equal(eager, other)
    for _ in range(3):
        captured.zero_()
        graph.replay()
        torch.cuda.synchronize()
        assert torch.equal(eager, captured)
    assert torch.equal(eager, torch.compile(forward, fullgraph=True, backend="aot_eager")(o["x"]))


@needs_hopper
def test_bad_input() -> None:
    o = operands(8, 128, 64, 16, torch.bfloat16)
    with pytest.raises(launch.KernelInputError, match=r"svdq::linear_w4a4: weight_scale is torch\.float16"):
        call({**o, "weight_scale": o["weight_scale"].half()})
    with pytest.raises(launch.KernelInputError, match="weight has shape"):
        call({**o, "weight": o["weight"][:, :32].contiguous()})
    with pytest.raises(launch.KernelInputError, match="x has strides"):
        call({**o, "x": o["x"].t().contiguous().t()})
    with pytest.raises(launch.KernelInputError, match="bias is on cpu"):
        call({**o, "bias": o["bias"].cpu()})
