"""The quantization methods that the quality benchmarks compare: how each is made by this pack's quantizer."""

from __future__ import annotations

from dataclasses import dataclass

from svdq_core.quantizer.recipes import RECIPES, Recipe

RANK = 32

# The paper's (section 4, and its public configurations): grid-searched smoothing, then up to 100 refinements of the
# low-rank branch, stopped early.
PAPER = "SVDQuant (paper)"


@dataclass(frozen=True)
class Method:
    """Recipe, rank and precision (a name of ``pipeline.PRECISIONS``)."""

    recipe: Recipe
    rank: int = RANK
    precision: str = "int4"


METHODS = {
    "naive rounding": Method(Recipe(), rank=0),
    "smoothing only": Method(Recipe(smooth="grid"), rank=0),
    "SVD only": Method(Recipe()),
    "LoRC": Method(Recipe(split=False, refit=True)),
    PAPER: Method(Recipe(smooth="grid", rounds=101)),
    "ours, fast": Method(RECIPES["fast"]),
    "ours, balanced": Method(RECIPES["balanced"]),
    "ours, best": Method(RECIPES["best"]),
    "NF4, weight only": Method(Recipe(), rank=0, precision="nf4"),
}
