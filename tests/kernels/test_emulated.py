"""The kernels themselves, run on the CPU (``emulated.py``), against float64 and the operators' references.

Small inputs of odd shapes; what only a card shows is in the tests that need one.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy
import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))
from emulated import CARD, Emulator, use_card

from svdq_core.kernels import block, descent, gemv, int8, launch, nvfp4, plan, statistics, w4a4
from svdq_core.numerics import awq, hadamard, int4
from svdq_core.numerics import int8 as int8_numerics
from svdq_core.numerics import nvfp4 as nvfp4_numerics
from svdq_core.ops import block as block_ops
from svdq_core.quantizer import descent as descent_reference

DTYPES = [torch.bfloat16, torch.float16]
TOLERANCE = {torch.bfloat16: 5e-3, torch.float16: 2e-3}


@pytest.fixture(scope="module")
def emulator(tmp_path_factory: pytest.TempPathFactory) -> Emulator:
    """What compiles kernels for the CPU."""
    found = Emulator(tmp_path_factory.mktemp("emulated"))
    if found.compiler is None:
        pytest.skip("no C++ compiler")
    return found


@pytest.fixture(autouse=True)
def card(monkeypatch: pytest.MonkeyPatch, emulator: Emulator) -> None:
    """Three multiprocessors of sm_89, and tensors with memory that was never written full of NaN."""
    torch.manual_seed(0)
    use_card(monkeypatch, emulator.kernel_of, CARD)
    empty = torch.empty

    def poisoned(*shape, **options):
        made = empty(*shape, **options)
        return made.fill_(float("nan")) if made.is_floating_point() else made.fill_(-86)

    monkeypatch.setattr(torch, "empty", poisoned)


def error(out: torch.Tensor, expected: torch.Tensor) -> float:
    assert torch.isfinite(out).all()
    return ((out.double() - expected).norm() / expected.norm()).item()


def operands(m: int, k: int, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """x, smooth_factor and proj_down."""
    x = (torch.randn(m, k) * 3).to(dtype)
    x[:, :64] = 0
    return x, (torch.rand(k) + 0.5).to(dtype), (torch.randn(k, rank) * k**-0.5).to(dtype)


def low_rank(n: int, rank: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """proj_up and bias."""
    return (torch.randn(n, rank) * 0.05).to(dtype), torch.randn(n).to(dtype)


# ---- INT4


def check_int4(smoothed: torch.Tensor, unsigned: bool, qact: torch.Tensor, act_scale: torch.Tensor) -> None:
    """Scales right to rounding, codes right except at ties."""
    groups = smoothed.unflatten(1, (-1, 64))
    limit = 15 if unsigned else 7
    largest = (groups if unsigned else groups.abs()).amax(-1).clamp(min=0)
    torch.testing.assert_close(act_scale.t().double(), largest / limit, rtol=2e-6, atol=1e-30)
    ideal = torch.where(largest[..., None] > 0, groups * limit / largest[..., None], 0.0)
    codes = int4.unpack(qact, unsigned).double().unflatten(1, (-1, 64))
    assert (codes - ideal.clamp(0 if unsigned else -limit, limit)).abs().max() <= 0.5 + 1e-4


# By rows: of three blocks none, one or two have eight rows more than others, which they share or not.
@pytest.mark.parametrize("m", [1, 37, 50, 88])
@pytest.mark.parametrize(("k", "rank", "dtype"), [(320, 32, DTYPES[0]), (448, 0, DTYPES[1]), (128, 70, DTYPES[1])])
def test_quantizer(m: int, k: int, rank: int, dtype: torch.dtype) -> None:
    x, smooth, proj_down = operands(m, k, rank, dtype)
    qact, act_scale, down = launch.quantize(x, smooth, proj_down, False)
    check_int4(x.double() / smooth.double(), False, qact, act_scale)
    assert down.shape == (m, rank)
    if rank:
        assert error(down, x.double() @ proj_down.double()) < 1e-5


def test_rows_are_shared_and_are_not() -> None:
    """What the test above is meant to go through."""

    def shares(m: int) -> bool:
        return plan.quantize_launch(*CARD, m, 320, 32, True, False).build.shares

    assert [shares(m) for m in (1, 37, 50, 88)] == [True, True, True, False]


@pytest.mark.parametrize("rank", [0, 16])
def test_unsigned_quantizer(rank: int) -> None:
    x, smooth, proj_down = operands(41, 192, rank, torch.bfloat16)
    qact, act_scale, down = launch.quantize(x, smooth, proj_down, True)
    check_int4((x.double() + int4.GELU_SHIFT) / smooth.double(), True, qact, act_scale)
    if rank:
        assert error(down, x.double() @ proj_down.double()) < 1e-5


@pytest.mark.parametrize("dtype", DTYPES)
def test_rotated_quantizer(dtype: torch.dtype) -> None:
    x, smooth, proj_down = operands(50, 256, 32, dtype)
    qact, act_scale, down = launch.quantize(x, smooth, proj_down, False, plan.ROTATE)
    expected = hadamard.smooth_and_rotate(x, smooth)
    found = int4.dequantize(int4.unpack(qact, False), act_scale.t())
    assert error(found, expected.double()) < 0.12
    codes, scale = int4.quantize_groups(expected, False)
    torch.testing.assert_close(act_scale.t(), scale, rtol=1e-2, atol=1e-6)
    assert (codes - int4.unpack(qact, False)).abs().max() <= 1
    assert error(down, x.double() @ proj_down.double()) < 1e-5


def test_gelu_and_modulation_in_front() -> None:
    x, smooth, proj_down = operands(34, 192, 16, torch.float16)
    y = torch.randn(34, 64 + 128).half()[:, 64:]
    both = torch.cat([x[:, :64], torch.nn.functional.gelu(y, approximate="tanh")], dim=1)
    qact, act_scale, down = launch.quantize(x[:, :64].contiguous(), smooth, proj_down, False, plan.GELU, y=y)
    codes, scale = int4.quantize_groups(both.float() / smooth.float(), False)
    torch.testing.assert_close(act_scale.t(), scale, rtol=2e-3, atol=1e-6)
    assert (codes - int4.unpack(qact, False)).abs().max() <= 1
    assert error(down, both.double() @ proj_down.double()) < 1e-3

    scale_of, shift = torch.randn(2, 192).half(), torch.randn(2, 192).half()
    qact, act_scale, down = launch.quantize(x, smooth, proj_down, False, plan.MODULATE, (scale_of, shift))
    rows = torch.arange(34) // 17
    modulated = (x.float() * (1 + scale_of[rows].float()) + shift[rows].float()).half()
    check_int4(modulated.double() / smooth.double(), False, qact, act_scale)
    assert error(down, modulated.double() @ proj_down.double()) < 1e-5


def int4_weight(n: int, k: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """weight and weight_scale."""
    codes = torch.randint(-7, 8, (n, k), dtype=torch.int8)
    return int4.pack(codes), (torch.rand(k // 64, n) * 0.02 + 0.001).to(dtype)


def exact_int4(qact, act_scale, down, weight, weight_scale, proj_up, bias, unsigned: bool) -> torch.Tensor:
    activation = int4.dequantize(int4.unpack(qact, unsigned).double(), act_scale.t().double())
    y = activation @ int4.dequantize(int4.unpack(weight).double(), weight_scale.t().double()).t()
    y += down.double() @ proj_up.double().t()
    return y if bias is None else y + bias.double()


@pytest.mark.parametrize(
    ("tile", "m", "n", "k", "rank", "unsigned", "dtype"),
    [
        (plan.LARGE, 260, 128, 128, 32, False, DTYPES[0]),  # it takes whole tiles of columns, and rows by fours
        (plan.MEDIUM, 33, 72, 192, 32, False, DTYPES[0]),
        (plan.MEDIUM, 130, 136, 128, 5, True, DTYPES[1]),
        (plan.SMALL, 70, 72, 192, 5, True, DTYPES[0]),
        (plan.SMALL, 7, 8, 64, 0, False, DTYPES[1]),
    ],
)
def test_int4_gemm(tile: plan.Tile, m: int, n: int, k: int, rank: int, unsigned: bool, dtype: torch.dtype) -> None:
    quantized = launch.quantize(*operands(m, k, rank, dtype), unsigned)
    weights = *int4_weight(n, k, dtype), *low_rank(n, rank, dtype)
    build = plan.GemmBuild(dtype == torch.bfloat16, unsigned, tile)
    out = launch.gemm(*quantized, *weights, unsigned, build=build)
    assert error(out, exact_int4(*quantized, *weights, unsigned)) < TOLERANCE[dtype]


def test_int4_gemm_without_a_bias_and_of_layers_made_ready() -> None:
    x, smooth, proj_down = operands(50, 128, 16, torch.bfloat16)
    weights = *int4_weight(40, 128, torch.bfloat16), low_rank(40, 16, torch.bfloat16)[0], None
    quantized = launch.quantize(x, smooth, proj_down, False)
    out = launch.gemm(*quantized, *weights, False)
    assert error(out, exact_int4(*quantized, *weights, False)) < TOLERANCE[torch.bfloat16]
    for _ in range(2):
        assert torch.equal(w4a4.linear(x, smooth, proj_down, *weights, False), out)


def test_int4_gemm_quantizes_for_the_next_layer() -> None:
    x, smooth, proj_down = operands(35, 128, 16, torch.bfloat16)
    weights = *int4_weight(128, 128, torch.bfloat16), *low_rank(128, 16, torch.bfloat16)
    _, next_smooth, next_down = operands(1, 128, 24, torch.bfloat16)
    quantized = launch.quantize(x, smooth, proj_down, False)
    qact, act_scale, down = launch.gemm(*quantized, *weights, False, next_layer=(next_smooth, next_down))
    y = exact_int4(*quantized, *weights, False).to(torch.bfloat16)
    gelu = torch.nn.functional.gelu(y.float(), approximate="tanh")
    found = int4.dequantize(int4.unpack(qact, True), act_scale.t())
    expected = (gelu + int4.GELU_SHIFT) / next_smooth.float()
    assert (found - expected).abs().max() <= expected.abs().max() / 15
    assert error(down, gelu.double() @ next_down.double()) < 1e-2


def test_int4_gemm_norms_and_rotates_heads() -> None:
    heads, rows = 1, 34
    x, smooth, proj_down = operands(2 * rows, 64, 8, torch.bfloat16)
    weights = *int4_weight(3 * 128 + 16, 64, torch.bfloat16), *low_rank(3 * 128 + 16, 8, torch.bfloat16)
    norm_q, norm_k = torch.rand(128).bfloat16() + 0.5, torch.rand(128).bfloat16() + 0.5
    angle = torch.rand(rows, 64) * 6
    turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=-1).unflatten(-1, (2, 2))
    quantized = launch.quantize(x, smooth, proj_down, False)
    out = launch.gemm(*quantized, *weights, False, norm=(norm_q, norm_k, turn.contiguous(), heads, 1e-6))
    y = exact_int4(*quantized, *weights, False)
    expected = y.clone()
    for part, weight in enumerate((norm_q, norm_k)):
        head = y[:, 128 * part : 128 * (part + 1)]
        normed = head * (head.square().mean(1, keepdim=True) + 1e-6).rsqrt() * weight.double()
        pairs = torch.einsum("rpij,rpj->rpi", turn.double().repeat(2, 1, 1, 1), normed.unflatten(1, (64, 2)))
        expected[:, 128 * part : 128 * (part + 1)] = pairs.flatten(1)
    assert error(out, expected) < TOLERANCE[torch.bfloat16]


# ---- INT8


@pytest.mark.parametrize(
    ("m", "k", "n", "rank", "dtype"), [(37, 192, 72, 24, DTYPES[0]), (130, 128, 136, 0, DTYPES[1])]
)
def test_int8_layer(m: int, k: int, n: int, rank: int, dtype: torch.dtype) -> None:
    x, smooth, proj_down = operands(m, k, rank, dtype)
    weight, weight_scale = torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n) * 1e-3
    proj_up, bias = low_rank(n, rank, dtype)
    codes, scale = int8_numerics.quantize_rows(x.float() / smooth.float())
    expected = codes.double() @ weight.double().t() * scale.double() * weight_scale.double()
    expected += x.double() @ proj_down.double() @ proj_up.double().t() + bias.double()
    out = int8.linear(x, smooth, proj_down, weight, weight_scale, proj_up, bias)
    assert error(out, expected) < TOLERANCE[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
def test_few_rows_of_int8(dtype: torch.dtype) -> None:
    k, outputs = 320, (24, 200)
    x, smooth, _ = operands(3, k, 0, dtype)
    x[:, :64] = 1
    layers = [
        (smooth, torch.randint(-127, 128, (n, k), dtype=torch.int8), torch.rand(n) * 1e-3, torch.randn(n).to(dtype))
        for n in outputs
    ]
    found = int8.linears(x, *zip(*layers, strict=True)).split([3 * n for n in outputs])
    codes, scale = int8_numerics.quantize_rows(x.float() / smooth.float())
    for out, (_, weight, weight_scale, bias) in zip(found, layers, strict=True):
        expected = codes.double() @ weight.double().t() * scale.double() * weight_scale.double() + bias.double()
        assert error(out.view(3, -1), expected) < TOLERANCE[dtype]


# ---- NVFP4


@pytest.mark.parametrize(("m", "k", "n", "rank", "dtype"), [(37, 192, 72, 24, DTYPES[0]), (70, 128, 136, 0, DTYPES[1])])
def test_nvfp4_layer(m: int, k: int, n: int, rank: int, dtype: torch.dtype) -> None:
    """Codes and scales bit for bit, and their product, which is made of 16-bit ones where a card has no other."""
    x, smooth, proj_down = operands(m, k, rank, dtype)
    codes, scale, _, _ = nvfp4.quantize(x, smooth, proj_down)
    expected_codes, expected_scale = nvfp4_numerics.quantize_groups(x.float() / smooth.float())
    assert torch.equal(int4.unpack(codes, unsigned=True), expected_codes)
    assert torch.equal(scale.permute(1, 0, 2).reshape(m, -1).float(), expected_scale.float())
    weight = torch.randint(-128, 128, (n, k // 2), dtype=torch.int8)
    weight_scale = (torch.rand(k // 16, n) * 4).to(torch.float8_e4m3fn)
    tensor_scale, channel_scale = torch.tensor(0.01), (torch.rand(n) + 0.5).to(dtype)
    proj_up, bias = low_rank(n, rank, dtype)
    out = nvfp4.linear(x, smooth, proj_down, weight, weight_scale, tensor_scale, channel_scale, proj_up, bias)

    def values(codes: torch.Tensor, scales: torch.Tensor) -> torch.Tensor:
        return nvfp4_numerics.dequantize(int4.unpack(codes, unsigned=True), scales).double()

    expected = values(codes, expected_scale) @ values(weight, weight_scale.t().float()).t()
    expected *= tensor_scale.double() * channel_scale.double()
    expected += x.double() @ proj_down.double() @ proj_up.double().t() + bias.double()
    assert error(out, expected) < TOLERANCE[dtype]


def test_nvfp4_feed_forward() -> None:
    """GELU and the second layer's quantizer in the first one's epilogue."""
    x, smooth, proj_down = operands(37, 128, 16, torch.bfloat16)
    _, next_smooth, next_down = operands(1, 192, 8, torch.bfloat16)

    def weights(n: int, k: int, rank: int) -> tuple[torch.Tensor | None, ...]:
        codes, scale = torch.randint(-128, 128, (n, k // 2), dtype=torch.int8), torch.rand(k // 16, n) * 4
        return codes, scale.to(torch.float8_e4m3fn), torch.tensor(0.01), None, *low_rank(n, rank, torch.bfloat16)

    first, second = weights(192, 128, 16), weights(40, 192, 8)
    out = nvfp4.feed_forward(x, smooth, proj_down, *first, next_smooth, next_down, *second)
    y = nvfp4.linear(x, smooth, proj_down, *first)
    gelu = torch.nn.functional.gelu(y.float(), approximate="tanh").to(torch.bfloat16)
    # Codes of numbers that were not rounded to 16 bits before may be others.
    assert error(out, nvfp4.linear(gelu, next_smooth, next_down, *second).double()) < 2e-2


# ---- W4A16


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("m", [1, 5])
def test_few_rows_of_w4a16(m: int, dtype: torch.dtype) -> None:
    k, n = 320, 72
    x = torch.randn(m, k).to(dtype)
    codes = torch.randint(0, 16, (n, k), dtype=torch.int8)
    scale, zero = (torch.rand(k // 64, n) * 0.01 + 0.001).to(dtype), (torch.randn(k // 64, n) * 0.01).to(dtype)
    bias = torch.randn(n).to(dtype)
    out = gemv.evaluate(plan.GemvAwqBuild, x, (int4.pack(codes), scale, zero, bias), n)
    weight = awq.dequantize(codes, scale.t(), zero.t()).double()
    assert error(out, x.double() @ weight.t() + bias.double()) < TOLERANCE[dtype]


# ---- between a FLUX block's layers


@pytest.mark.parametrize("dtype", DTYPES)
def test_block_kernels(dtype: torch.dtype) -> None:
    def random(*shape: int) -> torch.Tensor:
        return torch.randn(shape).to(dtype)

    x, y, gate, scale, shift = random(2, 9, 192), random(2, 9, 192), *(random(2, 1, 192) for _ in range(3))
    gated, normed = block.modulate(x.clone(), (y, gate), (scale, shift, 1e-6))
    expected_gated, expected_normed = block_ops._gated_norm_modulate_reference(x, y, gate, scale, shift, 1e-6)
    assert error(gated, expected_gated.double()) < TOLERANCE[dtype]
    assert error(normed, expected_normed.double()) < TOLERANCE[dtype]
    a, b = random(2, 9, 64), random(2, 9, 128)
    assert error(block.gelu_concat(a, b), block_ops._gelu_concat_reference(a, b).double()) < TOLERANCE[dtype]


def test_heads_are_normed_and_rotated() -> None:
    heads, lengths = 2, (5, 12)
    qkv = [torch.randn(2, length, 3 * heads * 128 + 64).bfloat16()[..., :-64] for length in lengths]
    weights = [[(torch.rand(128) + 0.5).bfloat16() for _ in lengths] for _ in "qk"]
    rope = torch.randn(1, 1, sum(lengths), 64, 2, 2)
    found = block.norm_rope(qkv, *weights, rope, heads, 1e-6)
    for part, expected in zip(found, block_ops._norm_rope_reference(qkv, *weights, rope, heads, 1e-6), strict=True):
        assert part.shape == expected.shape
        assert error(part, expected.double()) < TOLERANCE[torch.bfloat16]


# ---- quantizing


@pytest.mark.parametrize("dtype", DTYPES)
def test_statistics_of_channels(dtype: torch.dtype) -> None:
    m, k = 101, 328
    rows = (torch.randn(m, k) * 5).to(dtype)
    minimum, maximum = torch.full((k,), float("inf")), torch.full((k,), float("-inf"))
    squares = torch.zeros(k, dtype=torch.float64)
    chosen = numpy.array([100, 3, 47])
    for _ in range(2):
        copies = statistics.take_in(rows, minimum, maximum, squares, chosen)
        assert torch.equal(copies, rows[chosen])
    assert torch.equal(minimum, rows.float().amin(dim=0))
    assert torch.equal(maximum, rows.float().amax(dim=0))
    torch.testing.assert_close(squares, 2 * rows.double().square().sum(dim=0), rtol=1e-5, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
def test_descent_of_a_group_s_codes(dtype: torch.dtype) -> None:
    """Where the reference goes, but for codes at a tie."""
    n = 70
    spread = torch.randn(200, 64)
    metric = spread.t() @ spread / 200 + 0.1 * torch.eye(64)
    steps, pull = torch.randint(-8, 8, (64, n)).float(), torch.randn(64, n) * 0.01
    scale, zero = (torch.rand(n) * 0.01 + 0.001).to(dtype).float(), (torch.randn(n) * 0.01).to(dtype).float()
    value = steps * scale + zero
    mine, reference = ([each.clone() for each in (value, steps, pull, scale, zero)] for _ in range(2))
    descent.improve(metric, *mine, dtype)
    descent_reference.improve(descent_reference.Group(metric, *reference), dtype)
    torch.testing.assert_close(mine[3], reference[3], rtol=1e-2, atol=0)
    assert (mine[1] != reference[1]).float().mean() < 0.01
    assert not torch.equal(mine[1], steps), "it does something"
