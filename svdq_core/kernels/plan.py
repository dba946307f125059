"""Which build of a kernel runs where: the only place that knows tile sizes.

A *build* is a source file and the macros it is compiled with. Nothing here imports torch or touches a
device, so the plan can be read, tested and tuned (``benchmarks/kernels_tune.py``) on its own.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product

GROUP = 64

# Epilogues of the GEMM and prologues of the quantizer, by their number in the source.
STORE, GELU_QUANTIZE, NORM_ROPE = 0, 1, 2
PLAIN, GELU, MODULATE = 0, 1, 2

# (compute capability, nvcc's name) of everything an ahead-of-time build covers.
ARCHITECTURES = {75: "75", 80: "80", 86: "86", 89: "89", 90: "90a", 100: "100", 120: "120a"}


# Groups whose smoothing factors a block of the quantizer holds at once.
MOST_SLICE_GROUPS = 64
# Groups below which another slice costs more, in adding slices up, than it saves.
SHORTEST_SLICE = 6


def _ceil(a: int, b: int) -> int:
    return -(-a // b)


@dataclass(frozen=True)
class Tile:
    """Shape of the GEMM's work: what a block and a warp compute, and how copies are staged.

    ``rate`` is how fast it gets through its outputs, relative to the best tile, when the card is full.
    """

    bm: int
    bn: int
    wm: int
    wn: int
    groups: int
    stages: int
    min_blocks: int
    rate: float

    @property
    def threads(self) -> int:
        return self.bm // self.wm * (self.bn // self.wn) * 32

    @property
    def shared_bytes(self) -> int:
        codes = (self.bm + self.bn) * 32 * self.groups
        scales = self.groups * (self.bm * 4 + self.bn * 2)
        return (codes + scales) * self.stages + 16  # and the block's place


# 64 x 64 outputs a warp: the fewest instructions per product that registers allow.
# The large tile takes M in fours and N in whole tiles only; bounds checks would cost it registers.
LARGE = Tile(256, 128, 64, 64, 2, 3, 1, rate=1.0)
MEDIUM = Tile(128, 128, 64, 64, 2, 2, 2, rate=0.92)
SMALL = Tile(64, 64, 32, 32, 2, 4, 2, rate=0.6)


@dataclass(frozen=True)
class GemmBuild:
    """One build of ``csrc/gemm_int4.cu``."""

    bf16: bool
    unsigned: bool
    tile: Tile
    epilogue: int = STORE
    stand_in: bool = False

    source = "gemm_int4.cu"
    entry = "svdq_gemm_int4"

    @property
    def threads(self) -> int:
        return self.tile.threads

    def shared_bytes(self) -> int:
        """Dynamic shared memory of a block."""
        return self.tile.shared_bytes

    def grid(self, m: int, n: int) -> tuple[int, int, int]:
        """Blocks for an (m, n) output."""
        return _ceil(m, self.tile.bm) * _ceil(n, self.tile.bn), 1, 1

    def defines(self) -> dict[str, int]:
        """Macros of this build."""
        t = self.tile
        return {
            "SVDQ_BF16": int(self.bf16),
            "SVDQ_UNSIGNED": int(self.unsigned),
            "SVDQ_BM": t.bm,
            "SVDQ_BN": t.bn,
            "SVDQ_WM": t.wm,
            "SVDQ_WN": t.wn,
            "SVDQ_GROUPS": t.groups,
            "SVDQ_STAGES": t.stages,
            "SVDQ_MIN_BLOCKS": t.min_blocks,
            "SVDQ_EVEN": int(self.tile == LARGE),
            "SVDQ_EPILOGUE": self.epilogue,
            "SVDQ_STANDIN": int(self.stand_in),
        }


@dataclass(frozen=True)
class QuantizeBuild:
    """One build of ``csrc/quantize_int4.cu``; ``rank_tiles`` products of 8 ranks a block."""

    bf16: bool
    unsigned: bool
    rank_tiles: int
    prologue: int
    warps_k: int
    stages: int

    source = "quantize_int4.cu"
    entry = "svdq_quantize_int4"
    block_rows = 32

    @property
    def threads(self) -> int:
        """Two half-blocks of rows for each group that a block takes at once."""
        return 64 * self.warps_k

    def shared_bytes(self, slice_groups: int = MOST_SLICE_GROUPS) -> int:
        """Dynamic shared memory: stages of x and proj_down, and 1 / smooth."""
        slab = GROUP * (128 if self.rank_tiles > 4 else 64) if self.rank_tiles else 0
        return self.stages * self.warps_k * (4096 + slab) + slice_groups * GROUP * 4

    def defines(self) -> dict[str, int]:
        """Macros of this build."""
        return {
            "SVDQ_BF16": int(self.bf16),
            "SVDQ_UNSIGNED": int(self.unsigned),
            "SVDQ_RANK_TILES": self.rank_tiles,
            "SVDQ_PROLOGUE": self.prologue,
            "SVDQ_WARPS_K": self.warps_k,
            "SVDQ_STAGES": self.stages,
        }


Build = GemmBuild | QuantizeBuild


def build_name(build: Build) -> str:
    """A file name for a build: its source and the values of its macros."""
    values = "_".join(str(value) for value in build.defines().values())
    return f"{build.source.removesuffix('.cu')}_{values}"


def _tile_time(tile: Tile, m: int, n: int, multiprocessors: int) -> float:
    """Waves of blocks times the work of one wave, in outputs at the best tile's rate."""
    resident = tile.min_blocks * multiprocessors
    tiles = _ceil(m, tile.bm) * _ceil(n, tile.bn)
    full, rest = divmod(tiles, resident)
    # A last wave that leaves multiprocessors with fewer blocks than they can hold ends sooner.
    last = min(_ceil(rest, multiprocessors), tile.min_blocks) / tile.min_blocks
    return (full + last) * tile.min_blocks * tile.bm * tile.bn / tile.rate


@lru_cache(maxsize=4096)
def gemm_build(
    capability: int, multiprocessors: int, m: int, n: int, bf16: bool, unsigned: bool, epilogue: int = STORE
) -> GemmBuild:
    """The build for an (m, n) output on a card.

    The tile is the one whose waves of blocks take the least time. sm_75 has 64 KB of shared memory,
    too little for the large one; the fused epilogues need a warp tile of 64 columns.
    """
    tiles = [MEDIUM]
    if capability >= 80 and m % 4 == 0 and n % LARGE.bn == 0:
        tiles.append(LARGE)
    if epilogue == STORE:
        tiles.append(SMALL)
    tile = min(tiles, key=lambda t: _tile_time(t, m, n, multiprocessors))
    return GemmBuild(bf16, unsigned, tile, epilogue)


@lru_cache(maxsize=4096)
def quantize_build(
    capability: int, multiprocessors: int, m: int, k: int, rank: int, bf16: bool, unsigned: bool, prologue: int = PLAIN
) -> tuple[QuantizeBuild, tuple[int, int, int], int]:
    """The build for an (m, k) input, its grid, and how many groups a block's slice of the columns has.

    Few rows are cut into slices until the card is full or a slice is short; long rows are, so that a
    slice's smoothing factors stay a small part of shared memory.
    """
    rank_tiles = 0 if rank == 0 else 2 if rank <= 16 else 4 if rank <= 32 or capability < 80 else 8
    build = QuantizeBuild(bf16, unsigned, rank_tiles, prologue, *_quantize_staging(capability, rank_tiles))
    groups = k // GROUP
    blocks = _ceil(m, build.block_rows)
    most = _ceil(groups, SHORTEST_SLICE)
    slices = max(min(multiprocessors // blocks, most), _ceil(groups, MOST_SLICE_GROUPS), 1)
    slice_groups = _ceil(groups, slices)
    return build, (blocks, _ceil(groups, slice_groups), max(_ceil(rank, rank_tiles * 8 or 1), 1)), slice_groups


def _quantize_staging(capability: int, rank_tiles: int) -> tuple[int, int]:
    """(warps along K, stages) of the quantizer, to what shared memory allows."""
    small = capability < 80 or (rank_tiles > 4 and capability not in (80, 90, 100, 103))
    return (2 if small else 4), 2


def all_builds(capability: int) -> list[Build]:
    """Every build that the plan can ask for on an architecture, for the ahead-of-time build."""
    builds: list[Build] = []
    for bf16, unsigned in product((True, False), repeat=2):
        builds += [
            QuantizeBuild(bf16, unsigned, rank_tiles, prologue, *_quantize_staging(capability, rank_tiles))
            for rank_tiles, prologue in product((0, 2, 4, 8), (PLAIN, GELU, MODULATE))
        ]
        for tile in (LARGE, MEDIUM, SMALL):
            build = GemmBuild(bf16, unsigned, tile)
            builds.append(build)
            if tile is not SMALL:
                builds += [replace(build, epilogue=epilogue) for epilogue in (GELU_QUANTIZE, NORM_ROPE)]
    return [build for build in builds if runs_on(build, capability)]


def runs_on(build: Build, capability: int) -> bool:
    """Whether a build can run on an architecture: sm_75 has no bf16 and little shared memory."""
    if capability >= 80:
        return True
    small = build.rank_tiles <= 4 if isinstance(build, QuantizeBuild) else build.tile != LARGE
    return small and not build.bf16
