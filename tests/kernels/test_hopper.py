"""Hopper's kernels without a Hopper card: their machine code, and the layout of their operands."""

from __future__ import annotations

import gc
import itertools
import sys
import weakref
from pathlib import Path

import pytest
import torch

from svdq_core.kernels import grid, hopper, plan, rows, w8a8
from svdq_core.kernels.launch import Kernel
from svdq_core.numerics import int4
from svdq_core.ops import as_int8

sys.path.insert(0, str(Path(__file__).parent))
import sass
from test_kernels import disassembled

# What a byte of E4M3 is worth, by torch.
E4M3 = torch.arange(256, dtype=torch.uint8).view(torch.float8_e4m3fn).float()


def waits(code: list[sass.Instruction]) -> list[sass.Instruction]:
    """For products: a few are ours, but where the compiler gives up overlapping them it adds one for each."""
    return [i for i in code if i.opcode.startswith("WARPGROUP.DEPBAR")]


@pytest.mark.parametrize("bf16", [True, False])
def test_main_loop_multiplies_bytes_without_waiting(bf16: bool, tmp_path: Path) -> None:
    """A stage: two groups of 128 x 160 outputs, FP8 products, two packed instructions for two outputs."""
    code = list(disassembled(plan.HopperGemmBuild(bf16), plan.HOPPER, tmp_path))
    loop = sass.main_loop(code, "QGMMA")
    mix = sass.mix(loop)
    assert mix["QGMMA"] == 8
    assert all("64x160x32.F16.E4M3.E4M3" in i.opcode for i in loop if i.opcode.startswith("QGMMA"))
    assert mix["HFMA2"] == 160, "one for a pair of sums"
    assert mix["HMUL2"] <= 172, "one for a pair of scales, and the rows'"
    assert len(loop) < 470
    assert not {"I2F", "F2F"} & set(mix)
    assert not {"LDL", "STL"} & set(sass.mix(code)), "in all of the kernel"
    assert len(waits(loop)) == 4, "two a group"


@pytest.mark.parametrize("half", plan.GRID_HALVES)
@pytest.mark.parametrize("bf16", [True, False])
def test_a_grid_s_loop_scales_with_one_instruction(bf16: bool, half: int, tmp_path: Path) -> None:
    """A stage: two groups of 128 x 2 half outputs, of which a thread has `half`; and the start of a segment."""
    code = list(disassembled(plan.GridGemmBuild(bf16, half), plan.HOPPER, tmp_path))
    loop = sass.main_loop(code, "IGMMA")
    mix = sass.mix(loop)
    assert mix["IGMMA"] == 8
    assert all(f"64x{half}x32.S8.S8" in i.opcode for i in loop if i.opcode.startswith("IGMMA"))
    assert 3 * half <= mix["FFMA"] <= 3 * half + 4, "and a few for the scales"
    assert len(loop) < 4 * half + 140
    assert not {"I2F", "I2FP"} & set(mix)
    assert not {"LDL", "STL"} & set(sass.mix(code)), "in all of the kernel"
    assert len(waits(loop)) == 4


@pytest.mark.parametrize(
    ("bf16", "columns", "low_rank", "products"),
    [(True, 288, False, 2), (False, 288, True, 2), (False, 224, False, 2), (True, 256, True, 1), (True, 96, False, 1)],
)
def test_loop_of_rows_is_products_and_copies(
    bf16: bool, columns: int, low_rank: bool, products: int, tmp_path: Path
) -> None:
    code = list(disassembled(plan.RowsGemmBuild(bf16, columns, low_rank), plan.HOPPER, tmp_path))
    loop = sass.main_loop(code, "IGMMA")
    assert sass.mix(loop)["IGMMA"] == 8 * products, "two stages of 128 columns"
    assert len(loop) < 60 + 40 * products
    assert not {"LDL", "STL"} & set(sass.mix(code))
    assert len(waits(loop)) == 2
    assert len(waits(code)) < 8


@pytest.mark.parametrize("columns", [288, 256])
def test_a_part_of_a_tile_is_stored_while_another_is_multiplied(columns: int, tmp_path: Path) -> None:
    """Between a wait that leaves products running and the next product or wait: the left part's pieces."""
    code = disassembled(plan.RowsGemmBuild(True, columns, False), plan.HOPPER, tmp_path)
    behind_products, running = 0, False
    for i in code:
        if i.opcode.startswith("WARPGROUP.DEPBAR"):
            running = not i.operands.endswith(" 0x0")
        elif "IGMMA" in i.opcode:
            running = False
        behind_products += running and i.opcode.startswith("UTMASTG")
    assert behind_products == -(-columns // 64)


@pytest.mark.parametrize(("bf16", "tokens"), [(True, 256), (False, 192)])
def test_loop_of_nvfp4_expands_the_weight(bf16: bool, tokens: int, tmp_path: Path) -> None:
    code = list(disassembled(plan.WideGemmBuild(bf16, tokens), plan.HOPPER, tmp_path))
    loop = next(loop for loop in sass.loops(code) if sass.mix(loop)["HGMMA"] == 8)  # two stages of 64 columns
    assert not {"LDL", "STL"} & set(sass.mix(code))
    assert len(waits(loop)) == 2


@pytest.mark.parametrize("multiprocessors", [132, 114, 16])
def test_tiles_are_all_taken(multiprocessors: int) -> None:
    for m, n in itertools.product((1, 77, 512, 2048, 4608), (8, 3072, 9216, 21504)):
        grid_build = plan.grid_build(multiprocessors, m, n, True)
        rows_build = plan.rows_gemm_build(multiprocessors, m, n, True, False)
        wide_build = plan.wide_build(multiprocessors, m, n, True)
        for build, tiles in (
            (grid_build, -(-m // 256) * -(-n // grid_build.columns)),
            (rows_build, -(-m // 256) * -(-n // rows_build.columns)),
            (wide_build, -(-m // wide_build.tokens) * -(-n // 256)),
        ):
            assert build in plan.all_builds(plan.HOPPER)
            clusters, whole, rounds = build.turns(m, n, multiprocessors)
            assert 0 < clusters * build.cluster <= multiprocessors
            halves = 2 * (tiles - whole)
            assert whole + halves >= clusters, "nobody is idle"
            if halves:
                assert whole % clusters == 0 and halves <= clusters, "halves are one round"
            assert tiles / clusters / 2 <= rounds <= -(-tiles // clusters)


def test_a_last_round_is_halved_where_most_would_be_idle() -> None:
    def turns(m: int, n: int) -> plan.Turns:
        return plan.GridGemmBuild(True, 96).turns(m, n, 132)

    assert turns(4608, 3072)[:2] == (66, 4 * 66)  # of 288
    assert turns(512, 9216)[:2] == (66, 66)  # of 96
    assert turns(512, 3072)[:2] == (32, 32)  # one round anyway
    assert plan.RowsGemmBuild(True, 128, False).turns(77, 3072, 132)[:2] == (48, 0)  # of 24
    assert turns(4608, 21504)[:2] == (66, 2016)  # 30.5 rounds: no room for so many halves


def test_tiles_fill_the_card_in_whole_rounds() -> None:
    def plan_of(m: int, n: int) -> tuple[int, float]:
        build = plan.rows_gemm_build(132, m, n, True, False)
        return build.columns, build.turns(m, n, 132).rounds

    assert plan_of(4608, 3072) == (288, 3)
    assert plan_of(512, 9216) == (288, 1)
    assert plan_of(512, 3072) == (96, 1)
    assert plan_of(2048, 1280) == (160, 1)


def test_a_grid_s_tiles_are_wide_where_there_are_many() -> None:
    assert plan.grid_build(132, 4608, 3072, True).columns == 192
    assert plan.grid_build(132, 77, 3072, True).columns == 96


@pytest.mark.parametrize("output", [plan.IMAGE, plan.BYTES])
@pytest.mark.parametrize("rank_tiles", [0, 4])
@pytest.mark.parametrize("bf16", [True, False])
def test_quantizer_writes_bytes(bf16: bool, rank_tiles: int, output: int, tmp_path: Path) -> None:
    staging = plan.quantize_staging(plan.HOPPER, rank_tiles, output)
    build = plan.QuantizeBuild(bf16, False, rank_tiles, plan.PLAIN, *staging, output)
    mix = sass.mix(disassembled(build, plan.HOPPER, tmp_path))
    assert not {"LDL", "STL"} & set(mix)
    assert mix["HMMA"] == 12 * rank_tiles, "three tiles at once, 16 ranks and 8 rows a product"


@pytest.mark.parametrize("build", [b for b in plan.rows_builds() if b.cluster == 7 * b.bf16 + 1], ids=plan.build_name)
def test_rows_stay_in_shared_memory(build: plan.RowsBuild, tmp_path: Path) -> None:
    code = list(disassembled(build, plan.HOPPER, tmp_path))
    mix = sass.mix(code)
    # A rotation of 16 rows and 64 columns, or as many columns of the branch by two products of 8 ranks.
    assert mix["HMMA"] == (8 if build.rotate or build.rank_tiles else 0)
    assert mix["UTMALDG"] == (2 if build.rank_tiles else 1)
    assert not {"LDL", "STL", "ATOMG", "RED"} & set(mix)
    encode = min((loop for loop in sass.loops(code) if sass.mix(loop)["PRMT"] == 24), key=len)
    assert len(encode) <= (180 if build.rotate else 220), "of 32 values a lane"
    assert not {"MEMBAR", "FENCE", "I2F", "F2I"} & set(sass.mix(encode))


AT_ONCE = (132, 66, 30, 15)  # clusters that an H200 said it runs


@pytest.mark.parametrize(("rotate", "rank"), [(True, 0), (False, 0), (False, 32), (False, 40)])
def test_rows_fit_their_clusters(rotate: bool, rank: int) -> None:
    builds = plan.all_builds(plan.HOPPER)
    for m, k in itertools.product((1, 77, 512, 4608), (64, 640, 3072, 15360, plan.RowsBuild.most_k)):
        launch = plan.rows_launch(AT_ONCE, m, k, rank, True, rotate)
        if launch is None:
            assert not rotate and k * max(rank, 32) > 15360 * 32, "only where smoothing or proj_down has no room"
            continue
        build, cluster = launch.build, launch.build.cluster
        assert build in builds and build.rank_tiles * 8 >= rank
        assert launch.blocks % cluster == 0
        assert launch.blocks // cluster <= AT_ONCE[plan.ROWS_CLUSTERS.index(cluster)]
        groups = launch.boxes * launch.box
        assert groups * cluster * plan.GROUP >= k
        assert 1 <= launch.warps <= min(groups, build.most_warps)
        assert launch.threads == 32 * (launch.warps + build.other_warps) <= build.threads
        assert launch.boxes <= launch.ring_boxes
        assert launch.alone % launch.blocks == 0 and launch.alone <= -(-m // build.rows)
        assert not launch.alone or -(-k // plan.GROUP // launch.box) <= launch.ring_boxes
        assert launch.ring_boxes * build.box_bytes(launch.box) <= launch.shared <= build.shared_bytes()


@pytest.mark.parametrize(("plain", "columns"), [(None, 12288), (0, 12288), (3072, 12288), (64, 640), (704, 64)])
def test_boxes_of_rows_are_plain_or_of_a_gelu(plain: int | None, columns: int) -> None:
    for m, bf16 in itertools.product((1, 77, 4608), (True, False)):
        launch = plan.rows_launch(AT_ONCE, m, (plain or 0) + columns, 0, bf16, True, plain)
        assert launch.build.gelu == (plain is not None)
        assert launch.build in plan.all_builds(plan.HOPPER)
        assert (plain or 0) % (launch.box * plan.GROUP) == 0


def test_blocks_have_rows_of_their_own_while_there_are_enough_for_all() -> None:
    def alone(m: int, k: int) -> int:
        return plan.rows_launch(AT_ONCE, m, k, 0, True, True).alone

    assert alone(4608, 3072) == 2 * 132  # of 288
    assert alone(512, 3072) == 0
    assert alone(4608, 15360) == 0  # 16 rows are more than a block has room for


def test_no_rows_fit_what_is_too_long() -> None:
    assert plan.rows_launch(AT_ONCE, 16, 2 * plan.RowsBuild.most_k, 0, True, True) is None
    assert plan.rows_launch(AT_ONCE, 16, 3072, 65, True, False) is None
    part_of_a_card = (16, 8, 2, 0)
    assert plan.rows_launch(part_of_a_card, 4608, 15360, 0, True, True).build.cluster == 4
    assert plan.rows_launch(part_of_a_card, 4608, plan.RowsBuild.most_k, 0, True, True) is None


def unswizzled(image: torch.Tensor) -> torch.Tensor:
    """(stages, rows, 128 bytes) -> (rows, K) in the order of the kernel's columns, swizzle undone."""
    stages, rows, _ = image.shape
    chunks = image.view(stages, rows, 8, 16)
    place = torch.arange(8)[None, :] ^ (torch.arange(rows) % 8)[:, None]
    plain = torch.stack([chunks[:, r][:, place[r]] for r in range(rows)], 1)
    return plain.reshape(stages, rows, 128).transpose(0, 1).reshape(rows, -1)


def in_order(columns: torch.Tensor) -> torch.Tensor:
    """(rows, K) from the kernel's order of a group's columns to the file's."""
    rows, k = columns.shape
    return columns.view(rows, k // 64, 4, 2, 8).transpose(2, 3).reshape(rows, k)


@pytest.mark.parametrize(("n", "k"), [(8, 64), (72, 192), (160, 256), (328, 640)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_weight_image_is_the_weight(n: int, k: int, dtype: torch.dtype) -> None:
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    scale = (torch.rand(k // 64, n) * 10 ** torch.linspace(-3, 1, n)).to(dtype)
    smooth = torch.where(torch.rand(k) < 0.5, -1.0, 1.0).to(dtype)
    image = hopper.weight_image(int4.pack(codes), scale, smooth)
    decoded = in_order(E4M3[unswizzled(image.codes).int()])
    assert torch.equal(decoded[:n, :k], codes.float() * smooth.float())
    assert not decoded[n:].any() and not decoded[:, k:].any()
    # Pairs of columns, dealt as a fragment's lanes want them: 8 j + 2 q and + 1 of 32.
    stages = image.codes.shape[0]
    dealt = image.scale.view(stages, image.rows // 32, 2, 4, 4, 2).permute(0, 2, 1, 4, 3, 5)
    relative = dealt.reshape(2 * stages, image.rows)[: k // 64, :n].double()
    room = 2.0**20 if dtype == torch.bfloat16 else 1.0
    restored = relative * image.column_scale[:n].double() / room
    largest = image.column_scale[:n].double() / room
    assert ((restored - scale.double()).abs() <= scale.double() * 2**-11 + largest * 2**-25).all()
    assert relative.max() <= 1


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_grid_s_image_is_the_weight(dtype: torch.dtype, n: int = 72, k: int = 640) -> None:
    codes = torch.randint(-8, 8, (n, k), dtype=torch.int8)
    unit = int4.scale_unit(torch.rand(n) + 1e-3, dtype)
    scale = (torch.randint(0, int4.MOST_STEPS + 1, (k // 64, n)) * unit).to(dtype)
    image = grid.image(int4.pack(codes), scale)
    decoded = image.codes.double() * image.unit.double()[:, None]
    assert torch.equal(decoded, int4.dequantize(codes, scale.t()).double())


def test_scales_off_the_grid_have_another_image() -> None:
    weight = int4.pack(torch.randint(-7, 8, (72, 640), dtype=torch.int8))
    assert grid.image(weight, torch.rand(10, 72).bfloat16()) is None
    # The code -8 of 16 negative steps would be 128.
    weight = int4.pack(torch.full((8, 128), -8))
    scale = torch.tensor([[-16.0], [15.0]]).expand(2, 8).contiguous().bfloat16()
    assert grid.image(weight, scale) is None and grid.image(weight, -scale) is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rank", [0, 8, 24, 64, 130])
def test_up_image_is_proj_up(rank: int, dtype: torch.dtype) -> None:
    n, k = 72, 128
    weight = int4.pack(torch.randint(-7, 8, (n, k), dtype=torch.int8))
    scale = (torch.rand(k // 64, n) * 0.01 + 1e-4).to(dtype)
    image = hopper.weight_image(weight, scale, torch.ones(k, dtype=dtype))
    proj_up = (torch.randn(n, rank) * 0.05).to(dtype)
    up = hopper.up_image(proj_up, image)
    blocks = up.factors.shape[0]
    plain = unswizzled(up.factors.contiguous().view(torch.uint8).view(blocks, image.rows, 128)) if blocks else None
    if blocks:
        plain = plain.reshape(image.rows, -1).contiguous().view(dtype)[:n].float()
        assert not plain[:, rank:].any()
        restored = plain[:, :rank] * up.scale * image.column_scale[:n, None]
        torch.testing.assert_close(restored, proj_up.float(), rtol=2**-8, atol=2**-20)
    assert blocks == -(-rank // 64)


def test_guard_behind_the_images_can_be_read() -> None:
    weight = int4.pack(torch.randint(-7, 8, (8, 64), dtype=torch.int8))
    image = hopper.weight_image(weight, torch.ones(1, 8).half(), torch.ones(64).half())
    last_tile = plan.HopperGemmBuild.bn
    assert image.codes.untyped_storage().nbytes() >= image.codes.nbytes + 128 * (last_tile - 8)
    assert image.column_scale.numel() >= 256


def test_an_image_leaves_with_its_layer(monkeypatch: pytest.MonkeyPatch) -> None:
    """At once: a card has room for the next model's only when the last one's are gone."""
    kernel = Kernel(lambda *call: None, 0, (1, 1, 1), 1, 0)
    shape, build = plan.rows_launch(AT_ONCE, 16, 64, 0, True, True), plan.RowsGemmBuild(True, 256, False)
    monkeypatch.setattr(rows, "_kernel", lambda *asked: (kernel, shape))
    monkeypatch.setattr(w8a8, "_kernel", lambda *asked: (build, 1, kernel))
    monkeypatch.setattr(w8a8, "tensor_map", lambda *asked: bytes(128))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)

    def image(operands: tuple[torch.Tensor, ...], *form) -> as_int8.Image:
        made = as_int8.Image(torch.ones(64).bfloat16(), torch.ones(8, 64).to(torch.int8), torch.ones(8), None)
        made.launches = rows._Launches(made)
        assert made.launches.prepare(made, 16, None) is made.launches.prepared[16, None]
        return made

    monkeypatch.setattr(as_int8, "image", image)
    operands = [torch.ones(8) for _ in as_int8.NAMES]
    seen = weakref.ref(as_int8.kept_image(tuple(operands)))
    gc.disable()
    try:
        assert seen() is as_int8.kept_image(tuple(operands))
        operands[0].add_(1)
        assert seen() is not as_int8.kept_image(tuple(operands)), "it is not made of this"
        assert seen() is None
        seen = weakref.ref(as_int8.kept_image(tuple(operands)))
        del operands
        assert seen() is None
    finally:
        gc.enable()
