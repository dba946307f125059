"""The kernels without a GPU: they compile everywhere, to lean code, and bad input never reaches a card."""

from __future__ import annotations

import functools
import hashlib
import itertools
import multiprocessing
import os
import subprocess
import sys
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from svdq_core.kernels import cache, launch, library, nvrtc, plan, status
from svdq_core.numerics import int4
from svdq_core.ops import fused
from svdq_core.ops.int4 import linear_int4, quantize_act_int4

sys.path.insert(0, str(Path(__file__).parent))
import sass

LARGE = plan.GemmBuild(True, False, plan.LARGE)
MEDIUM = plan.GemmBuild(False, True, plan.MEDIUM)
GEMVS = [plan.GemvAwqBuild, plan.GemvInt8Build]


def compiler() -> nvrtc.Compiler:
    try:
        return nvrtc.find()
    except nvrtc.CompilerError as error:
        pytest.skip(str(error))


@functools.cache
def disassembled(build: plan.Build, capability: int, folder: Path) -> tuple[sass.Instruction, ...]:
    if sass.tool("nvdisasm") is None:
        pytest.skip("nvdisasm is not installed")
    headers = {name: text for name, text in library.sources().items() if name.endswith(".cuh")}
    options = library.options(build, plan.ARCHITECTURES[capability])
    code = compiler().compile(build.source, library.sources()[build.source], headers, options)
    path = folder / f"{plan.build_name(build)}_{capability}.cubin"
    path.write_bytes(code)
    return tuple(sass.disassemble(path))


def spills(builds: Iterable[plan.Build], capability: int, folder: Path) -> dict[str, dict[str, int]]:
    """Of those builds that run on an architecture the ones with local memory, compiled side by side."""
    builds = [build for build in builds if plan.runs_on(build, capability)]
    assert builds or capability == 75
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        mixes = pool.map(lambda build: sass.mix(disassembled(build, capability, folder)), builds)
        found = {
            plan.build_name(build): {name: mix[name] for name in ("LDL", "STL") if mix[name]}
            for build, mix in zip(builds, mixes, strict=True)
        }
    return {name: instructions for name, instructions in found.items() if instructions}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cubin")


def quantizer(capability: int, rank: int = 32, prologue: int = plan.PLAIN) -> plan.QuantizeBuild:
    return plan.quantize_launch(capability, 100, 4608, 3072, rank, capability >= 80, False, prologue).build


# ---- compilation and machine code


@pytest.mark.parametrize("capability", plan.ARCHITECTURES)
def test_compiles_without_headers_or_spills(capability: int, folder: Path) -> None:
    """No toolkit header is passed, so none is needed; no register lives in local memory."""
    bf16 = capability >= 80
    builds = [quantizer(capability), MEDIUM, LARGE, plan.Int8QuantizeBuild(bf16)]
    builds += [plan.gemv_build(kind, capability, layers, bf16) for kind in GEMVS for layers in (1, 2)]
    builds += [quantizer(capability, prologue=prologue) for prologue in (plan.ROTATE, plan.GELU_ROTATE)]
    builds += [plan.StatisticsBuild(bf16), plan.DescentBuild()]
    builds += [plan.Int8GemmBuild(bf16, tile) for tile in plan.INT8_TILES]
    found = spills(builds, capability, folder)
    # sm_75 has no asynchronous copies: the copies' data passes through registers there.
    assert not found or capability == 75


@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("prologue", [plan.PLAIN, plan.ROTATE], ids=["plain", "rotated"])
@pytest.mark.parametrize("shares", [False, True])
def test_quantizer_s_warps_do_not_wait_for_another(shares: bool, prologue: int, capability: int, folder: Path) -> None:
    """One barrier, at the end, and nothing goes through memory; a tile of 16 rows in so many instructions."""
    build = replace(quantizer(capability, prologue=prologue), shares=shares)
    code = list(disassembled(build, capability, folder))
    mix = sass.mix(code)
    assert not {"LDL", "STL", "MEMBAR", "ATOMG", "RED"} & set(mix)
    assert mix["BAR"] == 1
    assert all(i.opcode.endswith(".128") for i in code if i.opcode.startswith("LDGSTS"))
    products = 4 * build.rank_tiles + (8 if prologue == plan.ROTATE else 0)
    loops = [b for b in sass.loops(code) if {"HMMA", "LDGSTS", "MUFU"} <= set(sass.mix(b))]
    loop = min((b for b in loops if sass.mix(b)["HMMA"] >= products * build.most_tiles), key=len)
    most = 650 if prologue == plan.ROTATE else 450
    assert len(loop) <= (1.12 * most if shares else most) * build.most_tiles


def test_quantizer_gives_each_multiprocessor_its_share() -> None:
    """Of rows and, in a block, of columns."""

    def shape(m: int, k: int, rank: int = 32, output: int = plan.BYTES) -> tuple:
        return plan.quantize_launch(plan.HOPPER, 132, m, k, rank, True, False, output=output)[1:]

    assert shape(4608, 3072) == ((132, 1, 1), 12, 4, 48, 10)
    assert shape(4608, 3072, 0) == ((132, 1, 1), 12, 4, 48, 17)
    assert shape(4608, 3072, 32, plan.IMAGE) == ((264, 1, 1), 6, 2, 48, 48)
    assert shape(4224, 3072) == ((132, 1, 1), 12, 4, 0, 48)
    assert shape(512, 3072) == ((132, 1, 1), 12, 0, 64, 17)
    assert shape(4096, 15360) == ((132, 1, 1), 12, 3, 116, 240), "the others have too little time for much of it"
    assert shape(1024, 1280) == ((128, 1, 1), 10, 1, 0, 20)
    assert shape(16384, 640) == ((396, 1, 1), 10, 5, 68, 0)


@pytest.mark.parametrize("rank", [0, 32, 128])
def test_blocks_that_share_rows_take_about_as_long(rank: int) -> None:
    """Those with eight rows more multiply these, and leave the others as much to quantize as makes up for it."""
    shared = 0
    for m in (512, 1024, 4096, 4608, 8192):
        build, (blocks, _, _), _, each, longer, own = plan.quantize_launch(89, 128, m, 3072, rank, True, False)
        groups = 3072 // 64
        if not build.shares:
            assert own == groups
            continue
        shared += 1
        product = build.rank_tiles / 16
        long = groups * each * (1 + product) + groups * product + own
        others = groups * each * (1 + product) + longer * (groups - own) / (blocks - longer)
        assert long == pytest.approx(others, rel=0.05) or (own == 0 and long > others)
    assert shared == 2


@pytest.mark.parametrize("bf16", [True, False], ids=["bf16", "fp16"])
def test_no_int4_gemm_uses_local_memory(bf16: bool, folder: Path) -> None:
    """Every tile and every epilogue."""
    builds = [b for b in plan.all_builds(89) if isinstance(b, plan.GemmBuild) and b.bf16 == bf16]
    assert {b.epilogue for b in builds} == {plan.STORE, plan.GELU_QUANTIZE, plan.NORM_ROPE}
    assert not spills(builds, 89, folder)


@pytest.mark.parametrize("capability", [86, 89])
@pytest.mark.parametrize("tile", [plan.LARGE, plan.MEDIUM], ids=["large", "medium"])
@pytest.mark.parametrize(("bf16", "unsigned"), [(True, False), (False, True)], ids=["bf16", "fp16-unsigned"])
def test_gemm_main_loop_is_lean(bf16: bool, unsigned: bool, tile: plan.Tile, capability: int, folder: Path) -> None:
    """Native 4-bit products, and at most 12 instructions for each with a stage's copies, barrier and ring."""
    build = plan.GemmBuild(bf16, unsigned, tile)
    code = list(disassembled(build, capability, folder))
    loop = sass.main_loop(code, "IMMA")
    products = [i for i in loop if i.opcode.startswith("IMMA")]
    kind = "U4.S4" if build.unsigned else "S4.S4"
    assert all(i.opcode == f"IMMA.16864.{kind}" for i in products)
    assert len(products) == tile.wm // 16 * tile.wn // 8
    mix = sass.mix(loop)
    assert mix["FFMA"] == 8 * len(products), "two for each accumulator"
    assert not {"I2F", "I2FP", "F2F", "F2FP"} & set(mix), "no conversion of integers or of sums"
    assert all("LDS.128" in i.opcode for i in loop if i.opcode.startswith("LDS."))
    stage = next(
        body for body in sass.loops(code) if len(body) > len(loop) and any(i.opcode.startswith("LDGSTS") for i in body)
    )
    assert {i.address for i in loop} <= {i.address for i in stage}
    whole = len(stage) + (tile.groups - 1) * len(loop)
    assert whole <= 12 * tile.groups * len(products)


@pytest.mark.parametrize("capability", [75, 80, 89, 120])
def test_int8_main_loop_is_lean(capability: int, folder: Path) -> None:
    """A stage of 64 columns: products of bytes, and little more than its share of copies and fragments."""
    tile = plan.INT8_TILES[0]
    loop = sass.main_loop(list(disassembled(plan.Int8GemmBuild(capability >= 80, tile), capability, folder)), "IMMA")
    products = [i for i in loop if i.opcode.startswith("IMMA")]
    shape, columns = ("16832", 32) if capability >= 80 else ("8816", 16)
    assert all(i.opcode.startswith(f"IMMA.{shape}.S8.S8") for i in products)
    rows = 16 if capability >= 80 else 8
    assert len(products) == tile.wm // rows * (tile.wn // 8) * (64 // columns)
    assert not {"LDL", "STL", "I2F", "I2FP"} & set(sass.mix(loop))
    assert len(loop) <= (2.5 if capability >= 80 else 1.6) * len(products)


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize(("layers", "around"), [(1, 22), (2, 24)])
def test_awq_tile_is_lean(layers: int, around: int, capability: int, bf16: bool, folder: Path) -> None:
    """A warp's tile: a product for each word of a lane's codes, and so many around it; x stays in registers."""
    code = list(disassembled(plan.gemv_build(plan.GemvAwqBuild, capability, layers, bf16), capability, folder))
    tile = next(body for body in sass.loops(code) if sass.mix(body)["HMMA"])
    mix = sass.mix(tile)
    assert mix["HMMA"] == 16
    assert len(tile) <= around * mix["HMMA"]
    assert not {"LDG", "PRMT", "SHFL", "F2F", "F2FP", "I2F", "BAR"} & set(mix)
    assert all(i.opcode.endswith(".128") for i in tile if i.opcode.startswith("LDGSTS"))


@pytest.mark.parametrize("bf16", [True, False])
@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize("layers", [1, 2])
def test_few_rows_of_int8_are_lean(layers: int, capability: int, bf16: bool, folder: Path) -> None:
    """A warp's tile: what it reads of shared memory is an operand as it is, and codes of x stay in registers."""
    build = plan.gemv_build(plan.GemvInt8Build, capability, layers, bf16)
    tile = next(b for b in sass.loops(list(disassembled(build, capability, folder))) if sass.mix(b)["IMMA"])
    mix = sass.mix(tile)
    assert mix["IMMA"] == mix["LDGSTS"] == sum(i.opcode.startswith("LDS.128") for i in tile) == 8
    assert len(tile) <= 170
    assert not {"LDG", "PRMT", "SHFL", "F2F", "F2FP", "I2F", "BAR"} & set(mix)
    assert all(i.opcode.endswith(".128") for i in tile if i.opcode.startswith("LDGSTS"))


@pytest.mark.parametrize("capability", [80, 89, 90])
@pytest.mark.parametrize(("kind", "reads"), [(plan.GemvAwqBuild, 8), (plan.GemvInt8Build, 16)])
def test_x_is_read_before_the_weight(kind, reads: int, capability: int, folder: Path) -> None:
    code = disassembled(plan.gemv_build(kind, capability, 1, True), capability, folder)
    names = [i.opcode for i in code if i.opcode.startswith(("LDG.", "LDGSTS"))]
    assert all(name == "LDG.E.128" for name in names[:reads])
    assert all(name.startswith("LDGSTS") for name in names[reads : reads + 8])


@pytest.mark.parametrize("capability", plan.ARCHITECTURES)
@pytest.mark.parametrize("m", [1, 8])
@pytest.mark.parametrize("kind", GEMVS)
def test_plan_of_few_rows_covers_every_shape(kind, capability: int, m: int) -> None:
    """Every tile has a block, its sums have room, and all of K has a warp."""
    outputs = [(n,) for n in (16, 24, 200, 9216, 18432, 200_000)] + [(24, 200, 9216), (18432,) * 38 + (9216,) * 38]
    columns = (64, 192, 3072) if kind is plan.GemvInt8Build else (64, 192, 3072, 6208)
    for multiprocessors, sizes, k in itertools.product((28, 132), outputs, columns):
        launch = plan.gemv_launch(kind, capability, multiprocessors, m, sizes, k, capability >= 80)
        build, warps = launch.build, launch.warps
        assert build in plan.all_builds(capability) and build.layers >= len(sizes)
        assert launch.blocks * launch.tiles + launch.longer == sum(-(-n // build.rows) for n in sizes)
        assert launch.tiles >= 1 and launch.longer < launch.blocks
        assert (launch.rounds - 1) * warps * build.columns < k <= launch.rounds * warps * build.columns
        assert warps <= build.most_warps and launch.batch >= 1
        assert launch.shared == build.stage_bytes(warps) + launch.batch * build.tile_bytes(m, warps)
        assert launch.shared <= build.shared_bytes()
        assert build.shared_bytes() <= {75: 64, 80: 163, 90: 227, 100: 227}.get(capability, 99) * 1024
        if kind is plan.GemvInt8Build:
            assert launch.rounds == 1
            assert launch.batch * build.rows // 2 <= warps * 32, "a thread for each pair of outputs"


@pytest.mark.parametrize("capability", [86, 89])
def test_global_accesses_are_wide(capability: int, folder: Path) -> None:
    code = disassembled(LARGE, capability, folder)
    copies = [i for i in code if i.opcode.startswith("LDGSTS")]
    assert copies
    assert all(i.opcode.endswith(".128") for i in copies)
    stores = [i for i in code if i.opcode.startswith("STG")]
    assert stores
    assert all("128" in i.opcode for i in stores)


@pytest.mark.parametrize("capability", [75, 89])
def test_block_s_kernels_read_and_write_16_bytes(capability: int, folder: Path) -> None:
    builds = plan.block_builds(capability >= 80)
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for code in pool.map(lambda build: disassembled(build, capability, folder), builds):
            accesses = [i.opcode for i in code if i.opcode.startswith(("LDG", "STG"))]
            assert accesses and all("128" in opcode for opcode in accesses)
            assert not {"LDL", "STL"} & set(sass.mix(code))


def test_compiler_error_has_the_log() -> None:
    with pytest.raises(nvrtc.CompilerError, match="nonsense"):
        compiler().compile("broken.cu", "nonsense;", {}, ["-arch=sm_89"])


def test_missing_compiler_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nvrtc, "_candidates", lambda: iter(["/nowhere/libnvrtc.so"]))
    nvrtc.find.cache_clear()
    try:
        with pytest.raises(nvrtc.CompilerError, match="NVRTC was not found"):
            nvrtc.find()
    finally:
        nvrtc.find.cache_clear()


# ---- the cache


@pytest.fixture
def cache_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("SVDQ_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_cache_round_trip(cache_folder: Path) -> None:
    assert cache.read("key") is None
    cache.write("key", b"code")
    assert cache.read("key") == b"code"
    assert [path.name for path in cache_folder.iterdir()] == ["key"]


@pytest.mark.parametrize(
    "damage", [lambda data: data[:-1], lambda data: b"", lambda data: data[:40] + b"x" + data[41:]]
)
def test_damaged_entry_counts_as_missing(cache_folder: Path, damage) -> None:
    cache.write("key", bytes(range(256)))
    path = cache_folder / "key"
    path.write_bytes(damage(path.read_bytes()))
    assert cache.read("key") is None
    cache.write("key", b"again")
    assert cache.read("key") == b"again"


def test_damaged_entry_is_compiled_again(cache_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        version = (13, 0)
        calls = 0

        def compile(self, *_: object) -> bytes:
            self.calls += 1
            return b"machine code"

    fake = Fake()
    monkeypatch.setattr(nvrtc, "find", lambda: fake)
    assert [library.machine_code(LARGE, 89) for _ in range(2)] == [b"machine code"] * 2
    assert fake.calls == 1
    (entry,) = cache_folder.iterdir()
    entry.write_bytes(b"garbage")
    assert library.machine_code(LARGE, 89) == b"machine code"
    assert fake.calls == 2
    library.machine_code(LARGE, 86)
    library.machine_code(MEDIUM, 89)
    fake.version = (12, 8)
    library.machine_code(LARGE, 89)
    assert fake.calls == 5, "architecture, build and compiler version are part of the key"


def _hammer(folder: str, seed: int) -> bool:
    """Write and read one entry over and over; whether every read gave a whole entry."""
    import os

    os.environ["SVDQ_CACHE_DIR"] = folder
    good = {hashlib.sha256(bytes([s])).digest() * 4000 for s in (1, 2)}
    mine = hashlib.sha256(bytes([seed])).digest() * 4000
    for _ in range(60):
        cache.write("shared", mine)
        if cache.read("shared") not in good:
            return False
    return True


def test_two_processes_share_a_cache(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(2) as pool:
        assert all(pool.starmap(_hammer, [(str(tmp_path), 1), (str(tmp_path), 2)]))
    assert [path.name for path in tmp_path.iterdir()] == ["shared"]


def test_unwritable_cache_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("SVDQ_CACHE_DIR", str(tmp_path / "file" / "cache"))
    cache.write("key", b"code")
    assert cache.read("key") is None


# ---- the plan


@pytest.mark.parametrize("capability", plan.ARCHITECTURES)
def test_plan_fits_every_card(capability: int) -> None:
    shared = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}[capability] * 1024
    builds = set(plan.all_builds(capability))
    assert all(build.shared_bytes() <= shared for build in builds)
    for m in (1, 7, 77, 512, 4608):
        for n, k in ((8, 64), (3072, 3072), (21504, 3072), (3072, 15360)):
            for epilogue in (plan.STORE, plan.GELU_QUANTIZE, plan.NORM_ROPE):
                build = plan.gemm_build(capability, 82, m, n, capability >= 80, False, epilogue)
                assert build in builds
                assert build.grid(m, n)[0] * build.tile.bm * build.tile.bn >= m * n
            int8 = plan.int8_gemm_build(82, m, n, capability >= 80)
            assert int8 in builds
            assert int8.grid(m, n)[0] * int8.tile.bm * int8.tile.bn >= m * n
            for output in (plan.NIBBLES, plan.IMAGE, plan.BYTES)[: 3 if capability == plan.HOPPER else 1]:
                build, grid, warps, eights, longer, own_groups = plan.quantize_launch(
                    capability, 82, m, k, 48, capability >= 80, False, output=output
                )
                assert build in builds
                assert build.shared_bytes(warps) <= build.shared_bytes() <= shared
                assert 1 <= warps <= min(build.most_warps, k // 64)
                assert grid[0] * eights + longer == -(-m // build.rows)
                assert longer < grid[0]
                assert own_groups == k // 64 if output == plan.IMAGE or not longer else 0 <= own_groups <= k // 64
                assert eights + (longer > 0) <= 2 * build.most_tiles
                assert grid[2] * build.rank_tiles * 8 >= 48


@pytest.mark.parametrize("multiprocessors", [16, 132])
def test_statistics_see_every_row_and_column_once(multiprocessors: int) -> None:
    for m, k in itertools.product((1, 7, 77, 4608, 70000), (8, 64, 3072, 15360)):
        build = plan.StatisticsBuild(True)
        (columns, slices, _), slice_rows = build.grid(m, k, multiprocessors)
        assert (columns - 1) * build.columns < k <= columns * build.columns
        assert (slices - 1) * slice_rows < m <= slices * slice_rows


def test_large_shapes_get_large_tiles() -> None:
    assert plan.gemm_build(89, 128, 4608, 9216, True, False).tile == plan.LARGE
    assert plan.gemm_build(89, 128, 77, 3072, True, False).tile == plan.SMALL


# ---- bad input: an error before any launch (nothing here could launch)


def operands(m: int = 4, n: int = 16, k: int = 128, rank: int = 8, dtype: torch.dtype = torch.float16) -> dict:
    return {
        "qact": torch.zeros(m, k // 2, dtype=torch.int8),
        "act_scale": torch.zeros(k // 64, m),
        "down": torch.zeros(m, rank),
        "weight": torch.zeros(n, k // 2, dtype=torch.int8),
        "weight_scale": torch.zeros(k // 64, n, dtype=dtype),
        "proj_up": torch.zeros(n, rank, dtype=dtype),
        "bias": torch.zeros(n, dtype=dtype),
        "act_unsigned": False,
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"proj_up": torch.zeros(16, 8)}, "proj_up is torch.float32"),
        ({"qact": torch.zeros(4, 64, dtype=torch.uint8)}, "qact is torch.uint8, expected torch.int8"),
        ({"weight": torch.zeros(16, 32, dtype=torch.int8)}, r"weight has shape \(16, 32\), expected \(16, 64\)"),
        ({"weight": torch.zeros(64, 16, dtype=torch.int8).t()}, "weight has strides"),
        ({"act_scale": torch.zeros(3, 4)}, "act_scale has shape"),
        ({"weight_scale": torch.zeros(2, 16, dtype=torch.bfloat16)}, "weight_scale is torch.bfloat16"),
        ({"bias": torch.zeros(17, dtype=torch.float16)[1:]}, "bias does not start on a 16-byte boundary"),
        ({"down": torch.zeros(4, 16)}, "proj_up has shape"),
        (operands(n=12), "N = 12 is not a positive multiple of 8"),
        (operands(k=96), "K = 96 is not a positive multiple of 64"),
    ],
)
def test_bad_gemm_input(change: dict, message: str) -> None:
    with pytest.raises(launch.KernelInputError, match=message):
        launch.gemm(**{**operands(), **change})


@pytest.mark.parametrize(
    ("x", "smooth", "proj_down", "message"),
    [
        (torch.zeros(4, 128), torch.ones(128), torch.zeros(128, 8), "x is .* torch.float32"),
        (torch.zeros(4, 96).half(), torch.ones(96).half(), torch.zeros(96, 8).half(), "K = 96"),
        (torch.zeros(4, 128).half(), torch.ones(128).half(), torch.zeros(64, 8).half(), "proj_down has shape"),
        (torch.zeros(4, 128).half(), torch.ones(128).bfloat16(), torch.zeros(128, 8).half(), "smooth_factor is"),
        (torch.zeros(128, 4).half().t(), torch.ones(128).half(), torch.zeros(128, 8).half(), "x has strides"),
    ],
)
def test_bad_quantizer_input(x: torch.Tensor, smooth: torch.Tensor, proj_down: torch.Tensor, message: str) -> None:
    with pytest.raises(launch.KernelInputError, match=message):
        launch.quantize(x, smooth, proj_down, False)


def test_status_of_a_cpu() -> None:
    assert status(torch.device("cpu")) == (False, "cpu is not a CUDA device")


def test_registering_loads_nothing() -> None:
    """Registration must not open the driver or the compiler, nor import what does."""
    program = (
        "import sys, svdq_core.ops.cuda as cuda; cuda.register(); cuda.register();"
        "print([name for name in sys.modules if name in "
        "('svdq_core.kernels.driver', 'svdq_core.kernels.nvrtc', 'svdq_core.kernels.launch')])"
    )
    root = Path(__file__).resolve().parents[2]
    out = subprocess.run([sys.executable, "-c", program], cwd=root, capture_output=True, text=True, check=True)
    assert out.stdout.strip() == "[]"


# ---- the fused operators' references and fakes


def random_operands() -> dict:
    torch.manual_seed(0)
    m, n, k, rank = 5, 384, 128, 8
    return {
        "qact": int4.pack(torch.randint(-7, 8, (m, k))),
        "act_scale": torch.rand(k // 64, m),
        "down": torch.randn(m, rank),
        "weight": int4.pack(torch.randint(-7, 8, (n, k))),
        "weight_scale": (torch.rand(k // 64, n) * 0.05).half(),
        "proj_up": torch.randn(n, rank).half() * 0.1,
        "bias": torch.randn(n).half(),
        "act_unsigned": False,
    }


def test_fused_references_compose_the_plain_operators() -> None:
    o = random_operands()
    x, smooth, proj_down = torch.randn(6, 128).half(), torch.rand(128).half() + 0.5, torch.randn(128, 8).half()
    y = torch.nn.functional.gelu(x.float(), approximate="tanh").half()
    for unsigned, rotated in ((True, False), (False, False), (False, True)):
        found = fused.gelu_quantize_act_int4(x[:, :0], x, smooth, proj_down, unsigned, rotated)
        assert all(map(torch.equal, found, quantize_act_int4(y, smooth, proj_down, unsigned, rotated)))
        found = fused.gelu_quantize_act_int4(x[:, :64], x[:, 64:], smooth, proj_down, unsigned, rotated)
        whole = torch.cat((x[:, :64], y[:, 64:]), 1)
        assert all(map(torch.equal, found, quantize_act_int4(whole, smooth, proj_down, unsigned, rotated)))
    scale, shift = torch.randn(2, 128).half(), torch.randn(2, 128).half()
    rows = torch.tensor([0, 0, 0, 1, 1, 1])
    y = (x.float() * (1 + scale[rows].float()) + shift[rows].float()).half()
    got = fused.modulate_quantize_act_int4(x, scale, shift, smooth, proj_down, False)
    assert torch.equal(got[0], quantize_act_int4(y, smooth, proj_down, False)[0])
    rope = torch.eye(2).expand(5, 64, 2, 2)  # no rotation: what is left is the norm
    ones = torch.ones(128).half()
    out = fused.linear_norm_rope_int4(*o.values(), ones, ones, rope, 1, 1e-6)
    plain = linear_int4(*o.values())
    assert torch.equal(out[:, 256:], plain[:, 256:])
    head = plain[:, :128].float()
    expected = head * torch.rsqrt(head.square().mean(-1, keepdim=True) + 1e-6)
    torch.testing.assert_close(out[:, :128].float(), expected, rtol=2e-3, atol=2e-3)


def test_fused_fakes_match() -> None:
    o = random_operands()
    x, smooth, proj_down = torch.randn(6, 128).half(), torch.ones(128).half(), torch.randn(128, 8).half()
    modulation = torch.randn(2, 128).half()
    calls = [
        (torch.ops.svdq.gelu_quantize_act_int4, (x[:, :0], x, smooth, proj_down, True)),
        (torch.ops.svdq.gelu_quantize_act_int4, (x[:, :64], x[:, 64:], smooth, proj_down, False, True)),
        (torch.ops.svdq.modulate_quantize_act_int4, (x, modulation, modulation, smooth, proj_down, False)),
        (
            torch.ops.svdq.linear_gelu_quantize_int4,
            (*o.values(), torch.ones(384).half(), torch.randn(384, 8).half()),
        ),
        (
            torch.ops.svdq.linear_norm_rope_int4,
            (*o.values(), torch.ones(128).half(), torch.ones(128).half(), torch.randn(5, 64, 2, 2), 1, 1e-6),
        ),
    ]
    for operator, arguments in calls:
        torch.library.opcheck(operator.default, arguments, test_utils=("test_schema", "test_faketensor"))
