"""Relative output error of the quantization methods on synthetic layers of FLUX's shapes.

    python -m benchmarks.synthetic_layers                 on a CUDA card
    python -m benchmarks.synthetic_layers --scale 0.25    on a CPU: a quarter of the width

Inputs have what makes activations hard: channels 10 to 100 times the median, tokens with heavy tails, channels that
go together (eigenvalues of the covariance fall like 1/i). Weights have a falling spectrum and heavy-tailed noise.
Every method sees the same calibration (512 rows) and is judged on rows it has not seen. comfy-kitchen's ConvRot W4A4
and INT8 take part where the package is installed. Writes ``synthetic_layers.json`` and a chart to ``--output``.
"""

from __future__ import annotations

import argparse
import dataclasses
import importlib.metadata
import importlib.util
import json
import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import torch

from benchmarks.methods import METHODS, PAPER, RANK, Method
from svdq_core.formats.comfy_quant import K_MULTIPLE, NF4_W4A16, SVDQUANT_W4A4, LayerSpec
from svdq_core.layers import SVDQLinear
from svdq_core.numerics import hadamard
from svdq_core.quantizer.codecs import codec_of
from svdq_core.quantizer.recipes import quantize_layer
from svdq_core.quantizer.statistics import LayerStatistics

matplotlib.use("agg")
import matplotlib.pyplot as plt

RESULTS = Path(__file__).parent / "results"
EXACT = "only inputs rounded"
ROWS_SEEN, ROWS_KEPT, ROWS_JUDGED = 4096, 512, 2048


@dataclass(frozen=True)
class Shape:
    """One kind of layer: its sizes, and how many of its input channels come out of a GELU (the last ones)."""

    name: str
    n: int
    k: int
    gelu: int = 0


SHAPES = (
    Shape("attention out", 3072, 3072),
    Shape("qkv", 9216, 3072),
    Shape("mlp up", 12288, 3072),
    Shape("mlp down", 3072, 12288, gelu=12288),
    Shape("single block out", 3072, 15360, gelu=12288),
)


class SyntheticLayer:
    """A weight and a source of inputs.

    Args:
        scale: of the widths, for slow machines.
        seed: of the weight and of what the inputs are like; every drawing of rows has its own.
        device: where to draw and keep them; the numbers depend on its kind.
    """

    def __init__(self, shape: Shape, scale: float, seed: int, device: torch.device):
        n, k, gelu = (round(size * scale / K_MULTIPLE) * K_MULTIPLE for size in (shape.n, shape.k, shape.gelu))
        self._random = torch.Generator(device).manual_seed(seed)
        self._gelu, width = gelu, min(k, 1024)
        # Principal directions shared by all channels, of variance 1/i, over a floor of what each channel has alone.
        variance = 1 / torch.arange(1, width + 1, device=device)
        mixing = self._normal(width, k) * variance.sqrt()[:, None]
        self._mixing = mixing / mixing.norm(dim=0)
        strength = (0.5 * self._normal(k)).exp()
        outliers = torch.randperm(k, generator=self._random, device=device)[: max(1, k // 100)]
        strength[outliers] = 10 ** (1 + self._uniform(len(outliers)))
        self._strength = strength[: k - gelu]
        self._bias = 0.5 * self._normal(k) - 0.7  # of what goes into the GELU
        # Training lets a weight shrink where its input is large, and grow where it is small.
        directions = torch.arange(1, 129, device=device) ** -0.5
        core = (self._normal(n, 128) * directions) @ self._normal(128, k) / 128**0.5
        tails = self._normal(n, k) / self._normal(n, k).square().add(0.5).sqrt()
        weight = (2 * core + tails) * strength.clamp(max=4) ** -0.3 * 0.02
        self.weight = weight.to(torch.bfloat16)
        self.bias = (0.1 * self._normal(n)).to(torch.bfloat16)
        self.spec = LayerSpec(shape.name, SVDQUANT_W4A4, n, k, RANK, True, torch.bfloat16, bool(gelu) and gelu == k)

    def _normal(self, *size: int) -> torch.Tensor:
        return torch.randn(size, generator=self._random, device=self._random.device)

    def _uniform(self, *size: int) -> torch.Tensor:
        return torch.rand(size, generator=self._random, device=self._random.device)

    def inputs(self, rows: int) -> torch.Tensor:
        """(rows, K) bf16, other ones at every call."""
        width, k = self._mixing.shape
        common = self._normal(rows, width) @ self._mixing
        values = 0.9 * common + 0.44 * self._normal(rows, k)
        plain, gelu = values[:, : k - self._gelu], values[:, k - self._gelu :]
        loudness = (0.4 * self._normal(rows, 1)).exp()  # of a token: log-normal, the tail is heavy
        activated = torch.nn.functional.gelu(1.5 * loudness * gelu + self._bias[k - self._gelu :], approximate="tanh")
        return torch.cat((plain * self._strength * loudness, activated), dim=1).to(torch.bfloat16)


Linear = Callable[[torch.Tensor], torch.Tensor]


def ours(method: Method, layer: SyntheticLayer, statistics: LayerStatistics) -> Linear:
    """A layer as this pack quantizes it."""
    spec = dataclasses.replace(layer.spec, rank=method.rank)
    if method.precision == "nf4":
        spec = dataclasses.replace(spec, format=NF4_W4A16, act_unsigned=False)
    quantized = quantize_layer(spec, layer.weight, layer.bias, statistics, method.recipe)
    return SVDQLinear(quantized.spec, quantized.tensors)


def exact_weights(layer: SyntheticLayer, statistics: LayerStatistics) -> Linear:
    """``balanced`` with nothing rounded but the input: the most that any rounding of its weights could reach."""
    quantized = quantize_layer(layer.spec, layer.weight, layer.bias, statistics, METHODS["ours, balanced"].recipe)
    parts = {name: tensor.float() for name, tensor in quantized.tensors.items() if name != "weight"}
    codec, smooth = codec_of(quantized.spec), parts["smooth_factor"]
    branch = parts["proj_up"] @ parts["proj_down"].t()
    rotate = hadamard.rotate if quantized.spec.rotated else torch.Tensor.contiguous
    rest = rotate((layer.weight.float() - branch) * smooth)
    shifted = layer.bias.float() - rest @ (codec.shift / smooth)

    def linear(x: torch.Tensor) -> torch.Tensor:
        rounded = codec.activations(rotate((x + codec.shift) / smooth))
        return rounded @ rest.t() + x @ branch.t() + shifted

    return linear


def convrot_w4a4(layer: SyntheticLayer, statistics: LayerStatistics) -> Linear:
    """comfy-kitchen's rotation and rounding, without calibration."""
    import comfy_kitchen as kitchen

    packed, scales = kitchen.quantize_convrot_w4a4_weight(layer.weight)
    return lambda x: kitchen.convrot_w4a4_linear(x.to(layer.weight.dtype), packed, scales, layer.bias).float()


def kitchen_int8(layer: SyntheticLayer, statistics: LayerStatistics) -> Linear:
    """comfy-kitchen's 8 bits, a scale per row."""
    import comfy_kitchen as kitchen

    dtype = layer.weight.dtype
    packed, scale = kitchen.quantize_int8_rowwise(layer.weight)
    return lambda x: kitchen.int8_linear(x.to(dtype), packed, scale, layer.bias, dtype).float()


def contestants() -> dict[str, Callable[[SyntheticLayer, LayerStatistics], Linear]]:
    """By name, what makes the quantized layer."""
    found = {
        name: lambda layer, statistics, method=method: ours(method, layer, statistics)
        for name, method in METHODS.items()
    } | {EXACT: exact_weights}
    if importlib.util.find_spec("comfy_kitchen"):
        found |= {"comfy-kitchen ConvRot W4A4": convrot_w4a4, "comfy-kitchen INT8": kitchen_int8}
    return found


def measure(shape: Shape, scale: float, seed: int, device: torch.device) -> dict[str, dict[str, float]]:
    """Relative output error on unseen rows, and seconds, by method."""
    layer = SyntheticLayer(shape, scale, seed, device)
    statistics = LayerStatistics(layer.spec.in_features, ROWS_KEPT, seed)
    statistics.observe(layer.inputs(ROWS_SEEN).cpu())
    x = layer.inputs(ROWS_JUDGED).float()
    exact = torch.nn.functional.linear(x, layer.weight.float(), layer.bias.float())
    found = {}
    for name, make in contestants().items():
        synchronize(device)
        start = time.perf_counter()
        linear = make(layer, statistics)
        synchronize(device)
        seconds = time.perf_counter() - start
        found[name] = {"error": float((linear(x) - exact).norm() / exact.norm()), "seconds": round(seconds, 3)}
    for row in found.values():
        row["gain_db"] = round(20 * math.log10(found[PAPER]["error"] / row["error"]), 2)
        row["error"] = round(row["error"], 5)
    return found


def synchronize(device: torch.device) -> None:
    """Wait for the device, so that seconds are whole."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def chart(gains: dict[str, float], path: Path) -> None:
    """Bars of the mean gain over the paper's recipe."""
    figure, axes = plt.subplots(figsize=(7, 3.4))
    colours = ["#f58518" if name.startswith("ours") else "#4c78a8" for name in gains]
    bars = axes.barh(list(gains), list(gains.values()), color=colours)
    axes.bar_label(bars, [f"{value:+.1f}" for value in gains.values()], padding=4)
    axes.axvline(0, color="#222222", linewidth=0.8)
    axes.set_xlabel("output error below that of the paper's recipe, dB (mean)")
    axes.invert_yaxis()
    axes.margins(x=0.15)
    axes.spines[["top", "right"]].set_visible(False)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    """Measure every layer, print the table, write the JSON and the chart."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--scale", type=float, default=1.0, help="of FLUX's widths")
    parser.add_argument("--seeds", type=int, default=2, help="layers of each shape")
    parser.add_argument("--output", type=Path, default=RESULTS, help="folder to write to")
    options = parser.parse_args()
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.set_grad_enabled(False)
    # A first small layer takes the start-up of the libraries out of the times.
    measure(SHAPES[0], 1 / 12, 0, device)
    layers = []
    for shape in SHAPES:
        for seed in range(options.seeds):
            layers.append({"layer": shape.name, "seed": seed, "methods": measure(shape, options.scale, seed, device)})
            row = layers[-1]["methods"]
            print(
                f"{shape.name} {seed}: " + ", ".join(f"{name} {row[name]['gain_db']:+.2f}" for name in row), flush=True
            )
    means = {
        name: {
            key: round(sum(layer["methods"][name][key] for layer in layers) / len(layers), 4)
            for key in ("error", "gain_db", "seconds")
        }
        for name in layers[0]["methods"]
    }
    print(f"\n{'method':28} {'error':>8} {'gain dB':>8} {'s/layer':>8}")
    for name, row in means.items():
        print(f"{name:28} {row['error']:8.4f} {row['gain_db']:+8.2f} {row['seconds']:8.2f}")
    installed = importlib.util.find_spec("comfy_kitchen")
    result = {
        "command": f"python -m benchmarks.synthetic_layers --scale {options.scale:g} --seeds {options.seeds}",
        "reference": "float32 products of the 16-bit weight on rows that calibration did not see; gains in dB against "
        + PAPER,
        "rank": RANK,
        "rows": {"seen": ROWS_SEEN, "kept": ROWS_KEPT, "judged": ROWS_JUDGED},
        "torch": torch.__version__,
        "comfy_kitchen": importlib.metadata.version("comfy-kitchen") if installed else None,
        "machine": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "mean": means,
        "layers": layers,
    }
    options.output.mkdir(parents=True, exist_ok=True)
    (options.output / "synthetic_layers.json").write_text(json.dumps(result, indent=2) + "\n")
    chart({name: row["gain_db"] for name, row in means.items()}, options.output / "synthetic_layers.png")


if __name__ == "__main__":
    main()
