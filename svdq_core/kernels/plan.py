"""Which build of a kernel runs where: the only place that knows tile sizes.

A *build* is a source file and the macros it is compiled with. Nothing here imports torch or touches a
device, so the plan can be read, tested and tuned (``benchmarks/kernels_tune.py``) on its own.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import ClassVar, NamedTuple

GROUP = 64

# Epilogues of the GEMM and prologues of the quantizer, by their number in the source.
STORE, GELU_QUANTIZE, NORM_ROPE = 0, 1, 2
PLAIN, GELU, MODULATE, ROTATE, GELU_ROTATE = 0, 1, 2, 3, 4
# What INT4's quantizer writes: packed codes, or on Hopper bytes in the layout of either GEMM.
NIBBLES, IMAGE, BYTES = 0, 1, 2
# What NVFP4's quantizer writes: codes, their values in fp16, or rows' largest only (for INT8).
CODES, WIDE, ABSMAX = 0, 1, 2

# (compute capability, nvcc's name) of everything an ahead-of-time build covers.
ARCHITECTURES = {75: "75", 80: "80", 86: "86", 89: "89", 90: "90a", 100: "100", 120: "120a"}


# Columns whose scales are kept relative to one another's on Hopper, in groups.
CHUNK_GROUPS = 8
# Groups of 64 columns whose smoothing factors a block of NVFP4's quantizer holds at most.
MOST_SLICE_GROUPS = 64
# Warps of NVFP4's quantizer that keep a multiprocessor busy.
BUSY_WARPS = 14


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

HOPPER = 90  # the capability that has kernels of its own
HOPPER_SHARED = 227 * 1024  # bytes of shared memory that a block can have
BLOCK_SCALED = 120  # the one that multiplies NVFP4 codes with their scales in a warp's product


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
    prologue: int = PLAIN
    stages: int = 4
    most_warps: int = 12
    output: int = NIBBLES
    shares: bool = False  # blocks share out rows that only some of them have
    most_tiles: int = 3  # of 16 rows, in a block

    source = "quantize_int4.cu"
    entry = "svdq_quantize_int4"
    rows = 8  # that a block has a number of

    @property
    def threads(self) -> int:
        return self.most_warps * 32

    @property
    def warp_bytes(self) -> int:
        """Shared memory of a warp: two slabs of proj_down, x, 1 / smooth, and for an image its chunks' scales."""
        slab = GROUP * (128 if self.rank_tiles > 4 else 64) if self.rank_tiles else 0
        scales = 16 * CHUNK_GROUPS * 4 if self.output == IMAGE else 0
        return 2 * slab + self.stages * 16 * GROUP * 2 + GROUP * 4 + self.most_tiles * scales

    def shared_bytes(self, warps: int | None = None) -> int:
        """Dynamic shared memory of a block."""
        return (warps or self.most_warps) * self.warp_bytes

    def defines(self) -> dict[str, int]:
        """Macros of this build."""
        return {
            "SVDQ_BF16": int(self.bf16),
            "SVDQ_UNSIGNED": int(self.unsigned),
            "SVDQ_RANK_TILES": self.rank_tiles,
            "SVDQ_PROLOGUE": self.prologue,
            "SVDQ_STAGES": self.stages,
            "SVDQ_WARPS": self.most_warps,
            "SVDQ_TILES": self.most_tiles,
            "SVDQ_OUTPUT": self.output,
            "SVDQ_SHARES": int(self.shares),
        }


@dataclass(frozen=True)
class HopperGemmBuild:
    """One build of ``csrc/gemm_hopper.cu``."""

    bf16: bool

    source = "gemm_hopper.cu"
    entry = "svdq_gemm_hopper"
    bm, bn, stages = 256, 160, 3
    threads = 384

    def segments(self, k: int) -> int:
        """Parts of K whose sums are added in float32; each is one of fp16."""
        return _ceil(_ceil(k, 128), 64 if self.bf16 else 24)

    def shared_bytes(self) -> int:
        """Dynamic shared memory: the stages, outputs on their way out, scales of columns and rows, barriers."""
        stage = _ceil((self.bm + self.bn) * 128 + self.bm * 8 + self.bn * 4, 1024) * 1024
        outputs = self.bm // 2 * (self.bn * 2 + 16)
        return self.stages * (stage + 16) + outputs + 2 * self.bn * 8 + 2 * self.bm * 4 + 32

    def grid(self, m: int, n: int, multiprocessors: int) -> tuple[int, int, int]:
        """Blocks, each of which runs over many tiles."""
        return min(multiprocessors, _ceil(m, self.bm) * _ceil(n, self.bn)), 1, 1

    def defines(self) -> dict[str, int]:
        """Macros of this build."""
        return {"SVDQ_BF16": int(self.bf16)}


class Turns(NamedTuple):
    """How clusters of blocks take an output's tiles in turn (``csrc/hopper.cuh``).

    Attributes:
        whole: tiles that one cluster takes; each further one is two clusters', a half each.
        rounds: the time that it takes, in tiles.
    """

    clusters: int
    whole: int
    rounds: float


def _turns(tiles: int, clusters: int, half: float) -> Turns:
    """Tiles left for a last round are halved where there are clusters for all of the halves.

    Args:
        half: the time of half a tile, in tiles: all columns are loaded for it, and it has an end.
    """
    full, rest = divmod(tiles, clusters)
    if half < 1 and rest and 2 * rest <= clusters:
        return Turns(clusters if full else 2 * rest, full * clusters, full + half)
    return Turns(min(clusters, tiles), tiles, _ceil(tiles, clusters))


class InTurns:
    """A GEMM on Hopper whose blocks, in clusters, take tiles in turn and have as many stages as fit.

    Attributes:
        _stage_bytes: of a stage, with its barriers.
        _ends: bytes of what a tile's end needs.
    """

    rows, cluster, threads = 128, 2, 384
    _stage_bytes: int
    _ends: int

    @property
    def stages(self) -> int:
        """As many as fit."""
        return (HOPPER_SHARED - self._ends) // self._stage_bytes

    def shared_bytes(self) -> int:
        """Dynamic shared memory."""
        return self.stages * self._stage_bytes + self._ends


@dataclass(frozen=True)
class RowsGemmBuild(InTurns):
    """One build of ``csrc/gemm_rows.cu``: an output tile is 128 tokens by so many columns."""

    bf16: bool
    columns: int
    low_rank: bool

    source = "gemm_rows.cu"
    entry = "svdq_gemm_rows"
    piece = 16, 32  # rows and columns that are stored together

    @property
    def _buffers(self) -> int:
        """Pieces that a warp has on their way out: where stages are large there is less room."""
        return 2 if self.columns > 256 else 4

    @property
    def _ends(self) -> int:
        """Outputs on their way out, their columns' scales and biases, and the barriers of those."""
        rows, columns = self.piece
        return 8 * self._buffers * rows * columns * 2 + self.columns * 6 + 16

    @property
    def _stage_bytes(self) -> int:
        return (self.rows + self.columns) * 128 + 16

    def turns(self, m: int, n: int, multiprocessors: int) -> Turns:
        """How a launch's clusters take the tiles of an (m, n) output."""
        tiles = _ceil(m, self.rows * self.cluster) * _ceil(n, self.columns)
        return _turns(tiles, multiprocessors // self.cluster, half=0.7)

    def defines(self) -> dict[str, int]:
        """Macros of this build."""
        return {
            "SVDQ_BF16": int(self.bf16),
            "SVDQ_COLUMNS": self.columns,
            "SVDQ_LOW_RANK": int(self.low_rank),
            "SVDQ_STAGES": self.stages,
            "SVDQ_BUFFERS": self._buffers,
        }


# Widths of a tile that ``gemm_rows.cu`` has.
ROWS_COLUMNS = (288, 256, 224, 192, 160, 128, 96, 64)


@lru_cache(maxsize=4096)
def rows_gemm_build(multiprocessors: int, m: int, n: int, bf16: bool, low_rank: bool) -> RowsGemmBuild:
    """The build for m tokens and n outputs: the one whose rounds of tiles take the least time."""

    def time(build: RowsGemmBuild) -> float:
        # A narrow tile reads more for a product, and each has its end, worth about 16 columns.
        return build.turns(m, n, multiprocessors).rounds * (build.columns + 16)

    return min((RowsGemmBuild(bf16, columns, low_rank) for columns in ROWS_COLUMNS), key=time)


@dataclass(frozen=True)
class WideGemmBuild(InTurns):
    """One build of ``csrc/gemm_wide.cu``: an output tile is 128 of the weight's rows by ``tokens``."""

    bf16: bool
    tokens: int

    source = "gemm_wide.cu"
    entry = "svdq_gemm_wide"
    buffers = 4  # pieces of 32 tokens that a consumer has on their way out

    @property
    def _ends(self) -> int:
        """Outputs on their way out."""
        return 2 * self.buffers * 32 * 128

    @property
    def _stage_bytes(self) -> int:
        return _ceil(self.tokens * 128 + self.rows * (32 + 4), 1024) * 1024 + 16

    def turns(self, m: int, n: int, multiprocessors: int) -> Turns:
        """How a launch's clusters take the tiles of an (m, n) output."""
        tiles = _ceil(m, self.tokens) * _ceil(n, self.rows * self.cluster)
        return _turns(tiles, multiprocessors // self.cluster, half=0.9)

    def defines(self) -> dict[str, int]:
        """Macros of this build."""
        return {"SVDQ_BF16": int(self.bf16), "SVDQ_COLUMNS": self.tokens, "SVDQ_STAGES": self.stages}


# Widths of a tile that ``gemm_wide.cu`` has.
WIDE_TOKENS = (256, 224, 192, 128)


@lru_cache(maxsize=4096)
def wide_build(multiprocessors: int, m: int, n: int, bf16: bool) -> WideGemmBuild:
    """The build for m tokens and n outputs: the one whose rounds of tiles take the least time."""

    def time(build: WideGemmBuild) -> float:
        # A tile of few tokens reads more for a product, and each has its end, worth about 16 tokens.
        return build.turns(m, n, multiprocessors).rounds * (build.tokens + 16)

    return min((WideGemmBuild(bf16, tokens) for tokens in WIDE_TOKENS), key=time)


@dataclass(frozen=True)
class GridGemmBuild(InTurns):
    """One build of ``csrc/gemm_grid.cu``: an output tile is 128 tokens by two halves of ``half`` columns."""

    bf16: bool
    half: int

    source = "gemm_grid.cu"
    entry = "svdq_gemm_grid"
    piece = 48  # columns that are stored together

    @property
    def columns(self) -> int:
        """Of a tile."""
        return 2 * self.half

    @property
    def _stage_bytes(self) -> int:
        return _ceil((self.rows + self.columns) * 128 + 2 * 3 * 64 * 4, 1024) * 1024 + 16

    @property
    def _ends(self) -> int:
        """Outputs on their way out, and their columns' units and bias."""
        return self.rows * self.columns * 2 + 2 * self.columns * 8

    def turns(self, m: int, n: int, multiprocessors: int) -> Turns:
        """How a launch's clusters take the tiles of an (m, n) output."""
        tiles, clusters = _ceil(m, self.rows * self.cluster) * _ceil(n, self.columns), multiprocessors // self.cluster
        # Of few tiles the weight's loads take most of the time, and halves would load it twice.
        return _turns(tiles, clusters, half=0.62 if tiles > clusters else 1)

    def defines(self) -> dict[str, int]:
        """Macros of this build."""
        return {"SVDQ_BF16": int(self.bf16), "SVDQ_COLUMNS": self.half, "SVDQ_STAGES": self.stages}


# Halves of a tile's columns that ``gemm_grid.cu`` has.
GRID_HALVES = (96, 48)


@lru_cache(maxsize=4096)
def grid_build(multiprocessors: int, m: int, n: int, bf16: bool) -> GridGemmBuild:
    """The build for m tokens and n outputs: the one whose rounds of tiles take the least time."""

    def time(build: GridGemmBuild) -> float:
        # A narrow tile reads more for a product, and each has its end: together worth about 64 columns.
        return build.turns(m, n, multiprocessors).rounds * (build.columns + 64)

    return min((GridGemmBuild(bf16, half) for half in GRID_HALVES), key=time)


@dataclass(frozen=True)
class Int8QuantizeBuild:
    """One build of ``csrc/quantize_int8.cu``."""

    bf16: bool

    source = "quantize_int8.cu"
    entry = "svdq_quantize_int8"
    rows, threads = 4, 128

    def shared_bytes(self) -> int:
        """Dynamic shared memory: none."""
        return 0

    def grid(self, m: int) -> tuple[int, int, int]:
        """Blocks for m rows."""
        return _ceil(m, self.rows), 1, 1

    def defines(self) -> dict[str, int]:
        """Macros of this build."""
        return {"SVDQ_BF16": int(self.bf16)}


@dataclass(frozen=True)
class Int8GemmBuild:
    """One build of ``csrc/gemm_int8.cu``."""

    bf16: bool
    tile: Tile

    source = "gemm_int8.cu"
    entry = "svdq_gemm_int8"

    @property
    def threads(self) -> int:
        return self.tile.threads

    def shared_bytes(self) -> int:
        """Dynamic shared memory: stages of 64 columns of codes."""
        return (self.tile.bm + self.tile.bn) * 64 * self.tile.stages

    def grid(self, m: int, n: int) -> tuple[int, int, int]:
        """Blocks for an (m, n) output."""
        return _ceil(m, self.tile.bm) * _ceil(n, self.tile.bn), 1, 1

    def defines(self) -> dict[str, int]:
        """Macros of this build."""
        t = self.tile
        return {
            "SVDQ_BF16": int(self.bf16),
            "SVDQ_BM": t.bm,
            "SVDQ_BN": t.bn,
            "SVDQ_WM": t.wm,
            "SVDQ_WN": t.wn,
            "SVDQ_STAGES": t.stages,
            "SVDQ_MIN_BLOCKS": t.min_blocks,
        }


# Tiles of the INT8 GEMM, whose stages have half the columns of the others'.
INT8_TILES = (replace(MEDIUM, stages=3), SMALL)


@dataclass(frozen=True)
class _GemvBuild(ABC):
    """A product of at most ``most_m`` rows: a warp has ``stages`` tiles of 16 outputs and ``columns`` of K at once.

    ``layers`` is how many layers of one input a launch may have.
    """

    bf16: bool
    layers: int
    stages: int
    most_shared: int

    source: ClassVar[str]
    entry: ClassVar[str]
    rows, columns, most_m = 16, 256, 8  # outputs of a tile, rows of x
    most_layers = 96  # whose pointers fill the 4 kB that a kernel's arguments may have
    most_warps = 12
    threads = most_warps * 32

    @abstractmethod
    def stage_bytes(self, warps: int) -> int:
        """Shared memory of the warps' stages."""

    @abstractmethod
    def tile_bytes(self, m: int, warps: int) -> int:
        """Shared memory that a tile of outputs takes until its sums are complete, for m rows."""

    def most_batch(self, m: int, warps: int) -> int:
        """Tiles of a block whose sums are kept at once."""
        return (self.most_shared - self.stage_bytes(warps)) // self.tile_bytes(m, warps)

    def shared_bytes(self) -> int:
        """The most dynamic shared memory that a launch asks for."""
        return self.most_shared

    def defines(self) -> dict[str, int]:
        """Macros of this build."""
        return {
            "SVDQ_BF16": int(self.bf16),
            "SVDQ_LAYERS": self.layers,
            "SVDQ_WARPS": self.most_warps,
            "SVDQ_STAGES": self.stages,
        }


class GemvAwqBuild(_GemvBuild):
    """One build of ``csrc/gemv_awq.cu``."""

    source = "gemv_awq.cu"
    entry = "svdq_gemv_awq"
    note = 48  # bytes

    def stage_bytes(self, warps: int) -> int:
        """Codes, scales and zeros."""
        return warps * self.stages * self.rows * (self.columns // 2 + self.columns // GROUP * 4)

    def tile_bytes(self, m: int, warps: int) -> int:
        """Two notes, and what the warps add up."""
        return 2 * self.note + self.rows * 4 * m * warps


class GemvInt8Build(_GemvBuild):
    """One build of ``csrc/gemv_int8.cu``."""

    source = "gemv_int8.cu"
    entry = "svdq_gemv_int8"
    most_k = _GemvBuild.most_warps * _GemvBuild.columns

    def stage_bytes(self, warps: int) -> int:
        """Codes; and the largest of each row of x."""
        return warps * self.stages * self.rows * self.columns + self.most_m * 4

    def tile_bytes(self, m: int, warps: int) -> int:
        """Sums, to which all warps add."""
        return self.rows * 4 * m

    def most_batch(self, m: int, warps: int) -> int:
        """A thread for each pair of outputs."""
        return min(super().most_batch(m, warps), warps * 32 // (self.rows // 2))


def gemv_build(kind: type[_GemvBuild], capability: int, layers: int, bf16: bool) -> _GemvBuild:
    """The build for a card, and for one layer or several. sm_75 copies at once: a second stage would be of no use."""
    most = 1 if layers == 1 else kind.most_layers
    if capability < 80:
        return kind(bf16, most, 1, 64 * 1024)
    most_shared = {80: 163, 90: 227, 100: 227, 103: 227}.get(capability, 99) * 1024
    return kind(bf16, most, 2, most_shared)


class GemvLaunch(NamedTuple):
    """How a product of few rows is launched.

    Attributes:
        rounds: how often the warps go through a batch of a block's tiles, until they have gone through K.
        tiles: of a block; the ``longer`` first ones have one more.
        batch: tiles whose sums are kept at once.
        shared: bytes.
    """

    build: _GemvBuild
    blocks: int
    warps: int
    rounds: int
    tiles: int
    longer: int
    batch: int
    shared: int


@lru_cache(maxsize=4096)
def gemv_launch(
    kind: type[_GemvBuild],
    capability: int,
    multiprocessors: int,
    m: int,
    outputs: tuple[int, ...],
    k: int,
    bf16: bool,
) -> GemvLaunch:
    """The build for m rows, k columns and layers of so many outputs, and the shape of its launch.

    A block's warps share K evenly, and as many blocks as fill the card with warps share the tiles of outputs.
    """
    build = gemv_build(kind, capability, len(outputs), bf16)
    steps, tiles = _ceil(k, build.columns), sum(_ceil(n, build.rows) for n in outputs)
    rounds = _ceil(steps, build.most_warps)
    warps = _ceil(steps, rounds)
    blocks = min(tiles, multiprocessors * (build.most_warps // warps))
    batch = min(_ceil(tiles, blocks), build.most_batch(m, warps))
    shared = build.stage_bytes(warps) + batch * build.tile_bytes(m, warps)
    return GemvLaunch(build, blocks, warps, rounds, *divmod(tiles, blocks), batch, shared)


@dataclass(frozen=True)
class Nvfp4QuantizeBuild:
    """One build of ``csrc/quantize_nvfp4.cu``; ``rank_tiles`` products of 8 ranks a block."""

    bf16: bool
    rank_tiles: int
    output: int = CODES
    stages: int = 3
    most_warps: int = 20

    source = "quantize_nvfp4.cu"
    entry = "svdq_quantize_nvfp4"
    rows = 16  # of a warp

    @property
    def threads(self) -> int:
        return self.most_warps * 32

    def shared_bytes(self, slice_blocks: int = MOST_SLICE_GROUPS, warps: int | None = None) -> int:
        """Dynamic shared memory: two steps of proj_down, x, 1 / smooth."""
        steps = 2 * 4 * GROUP * 64 if self.rank_tiles else 0
        return steps + (warps or self.most_warps) * self.stages * 2048 + slice_blocks * GROUP * 4

    def defines(self) -> dict[str, int]:
        """Macros of this build."""
        return {
            "SVDQ_BF16": int(self.bf16),
            "SVDQ_RANK_TILES": self.rank_tiles,
            "SVDQ_STAGES": self.stages,
            "SVDQ_MOST_WARPS": self.most_warps,
            "SVDQ_OUTPUT": int(self.output),
        }


@dataclass(frozen=True)
class RowsBuild:
    """One build of ``csrc/quantize_rows.cu``: a cluster of blocks has ``rows`` rows, each a part of the columns.

    ``rank_tiles`` are products of 8 ranks, of a low-rank branch that is not in the weight; rotated layers have none.
    With ``gelu`` it is taken of the last columns.
    """

    bf16: bool
    cluster: int
    rotate: bool
    rank_tiles: int = 0
    gelu: bool = False

    source = "quantize_rows.cu"
    entry = "svdq_quantize_rows"
    rows, threads = 16, 896  # so many threads at most
    most_k = 8 * 104 * GROUP  # for which the rings of eight blocks have room for 16 rows

    @property
    def other_warps(self) -> int:
        """Of a block's warps, those that do not compute: the branch's, and two."""
        return self.rank_tiles + 2

    @property
    def takes_alone(self) -> bool:
        """Whether a block may have rows of its own, before clusters share what is left."""
        return self.rotate and self.cluster == 2

    @property
    def most_warps(self) -> int:
        """That compute."""
        return min(self.threads // 32 - self.other_warps, 24)

    def shared_bytes(self) -> int:
        """The most dynamic shared memory that a launch asks for."""
        return HOPPER_SHARED

    def fixed_bytes(self, groups: int, all_groups: int, warps: int) -> int:
        """A block's shared memory but the ring: proj_down, 1 / smooth_factor, what rows come to, barriers."""
        factors = (all_groups if self.takes_alone else groups) * GROUP * (2 if self.rotate else 4)
        columns = groups * GROUP * self.rank_tiles * 16 + factors
        sums = 2 * self.rows * self.rank_tiles * 8 * 4
        return columns + 2 * (self.rows * 4 * (warps + self.cluster + 1) + sums) + 9 * 8

    def box_bytes(self, groups: int) -> int:
        """So many groups in the ring, with two barriers."""
        return groups * self.rows * GROUP * 2 + 16

    def defines(self) -> dict[str, int]:
        """Macros of this build."""
        return {
            "SVDQ_BF16": int(self.bf16),
            "SVDQ_CLUSTER": self.cluster,
            "SVDQ_ROTATE": int(self.rotate),
            "SVDQ_GELU": int(self.gelu),
            "SVDQ_RANK_TILES": self.rank_tiles,
        }


ROWS_CLUSTERS = (1, 2, 4, 8)
ROWS_RANK_TILES = (0, 4, 8)


def rows_builds() -> list[RowsBuild]:
    """All builds of the rows' quantizer."""
    kinds = [(True, 0, False), (True, 0, True), *((False, tiles, False) for tiles in ROWS_RANK_TILES)]
    builds = (RowsBuild(b, c, *kind) for b, c, kind in product((True, False), ROWS_CLUSTERS, kinds))
    return [build for build in builds if build.cluster > 1 or not build.rank_tiles]


class RowsLaunch(NamedTuple):
    """How ``quantize_rows.cu`` is launched.

    Attributes:
        warps: of a block, those that compute.
        alone: 16 rows each that one block has, all of their columns; the rest clusters have.
        boxes: of a block's part of the columns, of ``box`` groups of 64 each.
        ring_boxes: that its shared memory has room for.
        shared: bytes of it.
    """

    build: RowsBuild
    blocks: int
    threads: int
    warps: int
    alone: int
    box: int
    boxes: int
    ring_boxes: int
    shared: int


def _rows_launch(
    build: RowsBuild, most: int, tiles: int, alone: int, all_groups: int, plain: int
) -> tuple[float, RowsLaunch] | None:
    """A launch of a build, if shared memory has room, and about how long it takes, in groups of a block.

    Args:
        most: clusters that run at once.
        tiles: 16 rows each, of which blocks have ``alone``.
        plain: columns in front of those that a GELU is taken of.
    """
    groups = _ceil(all_groups, build.cluster)
    box = next(box for box in (8, 4, 2, 1) if -groups % box <= groups // 8)
    boxes, own_boxes = _ceil(groups, box), _ceil(all_groups, box) if alone else 0
    warps = _ceil(boxes * box, _ceil(boxes * box, build.most_warps))
    fixed = build.fixed_bytes(boxes * box, all_groups, warps)
    ring_boxes = (HOPPER_SHARED - fixed) // build.box_bytes(box)
    if ring_boxes < max(boxes, own_boxes) or plain % (box * GROUP):  # a box is of one kind
        return None
    clusters = most if alone else min(most, tiles)
    turns, own_turns = _ceil(tiles - alone, clusters), alone // (most * build.cluster)

    def time(boxes: int) -> int:
        """Of a turn: its groups, what blocks tell each other, and where the next rows wait for that."""
        return boxes * box + 4 + (0 if ring_boxes >= 2 * boxes else boxes * box)

    total = turns * time(boxes) + own_turns * time(own_boxes)
    ring_boxes = min(ring_boxes, boxes * turns + own_boxes * own_turns)
    # More than half of what there is, whatever is needed: blocks come when the GEMM before them leaves its
    # multiprocessors, one by one, and two of them would take the first that is free.
    shared = max(fixed + ring_boxes * build.box_bytes(box), HOPPER_SHARED // 2 + 1024)
    threads = 32 * (warps + build.other_warps)
    launch = RowsLaunch(build, clusters * build.cluster, threads, warps, alone, box, boxes, ring_boxes, shared)
    return total, launch


@lru_cache(maxsize=4096)
def rows_launch(
    at_once: tuple[int, ...], m: int, k: int, rank: int, bf16: bool, rotate: bool, plain: int | None = None
) -> RowsLaunch | None:
    """The build for an (m, k) input and a branch of so many ranks, and the shape of its launch; None if none fits.

    Args:
        at_once: how many clusters of each size of ``ROWS_CLUSTERS`` the card runs at once; a part of one may run none.
        plain: columns of which no GELU is taken, if it is taken of the others.
    """
    rank_tiles = next((tiles for tiles in ROWS_RANK_TILES if rank <= tiles * 8), None)
    tiles, best = _ceil(m, RowsBuild.rows), None
    for build in rows_builds():
        most = at_once[ROWS_CLUSTERS.index(build.cluster)]
        kind = bf16, rotate, rank_tiles, plain is not None
        if not most or (build.bf16, build.rotate, build.rank_tiles, build.gelu) != kind:
            continue
        blocks = most * build.cluster
        for alone in {0, tiles // blocks * blocks if build.takes_alone else 0}:
            found = _rows_launch(build, most, tiles, alone, k // GROUP, plain or 0)
            if found and (best is None or found[0] < best[0]):
                best = found
    return best[1] if best else None


@dataclass(frozen=True)
class Nvfp4GemmBuild:
    """One build of ``csrc/gemm_nvfp4.cu``; ``native`` where the card multiplies NVFP4 itself."""

    bf16: bool
    native: bool
    tile: Tile
    epilogue: int = STORE

    source = "gemm_nvfp4.cu"
    entry = "svdq_gemm_nvfp4"

    @property
    def threads(self) -> int:
        return self.tile.threads

    def shared_bytes(self) -> int:
        """Dynamic shared memory: stages of two blocks of 64 columns, codes and scales."""
        return (self.tile.bm + self.tile.bn) * 2 * (32 + 4) * self.tile.stages

    def grid(self, m: int, n: int) -> tuple[int, int, int]:
        """Blocks for an (m, n) output."""
        return _ceil(m, self.tile.bm) * _ceil(n, self.tile.bn), 1, 1

    def defines(self) -> dict[str, int]:
        """Macros of this build."""
        t = self.tile
        return {
            "SVDQ_BF16": int(self.bf16),
            "SVDQ_NATIVE": int(self.native),
            "SVDQ_BM": t.bm,
            "SVDQ_BN": t.bn,
            "SVDQ_WM": t.wm,
            "SVDQ_WN": t.wn,
            "SVDQ_STAGES": t.stages,
            "SVDQ_MIN_BLOCKS": t.min_blocks,
            "SVDQ_EPILOGUE": self.epilogue,
        }


@dataclass(frozen=True)
class StatisticsBuild:
    """One build of ``csrc/channel_statistics.cu``."""

    bf16: bool

    source = "channel_statistics.cu"
    entry = "svdq_channel_statistics"
    threads, columns, rows = 256, 256, 8  # of a block; rows that it reads at once

    def shared_bytes(self) -> int:
        """Dynamic shared memory: none."""
        return 0

    def grid(self, m: int, k: int, multiprocessors: int) -> tuple[tuple[int, int, int], int]:
        """Blocks, about three for each multiprocessor, and the rows of a slice."""
        columns = _ceil(k, self.columns)
        slices = min(_ceil(3 * multiprocessors, columns), _ceil(m, self.rows))
        slice_rows = _ceil(_ceil(m, slices), self.rows) * self.rows
        return (columns, _ceil(m, slice_rows), 1), slice_rows

    def defines(self) -> dict[str, int]:
        """Macros of this build."""
        return {"SVDQ_BF16": int(self.bf16)}


@dataclass(frozen=True)
class DescentBuild:
    """The build of ``csrc/descent.cu``: a thread has one output."""

    bf16 = False  # it rounds to either type, on every card
    source = "descent.cu"
    entry = "svdq_descent"
    threads = 64

    def shared_bytes(self) -> int:
        """Dynamic shared memory: none."""
        return 0

    def grid(self, n: int) -> tuple[int, int, int]:
        """Blocks for N outputs."""
        return _ceil(n, self.threads), 1, 1

    def defines(self) -> dict[str, int]:
        """Macros of this build."""
        return {"SVDQ_BF16": 0}


@dataclass(frozen=True)
class ModulateBuild:
    """One build of ``csrc/modulate.cu``: what it adds to a row (``gated``) and whether it norms what comes of it."""

    bf16: bool
    gated: bool
    normed: bool

    source = "modulate.cu"
    entry = "svdq_modulate"
    threads, most_columns = 128, 4096  # of a block, which has a row

    def shared_bytes(self) -> int:
        """Dynamic shared memory: none."""
        return 0

    def defines(self) -> dict[str, int]:
        """Macros of this build."""
        return {"SVDQ_BF16": int(self.bf16), "SVDQ_GATED": int(self.gated), "SVDQ_NORMED": int(self.normed)}


@dataclass(frozen=True)
class NormRopeBuild:
    """One build of ``csrc/norm_rope.cu``, for heads of so many columns."""

    bf16: bool
    head: int

    source = "norm_rope.cu"
    entry = "svdq_norm_rope"
    threads, tokens = 128, 4  # tokens of a block
    heads = (64, 128)

    def shared_bytes(self) -> int:
        """Dynamic shared memory: none."""
        return 0

    def defines(self) -> dict[str, int]:
        """Macros of this build."""
        return {"SVDQ_BF16": int(self.bf16), "SVDQ_HEAD": self.head}


@dataclass(frozen=True)
class GeluConcatBuild:
    """One build of ``csrc/gelu_concat.cu``."""

    bf16: bool

    source = "gelu_concat.cu"
    entry = "svdq_gelu_concat"
    threads, columns = 256, 8192  # of a row, a block's

    def shared_bytes(self) -> int:
        """Dynamic shared memory: none."""
        return 0

    def defines(self) -> dict[str, int]:
        """Macros of this build."""
        return {"SVDQ_BF16": int(self.bf16)}


def block_builds(bf16: bool) -> list[ModulateBuild | NormRopeBuild | GeluConcatBuild]:
    """What runs between the linear layers of a FLUX block."""
    modulate = [ModulateBuild(bf16, *kind) for kind in ((False, True), (True, True), (True, False))]
    return [*modulate, *(NormRopeBuild(bf16, head) for head in NormRopeBuild.heads), GeluConcatBuild(bf16)]


Build = (
    GemmBuild
    | QuantizeBuild
    | HopperGemmBuild
    | RowsGemmBuild
    | WideGemmBuild
    | GridGemmBuild
    | Int8QuantizeBuild
    | Int8GemmBuild
    | GemvAwqBuild
    | GemvInt8Build
    | StatisticsBuild
    | DescentBuild
    | Nvfp4QuantizeBuild
    | Nvfp4GemmBuild
    | RowsBuild
    | ModulateBuild
    | NormRopeBuild
    | GeluConcatBuild
)


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
def nvfp4_gemm_build(
    capability: int, multiprocessors: int, m: int, n: int, bf16: bool, epilogue: int = STORE
) -> Nvfp4GemmBuild:
    """The same for NVFP4."""
    tiles = _nvfp4_tiles(capability, epilogue)
    tile = min(tiles, key=lambda t: _tile_time(t, m, n, multiprocessors))
    return Nvfp4GemmBuild(bf16, capability == BLOCK_SCALED, tile, epilogue)


@lru_cache(maxsize=4096)
def int8_gemm_build(multiprocessors: int, m: int, n: int, bf16: bool) -> Int8GemmBuild:
    """The same for INT8, on any card."""
    return Int8GemmBuild(bf16, min(INT8_TILES, key=lambda t: _tile_time(t, m, n, multiprocessors)))


def _nvfp4_tiles(capability: int, epilogue: int) -> tuple[Tile, ...]:
    """The large tile spares bandwidth, which only the native product is fast enough to want."""
    tiles = (LARGE, MEDIUM) if capability == BLOCK_SCALED else (MEDIUM,)
    return (*tiles, SMALL) if epilogue == STORE else tiles


# Shared memory of a multiprocessor that blocks can have, in KB, where it is not 99.
_QUANTIZE_SHARED = {75: 64, 80: 163, 90: 227, 100: 227, 103: 227}
_RESERVED_SHARED = 1024  # of each block


def quantize_staging(capability: int, rank_tiles: int = 4, output: int = NIBBLES) -> tuple[int, int]:
    """(stages of x, most warps in a block) of INT4's quantizer, to what shared memory and registers hold."""
    shared = _QUANTIZE_SHARED.get(capability, 99)
    stages, warps = (3, 12) if shared > 64 else (2, 4)
    if shared > 200 and output == NIBBLES and not rank_tiles:
        stages, warps = 2, 16
    room = shared * 1024 // QuantizeBuild(True, False, rank_tiles, PLAIN, stages, warps, output).warp_bytes
    return stages, min(warps, room)


def nvfp4_quantize_staging(capability: int) -> tuple[int, int]:
    """The same of NVFP4's."""
    if capability < 80:
        return 2, 4
    return {80: (4, 12), 90: (3, 20), 100: (3, 20), 103: (3, 20)}.get(capability, (3, 8))


_COST_OF_SHARING = 1.1  # instructions of a build that shares, relative to one that does not


def quantize_sharing(output: int) -> tuple[bool, ...]:
    """Whether builds of INT4's quantizer share; an image's scales belong to whole chunks of a row, so those do not."""
    return (False,) if output == IMAGE else (False, True)


class QuantizeLaunch(NamedTuple):
    """How INT4's quantizer is launched.

    Attributes:
        grid: (blocks of rows, 1, blocks of ranks).
        eights: of a block, eight rows each; the ``longer`` first ones have one more.
        own_groups: of that one, which a block quantizes itself; the rest is the other blocks'.
    """

    build: QuantizeBuild
    grid: tuple[int, int, int]
    warps: int
    eights: int
    longer: int
    own_groups: int


@lru_cache(maxsize=4096)
def quantize_launch(
    capability: int,
    multiprocessors: int,
    m: int,
    k: int,
    rank: int,
    bf16: bool,
    unsigned: bool,
    prologue: int = PLAIN,
    output: int = NIBBLES,
) -> QuantizeLaunch:
    """The build for an (m, k) input and the shape of its launch."""
    products = rank_tiles(capability, rank)
    staging = quantize_staging(capability, products, output)
    build = QuantizeBuild(bf16, unsigned, products, prologue, *staging, output)
    return quantize_shape(build, capability, multiprocessors, m, k, rank)


def quantize_shape(
    build: QuantizeBuild, capability: int, multiprocessors: int, m: int, k: int, rank: int
) -> QuantizeLaunch:
    """Warps share the columns evenly, and as many blocks as the card holds at once, or several times, the rows."""
    groups, eights = k // GROUP, _ceil(m, build.rows)
    parts = _ceil(groups, CHUNK_GROUPS) if build.output == IMAGE else groups
    warps = _ceil(parts, _ceil(parts, build.most_warps))
    shared = _QUANTIZE_SHARED.get(capability, 99) * 1024 + _RESERVED_SHARED
    fitting = shared // (build.shared_bytes(warps) + _RESERVED_SHARED)
    places = multiprocessors * max(min(fitting, build.most_warps // warps), 1)
    rounds = _ceil(eights, places * 2 * build.most_tiles)
    blocks, own_groups = places * rounds, groups
    each, longer = divmod(eights, blocks)
    if longer and True in quantize_sharing(build.output) and (each + longer / blocks) * _COST_OF_SHARING < each + 1:
        # So that blocks of either kind are done at the same time. Multiplying a row takes about as long as
        # rank_tiles / 16 of quantizing it.
        product, ratio = build.rank_tiles / 16, longer / (blocks - longer)
        own_groups = round(groups * max(ratio - product, 0) / (1 + ratio))
        build = replace(build, shares=True)
    else:
        build, blocks = replace(build, shares=False), min(eights, blocks)
        each, longer = divmod(eights, blocks)
    grid = blocks, 1, _ceil(rank, build.rank_tiles * 8 or 1) or 1
    return QuantizeLaunch(build, grid, warps, each, longer, own_groups)


class Nvfp4QuantizeLaunch(NamedTuple):
    """How NVFP4's is launched; ``grid`` is (blocks of rows, slices of the columns, blocks of ranks)."""

    build: Nvfp4QuantizeBuild
    grid: tuple[int, int, int]
    warps: int
    slice_groups: int


@lru_cache(maxsize=4096)
def nvfp4_quantize_launch(
    capability: int, multiprocessors: int, m: int, k: int, rank: int, bf16: bool, output: int = CODES
) -> Nvfp4QuantizeLaunch:
    """The same for NVFP4: warps have 16 rows and slices of the columns, long enough that ``busy_warps`` of
    them make up a multiprocessor's share of the work; a block has as many warps as deals them out most evenly.
    """
    stages, most_warps = nvfp4_quantize_staging(capability)
    build = Nvfp4QuantizeBuild(bf16, rank_tiles(capability, rank), output, stages, most_warps)
    return _quantizer_shape(build, multiprocessors, m, k, rank, 2, 18 if most_warps >= 18 else BUSY_WARPS)


def rank_tiles(capability: int, rank: int) -> int:
    """Products of 8 ranks that a block of a quantizer makes."""
    return 0 if rank == 0 else 2 if rank <= 16 else 4 if rank <= 32 or capability < 80 else 8


def _quantizer_shape(
    build: Nvfp4QuantizeBuild,
    multiprocessors: int,
    m: int,
    k: int,
    rank: int,
    chunk_groups: int,
    busy_warps: int,
) -> Nvfp4QuantizeLaunch:
    """Slices of whole chunks, and warps in a block, that keep a card busy."""
    groups, row_tiles = k // GROUP, _ceil(m, build.rows)
    chunks = _ceil(groups, chunk_groups)
    share = round(chunks * row_tiles / (multiprocessors * busy_warps))
    slice_chunks = min(max(share, 1), chunks, MOST_SLICE_GROUPS // chunk_groups)
    slices = _ceil(chunks, slice_chunks)
    slice_groups = _ceil(chunks, slices) * chunk_groups
    slices = _ceil(groups, slice_groups)

    def most_warps_on_a_multiprocessor(warps: int) -> int:
        return _ceil(_ceil(row_tiles, warps) * slices, multiprocessors) * warps

    warps = min(range(build.most_warps, 0, -1), key=most_warps_on_a_multiprocessor)
    return Nvfp4QuantizeLaunch(
        build, (_ceil(row_tiles, warps), slices, _ceil(rank, build.rank_tiles * 8 or 1) or 1), warps, slice_groups
    )


def all_builds(capability: int) -> list[Build]:
    """Every build that the plan can ask for on an architecture, for the ahead-of-time build."""
    builds: list[Build] = []
    for bf16, unsigned in product((True, False), repeat=2):
        builds += [
            QuantizeBuild(bf16, unsigned, tiles, prologue, *quantize_staging(capability, tiles, output), output, shares)
            for tiles, prologue in product((0, 2, 4, 8), (PLAIN, GELU, MODULATE, ROTATE, GELU_ROTATE))
            if not (unsigned and prologue in (ROTATE, GELU_ROTATE))
            for output in (
                (NIBBLES, IMAGE, BYTES) if capability == HOPPER and prologue in (PLAIN, ROTATE) else (NIBBLES,)
            )
            for shares in quantize_sharing(output)
        ]
        for tile in (LARGE, MEDIUM, SMALL):
            build = GemmBuild(bf16, unsigned, tile)
            builds.append(build)
            if tile is not SMALL:
                builds += [replace(build, epilogue=epilogue) for epilogue in (GELU_QUANTIZE, NORM_ROPE)]
    for bf16, rank_tiles in product((True, False), (0, 2, 4, 8)):
        builds += [
            Nvfp4QuantizeBuild(bf16, rank_tiles, output, *nvfp4_quantize_staging(capability))
            for output in ((CODES, WIDE, ABSMAX) if capability == HOPPER else (CODES, ABSMAX))
        ]
    builds += [
        Nvfp4GemmBuild(bf16, capability == BLOCK_SCALED, tile, epilogue)
        for bf16, epilogue in product((True, False), (STORE,) if capability == HOPPER else (STORE, GELU_QUANTIZE))
        for tile in _nvfp4_tiles(capability, epilogue)
    ]
    builds += [Int8GemmBuild(*build) for build in product((True, False), INT8_TILES)]
    builds += [Int8QuantizeBuild(bf16) for bf16 in (True, False)]
    for bf16 in (True, False):
        builds += [
            gemv_build(kind, capability, layers, bf16) for kind in (GemvAwqBuild, GemvInt8Build) for layers in (1, 2)
        ]
        builds.append(StatisticsBuild(bf16))
    builds.append(DescentBuild())
    builds += [build for bf16 in (True, False) for build in block_builds(bf16)]
    if capability == HOPPER:
        builds += [HopperGemmBuild(bf16) for bf16 in (True, False)]
        builds += [RowsGemmBuild(*build) for build in product((True, False), ROWS_COLUMNS, (False, True))]
        builds += [WideGemmBuild(*build) for build in product((True, False), WIDE_TOKENS)]
        builds += [GridGemmBuild(*build) for build in product((True, False), GRID_HALVES)]
        builds += rows_builds()
    return [build for build in builds if runs_on(build, capability)]


def runs_on(build: Build, capability: int) -> bool:
    """Whether a build can run on an architecture: sm_75 has no bf16 and little shared memory."""
    if capability >= 80:
        return True
    if isinstance(build, (QuantizeBuild, Nvfp4QuantizeBuild)):
        return build.rank_tiles <= 4 and not build.bf16
    return not build.bf16 and getattr(build, "tile", None) != LARGE
