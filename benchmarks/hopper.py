"""Whole INT4 layers on a Hopper card, in 8 bits and exact, against 16 bits and every installed peer.

    python -m benchmarks.hopper OUT.json      measures (needs the card)
    python -m benchmarks.hopper --plot IN.json OUT.png

Peers are those of ``svdq_core.bench``; all times of a shape come from one process.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path

import torch

from svdq_core import bench
from svdq_core.formats.comfy_quant import SVDQUANT_W4A4
from svdq_core.kernels import grid, plan, rows
from svdq_core.numerics import hadamard, int4
from svdq_core.ops import as_int8

RANKS = (0, 16, 32, 64, 128)
FLUX = 5  # of bench.SHAPES, the first are FLUX's with 4608 tokens


def errors(m: int, k: int, n: int, dtype: torch.dtype) -> dict[str, float]:
    """Relative errors of the layer in 8 bits and of the exact one.

    Each against float64 of the codes that the reference makes, and against its weight with a 16-bit input.
    """
    o = bench._operands(m, k, n, 32, dtype, False)
    weight = int4.dequantize(int4.unpack(o["weight"]), o["weight_scale"].t()).double()
    low_rank = o["proj_up"].double() @ o["proj_down"].double().t()

    def of(out: torch.Tensor, expected: torch.Tensor) -> float:
        expected = expected + o["bias"].double()
        return ((out.double() - expected).norm() / expected.norm()).item()

    operands = o["smooth"], o["proj_down"], o["weight"], o["weight_scale"], None, None, o["proj_up"], o["bias"]
    image = as_int8.image(operands, SVDQUANT_W4A4, unsigned=False, rotated=True)
    codes, scale = as_int8.quantize_input(o["x"], image.inverse)
    in_8_bits = codes.double() @ image.weight.double().t() * scale.double() * image.weight_scale.double()
    codes, scale = int4.quantize_groups(hadamard.smooth_and_rotate(o["x"], o["smooth"]), False)
    exact = int4.dequantize(codes, scale).double() @ weight.t() + o["x"].double() @ low_rank.t()
    full = o["x"].double() @ (hadamard.rotate(weight) / o["smooth"].double() + low_rank).t()
    ours, fours = bench.layer(o), bench.exact_layer(o)
    return {
        "error": of(ours, in_8_bits),
        "exact_error": of(fours, exact),
        "input_error": of(ours, full),
        "exact_input_error": of(fours, full),
    }


def parts(m: int, k: int, n: int) -> dict[str, float]:
    """Times by rank, of the halves of a layer at rank 32, and of exact layers with scales that are not on a grid."""
    result = {}
    for rank in RANKS:
        size = 2 * m * k + n * k + 2 * m * n
        sets = bench.copies(lambda r=rank: bench._operands(m, k, n, r, torch.bfloat16, False), size)
        result[f"rank{rank}_us"] = bench.median_us([lambda o=o: bench.layer(o) for o in sets])
        exact = [lambda o=o: bench.exact_layer(o) for o in sets]
        result[f"exact_rank{rank}_us"] = bench.median_us(exact)
        if rank == 32:
            result["quantize_us"] = bench.median_us([lambda o=o: rows.quantize(o["x"], o["smooth"]) for o in sets])
            result["gemm_us"] = result["rank32_us"] - result["quantize_us"]
            halves = [lambda o=o: grid.quantize(o["x"], o["smooth"], o["proj_down"], False, plan.ROTATE) for o in sets]
            result["exact_quantize_us"] = bench.median_us(halves)
            result["exact_gemm_us"] = result["exact_rank32_us"] - result["exact_quantize_us"]
            for o in sets:
                o["weight_scale"] = (torch.rand_like(o["weight_scale"].float()) * 0.01).to(torch.bfloat16)
                o["weight"] = o["weight"].clone()  # another weight, another image
            result["exact_any_scales_us"] = bench.median_us(exact)
    return result


def measure(path: Path) -> None:
    """Measure every shape of the bench and write it down."""
    limits = bench.measure_limits()
    results = []
    for m, k, n in bench.SHAPES:
        result = bench.bench_shape(m, k, n, 32, torch.bfloat16, limits) | parts(m, k, n)
        for name, dtype in (("bf16", torch.bfloat16), ("fp16", torch.float16)):
            result |= {f"{kind}_{name}": value for kind, value in errors(m, k, n, dtype).items()}
        results.append(result)
        print(bench.table([result]), flush=True)
    report = {
        "command": "python -m benchmarks.hopper benchmarks/results/hopper_h200.json",
        "environment": bench.environment(),
        "copy_bytes_per_second": limits.bandwidth,
        "geometric_mean_over_16bit_flux": statistics.geometric_mean([r["speedup_over_16bit"] for r in results[:FLUX]]),
        "exact_geometric_mean": statistics.geometric_mean([r["16bit_us"] / r["exact_us"] for r in results[:FLUX]]),
        "weight_image_bytes_per_weight": 1.0,
        "results": results,
    }
    path.write_text(json.dumps(report, indent=1) + "\n")


def plot(source: Path, target: Path) -> None:
    """Speed relative to 16 bits, by shape, of ours and every peer."""
    import matplotlib.pyplot as plt

    results = json.loads(source.read_text())["results"]
    names = {
        "layer_us": "this pack, INT4 file in 8 bits",
        "exact_us": "this pack, exact W4A4",
        "nf4_us": "NF4 (bitsandbytes)",
        "kitchen_convrot_w4a4_us": "comfy-kitchen ConvRot W4A4",
        "kitchen_w4a8_us": "comfy-kitchen W4A8",
        "kitchen_int8_us": "comfy-kitchen INT8",
        "kitchen_svdquant_us": "comfy-kitchen SVDQuant",
        "fp8_gemm_us": "bare FP8 product (torch)",
        "int8_gemm_us": "bare INT8 product (torch)",
    }
    shown = [key for key in names if any(key in r for r in results)]
    figure, axes = plt.subplots(figsize=(11, 4.2))
    width = 0.85 / len(shown)
    for i, key in enumerate(shown):
        heights = [r["16bit_us"] / r[key] if key in r else 0.0 for r in results]
        hatch = "//" if key.endswith("gemm_us") else None
        axes.bar(
            [j + (i - len(shown) / 2 + 0.5) * width for j in range(len(results))],
            heights,
            width,
            label=names[key],
            hatch=hatch,
            alpha=0.5 if hatch else 1.0,
        )
    axes.axhline(1, color="black", linewidth=1)
    axes.set_xticks(range(len(results)), [f"{r['m']} x {r['k']}\nx {r['n']}" for r in results], fontsize=8)
    axes.set_ylabel("times as fast as bf16 F.linear")
    axes.set_ylim(top=1.3 * axes.get_ylim()[1])
    axes.legend(fontsize=7, ncols=3)
    figure.tight_layout()
    figure.savefig(target, dpi=110)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    parser.add_argument("target", type=Path, nargs="?")
    parser.add_argument("--plot", action="store_true")
    options = parser.parse_args()
    plot(options.path, options.target) if options.plot else measure(options.path)
