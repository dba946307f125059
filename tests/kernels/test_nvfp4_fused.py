"""``feed_forward_nvfp4`` and the GELU + quantize epilogue without a GPU: reference, machine code, bad operands."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from svdq_core.kernels import launch, nvfp4, plan
from svdq_core.numerics import int4
from svdq_core.numerics import nvfp4 as numerics
from svdq_core.ops.nvfp4 import feed_forward_nvfp4

sys.path.insert(0, str(Path(__file__).parent))
import sass
from test_kernels import disassembled, spills

CPU = torch.device("cpu")
LAYER = (
    "smooth_factor",
    "proj_down",
    "weight",
    "weight_scale",
    "weight_tensor_scale",
    "weight_channel_scale",
    "proj_up",
    "bias",
)
NAMES = ("x", *LAYER, *(f"next_{name}" for name in LAYER))


def layer(k: int, n: int, rank: int, dtype: torch.dtype, device: torch.device = CPU) -> tuple:
    """Random operands of a layer of about unit outputs for unit inputs."""

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, device=device) * scale).to(dtype)

    return (
        (torch.rand(k, device=device) + 0.5).to(dtype),
        random(k, rank, scale=k**-0.5),
        int4.pack(torch.randint(0, 16, (n, k), device=device, dtype=torch.int8)),
        (torch.rand(k // 16, n, device=device) * 8 + 0.5).to(torch.float8_e4m3fn),
        torch.tensor(0.06 * k**-0.5, device=device),
        (torch.rand(n, device=device) + 0.5).to(dtype),
        random(n, rank, scale=0.5 * max(rank, 1) ** -0.5),
        random(n, scale=0.3),
    )


def exact(x: torch.Tensor, operands: tuple, codes: tuple | None = None) -> torch.Tensor:
    """A layer in float64, of the reference's codes and scales of ``x`` or of those given."""
    smooth, proj_down, weight, weight_scale, tensor_scale, channel_scale, proj_up, bias = operands
    # On the CPU, where torch divides exactly: on a card it multiplies by the reciprocal of a number.
    codes = codes or numerics.quantize_groups(x.float().cpu() / smooth.float().cpu())
    activation = numerics.dequantize(*codes).double().to(x.device)
    y = activation @ numerics.dequantize(int4.unpack(weight, unsigned=True), weight_scale.t()).double().t()
    y *= tensor_scale.double()
    if channel_scale is not None:
        y *= channel_scale.double()
    y += x.double() @ proj_down.double() @ proj_up.double().t()
    return y if bias is None else y + bias.double()


def gelu(y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(y, approximate="tanh")


# ---- the operator


@pytest.mark.parametrize(("m", "inner", "rank"), [(1, 64, 0), (7, 48, 16), (77, 128, 5), (0, 64, 8)])
def test_reference_matches_float64(m: int, inner: int, rank: int) -> None:
    x = torch.randn(m, 96)
    first, second = layer(96, inner, rank, torch.float32), layer(inner, 40, rank, torch.float32)
    y = feed_forward_nvfp4(x, *first, *second)
    expected = exact(gelu(exact(x, first)).float(), second)
    assert y.shape == (m, 40) and y.dtype == torch.float32
    # A value of GELU at the border of two codes may take either.
    assert torch.linalg.norm(y - expected) <= 1e-2 * torch.linalg.norm(expected)


def test_gelu_is_taken_of_what_is_not_rounded() -> None:
    x = torch.randn(64, 128).bfloat16()
    first, second = layer(128, 64, 16, torch.bfloat16), layer(64, 32, 16, torch.bfloat16)
    expected = exact(gelu(exact(x, first)).bfloat16(), second)
    rounded = exact(gelu(exact(x, first).bfloat16().double()).bfloat16(), second)
    y = feed_forward_nvfp4(x, *first, *second).double()
    assert torch.linalg.norm(y - expected) < 0.5 * torch.linalg.norm(y - rounded)


def test_torch_accepts_the_operator() -> None:
    operands = torch.randn(5, 64), *layer(64, 32, 8, torch.float32), *layer(32, 48, 8, torch.float32)
    # torch cannot compare E4M3 tensors, which its test of the schema does.
    checks = "test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic"
    torch.library.opcheck(torch.ops.svdq.feed_forward_nvfp4, operands, test_utils=checks)
    compiled = torch.compile(feed_forward_nvfp4, backend="aot_eager", fullgraph=True)
    assert torch.equal(compiled(*operands), feed_forward_nvfp4(*operands))


# ---- machine code and plan


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cubin")


def fused(capability: int, tile: plan.Tile, bf16: bool = True) -> plan.Nvfp4GemmBuild:
    native = capability == plan.BLOCK_SCALED
    return plan.Nvfp4GemmBuild(bf16 and capability >= 80, native, tile, plan.GELU_QUANTIZE)


@pytest.mark.parametrize("capability", plan.ARCHITECTURES)
def test_compiles_without_spills(capability: int, folder: Path) -> None:
    builds = ((plan.LARGE, True), (plan.MEDIUM, False))
    assert not spills([fused(capability, *build) for build in builds], capability, folder)


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("tile", [plan.LARGE, plan.MEDIUM], ids=lambda tile: f"{tile.bm}x{tile.bn}")
def test_blackwell_quantizes_in_hardware_behind_the_same_loop(tile: plan.Tile, bf16: bool, folder: Path) -> None:
    code = list(disassembled(fused(120, tile, bf16), 120, folder))
    plain = list(disassembled(plan.Nvfp4GemmBuild(bf16, True, tile), 120, folder))
    loop, plain_loop = sass.main_loop(code, "OMMA"), sass.main_loop(plain, "OMMA")
    assert sass.mix(loop)["OMMA"] == sass.mix(plain_loop)["OMMA"] == tile.wm // 16 * tile.wn // 8
    assert len(loop) <= len(plain_loop) + 2, "the epilogue costs the loop nothing"
    converted = sum("E2M1" in i.opcode and not i.opcode.startswith("OMMA") for i in code)
    assert converted == tile.wm * tile.wn // 32 // 2, "two values each"
    stores = {i.opcode.removeprefix("STG.E") for i in code if i.opcode.startswith("STG")}
    assert stores <= {".64", ".U8", ""}, "codes and down, scales, counters and powers: no outputs in 16 bits"


@pytest.mark.parametrize("capability", sorted(set(plan.ARCHITECTURES) - {plan.HOPPER}))
def test_plan(capability: int) -> None:
    builds = set(plan.all_builds(capability))
    for m in (1, 77, 4608):
        for n in (64, 192, 12288):
            build = plan.nvfp4_gemm_build(capability, 82, m, n, capability >= 80, plan.GELU_QUANTIZE)
            assert build in builds and build.epilogue == plan.GELU_QUANTIZE
            assert build.tile.wn == 64, "a lane owns a group of 16 columns"
            assert build.tile.bm >= plan.MEDIUM.bm, "counters are enough for the lowest tile"


# ---- bad operands: an error before any launch (nothing here could launch)


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda t: t.float(), r"x is .* torch\.float32"),
        ("weight", lambda t: t[:56].contiguous(), r"weight_scale has shape \(8, 64\), expected \(8, 56\)"),
        ("next_smooth_factor", lambda t: t[:32], r"next_smooth_factor has shape \(32,\), expected \(64,\)"),
        ("next_smooth_factor", lambda t: t.half(), r"next_smooth_factor is torch\.float16"),
        ("next_proj_down", lambda t: t[0], r"next_proj_down has shape \(16,\), expected \(64, rank\)"),
        ("next_proj_down", lambda t: t[:32], r"next_proj_down has shape \(32, 16\), expected \(64, 16\)"),
        ("next_weight", lambda t: t[0], "next_weight has shape"),
        ("next_weight", lambda t: t[:, :16].contiguous(), "next_weight has shape"),
        ("next_weight", lambda t: t[:20].contiguous(), "N = 20 of next_weight is not a positive multiple of 8"),
        ("next_weight_scale", lambda t: t.t().contiguous(), "next_weight_scale has shape"),
        ("next_weight_tensor_scale", lambda t: t.double(), r"next_weight_tensor_scale is torch\.float64"),
        ("next_weight_channel_scale", lambda t: t[:8], "next_weight_channel_scale has shape"),
        ("next_proj_up", lambda t: t[:, :8].contiguous(), "next_proj_up has shape"),
        ("next_bias", lambda t: t.float(), r"next_bias is torch\.float32"),
    ],
)
def test_bad_operand(name: str, change, message: str) -> None:
    dtype = torch.bfloat16
    values = torch.zeros(5, 128, dtype=dtype), *layer(128, 64, 16, dtype), *layer(64, 40, 16, dtype)
    operands = dict(zip(NAMES, values, strict=True))
    with pytest.raises(launch.KernelInputError, match=rf"svdq::feed_forward_nvfp4: {message}"):
        nvfp4.feed_forward(*{**operands, name: change(operands[name])}.values())


def test_inner_columns_that_the_epilogue_does_not_take() -> None:
    dtype = torch.bfloat16
    operands = torch.zeros(5, 128, dtype=dtype), *layer(128, 48, 16, dtype), *layer(48, 40, 16, dtype)
    with pytest.raises(launch.KernelInputError, match="N = 48 of weight is not a multiple of 64"):
        nvfp4.feed_forward(*operands)
