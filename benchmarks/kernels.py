"""What the INT4 kernels reach on this card, and what they would reach with a native 4-bit product.

    python -m benchmarks.kernels OUT.json

Cards from sm_90 on have no 4-bit product. To time everything else in the GEMM there, each is replaced by the
two int8 products that occupy a Hopper tensor core as long as the 4-bit one occupies Ada's (the results are
then meaningless), and compared with a loop of nothing but those products.
"""

from __future__ import annotations

import json
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import torch

from svdq_core import bench
from svdq_core.kernels import driver, launch, library, nvrtc, plan, w4a4
from svdq_core.ops.cuda import register
from svdq_core.ops.int4 import linear_int4, quantize_act_int4

_PEAK = r"""
struct Arguments { int* out; int rounds; };
extern "C" __global__ void peak(const Arguments p) {
    int c[8][4] = {}, a = threadIdx.x, b = threadIdx.x * 3;
    for (int r = 0; r < p.rounds; ++r)
#pragma unroll
        for (int i = 0; i < 8; ++i)
            asm volatile("mma.sync.aligned.m16n8k32.row.col.s32.s8.s8.s32 {%0, %1, %2, %3}, "
                         "{%4, %4, %4, %4}, {%5, %5}, {%0, %1, %2, %3};"
                         : "+r"(c[i][0]), "+r"(c[i][1]), "+r"(c[i][2]), "+r"(c[i][3]) : "r"(a), "r"(b));
    int sum = 0;
    for (int i = 0; i < 32; ++i) sum += c[i / 4][i % 4];
    p.out[blockIdx.x * blockDim.x + threadIdx.x] = sum;
}
"""


def int8_products_per_second() -> float:
    """How many m16n8k32 int8 products this card does a second."""
    capability, multiprocessors = launch.card(torch.cuda.current_device())
    code = nvrtc.find().compile("peak.cu", _PEAK, {}, [f"-arch=sm_{capability}"])
    launcher = driver.launcher()
    function = launcher.load(code, "peak", 0)
    blocks, threads, rounds = multiprocessors * 2, 256, 4096
    out = torch.empty(blocks * threads, dtype=torch.int32, device="cuda")
    arguments = out.data_ptr().to_bytes(8, "little") + rounds.to_bytes(4, "little")

    def run() -> None:
        launcher.launch(function, (blocks, 1, 1), threads, 0, torch.cuda.current_stream().cuda_stream, arguments, False)

    seconds = bench.median_us([run] * 4) * 1e-6
    return blocks * threads / 32 * rounds * 8 / seconds


def quantizer(m: int, k: int, ranks: tuple[int, ...], bandwidth: float) -> list[dict]:
    """The quantizer's time by rank, and that of a copy that reads and writes as many bytes in all."""
    results = []
    for rank in ranks:
        sets = bench.copies(lambda r=rank: bench._operands(m, k, 64, r, torch.bfloat16, False), 2 * m * k)
        us, rotated_us = (
            bench.median_us(
                [lambda o=o, r=r: quantize_act_int4(o["x"], o["smooth"], o["proj_down"], False, r) for o in sets], 50
            )
            for r in (False, True)
        )
        moved = bench.quantize_bytes(m, k, rank)
        halves = [torch.zeros(2, moved // 4, dtype=torch.bfloat16, device="cuda") for _ in sets]
        copy_us = bench.median_us([lambda h=h: torch.mul(h[0], 1.0, out=h[1]) for h in halves], 50)
        result = {"m": m, "k": k, "rank": rank, "us": us, "rotated_us": rotated_us, "copy_of_as_many_bytes_us": copy_us}
        results.append(result | {"share_of_copy": moved / us * 1e6 / bandwidth})
    return results


def stand_in(m: int, k: int, n: int, peak: float) -> dict:
    """The GEMM with int8 products in place of 4-bit ones, with and without the low-rank branch."""
    capability, multiprocessors = launch.card(torch.cuda.current_device())
    result: dict = {"m": m, "k": k, "n": n}
    for rank in (0, 32):
        sets = bench.copies(lambda r=rank: bench._operands(m, k, n, r, torch.bfloat16, False), m * k // 2 + m * n * 2)
        quantized = [quantize_act_int4(o["x"], o["smooth"], o["proj_down"], False) for o in sets]
        for tile in (plan.LARGE, plan.MEDIUM):
            build = replace(
                plan.gemm_build(capability, multiprocessors, m, n, True, False),
                tile=tile,
                stand_in=True,
            )

            def call(o: dict, q: tuple, build: plan.GemmBuild = build) -> None:
                launch.gemm(*q, o["weight"], o["weight_scale"], o["proj_up"], o["bias"], False, build=build)

            us = bench.median_us([lambda o=o, q=q: call(o, q) for o, q in zip(sets, quantized, strict=True)])
            products = 2 * m * n * k / (16 * 8 * 64)
            name = f"{tile.bm}x{tile.bn}_rank{rank}"
            result[f"{name}_us"] = us
            result[f"{name}_share_of_peak"] = products / (us * 1e-6) / peak
    return result


def host_overhead_us() -> dict[str, float]:
    """Time of a call on the host, when the card is not waited for: of a layer, of its halves, of torch's layer."""
    o = bench._operands(16, 256, 128, 32, torch.bfloat16, False)
    of_input = o["smooth"], o["proj_down"]
    of_output = o["weight"], o["weight_scale"], o["proj_up"], o["bias"]
    dense = torch.zeros(128, 256, dtype=torch.bfloat16, device="cuda")
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "layer": lambda: w4a4.linear(o["x"], *of_input, *of_output, False),
        "halves": lambda: linear_int4(*quantize_act_int4(o["x"], *of_input, False), *of_output, False),
        "torch": lambda: torch.nn.functional.linear(o["x"], dense, o["bias"]),
    }
    result = {}
    for name, call in calls.items():
        for _ in range(100):
            call()
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(500):
            call()
        result[name] = (time.perf_counter() - started) / 500 * 1e6
        torch.cuda.synchronize()
    return result


def cold_start(capability: int) -> dict[str, float]:
    """Seconds to get the code of everything FLUX needs: compiled, and from the cache."""
    import os

    _, multiprocessors = launch.card(torch.cuda.current_device())
    builds: set[plan.Build] = set()
    for m in (4608, 4096, 512):
        for unsigned in (False, True):
            builds.add(plan.quantize_launch(capability, multiprocessors, m, 3072, 32, True, unsigned).build)
            for n in (3072, 9216, 12288, 21504):
                builds.add(plan.gemm_build(capability, multiprocessors, m, n, True, unsigned))
    result = {"builds": len(builds)}
    before = os.environ.get("SVDQ_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["SVDQ_CACHE_DIR"] = folder
        for name in ("compile_s", "cached_s"):
            started = time.perf_counter()
            for build in builds:
                library.machine_code(build, capability)
            result[name] = time.perf_counter() - started
    if before is None:
        del os.environ["SVDQ_CACHE_DIR"]
    else:
        os.environ["SVDQ_CACHE_DIR"] = before
    return result


def main(path: Path) -> None:
    """Measure everything and write it down."""
    register()
    capability, _ = launch.card(torch.cuda.current_device())
    limits = bench.measure_limits()
    steps: dict[str, Callable] = {
        "cold_start": lambda: cold_start(capability),
        "host_overhead_us": host_overhead_us,
        "quantize": lambda: (
            quantizer(4608, 3072, (0, 16, 32, 64, 128), limits.bandwidth)
            + quantizer(512, 3072, (0, 32), limits.bandwidth)
            + quantizer(4608, 12288, (0, 32), limits.bandwidth)
        ),
    }
    report: dict = {"command": "python -m benchmarks.kernels", "environment": bench.environment()}
    report["copy_bytes_per_second"] = limits.bandwidth
    for name, step in steps.items():
        report[name] = step()
    if capability >= 90:
        peak = report["int8_products_per_second"] = int8_products_per_second()
        report["stand_in"] = [stand_in(m, k, n, peak) for m, k, n in bench.SHAPES]
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
