"""A whole checkpoint from 16 to 4 (or 8) bits, layer by layer: no step holds the 16-bit model in memory."""

import contextlib
import fnmatch
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Protocol

import torch

from .. import __version__
from ..architectures import MODULATION, Architecture, detect
from ..errors import CheckpointError, LayerError, SVDQuantError
from ..formats.comfy_quant import (
    AWQ_W4A16,
    LAYOUTS,
    METADATA_KEY,
    NF4_W4A16,
    SVDQUANT_NVFP4,
    SVDQUANT_W4A4,
    SVDQUANT_W8A8,
    LayerSpec,
)
from ..formats.safetensors_file import (
    SafetensorsFile,
    SafetensorsWriter,
    TensorSpec,
    check_writable,
)
from .recipes import RECIPES, QuantizedLayer, Recipe, check_width, quantize_layer
from .statistics import Calibration

# What a user picks for the body and for the modulations, and the format that it means; None leaves 16 bits.
PRECISIONS = {"int4": SVDQUANT_W4A4, "nvfp4": SVDQUANT_NVFP4, "int8": SVDQUANT_W8A8, "nf4": NF4_W4A16}
MODULATIONS = {"awq_w4a16": AWQ_W4A16, "16bit": None}
DEFAULT_RANK = 32
MAX_RANK = 256

_HALF = (torch.bfloat16, torch.float16)
_REPORT_BYTES_PER_LAYER = 80  # beside the layer's name


class WeightSource(Protocol):
    """Where 16-bit weights come from: a file, or a model that the host has loaded."""

    name: str
    specs: Mapping[str, TensorSpec]

    def get(self, name: str) -> torch.Tensor:
        """One tensor, on any device."""


class FileSource:
    """A 16-bit safetensors checkpoint; ComfyUI's prefixes are stripped from its keys.

    Raises:
        CheckpointError: unreadable, or of a family that this pack does not know.
    """

    def __init__(self, path: str | PathLike):
        self._file = SafetensorsFile(path)
        self.name = str(path)
        _, self._prefix = detect(self._file.specs, self.name)
        self.specs = {
            key.removeprefix(self._prefix): spec
            for key, spec in self._file.specs.items()
            if key.startswith(self._prefix)
        }

    def get(self, name: str) -> torch.Tensor:
        """One tensor, memory-mapped."""
        return self._file.get(self._prefix + name)


@dataclass(frozen=True)
class Settings:
    """What a user chooses.

    Attributes:
        precision: of the body's layers; one of ``PRECISIONS``.
        recipe: a name of ``recipes.RECIPES``.
        rank: of the low-rank branch, 0 to 256; weight-only formats have none.
        skip: layers to leave in 16 bits: names, or shell patterns (``double_blocks.0.*``).
        seed: of everything random.
        modulations: precision of the modulation layers; one of ``MODULATIONS``.
    """

    precision: str = "int4"
    recipe: str = "balanced"
    rank: int = DEFAULT_RANK
    skip: Sequence[str] = ()
    seed: int = 0
    modulations: str = "awq_w4a16"

    def check(self) -> None:
        """Raise SVDQuantError for a value that makes no sense."""
        if self.precision not in PRECISIONS:
            raise SVDQuantError(f"precision {self.precision!r} is not one of {tuple(PRECISIONS)}")
        if self.modulations not in MODULATIONS:
            raise SVDQuantError(f"modulations {self.modulations!r} is not one of {tuple(MODULATIONS)}")
        if self.recipe not in RECIPES:
            raise SVDQuantError(f"recipe {self.recipe!r} is not one of {tuple(RECIPES)}")
        if not 0 <= self.rank <= MAX_RANK:
            raise SVDQuantError(f"rank {self.rank} is not between 0 and {MAX_RANK}")

    def format_of(self, architecture: Architecture, layer: str) -> str | None:
        """The format that a layer (a module name) gets; None for one that stays in 16 bits."""
        kind = architecture.kind(layer)
        if kind is None or any(fnmatch.fnmatchcase(layer, pattern) for pattern in self.skip):
            return None
        return MODULATIONS[self.modulations] if kind == MODULATION else PRECISIONS[self.precision]


@dataclass(frozen=True)
class Report:
    """What a quantization did.

    Attributes:
        layers: per quantized layer, its errors as stored in the file.
        bytes_16bit, bytes_4bit: of the quantized layers alone.
        file_bytes: of the whole file.
        seconds: wall-clock time, calibration not included.
    """

    path: Path
    layers: Mapping[str, Mapping[str, float]]
    bytes_16bit: int
    bytes_4bit: int
    file_bytes: int
    seconds: float

    @property
    def size_ratio(self) -> float:
        """How many times smaller the quantized layers became, low-rank branch included."""
        return self.bytes_16bit / self.bytes_4bit


# Called after each step with (steps done, steps in all, what was done); may raise to cancel.
Progress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Plan:
    """Everything that is decided before the first tensor is read."""

    architecture: Architecture
    layers: Mapping[str, LayerSpec]  # to quantize, by module name
    plain: Mapping[str, TensorSpec]  # to copy, as they will be stored

    @property
    def steps(self) -> int:
        """How many steps :func:`quantize_checkpoint` reports."""
        return len(self.layers) + len(self.plain)

    def calibrates(self, recipe: Recipe) -> bool:
        """Whether the recipe needs calibration for any of these layers."""
        return recipe.calibrates and bool(self.smoothed)

    @property
    def smoothed(self) -> list[str]:
        """Names of the layers whose smoothing is fitted to their input."""
        return [name for name, layer in self.layers.items() if layer.layout.low_rank]


def plan(source: WeightSource, settings: Settings) -> Plan:
    """Decide what becomes of every tensor, and refuse what cannot work, reading no weight.

    Raises:
        SVDQuantError: bad settings; a model of an unknown family, one that is quantized already, or a
            layer that cannot be quantized (named, with what to do).
    """
    settings.check()
    architecture, _ = detect(source.specs, source.name)
    dtype = _storage_dtype(source)
    layers, plain = {}, {}
    for key, spec in sorted(source.specs.items()):  # the same order whatever the source
        layer = key.removesuffix(".weight")
        format_name = settings.format_of(architecture, layer) if key.endswith(".weight") else None
        if format_name is not None:
            layers[layer] = _layer_spec(source, layer, format_name, architecture, settings.rank, dtype)
        else:
            stored = dtype if spec.dtype.is_floating_point else spec.dtype
            plain[key] = TensorSpec(spec.shape, stored)
    for layer in layers:
        plain.pop(f"{layer}.bias", None)
    if not layers:
        raise SVDQuantError(f"{source.name}: every layer is to be skipped, nothing is left to quantize")
    return Plan(architecture, layers, plain)


def quantize_checkpoint(
    source: WeightSource,
    path: str | PathLike,
    settings: Settings,
    calibration: Calibration | None = None,
    progress: Progress | None = None,
    overwrite: bool = False,
    device: torch.device | str = "cpu",
    recipe: Recipe | None = None,
    on_layer: Callable[[str, Mapping[str, float]], None] | None = None,
) -> Report:
    """Quantize a denoiser and write it in the ``comfy_quant`` convention.

    The same source, settings, calibration and device give the same bytes, whoever calls.

    Args:
        source: the 16-bit weights.
        path: the file to write; it appears whole or not at all.
        settings: what the user chose.
        calibration: needed by every recipe but ``fast``.
        progress: see ``Progress``.
        overwrite: whether an existing file may be replaced.
        device: where to compute.
        recipe: steps other than those ``settings.recipe`` names (for ablations).
        on_layer: called with the name and the errors of each layer that is done.

    Raises:
        SVDQuantError: anything wrong with the input, the calibration or the disk, before anything is
            written; whatever ``progress`` raises. Neither leaves a file behind.
    """
    start = time.monotonic()
    planned = plan(source, settings)
    recipe = recipe or RECIPES[settings.recipe]
    statistics = _statistics_for(planned, recipe, settings, calibration)
    specs = dict(planned.plain)
    for name, layer in planned.layers.items():
        config = layer.config
        specs[f"{name}.comfy_quant"] = TensorSpec(tuple(config.shape), config.dtype)
        specs.update({f"{name}.{tensor}": spec for tensor, spec in layer.tensors.items()})
    about = _about(planned, settings, calibration if statistics else None)
    room = sum(len(name) + _REPORT_BYTES_PER_LAYER for name in planned.layers)
    total = planned.steps
    report_step = progress or (lambda done, total, text: None)
    writer = SafetensorsWriter(path, specs, {METADATA_KEY: json.dumps(about)}, room, overwrite)
    with torch.inference_mode(), writer:
        for done, key in enumerate(planned.plain):
            report_step(done, total, key)
            writer.write(key, _plain(source, key, planned.plain[key]))
        for done, (name, spec) in enumerate(planned.layers.items(), len(planned.plain)):
            report_step(done, total, name)
            quantized = _quantize(source, spec, statistics.get(name), recipe, settings.seed, device)
            writer.write(f"{name}.comfy_quant", spec.config)
            for tensor, value in quantized.tensors.items():
                writer.write(f"{name}.{tensor}", value)
            about["layers"][name] = _errors(quantized)
            if on_layer is not None:
                on_layer(name, about["layers"][name])
        writer.metadata[METADATA_KEY] = json.dumps(about)
        report_step(total, total, "finishing the file")
    return Report(
        path=Path(path),
        layers=about["layers"],
        bytes_16bit=sum(layer.nbytes_16bit for layer in planned.layers.values()),
        bytes_4bit=sum(layer.nbytes for layer in planned.layers.values()),
        file_bytes=Path(path).stat().st_size,
        seconds=time.monotonic() - start,
    )


def check_output(path: str | PathLike, planned: Plan, overwrite: bool) -> None:
    """Refuse before a long calibration what would fail after it.

    Raises:
        CheckpointError: the file exists and ``overwrite`` is false, or the disk is too small for it.
    """
    nbytes = sum(spec.nbytes for spec in (*planned.plain.values(), *planned.layers.values()))
    check_writable(Path(path), nbytes, overwrite)


def _storage_dtype(source: WeightSource) -> torch.dtype:
    """The 16-bit type of the file: the model's own, or for float32 the one that holds it exactly."""
    floats = {key: spec for key, spec in source.specs.items() if spec.dtype.is_floating_point}
    for key, spec in source.specs.items():
        if key.endswith(".weight") and spec.dtype not in (*_HALF, torch.float32):
            raise CheckpointError(
                f"{source.name}: {key} is {str(spec.dtype).removeprefix('torch.')}, quantized "
                "already. Start from a 16-bit (bf16 or fp16) checkpoint."
            )
    sizes = {dtype: sum(s.nbytes for s in floats.values() if s.dtype == dtype) for dtype in _HALF}
    if any(sizes.values()):
        return max(_HALF, key=sizes.get)
    probe = source.get(max(floats, key=lambda key: floats[key].nbytes)).float()
    halves = probe.to(torch.float16).float() == probe
    return torch.float16 if bool(halves.all()) and not _fits_bf16(probe) else torch.bfloat16


def _fits_bf16(probe: torch.Tensor) -> bool:
    return bool((probe.to(torch.bfloat16).float() == probe).all())


def _layer_spec(source, layer, format_name, architecture, rank, dtype) -> LayerSpec:
    shape = source.specs[f"{layer}.weight"].shape
    if len(shape) != 2:
        raise LayerError(f"{source.name}: layer {layer} is {shape}, not a linear layer")
    # E2M1 codes gain nothing from it: their sign is a bit of its own, and they are finest around zero.
    unsigned = format_name == SVDQUANT_W4A4 and architecture.input_after_gelu(layer)
    spec = LayerSpec(
        name=layer,
        format=format_name,
        out_features=shape[0],
        in_features=shape[1],
        rank=rank if LAYOUTS[format_name].low_rank else 0,
        bias=unsigned or f"{layer}.bias" in source.specs,  # the shift's correction needs a bias
        dtype=dtype,
        act_unsigned=unsigned,
    )
    with _naming(source):
        check_width(spec)
    return spec


@contextlib.contextmanager
def _naming(source: WeightSource) -> Iterator[None]:
    """Put the source's name in front of errors that name a layer only."""
    try:
        yield
    except LayerError as error:
        raise LayerError(f"{source.name}: {error}") from error


def _statistics_for(planned, recipe, settings, calibration) -> Mapping:
    if not planned.calibrates(recipe):
        return {}
    if calibration is None:
        raise SVDQuantError(f"the recipe {settings.recipe!r} needs calibration. Calibrate first, or take 'fast'.")
    # Weight-only layers do without: files saved before they were quantized serve on.
    calibration.check(name for name in planned.layers if name in calibration.layers or name in planned.smoothed)
    return calibration.layers


def _about(planned: Plan, settings: Settings, calibration: Calibration | None) -> dict:
    about = {
        "version": __version__,
        "architecture": planned.architecture.name,
        "precision": settings.precision,
        "modulations": settings.modulations,
        "recipe": settings.recipe,
        "rank": max(layer.rank for layer in planned.layers.values()),
        "seed": settings.seed,
        "layers": {},
    }
    if calibration is not None:
        about["calibration"] = {
            "rows": sum(calibration.layers[name].count for name in planned.layers if name in calibration.layers),
            "rows_kept_per_layer": calibration.rows,
        }
    return about


def _plain(source: WeightSource, key: str, spec: TensorSpec) -> torch.Tensor:
    tensor = source.get(key)
    if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
        raise LayerError(f"{source.name}: {key} has NaN or infinite values. The checkpoint is broken.")
    return tensor.to(spec.dtype)


def _quantize(source, spec, statistics, recipe, seed, device) -> QuantizedLayer:
    weight = source.get(f"{spec.name}.weight").to(device)
    bias = None
    if f"{spec.name}.bias" in source.specs:
        bias = source.get(f"{spec.name}.bias").to(device)
    with _naming(source):
        return quantize_layer(spec, weight, bias, statistics, recipe, seed)


def _errors(layer: QuantizedLayer) -> dict[str, float]:
    errors = {"weight_error": round(layer.weight_error, 5)}
    if layer.output_error is not None:
        errors["output_error"] = round(layer.output_error, 5)
    return errors
