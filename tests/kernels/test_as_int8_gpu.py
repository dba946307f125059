"""Layers evaluated in 8 bits on a Hopper card, against the reference and float64."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch

from svdq_core.formats.comfy_quant import SVDQUANT_NVFP4, SVDQUANT_W4A4
from svdq_core.kernels import plan, rows
from svdq_core.numerics import int4, nvfp4
from svdq_core.ops import as_int8
from svdq_core.ops.as_int8 import linear_as_int8
from svdq_core.ops.cuda import register

HOPPER = torch.cuda.is_available() and torch.cuda.get_device_capability() == (9, 0)
pytestmark = [pytest.mark.gpu, pytest.mark.skipif(torch.cuda.is_available() and not HOPPER, reason="needs sm_90")]
DTYPES = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 2e-3}
FORMS = {"int4": (SVDQUANT_W4A4, False), "unsigned": (SVDQUANT_W4A4, True), "nvfp4": (SVDQUANT_NVFP4, False)}


@pytest.fixture(autouse=True)
def _registered() -> None:
    register()


def operands(m: int, k: int, n: int, rank: int, dtype: torch.dtype, form: str = "int4", bias: bool = True) -> list:
    """Of the operator; rows of x differ a hundredfold, some channels are outliers."""

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, device="cuda") * scale).to(dtype)

    layer_format, unsigned = FORMS[form]
    x = torch.randn(m, k, device="cuda") * torch.randn(m, 1, device="cuda").exp2()
    x[:, ::37] *= 8
    if layer_format == SVDQUANT_W4A4:
        weight = int4.pack(torch.randint(-7, 8, (n, k), device="cuda", dtype=torch.int8))
        scales = [random(k // 64, n, scale=0.1), None, None]
    else:
        weight = int4.pack(torch.randint(0, 16, (n, k), device="cuda", dtype=torch.uint8))
        scale = torch.rand(k // nvfp4.GROUP_SIZE, n, device="cuda").mul(300).to(nvfp4.SCALE_DTYPE)
        scales = [scale, torch.tensor(1e-3, device="cuda"), random(n).abs() + 0.1]
    smooth, down, up = (torch.rand(k, device="cuda") + 0.5).to(dtype), random(k, rank), random(n, rank, scale=0.1)
    return [x.to(dtype), smooth, down, weight, *scales, up, random(n) if bias else None, layer_format, unsigned, False]


def codes_of(x: torch.Tensor, inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The kernel's, after a check that they are the reference's.

    Sums of a rotation in another order are another 16-bit number once in a while, and then the code next to it. It
    may be the largest of a row, whose scale then differs by a last bit of x's type.
    """
    codes, scale = rows.quantize(x, inverse)
    want, want_scale = as_int8.quantize_input(x, inverse)
    torch.testing.assert_close(scale, want_scale.flatten(), rtol=torch.finfo(x.dtype).eps, atol=0)
    assert ((scale / want_scale.flatten() - 1).abs() > 1e-6).sum() <= 2 + 1e-3 * len(scale)
    difference = (codes.int() - want.int()).abs()
    assert difference.max() <= 1 and (difference > 0).sum() <= 9 + 2e-3 * codes.numel()
    return codes.double(), scale.double()[:, None]


def exact(o: list) -> torch.Tensor:
    """The layer in float64, of the kernel's codes."""
    image = as_int8.image(tuple(o[1:9]), *o[9:])
    codes, scale = codes_of(o[0], image.inverse)
    y = codes @ image.weight.double().t() * scale * image.weight_scale.double()
    return y if image.bias is None else y + image.bias.double()


@contextmanager
def only_cluster(monkeypatch: pytest.MonkeyPatch, cluster: int, at_once: int) -> Iterator[None]:
    """The plan knows clusters of one size only."""
    with monkeypatch.context() as patch:
        patch.setattr(plan, "ROWS_CLUSTERS", (cluster,))
        patch.setattr(rows, "_at_once", lambda index: (at_once,))
        for cache in (plan.rows_launch, rows._kernel):
            cache.cache_clear()
        yield
    for cache in (plan.rows_launch, rows._kernel):
        cache.cache_clear()


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(out).all()
    return ((out.double() - expected).norm() / expected.norm()).item()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("m", "k"), [(1, 64), (7, 3072), (77, 192), (513, 1280), (33, 15360), (4608, 3072)])
def test_codes_are_the_reference_s(m: int, k: int, dtype: torch.dtype) -> None:
    o = operands(m, k, 8, 0, dtype)
    inverse = 1 / o[1]
    if m > 1:
        o[0][m // 2] = 0
    torch.full((m, k), 85, dtype=torch.int8, device="cuda")  # what is not written must not read as zeros
    codes_of(o[0], inverse)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_cluster_s_codes(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    o = operands(50, 1600, 8, 0, dtype)
    found = []
    for cluster, at_once in zip(plan.ROWS_CLUSTERS, rows._at_once(0), strict=True):
        with only_cluster(monkeypatch, cluster, at_once):
            found.append(rows.quantize(o[0], o[1]))
    assert all(torch.equal(a, b) for pair in found[1:] for a, b in zip(found[0], pair, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("tiles", [133, 264, 300, 500])
def test_rows_of_blocks_of_their_own(tiles: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """One and more turns of own rows, none to several of shared ones, the last rows not full."""
    m, k = tiles * 16 - 5, 1600
    o, found = operands(m, k, 8, 0, dtype), []
    gelu = o[0][:, :384].contiguous()[None], o[0][:, 384:][None]
    layer = as_int8.image(tuple(o[1:9]), *o[9:])
    for cluster, at_once in ((2, 66), (4, 30)):
        with only_cluster(monkeypatch, cluster, at_once):
            assert (plan.rows_launch((at_once,), m, k, 0, True, True).alone > 0) == (cluster == 2)
            found.append((*rows.quantize(o[0], o[1]), rows.linear_of_gelu(*gelu, layer)))
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("n", [8, 200, 3072])
@pytest.mark.parametrize(("m", "k"), [(1, 64), (7, 192), (77, 3072), (300, 320), (4608, 3072)])
def test_layer(m: int, k: int, n: int, form: str, dtype: torch.dtype) -> None:
    o = operands(m, k, n, 32, dtype, form)
    torch.full((m, n), float("nan"), dtype=dtype, device="cuda")  # what is not written must not read as zeros
    first, second = linear_as_int8(*o), linear_as_int8(*o)
    assert error(first, exact(o)) < TOLERANCE[dtype]
    assert torch.equal(first, second), "the same bits every time"


@pytest.mark.parametrize("rank", [0, 16, 128])
@pytest.mark.parametrize("bias", [True, False])
def test_any_rank(rank: int, bias: bool) -> None:
    o = operands(77, 640, 328, rank, torch.bfloat16, bias=bias)
    assert error(linear_as_int8(*o), exact(o)) < TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("dtype", DTYPES)
def test_the_largest_values_stay_finite(dtype: torch.dtype) -> None:
    o = operands(40, 640, 64, 0, dtype, bias=False)
    o[0][3] = torch.finfo(dtype).max
    o[0][4, ::3] = -torch.finfo(dtype).max
    codes_of(o[0], torch.full_like(o[1], 4))
    assert torch.isfinite(linear_as_int8(*o)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("batch", "length", "plain", "columns"),
    [
        (1, 7, 0, 128),
        (2, 77, 0, 12288),
        (1, 300, 64, 128),
        (2, 40, 3072, 12288),
        (1, 4608, 256, 1024),
        (3, 5, 0, 64),
    ],
)
def test_of_gelu(batch: int, length: int, plain: int, columns: int, dtype: torch.dtype) -> None:
    """The second part is the end of something wider, as in a single block of FLUX."""
    m, k, n = batch * length, plain + columns, 72
    o = operands(m, k, n, 16, dtype)
    image = as_int8.image(tuple(o[1:9]), *o[9:])
    x = o[0][:, :plain].contiguous().view(batch, length, plain)
    wide = torch.randn(batch, length, columns + 64, device="cuda").mul(2).to(dtype)
    wide[0, 1] = 0
    y = wide[..., 64:]
    torch.full((m, n), float("nan"), dtype=dtype, device="cuda")
    found, again = (rows.linear_of_gelu(x, y, image) for _ in range(2))
    assert found.shape == (batch, length, n) and torch.equal(found, again)
    activated = torch.nn.functional.gelu(y.double(), approximate="tanh").to(dtype).view(m, columns)
    o[0] = torch.cat((x.view(m, plain), activated), 1)
    # GELU may be the next number of 16 bits, and a code the next one.
    assert error(found.view(m, n), exact(o)) < 1.5 * TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_gelu_of_the_largest_values_stays_finite(dtype: torch.dtype) -> None:
    o = operands(1, 192, 64, 0, dtype)
    image = as_int8.image(tuple(o[1:9]), *o[9:])
    y = torch.randn(1, 20, 192, device="cuda").to(dtype)
    y[0, 3], y[0, 4] = torch.finfo(dtype).max, -torch.finfo(dtype).max
    assert torch.isfinite(rows.linear_of_gelu(y[..., :0], y, image)).all()


@pytest.mark.parametrize(
    "change",
    [
        lambda x, y: (x[..., :64].contiguous(), y),  # other columns than the layer's
        lambda x, y: (x, y.float()),
        lambda x, y: (x, y.transpose(0, 1).contiguous().transpose(0, 1)),
        lambda x, y: (x.cpu(), y),
        lambda x, y: (x, y[:, :0]),
    ],
)
def test_of_gelu_leaves_other_operands_to_others(change) -> None:
    o = operands(1, 320, 64, 0, torch.bfloat16)
    image = as_int8.image(tuple(o[1:9]), *o[9:])
    x, y = (torch.randn(2, 9, size, device="cuda").bfloat16() for size in (128, 192))
    assert rows.linear_of_gelu(x, y, image) is not None
    assert rows.linear_of_gelu(*change(x, y), image) is None


def test_the_image_is_made_again_when_an_operand_changes() -> None:
    o = operands(9, 128, 64, 16, torch.bfloat16, "unsigned")
    weight = o[3]
    assert as_int8.memory(weight) == 0
    before = linear_as_int8(*o)
    assert as_int8.memory(weight) > 64 * 128
    for changed in (1, 2, 3, 4, 7, 8):
        o[changed].copy_(o[changed].flip(0))
        after = linear_as_int8(*o)
        assert not torch.equal(after, before) and error(after, exact(o)) < TOLERANCE[torch.bfloat16]
        before = after
    o[7] = o[7] * 2  # as an adapter replaces a branch
    assert error(linear_as_int8(*o), exact(o)) < TOLERANCE[torch.bfloat16]
    as_int8.forget(weight)
    assert as_int8.memory(weight) == 0


@pytest.mark.parametrize("warm", [True, False])
def test_in_a_graph(warm: bool) -> None:
    o = operands(130, 640, 328, 16, torch.bfloat16)
    if warm:
        linear_as_int8(*o)
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        linear_as_int8(*operands(130, 640, 328, 16, torch.bfloat16))  # what is compiled or allocated once
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        out = linear_as_int8(*o)
    o[0].copy_(torch.randn_like(o[0]))
    graph.replay()
    assert error(out, exact(o)) < TOLERANCE[torch.bfloat16]


def test_compiled() -> None:
    o = operands(130, 640, 328, 16, torch.bfloat16)
    compiled = torch.compile(lambda x: linear_as_int8(x, *o[1:]) * 2, fullgraph=True)
    assert torch.equal(compiled(o[0]), linear_as_int8(*o) * 2)
