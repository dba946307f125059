"""Times the kernels of this card against what it could do at best, and against installed peers.

Every time is a median over repeats, after a warm-up, of a replayed CUDA graph whose calls take turns among
copies of their operands, more of them than fit the card's cache together.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import logging
import platform
import statistics
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from . import __version__
from .errors import SVDQuantError
from .formats.comfy_quant import SVDQUANT_W4A4
from .kernels import prefers_int8
from .numerics import int4
from .ops.as_int8 import linear_as_int8
from .ops.int4 import linear_int4, linear_w4a4, quantize_act_int4

_log = logging.getLogger(__name__)

# (M, K, N): FLUX at 1024 x 1024 (qkv, proj, fc1, fc2, linear1), SDXL, FLUX's text stream.
SHAPES = (
    (4608, 3072, 9216),
    (4608, 3072, 3072),
    (4608, 3072, 12288),
    (4608, 12288, 3072),
    (4608, 3072, 21504),
    (2048, 1280, 10240),
    (512, 3072, 9216),
)
_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Limits:
    """What a card was seen to do.

    Attributes:
        bandwidth: bytes a second that a large copy reads and writes.
    """

    bandwidth: float


def median_us(calls: list[Callable[[], Any]], repeats: int = 20) -> float:
    """Median time of one call, in microseconds; ``calls`` are the same work on different operands."""
    for call in calls:
        call()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for call in calls:
            call()
    times = []
    for index in range(repeats + 3):
        start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        start.record()
        graph.replay()
        end.record()
        end.synchronize()
        if index >= 3:
            times.append(start.elapsed_time(end) * 1e3 / len(calls))
    return statistics.median(times)


def copies(make: Callable[[], Any], size: int) -> list[Any]:
    """Enough copies of operands of ``size`` bytes to exceed the card's cache three times over, 4 to 64."""
    cache = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
    return [make() for _ in range(min(max(4, 3 * cache // max(size, 1) + 1), 64))]


def measure_limits() -> Limits:
    """Copy bandwidth of this card: a kernel that copies, not the copy engine, which can be slower."""
    source = torch.empty(2**28, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    time = median_us([lambda: torch.mul(source, 1.0, out=target)] * 2)
    return Limits(bandwidth=2 * source.numel() * 4 / (time * 1e-6))


def _operands(m: int, k: int, n: int, rank: int, dtype: torch.dtype, unsigned: bool) -> dict[str, torch.Tensor]:
    def random(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, device="cuda") * scale).to(dtype)

    unit = int4.scale_unit(torch.full((n,), 0.01, device="cuda"), dtype)
    steps = torch.randint(1, int4.MOST_STEPS + 1, (k // 64, n), device="cuda")
    return {
        "x": random(m, k),
        "smooth": (torch.rand(k, device="cuda") + 0.5).to(dtype),
        "proj_down": random(k, rank, scale=k**-0.5),
        "weight": int4.pack(torch.randint(-7, 8, (n, k), device="cuda", dtype=torch.int8)),
        "weight_scale": (steps * unit).to(dtype),  # on a grid, as this package's quantizer stores them
        "proj_up": random(n, rank, scale=0.05),
        "bias": random(n),
    }


def exact_layer(o: dict[str, torch.Tensor]) -> torch.Tensor:
    """The W4A4 layer (M, N) of :func:`_operands`: signed and so rotated, as recipes make most."""
    return linear_w4a4(
        o["x"], o["smooth"], o["proj_down"], o["weight"], o["weight_scale"], o["proj_up"], o["bias"], False, True
    )


def layer(o: dict[str, torch.Tensor]) -> torch.Tensor:
    """The same layer as this card evaluates it."""
    weight = o["weight"]
    if not prefers_int8(weight.device, weight.shape[0], o["x"].shape[1]):
        return exact_layer(o)
    scales = o["weight_scale"], None, None
    return linear_as_int8(
        o["x"], o["smooth"], o["proj_down"], weight, *scales, o["proj_up"], o["bias"], SVDQUANT_W4A4, False, True
    )


def quantize_bytes(m: int, k: int, rank: int) -> int:
    """The fewest bytes the quantizer must move."""
    return 2 * m * k + m * k // 2 + 4 * m * k // 64 + 4 * m * rank + 2 * k * (rank + 1)


def gemm_bytes(m: int, k: int, n: int, rank: int) -> int:
    """The fewest bytes the GEMM must move."""
    scales = k // 64 * (4 * m + 2 * n)
    return (m + n) * k // 2 + scales + 4 * m * rank + 2 * n * (rank + 1) + 2 * m * n


def runs_in_halves() -> bool:
    """Whether a layer is its two halves on this card; Hopper has kernels of its own for the whole."""
    return torch.cuda.get_device_capability() != (9, 0)


def bench_shape(
    m: int, k: int, n: int, rank: int, dtype: torch.dtype, limits: Limits, peers: bool = True
) -> dict[str, Any]:
    """Times of one layer: ours (where it runs so, also in its two halves), the 16-bit layer, and peers.

    Where a card evaluates layers in 8 bits, ``exact`` is the W4A4 layer itself. ``fp8_gemm`` and ``int8_gemm`` are
    torch's bare products, without what quantizes their input.
    """
    sets = copies(lambda: _operands(m, k, n, rank, dtype, False), 2 * m * k + n * k // 2 + 2 * m * n)

    result: dict[str, Any] = {"m": m, "k": k, "n": n, "rank": rank, "dtype": str(dtype).removeprefix("torch.")}
    if runs_in_halves():
        _bench_halves(result, sets, limits)
    else:
        result["exact_us"] = median_us([lambda o=o: exact_layer(o) for o in sets])
    result["layer_us"] = median_us([lambda o=o: layer(o) for o in sets])
    result["layer_tops"] = 2 * m * n * k / result["layer_us"] * 1e-6
    moved = quantize_bytes(m, k, rank) + gemm_bytes(m, k, n, rank)
    result["layer_share_of_bandwidth"] = moved / (result["layer_us"] * 1e-6) / limits.bandwidth

    weights = [torch.randn(n, k, device="cuda").to(dtype) for _ in sets[:4]]
    pairs = list(zip(sets, weights, strict=False))
    result["16bit_us"] = median_us(
        [lambda o=o, w=w: torch.nn.functional.linear(o["x"], w, o["bias"]) for o, w in pairs]
    )
    result["speedup_over_16bit"] = result["16bit_us"] / result["layer_us"]
    if peers:
        for name, make in _PEERS.items():
            timed = _peer(make, pairs, rank)
            if timed is not None:
                result[f"{name}_us"] = timed
                result[f"speedup_over_{name}"] = timed / result["layer_us"]
    return result


def _bench_halves(result: dict[str, Any], sets: list[dict[str, torch.Tensor]], limits: Limits) -> None:
    m, k, n, rank = (result[name] for name in ("m", "k", "n", "rank"))

    def quantize(o: dict[str, torch.Tensor]):
        return quantize_act_int4(o["x"], o["smooth"], o["proj_down"], False, True)

    def linear(o: dict[str, torch.Tensor], quantized):
        return linear_int4(*quantized, o["weight"], o["weight_scale"], o["proj_up"], o["bias"], False)

    quantized = [quantize(o) for o in sets]
    result["quantize_us"] = median_us([lambda o=o: quantize(o) for o in sets])
    result["gemm_us"] = median_us([lambda o=o, q=q: linear(o, q) for o, q in zip(sets, quantized, strict=True)])
    moved = quantize_bytes(m, k, rank)
    result["quantize_share_of_bandwidth"] = moved / (result["quantize_us"] * 1e-6) / limits.bandwidth
    result["gemm_tops"] = 2 * m * n * k / result["gemm_us"] * 1e-6
    moved = gemm_bytes(m, k, n, rank)
    result["gemm_share_of_bandwidth"] = moved / (result["gemm_us"] * 1e-6) / limits.bandwidth


def _peer(make: Callable, pairs: list, rank: int) -> float | None:
    """Time of a peer's layer, or None where it is not installed or does not run on this card."""
    try:
        layers = [make(o, w, rank) for o, w in pairs]
        return median_us([lambda o=o, f=f: f(o["x"]) for (o, _), f in zip(pairs, layers, strict=True)])
    except (ImportError, AttributeError, RuntimeError, ValueError) as error:
        _log.info("%s was not timed: %s", make.__name__, error)
        return None


def _fp8_gemm(o: dict[str, torch.Tensor], weight: torch.Tensor, rank: int) -> Callable:
    one = torch.ones((), device="cuda")
    x, w = o["x"].to(torch.float8_e4m3fn), weight.to(torch.float8_e4m3fn)
    dtype = weight.dtype
    return lambda _: torch._scaled_mm(x, w.t(), scale_a=one, scale_b=one, out_dtype=dtype, use_fast_accum=True)


def _int8_gemm(o: dict[str, torch.Tensor], weight: torch.Tensor, rank: int) -> Callable:
    x, w = (torch.randint(-127, 128, t.shape, dtype=torch.int8, device="cuda") for t in (o["x"], weight))
    return lambda _: torch._int_mm(x, w.t())


def _bitsandbytes_nf4(o: dict[str, torch.Tensor], weight: torch.Tensor, rank: int) -> Callable:
    import bitsandbytes
    from bitsandbytes.functional import quantize_4bit

    packed, state = quantize_4bit(weight, quant_type="nf4")
    return lambda x: bitsandbytes.matmul_4bit(x, packed.t(), state, bias=o["bias"])


def _kitchen_svdquant(o: dict[str, torch.Tensor], weight: torch.Tensor, rank: int) -> Callable:
    import comfy_kitchen as kitchen

    def layer(x: torch.Tensor) -> torch.Tensor:
        qact, scale, down = kitchen.quantize_svdquant_w4a4(x, o["smooth"], o["proj_down"])
        return kitchen.scaled_mm_svdquant_w4a4(
            qact, o["weight"], scale, o["weight_scale"], down, o["proj_up"], o["bias"]
        )

    return layer


def _kitchen_convrot_w4a4(o: dict[str, torch.Tensor], weight: torch.Tensor, rank: int) -> Callable:
    from comfy_kitchen.backends.cuda import convrot_w4a4_linear, quantize_convrot_w4a4_weight

    packed, scale = quantize_convrot_w4a4_weight(weight)
    return lambda x: convrot_w4a4_linear(x, packed, scale, o["bias"])


def _kitchen_int8(o: dict[str, torch.Tensor], weight: torch.Tensor, rank: int) -> Callable:
    import comfy_kitchen as kitchen

    packed, scale = kitchen.quantize_int8_rowwise(weight)
    return lambda x: kitchen.int8_linear(x, packed, scale, o["bias"], weight.dtype)


def _kitchen_w4a8(o: dict[str, torch.Tensor], weight: torch.Tensor, rank: int) -> Callable:
    from comfy_kitchen.backends.cuda import quantize_w4a8_int8_weight, w4a8_int8_linear

    *packed, correction, codebook = quantize_w4a8_int8_weight(weight)
    return lambda x: w4a8_int8_linear(x, *packed, codebook, correction, o["bias"], out_dtype=weight.dtype)


_PEERS: dict[str, Callable] = {
    "fp8_gemm": _fp8_gemm,
    "int8_gemm": _int8_gemm,
    "nf4": _bitsandbytes_nf4,
    "kitchen_svdquant": _kitchen_svdquant,
    "kitchen_convrot_w4a4": _kitchen_convrot_w4a4,
    "kitchen_int8": _kitchen_int8,
    "kitchen_w4a8": _kitchen_w4a8,
}


def environment() -> dict[str, str]:
    """What a result depends on."""
    versions = {"svdquant": __version__, "torch": torch.__version__, "python": platform.python_version()}
    for package in ("bitsandbytes", "comfy-kitchen", "nunchaku"):
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    capability = f"sm_{properties.major}{properties.minor}"
    return {"chip": properties.name, "architecture": capability, "cuda": str(torch.version.cuda), **versions}


def table(results: list[dict[str, Any]]) -> str:
    """Results for a person, times in microseconds: each peer's, and how many times ours it is."""
    columns = {
        "layer_us": "ours",
        "exact_us": "exact W4A4",
        "quantize_us": "quantize",
        "gemm_us": "gemm",
        "16bit_us": "16bit",
    }
    columns |= {f"{name}_us": name for name in _PEERS}
    shown = {key: name for key, name in columns.items() if any(key in r for r in results)}
    rows = [["M x K x N", *shown.values(), "TOPS"]]
    for r in results:
        row = [f"{r['m']} x {r['k']} x {r['n']}"]
        for key in shown:
            ratio = "" if key in ("layer_us", "quantize_us", "gemm_us") or key not in r else r[key] / r["layer_us"]
            row.append((f"{r[key]:.1f}" if key in r else "-") + (f" ({ratio:.2f}x)" if ratio else ""))
        rows.append([*row, f"{r['layer_tops']:.0f}"])
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    return "\n".join("  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Options of ``python -m svdq_core bench``."""
    parser.add_argument("--shape", nargs=3, type=int, action="append", metavar=("M", "K", "N"), help="default: FLUX's")
    parser.add_argument("--rank", type=int, default=32, help="of the low-rank branch")
    parser.add_argument("--dtype", choices=_DTYPES, default="bf16")
    parser.add_argument("--no-peers", action="store_true", help="time ours and 16 bits only")
    parser.add_argument("--json", type=Path, help="also write the results there")


def run(options: argparse.Namespace) -> None:
    """Time every shape, print a table (times in microseconds), and write JSON if asked.

    Raises:
        SVDQuantError: there is no CUDA device.
    """
    if not torch.cuda.is_available():
        raise SVDQuantError("bench needs a CUDA device, and torch sees none")
    limits = measure_limits()
    shapes = options.shape or SHAPES
    dtype = _DTYPES[options.dtype]
    results = [bench_shape(m, k, n, options.rank, dtype, limits, not options.no_peers) for m, k, n in shapes]
    print(table(results))
    if options.json:
        report = {"environment": environment(), "copy_bytes_per_second": limits.bandwidth, "results": results}
        options.json.write_text(json.dumps(report, indent=1) + "\n")
