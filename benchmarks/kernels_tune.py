"""Times the launch plan's alternatives on this card, best first, to set the numbers in its tables.

python -m benchmarks.kernels_tune [M K N]...
"""

from __future__ import annotations

import sys
from dataclasses import replace
from itertools import product
from unittest import mock

import torch

from svdq_core import bench
from svdq_core.errors import SVDQuantError
from svdq_core.kernels import launch, plan
from svdq_core.ops.cuda import register
from svdq_core.ops.int4 import quantize_act_int4

RANK = 32


def _show(title: str, timed: list[tuple[float, str]]) -> None:
    print(title)
    for us, what in sorted(timed)[:6]:
        print(f"  {us:8.1f} us  {what}")


def tune_gemm(m: int, k: int, n: int) -> None:
    """Every tile in the plan; on cards without 4-bit products, with int8 ones in their place."""
    stand_in = launch.card(torch.cuda.current_device())[0] >= 90
    sets = bench.copies(lambda: bench._operands(m, k, n, RANK, torch.bfloat16, False), m * k // 2 + 2 * m * n)
    quantized = [quantize_act_int4(o["x"], o["smooth"], o["proj_down"], False) for o in sets]
    timed = []
    for tile in (plan.LARGE, plan.MEDIUM, plan.SMALL):
        if tile == plan.LARGE and (m % 4 or n % tile.bn):
            continue
        build = plan.GemmBuild(True, False, tile, stand_in=stand_in)

        def call(o: dict, q: tuple, build: plan.GemmBuild = build) -> None:
            launch.gemm(*q, o["weight"], o["weight_scale"], o["proj_up"], o["bias"], False, build=build)

        us = bench.median_us([lambda o=o, q=q: call(o, q) for o, q in zip(sets, quantized, strict=True)])
        timed.append((us, f"{tile.bm} x {tile.bn}"))
    _show(f"GEMM {m} x {k} x {n}", timed)


def tune_quantizer(m: int, k: int) -> None:
    """Warps in a block, and how far ahead x is copied."""
    sets = bench.copies(lambda: bench._operands(m, k, 64, RANK, torch.bfloat16, False), 2 * m * k)
    card = launch.card(torch.cuda.current_device())
    planned = plan.quantize_launch
    timed = []
    for warps, stages in product((4, 6, 8, 10, 12, 16), (2, 3, 4, 5)):

        def changed(*arguments, warps=warps, stages=stages):
            build = replace(planned(*arguments).build, most_warps=warps, stages=stages)
            return plan.quantize_shape(build, *card, m, k, RANK)

        launch.quantize_kernel.cache_clear()
        with mock.patch.object(plan, "quantize_launch", changed):
            try:
                us = bench.median_us(
                    [lambda o=o: quantize_act_int4(o["x"], o["smooth"], o["proj_down"], False) for o in sets]
                )
            except (SVDQuantError, RuntimeError):  # more shared memory than the card has
                continue
        timed.append((us, f"{warps} warps, {stages} tiles of x"))
    launch.quantize_kernel.cache_clear()
    _show(f"quantizer {m} x {k}", timed)


def main(arguments: list[str]) -> None:
    """Tune for shapes given as M K N triples, or for FLUX's."""
    register()
    numbers = [int(argument) for argument in arguments]
    shapes = [tuple(numbers[i : i + 3]) for i in range(0, len(numbers), 3)] or list(bench.SHAPES)
    for m, k in sorted({(m, k) for m, k, _ in shapes}):
        tune_quantizer(m, k)
    for m, k, n in shapes:
        tune_gemm(m, k, n)


if __name__ == "__main__":
    main(sys.argv[1:])
