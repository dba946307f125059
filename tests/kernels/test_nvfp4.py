"""The NVFP4 kernels without a GPU: their machine code, the plan, and bad operands."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

from svdq_core.kernels import launch, nvfp4, plan

sys.path.insert(0, str(Path(__file__).parent))
import sass
from test_kernels import disassembled, spills

BLOCK_PRODUCTS = plan.MEDIUM.wm // 16 * plan.MEDIUM.wn // 8  # of a warp, for 64 columns


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cubin")


def gemm(capability: int, tile: plan.Tile = plan.MEDIUM) -> plan.Nvfp4GemmBuild:
    return plan.Nvfp4GemmBuild(capability >= 80, capability == plan.BLOCK_SCALED, tile)


def quantizer(capability: int, wide: bool = False) -> plan.Nvfp4QuantizeBuild:
    return plan.nvfp4_quantize_launch(capability, 100, 4608, 3072, 32, capability >= 80, wide).build


@pytest.mark.parametrize("capability", plan.ARCHITECTURES)
def test_compiles_without_spills(capability: int, folder: Path) -> None:
    gemms = (gemm(capability, tile) for tile in (plan.LARGE, plan.MEDIUM, plan.SMALL))
    assert not spills((quantizer(capability), *gemms), capability, folder)


@pytest.mark.parametrize("bf16", [True, False])
def test_blackwell_multiplies_codes_with_their_scales(bf16: bool, folder: Path) -> None:
    """In the main loop: the block-scaled product, a register of scales for each operand, and nothing widened."""
    code = list(disassembled(plan.Nvfp4GemmBuild(bf16, True, plan.MEDIUM), 120, folder))
    loop = sass.main_loop(code, "OMMA")
    products = [i for i in loop if i.opcode.startswith("OMMA")]
    assert len(products) == BLOCK_PRODUCTS
    assert all(i.opcode.startswith("OMMA.SF.16864.F32.E2M1.E2M1.UE4M3.4X") for i in products)
    assert not {"HMMA", "HMUL2", "SHFL"} & set(sass.mix(loop))
    assert len(loop) <= 4 * len(products)


@pytest.mark.parametrize("capability", [80, 86, 89, 100])
def test_other_cards_widen_each_operand_once(capability: int, folder: Path) -> None:
    """Products in fp16 with float32 sums; two conversions a product, and little beside."""
    loop = sass.main_loop(list(disassembled(gemm(capability), capability, folder)), "HMUL2")
    mix = sass.mix(loop)
    assert mix["HMMA"] == 4 * BLOCK_PRODUCTS
    assert all(i.opcode == "HMMA.16816.F32" for i in loop if i.opcode.startswith("HMMA"))
    assert mix["HMUL2"] <= mix["HMMA"] * 5 // 4, "one for a pair of codes, and the scales'"
    assert mix["SHFL"] == 4, "one for the scales of 16 rows"
    assert len(loop) <= 8 * mix["HMMA"]


@pytest.mark.parametrize("wide", [False, True])
def test_quantizer_is_lean(wide: bool, folder: Path) -> None:
    """A block of 16 x 64: products of two rows' fragments, wide stores, no division and no call."""
    code = list(disassembled(quantizer(plan.HOPPER, wide), plan.HOPPER, folder))
    loop = sass.main_loop(code, "HMMA")
    mix = sass.mix(loop)
    assert mix["HMMA"] == 16, "4 of 16 columns, 2 of 16 ranks, 2 of 8 rows"
    assert len(loop) < 800
    assert not {"CALL", "LDL", "STL"} & set(mix)
    stores = {i.opcode.removeprefix("STG.E") for i in loop if i.opcode.startswith("STG")}
    assert stores == ({".128"} if wide else {".64", ".U8"})


def test_blackwell_converts_in_hardware(folder: Path) -> None:
    opcodes = [i.opcode for i in disassembled(quantizer(120), 120, folder)]
    assert sum("E2M1" in opcode for opcode in opcodes) == 16, "two values each, of two rows' 16"


@pytest.mark.parametrize("capability", plan.ARCHITECTURES)
def test_plan(capability: int) -> None:
    builds = set(plan.all_builds(capability))
    bf16 = capability >= 80
    for m in (1, 7, 77, 512, 4608):
        for n, k in ((8, 64), (3072, 3072), (21504, 3072), (3072, 15360)):
            build = plan.nvfp4_gemm_build(capability, 82, m, n, bf16)
            assert build in builds
            assert build.native == (capability == 120)
            assert build.grid(m, n)[0] * build.tile.bm * build.tile.bn >= m * n
            for rank in (0, 16, 48, 256):
                wide = capability == plan.HOPPER
                build, grid, warps, slice_groups = plan.nvfp4_quantize_launch(capability, 82, m, k, rank, bf16, wide)
                assert build in builds
                assert build.shared_bytes(slice_groups, warps) <= build.shared_bytes()
                assert (grid[0] - 1) * warps * build.rows < m <= grid[0] * warps * build.rows
                assert slice_groups * (grid[1] - 1) < k // 64 <= slice_groups * grid[1]
                assert grid[2] * build.rank_tiles * 8 >= rank


# ---- bad operands: an error before any launch (nothing here could launch)


def operands() -> dict[str, torch.Tensor]:
    m, k, n, rank, dtype = 8, 128, 64, 16, torch.bfloat16
    return {
        "x": torch.zeros(m, k, dtype=dtype),
        "smooth_factor": torch.ones(k, dtype=dtype),
        "proj_down": torch.zeros(k, rank, dtype=dtype),
        "weight": torch.zeros(n, k // 2, dtype=torch.int8),
        "weight_scale": torch.zeros(k // 16, n).to(torch.float8_e4m3fn),
        "weight_tensor_scale": torch.tensor(1.0),
        "weight_channel_scale": torch.ones(n, dtype=dtype),
        "proj_up": torch.zeros(n, rank, dtype=dtype),
        "bias": torch.zeros(n, dtype=dtype),
    }


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("x", lambda t: t.float(), r"x is .* torch\.float32"),
        ("x", lambda t: t[:, :96].contiguous(), "K = 96 is not a positive multiple of 64"),
        ("x", lambda t: t.t().contiguous().t(), "x has strides"),
        ("smooth_factor", lambda t: t.half(), r"smooth_factor is torch\.float16"),
        ("proj_down", lambda t: t[:64], "proj_down has shape"),
        ("weight", lambda t: t[0], "weight has shape"),
        ("weight", lambda t: t[:, :32].contiguous(), "weight has shape"),
        ("weight", lambda t: t[:60].contiguous(), "N = 60 of weight is not a positive multiple of 8"),
        ("weight_scale", lambda t: t.float(), r"weight_scale is torch\.float32"),
        ("weight_scale", lambda t: t.t().contiguous(), "weight_scale has shape"),
        ("weight_tensor_scale", lambda t: t.double(), r"weight_tensor_scale is torch\.float64"),
        ("weight_tensor_scale", lambda t: t.reshape(1), "weight_tensor_scale has shape"),
        ("weight_channel_scale", lambda t: t[:8], "weight_channel_scale has shape"),
        ("proj_up", lambda t: t.float(), r"proj_up is torch\.float32"),
        ("bias", lambda t: torch.zeros(72, dtype=t.dtype)[1:65], "bias does not start on a 16-byte boundary"),
    ],
)
def test_bad_operand(name: str, change, message: str) -> None:
    o = operands()
    with pytest.raises(launch.KernelInputError, match=rf"svdq::linear_nvfp4: {message}"):
        nvfp4.linear(*{**o, name: change(o[name])}.values())
