"""Quantizing at full size: FLUX.1-dev's and SDXL's true names and shapes, with random weights.

python -m benchmarks.full_size make flux1-dev flux.safetensors
python -m benchmarks.full_size run flux.safetensors --recipe balanced

``make`` streams the weights to the file and writes synthetic statistics beside it, as a calibration file of this
pack. ``run`` quantizes in a process of its own (peaks of memory are a process's), prints seconds by stage and
peaks of memory, and adds them to ``benchmarks/results/full_size_<chip>.json``.

Weights: normal, with a strength of its own per input channel, one channel in 100 several times the others, and 16
strong directions. Inputs: channels that are 10 to 100 times the median, tokens with heavy tails.
"""

import argparse
import json
import platform
import time
from pathlib import Path

import torch

from benchmarks.flux_sizes import DOUBLE_BLOCKS, HIDDEN, SINGLE_BLOCKS, layer_shapes
from svdq_core.architectures import BODY, detect
from svdq_core.formats.safetensors_file import SafetensorsFile, SafetensorsWriter, TensorSpec
from svdq_core.quantizer.pipeline import DEFAULT_RANK, PRECISIONS, FileSource, Settings, plan, quantize_checkpoint
from svdq_core.quantizer.recipes import RECIPES
from svdq_core.quantizer.statistics import Calibration, layer_seed

RESULTS = Path(__file__).parent / "results"
ROWS = 4096  # of synthetic input per layer, of which a calibration keeps its sample
EMBEDDINGS = 128  # of them a modulation sees: one for each of 16 prompts and 8 steps
DIRECTIONS = 16

Shapes = dict[str, tuple[int, ...]]


def flux(blocks: int | None) -> Shapes:
    """Every tensor of FLUX.1-dev, or of one with fewer blocks of each kind."""
    double, single = (min(count, blocks or count) for count in (DOUBLE_BLOCKS, SINGLE_BLOCKS))
    h, head = HIDDEN, 128
    linears = layer_shapes(h, double, single) | {
        "img_in": (h, 64),
        "txt_in": (h, 4096),
        "final_layer.linear": (64, h),
        "final_layer.adaLN_modulation.1": (2 * h, h),
    }
    for name, width in (("time_in", 256), ("guidance_in", 256), ("vector_in", 768)):
        linears |= {f"{name}.in_layer": (h, width), f"{name}.out_layer": (h, h)}
    shapes = _with_biases(linears)
    norms = [f"double_blocks.{i}.{stream}_attn.norm" for i in range(double) for stream in ("img", "txt")]
    for norm in (*norms, *(f"single_blocks.{i}.norm" for i in range(single))):
        shapes |= {f"{norm}.query_norm.scale": (head,), f"{norm}.key_norm.scale": (head,)}
    return shapes


def sdxl(blocks: int | None) -> Shapes:
    """Every tensor of SDXL's UNet, or of one with transformers of fewer blocks."""
    width, embedding, context = 320, 1280, 2048
    shapes = _with_biases(
        {
            "time_embed.0": (embedding, width),
            "time_embed.2": (embedding, embedding),
            "label_emb.0.0": (embedding, 2816),
            "label_emb.0.2": (embedding, embedding),
            "input_blocks.0.0": (width, 4, 3, 3),
            "out.0": (width,),
            "out.2": (4, width, 3, 3),
        }
    )

    def residual(name: str, taken: int, given: int) -> None:
        parts = {"in_layers.0": (taken,), "in_layers.2": (given, taken, 3, 3), "emb_layers.1": (given, embedding)}
        parts |= {"out_layers.0": (given,), "out_layers.3": (given, given, 3, 3)}
        if taken != given:
            parts["skip_connection"] = (given, taken, 1, 1)
        shapes.update(_with_biases({f"{name}.{part}": shape for part, shape in parts.items()}))

    def transformer(name: str, c: int, depth: int) -> None:
        shapes.update(_with_biases({f"{name}.norm": (c,), f"{name}.proj_in": (c, c), f"{name}.proj_out": (c, c)}))
        for block in range(min(depth, blocks or depth)):
            parts = {f"norm{i}": (c,) for i in (1, 2, 3)}
            parts |= {"attn1.to_out.0": (c, c), "attn2.to_out.0": (c, c)}
            parts |= {"ff.net.0.proj": (8 * c, c), "ff.net.2": (c, 4 * c)}
            prefix = f"{name}.transformer_blocks.{block}"
            shapes.update(_with_biases({f"{prefix}.{part}": shape for part, shape in parts.items()}))
            for attention, source in (("attn1", c), ("attn2", context)):
                for part, taken in (("q", c), ("k", source), ("v", source)):
                    shapes[f"{prefix}.{attention}.to_{part}.weight"] = (c, taken)

    levels = ((320, 0), (640, 2), (1280, 10))  # channels, depth of the transformers
    skips, channels, index = [width], width, 1
    for level, (c, depth) in enumerate(levels):
        for _ in range(2):
            residual(f"input_blocks.{index}.0", channels, c)
            if depth:
                transformer(f"input_blocks.{index}.1", c, depth)
            skips.append(c)
            channels, index = c, index + 1
        if level < 2:
            shapes.update(_with_biases({f"input_blocks.{index}.0.op": (c, c, 3, 3)}))
            skips.append(c)
            index += 1
    residual("middle_block.0", channels, channels)
    transformer("middle_block.1", channels, 10)
    residual("middle_block.2", channels, channels)
    index = 0
    for level, (c, depth) in reversed(list(enumerate(levels))):
        for turn in range(3):
            residual(f"output_blocks.{index}.0", channels + skips.pop(), c)
            if depth:
                transformer(f"output_blocks.{index}.1", c, depth)
            if level and turn == 2:
                shapes.update(_with_biases({f"output_blocks.{index}.2.conv": (c, c, 3, 3)}))
            channels, index = c, index + 1
    return shapes


MODELS = {"flux1-dev": flux, "sdxl": sdxl}


def _with_biases(shapes: Shapes) -> Shapes:
    """A weight of each shape, and a bias for its first axis."""
    tensors: Shapes = {}
    for name, shape in shapes.items():
        tensors |= {f"{name}.weight": shape, f"{name}.bias": shape[:1]}
    return tensors


def weight(name: str, shape: tuple[int, ...], device: str) -> torch.Tensor:
    """A random tensor of this name: bf16, on ``device``, the same whenever it is asked for there."""
    random = torch.Generator(device).manual_seed(layer_seed(0, name))

    def normal(*size: int) -> torch.Tensor:
        return torch.randn(size, generator=random, device=device)

    if name.endswith("scale") or len(shape) == 1:
        return (normal(*shape) * 0.02 + name.endswith(("scale", "norm.weight"))).to(torch.bfloat16)
    rows, columns = shape[0], torch.Size(shape[1:]).numel()
    strength = torch.exp(0.3 * normal(columns))
    strong = torch.randperm(columns, generator=random, device=device)[: max(columns // 100, 1)]
    strength[strong] *= 3 + 2 * normal(len(strong)).abs()
    found = normal(rows, columns).mul_(0.02 * strength)
    found.addmm_(normal(rows, DIRECTIONS), normal(DIRECTIONS, columns), alpha=0.01)
    return found.to(torch.bfloat16).reshape(shape)


def inputs(name: str, width: int, after_gelu: bool, device: str) -> torch.Tensor:
    """(ROWS, width) bf16 of synthetic inputs of a layer."""
    random = torch.Generator(device).manual_seed(layer_seed(1, name))
    channels = torch.exp(0.5 * torch.randn(width, generator=random, device=device))
    strong = torch.randperm(width, generator=random, device=device)[: max(width // 100, 1)]
    channels[strong] *= 10 ** (1 + torch.rand(len(strong), generator=random, device=device))
    tokens = torch.randn((3, ROWS, 1), generator=random, device=device)
    tails = tokens.square().mean(0).clamp(min=0.05).rsqrt()  # of Student's t with three degrees of freedom
    x = torch.randn((ROWS, width), generator=random, device=device) * channels * tails
    return (torch.nn.functional.gelu(x, approximate="tanh") if after_gelu else x).to(torch.bfloat16)


def make(model: str, path: Path, blocks: int | None, device: str) -> None:
    """Write the model, and its calibration beside it."""
    start = time.monotonic()
    shapes = MODELS[model](blocks)
    specs = {name: TensorSpec(shape, torch.bfloat16) for name, shape in shapes.items()}
    with SafetensorsWriter(path, specs, {"model": model}, overwrite=True) as writer:
        for name, shape in shapes.items():
            writer.write(name, weight(name, shape, device))
    architecture, _ = detect(shapes, model)
    calibration = Calibration()
    for name, shape in shapes.items():
        layer = name.removesuffix(".weight")
        if kind := architecture.kind(layer):
            x = inputs(layer, shape[1], architecture.input_after_gelu(layer), device)
            calibration.observe(layer, x if kind == BODY else x[:EMBEDDINGS])
    calibration.save(calibration_of(path), overwrite=True)
    parameters = sum(torch.Size(shape).numel() for shape in shapes.values())
    print(f"{path}: {parameters:,} parameters, {time.monotonic() - start:.0f} s")


def calibration_of(path: Path) -> Path:
    """Where the calibration of a model lies."""
    return path.with_suffix(".calibration.safetensors")


def run(path: Path, output: Path, settings: Settings, device: str) -> dict[str, object]:
    """Quantize and measure."""
    source = FileSource(path)
    calibrates = plan(source, settings).calibrates(RECIPES[settings.recipe])
    start = time.monotonic()
    calibration = Calibration.load(calibration_of(path)) if calibrates else None
    report = quantize_checkpoint(source, output, settings, calibration, overwrite=True, device=device, restart=True)
    seconds = time.monotonic() - start
    errors = [found.get("output_error", found["weight_error"]) for found in report.layers.values()]
    measured: dict[str, object] = {
        "seconds": round(seconds, 1),
        "stages": report.stages,
        "peak_host_gb": peak_host_gb(),
        "layers": len(report.layers),
        "kept": len(report.kept),
        "size_ratio": round(report.size_ratio, 3),
        "file_gb": round(report.file_bytes / 1e9, 2),
        "error": {"of": "output" if calibrates else "weight", "mean": sum(errors) / len(errors), "max": max(errors)},
    }
    if device == "cuda":
        measured["peak_gpu_gb"] = round(torch.cuda.max_memory_allocated() / 1e9, 2)
        measured["peak_gpu_reserved_gb"] = round(torch.cuda.max_memory_reserved() / 1e9, 2)
    return measured


def peak_host_gb() -> float | None:
    """The most memory that this process ever had resident; None on Windows."""
    try:
        import resource
    except ImportError:
        return None
    return round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 2)


def chip(device: str) -> str:
    """What computes, as in the name of a file."""
    name = torch.cuda.get_device_name() if device == "cuda" else platform.machine()
    return name.removeprefix("NVIDIA ").lower().replace(" ", "_")


def record(results: Path, model: str, case: str, device: str, measured: dict[str, object]) -> dict[str, object]:
    """Add a measurement to the chip's file."""
    found = json.loads(results.read_text()) if results.exists() else {}
    found |= {"command": "python -m benchmarks.full_size run FILE", "chip": chip(device), "torch": torch.__version__}
    found.setdefault("models", {}).setdefault(model, {})[case] = measured
    results.parent.mkdir(exist_ok=True)
    results.write_text(json.dumps(found, indent=2) + "\n")
    return found


def arguments() -> argparse.Namespace:
    """What the command line asks for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(dest="command", required=True)
    cuda = "cuda" if torch.cuda.is_available() else "cpu"
    making = commands.add_parser("make", help="write a model and its calibration")
    making.add_argument("model", choices=MODELS)
    making.add_argument("path", type=Path)
    making.add_argument("--layers", type=int, help="at most so many blocks of each kind")
    running = commands.add_parser("run", help="quantize it and measure")
    running.add_argument("path", type=Path)
    running.add_argument("--recipe", choices=RECIPES, default="balanced")
    running.add_argument("--precision", choices=PRECISIONS, default="int4")
    running.add_argument("--rank", type=int, default=DEFAULT_RANK)
    running.add_argument("--output", type=Path, help="default: beside the model; deleted at the end")
    running.add_argument("--results", type=Path, help="default: benchmarks/results/full_size_<chip>.json")
    for command in (making, running):
        command.add_argument("--device", default=cuda, help="cuda or cpu (default: %(default)s)")
    return parser.parse_args()


def main() -> None:
    """Run the command."""
    options = arguments()
    if options.command == "make":
        make(options.model, options.path, options.layers, options.device)
        return
    settings = Settings(options.precision, options.recipe, options.rank)
    output = options.output or options.path.with_suffix(".quantized.safetensors")
    measured = run(options.path, output, settings, options.device)
    if options.output is None:
        output.unlink()
    case = f"{options.recipe}, {options.precision}, rank {options.rank}"
    print(json.dumps({case: measured}, indent=2))
    model = SafetensorsFile(options.path).metadata["model"]
    results = options.results or RESULTS / f"full_size_{chip(options.device)}.json"
    record(results, model, case, options.device, measured)


if __name__ == "__main__":
    main()
