"""INT8, NVFP4 and W4A16 layers on the card at hand, against 16 bits; and what a LoRA's rank costs an INT4 layer.

    python -m benchmarks.precisions OUT.json      needs a GPU

Times are medians as in ``svdq_core.bench``, all of a shape from one process; errors are against float64 of the
codes that the reference makes on the CPU.
"""

from __future__ import annotations

import argparse
import json
import statistics
from collections.abc import Callable
from pathlib import Path

import torch

from svdq_core import bench
from svdq_core.formats.comfy_quant import SVDQUANT_NVFP4
from svdq_core.kernels import int8 as int8_kernels
from svdq_core.kernels import nvfp4 as nvfp4_kernels
from svdq_core.kernels import prefers_int8
from svdq_core.numerics import awq, int4, int8, nvfp4
from svdq_core.ops.as_int8 import linear_as_int8
from svdq_core.ops.awq import linear_awq_w4a16, linears_awq_w4a16
from svdq_core.ops.int8 import linear_int8, linears_int8
from svdq_core.ops.nvfp4 import linear_nvfp4

RANK, LORA_RANK = 32, 16
FLUX = 5  # of bench.SHAPES, the first are FLUX's with 4608 tokens
MODULATIONS = {(3072, 18432): 38, (3072, 9216): 38}  # (K, N), and how often FLUX.1 has each
# How often FLUX.1 has each (tokens, K, N) at 1024 x 1024: 19 double blocks, both streams, and 38 single ones.
FLUX_LAYERS = {
    (4096, 3072, 9216): 19,
    (4096, 3072, 3072): 19,
    (4096, 3072, 12288): 19,
    (4096, 12288, 3072): 19,
    (512, 3072, 9216): 19,
    (512, 3072, 3072): 19,
    (512, 3072, 12288): 19,
    (512, 12288, 3072): 19,
    (4608, 3072, 21504): 38,
    (4608, 15360, 3072): 38,
}

Operands = dict[str, torch.Tensor]


def _common(m: int, k: int, n: int, dtype: torch.dtype) -> tuple[Operands, torch.Tensor]:
    """The operands that formats share, and a weight to quantize."""

    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, device="cuda") * scale).to(dtype)

    o = {
        "x": random(m, k),
        "smooth_factor": (torch.rand(k, device="cuda") + 0.5).to(dtype),
        "proj_down": random(k, RANK, scale=k**-0.5),
        "proj_up": random(n, RANK, scale=0.05),
        "bias": random(n),
    }
    return o, torch.randn(n, k, device="cuda") * k**-0.5


def int8_operands(m: int, k: int, n: int, dtype: torch.dtype) -> Operands:
    """Of ``linear_int8``."""
    o, weight = _common(m, k, n, dtype)
    codes, scale = int8.quantize_rows(weight)
    return o | {"weight": codes, "weight_scale": scale.flatten()}


def without_branch(o: Operands) -> Operands:
    """The same at rank 0."""
    return o | {name: o[name][:, :0] for name in ("proj_down", "proj_up")}


def nvfp4_operands(m: int, k: int, n: int, dtype: torch.dtype) -> Operands:
    """Of ``linear_nvfp4``."""
    o, weight = _common(m, k, n, dtype)
    tensor_scale = weight.abs().amax() / (nvfp4.LARGEST * nvfp4.SCALE_LARGEST)
    scale = nvfp4.group_scale(weight, tensor_scale)
    step = (scale.float() * tensor_scale).repeat_interleave(nvfp4.GROUP_SIZE, dim=1)
    codes = nvfp4.encode(torch.where(step > 0, weight / step, 0.0))
    return o | {
        "weight": int4.pack(codes),
        "weight_scale": scale.t().contiguous(),
        "weight_tensor_scale": tensor_scale,
        "weight_channel_scale": None,
    }


def awq_operands(m: int, k: int, n: int, dtype: torch.dtype) -> Operands:
    """Of ``linear_awq_w4a16``."""
    o, weight = _common(m, k, n, dtype)
    scale, zero = awq.group_range(weight, dtype)
    steps = (weight.unflatten(-1, (-1, awq.GROUP_SIZE)) - zero.float()[..., None]) / scale.float()[..., None]
    return {
        "x": o["x"],
        "weight": int4.pack(awq.encode(steps).flatten(-2)),
        "weight_scale": scale.t().contiguous(),
        "weight_zero": zero.t().contiguous(),
        "bias": o["bias"],
    }


def smoothed(o: Operands) -> torch.Tensor:
    """On the CPU, where torch divides exactly."""
    return o["x"].float().cpu() / o["smooth_factor"].float().cpu()


def int8_exact(o: Operands) -> torch.Tensor:
    """The layer in float64."""
    y = int8.dequantize(*int8.quantize_rows(smoothed(o))).double().cuda() @ o["weight"].double().t()
    return low_rank(o, y * o["weight_scale"].double())


def nvfp4_exact(o: Operands) -> torch.Tensor:
    """The layer in float64."""
    weight = nvfp4.dequantize(int4.unpack(o["weight"], unsigned=True), o["weight_scale"].t()).double()
    y = nvfp4.dequantize(*nvfp4.quantize_groups(smoothed(o))).double().cuda() @ weight.t()
    return low_rank(o, y * o["weight_tensor_scale"].double())


def nvfp4_layer(o: Operands) -> torch.Tensor:
    """The layer as a card that prefers it evaluates it, in 8 bits."""
    operands = {name: tensor for name, tensor in o.items() if name != "x"}
    return linear_as_int8(o["x"], **operands, layer_format=SVDQUANT_NVFP4, act_unsigned=False, act_rotated=False)


def low_rank(o: Operands, y: torch.Tensor) -> torch.Tensor:
    """``y`` with the low-rank branch and the bias."""
    return y + o["x"].double() @ o["proj_down"].double() @ o["proj_up"].double().t() + o["bias"].double()


def error(out: torch.Tensor, exact: torch.Tensor) -> float:
    """Relative, by Frobenius norm."""
    return ((out.double() - exact).norm() / exact.norm()).item()


def measure_layers() -> list[dict]:
    """INT8 and NVFP4 at every shape of the bench."""
    formats: dict[str, tuple[Callable, Callable, Callable, Callable]] = {
        "int8": (int8_operands, linear_int8, int8_kernels.quantize, int8_exact),
        "nvfp4": (nvfp4_operands, linear_nvfp4, nvfp4_kernels.quantize_wide, nvfp4_exact),
    }
    results = []
    for m, k, n in bench.SHAPES:
        size = 2 * m * k + n * k + 2 * m * n
        result = {"m": m, "k": k, "n": n, "rank": RANK}
        dense = [(o, w.bfloat16()) for o, w in bench.copies(lambda s=(m, k, n): _common(*s, torch.bfloat16), size)]
        calls = [lambda o=o, w=w: torch.nn.functional.linear(o["x"], w, o["bias"]) for o, w in dense]
        result["16bit_us"] = bench.median_us(calls)
        del dense, calls
        for name, (make, linear, quantize, exact) in formats.items():
            sets = bench.copies(lambda make=make, s=(m, k, n): make(*s, torch.bfloat16), size)
            result[f"{name}_us"] = bench.median_us([lambda o=o, f=linear: f(**o) for o in sets])
            calls = [lambda o=o, f=quantize: f(o["x"], o["smooth_factor"], o["proj_down"]) for o in sets]
            result[f"{name}_quantize_us"] = bench.median_us(calls)
            if name == "nvfp4" and prefers_int8(sets[0]["x"].device, n, k):
                result["nvfp4_exact_us"] = result["nvfp4_us"]
                result["nvfp4_us"] = bench.median_us([lambda o=o: nvfp4_layer(o) for o in sets])
            result[f"{name}_speedup"] = result["16bit_us"] / result[f"{name}_us"]
            for dtype in (torch.bfloat16, torch.float16):
                o = make(m, k, n, dtype)
                result[f"{name}_error_{str(dtype).removeprefix('torch.')}"] = error(linear(**o), exact(o))
        results.append(result)
        print(result, flush=True)
    return results


def measure_modulations(bandwidth: float) -> list[dict]:
    """W4A16 and INT8 at FLUX's modulations.

    Beside a copy of as many bytes as W4A16 moves: so few that it does not reach the bandwidth either.
    Layers run one after another, which may overlap, and as in a model, each after a SiLU that makes its input
    (``after_silu``): of pairs less what their SiLUs take alone.
    """
    linear, silu = torch.nn.functional.linear, torch.nn.functional.silu
    results = []
    for (k, n), m in ((shape, m) for shape in MODULATIONS for m in (1, 4, 8)):
        moved = n * k // 2 + 4 * n * k // awq.GROUP_SIZE + 2 * (m * k + m * n + n)
        sets = bench.copies(lambda s=(m, k, n): awq_operands(*s, torch.bfloat16), moved)
        us = bench.median_us([lambda o=o: linear_awq_w4a16(**o) for o in sets])
        eights = bench.copies(lambda s=(m, k, n): without_branch(int8_operands(*s, torch.bfloat16)), n * k)
        int8_us = bench.median_us([lambda o=o: linear_int8(**o) for o in eights])
        weights = bench.copies(lambda s=(n, k): torch.randn(s, device="cuda", dtype=torch.bfloat16), 2 * n * k)
        dense = bench.median_us([lambda w=w, o=sets[0]: linear(o["x"], w) for w in weights])
        pairs = [lambda o=o: linear_awq_w4a16(**o | {"x": silu(o["x"])}) for o in sets]
        after_silu = bench.median_us(pairs) - bench.median_us([lambda o=o: silu(o["x"]) for o in sets])
        x = sets[0]["x"]
        pairs = [lambda w=w, x=x: linear(silu(x), w) for w in weights]
        dense_after_silu = bench.median_us(pairs) - bench.median_us([lambda x=x: silu(x)] * len(weights))
        halves = bench.copies(
            lambda size=moved // 8: (torch.randn(size, device="cuda"), torch.empty(size, device="cuda")), moved
        )
        copy = bench.median_us([lambda a=a, b=b: torch.mul(a, 1.0, out=b) for a, b in halves])
        result = {"m": m, "k": k, "n": n, "w4a16_us": us, "int8_us": int8_us, "16bit_us": dense, "copy_us": copy}
        result |= {"w4a16_after_silu_us": after_silu, "16bit_after_silu_us": dense_after_silu}
        result["share_of_copy_bandwidth"] = moved / (us * 1e-6) / bandwidth
        moved = n * k + 4 * n + 2 * (m * k + m * n + n + k)
        results.append(result | {"int8_share_of_copy_bandwidth": moved / (int8_us * 1e-6) / bandwidth})
        print(results[-1], flush=True)
    return results


def measure_modulations_together(bandwidth: float) -> list[dict]:
    """All of FLUX.1's modulations, as a step computes them: by one kernel; and for comparison one after another."""
    awq_names = ("weight", "weight_scale", "weight_zero", "bias")
    int8_names = ("smooth_factor", "weight", "weight_scale", "bias")
    return [
        *_together("w4a16", awq_operands, awq_names, linears_awq_w4a16, bandwidth),
        *_together("int8", int8_operands, int8_names, linears_int8, bandwidth),
    ]


def _together(
    precision: str, make: Callable[..., Operands], names: tuple[str, ...], operator: Callable, bandwidth: float
) -> list[dict]:
    every = [shape for shape, count in MODULATIONS.items() for _ in range(count)]
    layers = [[o[name] for name in names] for o in (make(1, *shape, torch.bfloat16) for shape in every)]
    weights = sum(tensor.nbytes for layer in layers for tensor in layer)
    results = []
    for m in (1, 4, 8):
        x = torch.randn((m, every[0][0]), device="cuda", dtype=torch.bfloat16)

        def evaluate(*some: list[torch.Tensor], x: torch.Tensor = x) -> list[torch.Tensor]:
            return operator(x, *zip(*some, strict=True))

        us = bench.median_us([lambda f=evaluate: f(*layers)])
        one_by_one = bench.median_us([lambda f=evaluate: [f(layer) for layer in layers]])
        moved = weights + 2 * m * (x.shape[1] + sum(n for _, n in every))
        result = {"precision": precision, "m": m, "layers": len(layers), "bytes": moved, "us": us}
        result |= {"one_by_one_us": one_by_one, "share_of_copy_bandwidth": moved / (us * 1e-6) / bandwidth}
        results.append(result)
        print(result, flush=True)
    return results


def measure_lora() -> dict:
    """All of FLUX.1's linear layers in INT4 without and with 16 more ranks, as an adapter extends them."""
    times = {}
    for rank in (RANK, RANK + LORA_RANK):
        total = 0.0
        for (m, k, n), count in FLUX_LAYERS.items():
            size = 2 * m * k + n * k + 2 * m * n
            sets = bench.copies(lambda s=(m, k, n), r=rank: bench._operands(*s, r, torch.bfloat16, False), size)
            calls = [lambda o=o: bench.layer(o) for o in sets]
            total += count * bench.median_us(calls)
        times[rank] = total
    cost = times[RANK + LORA_RANK] / times[RANK] - 1
    return {"flux_step_us": times[RANK], "with_lora_us": times[RANK + LORA_RANK], "rank": LORA_RANK, "cost": cost}


def main() -> None:
    """Measure, and write it down."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path)
    path = parser.parse_args().path
    bandwidth = bench.measure_limits().bandwidth
    layers = measure_layers()
    report = {
        "command": "python -m benchmarks.precisions benchmarks/results/precisions_h200.json",
        "environment": bench.environment(),
        "copy_bytes_per_second": bandwidth,
        "geometric_mean_over_16bit_flux": {
            name: statistics.geometric_mean([r[f"{name}_speedup"] for r in layers[:FLUX]]) for name in ("int8", "nvfp4")
        },
        "layers": layers,
        "modulations": measure_modulations(bandwidth),
        "modulations_together": measure_modulations_together(bandwidth),
        "lora": measure_lora(),
    }
    path.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
