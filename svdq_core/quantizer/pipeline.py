"""A whole checkpoint from 16 to 4 (or 8) bits, layer by layer: no step holds the 16-bit model in memory.

What is read ahead while a layer is computed is the next one, so two are in memory at most. What is done is
committed to the file in the making; a run that was interrupted goes on there (``formats.partial_file``).
"""

import contextlib
import dataclasses
import fnmatch
import hashlib
import json
import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
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
from ..summary import kept_lines
from .memory import quantize_within_memory
from .recipes import RECIPES, QuantizedLayer, Recipe, check_width
from .statistics import Calibration

# What a user picks for the body and for the modulations, and the format that it means; None leaves 16 bits.
PRECISIONS = {"int4": SVDQUANT_W4A4, "nvfp4": SVDQUANT_NVFP4, "int8": SVDQUANT_W8A8, "nf4": NF4_W4A16}
MODULATIONS = {"awq_w4a16": AWQ_W4A16, "int8": SVDQUANT_W8A8, "16bit": None}
AUTO = "auto"  # modulations that go with the body
DEFAULT_RANK = 32
MAX_RANK = 256

_HALF = (torch.bfloat16, torch.float16)
_REPORT_BYTES_PER_LAYER = 240  # beside the layer's name, twice
_16BIT = "16-bit"
_log = logging.getLogger(__name__)


class WeightSource(Protocol):
    """Where 16-bit weights come from: a file, or a model that the host has loaded.

    Attributes:
        name: for messages.
        specs: of the denoiser's tensors, ComfyUI's prefixes stripped.
        reads_ahead: whether ``get`` may run on another thread while a layer is quantized, and gains by it.
    """

    name: str
    specs: Mapping[str, TensorSpec]
    reads_ahead: bool

    def get(self, name: str) -> torch.Tensor:
        """One tensor, on any device."""

    def digest(self) -> str:
        """Tells these weights from others of the same names and shapes, at little cost."""


class FileSource:
    """A 16-bit safetensors checkpoint; ComfyUI's prefixes are stripped from its keys.

    Raises:
        CheckpointError: unreadable, or of a family that this pack does not know.
    """

    reads_ahead = True

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
        """One tensor on the CPU, in memory of its own."""
        return self._file.read(self._prefix + name)

    def digest(self) -> str:
        """The file's size and the time of its last change."""
        stat = self._file.path.stat()
        return f"{stat.st_size} bytes of {stat.st_mtime_ns}"


@dataclass(frozen=True)
class Settings:
    """What a user chooses.

    Attributes:
        precision: of the body's layers; one of ``PRECISIONS``.
        recipe: a name of ``recipes.RECIPES``.
        rank: of the low-rank branch, 0 to 256; weight-only formats and modulations have none.
        skip: layers to leave in 16 bits: names, or shell patterns (``double_blocks.0.*``).
        seed: of everything random.
        modulations: precision of the modulation layers; one of ``MODULATIONS``, or ``AUTO``: W4A16, and INT8 beside a
            body in INT8, to whose error 4-bit ones would add several times as much.
        max_error: a layer whose relative error (of its output where calibration measured it, else of its weight)
            is larger is kept in 8 bits, or in 16 where that is not enough.
        keep_broken: leave layers with NaN or infinite weights as they are instead of stopping.
    """

    precision: str = "int4"
    recipe: str = "balanced"
    rank: int = DEFAULT_RANK
    skip: Sequence[str] = ()
    seed: int = 0
    modulations: str = AUTO
    max_error: float = 0.5
    keep_broken: bool = False

    def check(self) -> None:
        """Raise SVDQuantError for a value that makes no sense."""
        if self.precision not in PRECISIONS:
            raise SVDQuantError(f"precision {self.precision!r} is not one of {tuple(PRECISIONS)}")
        if self.modulations not in (AUTO, *MODULATIONS):
            raise SVDQuantError(f"modulations {self.modulations!r} is not one of {(AUTO, *MODULATIONS)}")
        if self.recipe not in RECIPES:
            raise SVDQuantError(f"recipe {self.recipe!r} is not one of {tuple(RECIPES)}")
        if not 0 <= self.rank <= MAX_RANK:
            raise SVDQuantError(f"rank {self.rank} is not between 0 and {MAX_RANK}")
        if not self.max_error > 0:
            raise SVDQuantError(f"max_error {self.max_error} is not above 0")

    @property
    def modulation_precision(self) -> str:
        """The one of ``MODULATIONS`` that is meant."""
        if self.modulations != AUTO:
            return self.modulations
        return "int8" if self.precision == "int8" else "awq_w4a16"

    def format_of(self, architecture: Architecture, layer: str) -> str | None:
        """The format that a layer (a module name) gets; None for one that stays in 16 bits."""
        kind = architecture.kind(layer)
        if kind is None or any(fnmatch.fnmatchcase(layer, pattern) for pattern in self.skip):
            return None
        return MODULATIONS[self.modulation_precision] if kind == MODULATION else PRECISIONS[self.precision]

    def rank_of(self, architecture: Architecture, layer: str) -> int:
        """The rank of the branch of a layer that gets a format; 8 bits are enough for a modulation without one."""
        low_rank = LAYOUTS[self.format_of(architecture, layer)].low_rank
        return self.rank if low_rank and architecture.kind(layer) != MODULATION else 0


@dataclass(frozen=True)
class Report:
    """What a quantization did.

    Attributes:
        layers: per quantized layer, its errors as stored in the file.
        kept: per layer that was to be quantized and is not as asked, its format and why.
        bytes_16bit, bytes_4bit: of the quantized layers alone.
        file_bytes: of the whole file.
        seconds: wall-clock time, calibration not included.
        stages: of these, the seconds spent waiting for weights ("read"), in "quantize" and in "write".
        resumed: steps that an interrupted run had done.
    """

    path: Path
    layers: Mapping[str, Mapping[str, float]]
    bytes_16bit: int
    bytes_4bit: int
    file_bytes: int
    seconds: float
    stages: Mapping[str, float]
    kept: Mapping[str, Mapping[str, str]] = field(default_factory=dict)
    resumed: int = 0

    @property
    def size_ratio(self) -> float:
        """How many times smaller the quantized layers became, low-rank branch included."""
        return self.bytes_16bit / self.bytes_4bit

    def text(self) -> str:
        """For a person to read."""
        lines = [
            f"{self.path}: {len(self.layers)} layers quantized, {self.size_ratio:.2f}x smaller "
            f"({self.bytes_16bit / 1e6:.1f} -> {self.bytes_4bit / 1e6:.1f} MB); "
            f"file {self.file_bytes / 1e6:.1f} MB, {self.seconds:.1f} s"
        ]
        return "\n".join([*lines, *kept_lines(self.kept)])


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
            rank = settings.rank_of(architecture, layer)
            layers[layer] = _layer_spec(source, layer, format_name, architecture, rank, dtype)
        else:
            stored = dtype if spec.dtype.is_floating_point else spec.dtype
            plain[key] = TensorSpec(spec.shape, stored)
    for layer in layers:
        plain.pop(f"{layer}.bias", None)
    if not layers:
        raise SVDQuantError(f"{source.name}: every layer is to be skipped, nothing is left to quantize")
    return Plan(architecture, layers, plain)


def quantizable_layers(source: WeightSource) -> list[str]:
    """Names of all layers that some settings quantize: those worth calibrating."""
    architecture, _ = detect(source.specs, source.name)
    layers = [key.removesuffix(".weight") for key in sorted(source.specs) if key.endswith(".weight")]
    return [layer for layer in layers if architecture.kind(layer) is not None]


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
    restart: bool = False,
) -> Report:
    """Quantize a denoiser and write it in the ``comfy_quant`` convention.

    The same source, settings, calibration and device give the same bytes, whoever calls, and however often
    the work was interrupted: the same call goes on where the last one stopped.

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
        restart: begin again even if an interrupted run could be continued.

    Raises:
        SVDQuantError: anything wrong with the input or the calibration; nothing is left behind. A full disk
            (``WriteError``), or whatever ``progress`` raises: what is done stays in a hidden file beside
            ``path``, which a log message names. An older file is never touched.
    """
    start = time.monotonic()
    planned = plan(source, settings)
    recipe = recipe or RECIPES[settings.recipe]
    device = torch.device(device)
    statistics = _statistics_for(planned, recipe, settings, calibration)
    specs = dict(planned.plain)
    for layer in planned.layers.values():
        specs.update(_file_specs(layer))
    about = _about(planned, settings, calibration if statistics else None)
    room = sum(2 * len(name) + _REPORT_BYTES_PER_LAYER for name in planned.layers)
    fingerprint = _fingerprint(source, planned, settings, recipe, device, calibration if statistics else None)
    writer = SafetensorsWriter(path, specs, {METADATA_KEY: json.dumps(about)}, room, overwrite, fingerprint, restart)
    work = _Work(source, planned, settings, recipe, statistics, device)
    try:
        with torch.inference_mode(), writer:
            work.run(writer, progress or (lambda done, total, text: None), on_layer or (lambda name, errors: None))
            about["layers"] = work.errors
            if work.kept:
                about["kept"] = work.kept
            writer.metadata[METADATA_KEY] = json.dumps(about)
    finally:
        if writer.kept:
            _log.warning(
                "%s is unfinished. The same again goes on where this stopped; what is done so far is in %s, "
                "which can be deleted.",
                path,
                writer.kept,
            )
    final = {name: work.final.get(name, layer) for name, layer in planned.layers.items()}
    return Report(
        path=Path(path),
        layers=work.errors,
        kept=work.kept,
        bytes_16bit=sum(layer.nbytes_16bit for layer in planned.layers.values()),
        bytes_4bit=sum(layer.nbytes if layer else planned.layers[name].nbytes_16bit for name, layer in final.items()),
        file_bytes=Path(path).stat().st_size,
        seconds=time.monotonic() - start,
        stages={stage: round(seconds, 3) for stage, seconds in work.stages.items()},
        resumed=work.resumed,
    )


class _Work:
    """The steps of one run, in the order of the file: a tensor that is copied, or a layer."""

    def __init__(self, source, planned, settings, recipe, statistics, device):
        self._source, self._planned, self._settings = source, planned, settings
        self._recipe, self._statistics, self._device = recipe, statistics, device
        # Bytes of odd number last and wide types first: every tensor starts at a multiple of its element size.
        plain = sorted(planned.plain, key=lambda key: (-planned.plain[key].dtype.itemsize, key))
        bytewise = [key for key in plain if planned.plain[key].dtype.itemsize == 1]
        self._steps = [*(key for key in plain if key not in bytewise), *planned.layers, *bytewise]
        self.errors: dict[str, Mapping[str, float]] = {}
        self.kept: dict[str, Mapping[str, str]] = {}
        self.final: dict[str, LayerSpec | None] = {}  # of layers that are not quantized as planned
        self.stages = Counter(read=0.0, quantize=0.0, write=0.0)
        self.resumed = 0

    def run(self, writer: SafetensorsWriter, progress: Progress, on_layer: Callable) -> None:
        """Every step that the file does not have yet."""
        total = len(self._steps)
        for note in writer.notes:
            self._count(note, on_layer)
        self.resumed = len(writer.notes)
        if self.resumed:
            _log.info("going on with %s: %d of %d steps are done", writer.path, self.resumed, total)
        steps = self._steps[self.resumed :]
        with contextlib.closing(self._read(steps)) as tensors:
            for done, step in enumerate(steps, self.resumed):
                progress(done, total, step)
                with self._timed("read"):
                    weight, bias = next(tensors)
                note = {"step": step}
                if step in self._planned.layers:
                    note |= self._write_layer(writer, self._planned.layers[step], weight, bias)
                else:
                    self._copy(writer, step, weight)
                writer.commit(note)
                self._count(note, on_layer)
        progress(total, total, "finishing the file")

    def _count(self, note: dict, on_layer: Callable) -> None:
        """A step is done, now or by an earlier run."""
        name = note["step"]
        if "kept" in note:
            self.kept[name] = note["kept"]
            self.final[name] = self._lowered(name, note["kept"]["format"])
        if "errors" in note:
            self.errors[name] = note["errors"]
            on_layer(name, note["errors"])

    def _read(self, steps: Sequence[str]) -> Iterator[tuple[torch.Tensor, torch.Tensor | None]]:
        """Weight and bias of every step, the next read while one is worked on."""
        if not self._source.reads_ahead:
            yield from map(self._load, steps)
            return
        with ThreadPoolExecutor(1) as pool:
            following = pool.submit(self._load, steps[0]) if steps else None
            for step in [*steps[1:], None]:
                current, following = following, step and pool.submit(self._load, step)
                yield current.result()

    def _load(self, step: str) -> tuple[torch.Tensor, torch.Tensor | None]:
        if step not in self._planned.layers:
            return self._source.get(step), None
        weight = self._source.get(f"{step}.weight")
        if self._device.type == "cuda" and self._source.reads_ahead:
            weight = weight.pin_memory()  # crosses to the device several times faster
        bias = f"{step}.bias"
        return weight, self._source.get(bias) if bias in self._source.specs else None

    def _copy(self, writer: SafetensorsWriter, key: str, tensor: torch.Tensor) -> None:
        if not _finite(tensor) and not self._settings.keep_broken:
            raise LayerError(
                f"{self._source.name}: {key} has NaN or infinite values. The checkpoint is broken; "
                "--keep-broken (keep_broken) copies it as it is."
            )
        with self._timed("write"):
            writer.write(key, tensor.to(self._planned.plain[key].dtype))

    def _write_layer(self, writer: SafetensorsWriter, spec: LayerSpec, weight, bias) -> dict:
        """Quantize and write; returns what the journal and the report keep of it."""
        with self._timed("quantize"):
            quantized, reason = self._quantize(spec, weight, bias)
        found = quantized.spec if quantized else None
        with self._timed("write"):
            if found != spec:
                writer.replace(_file_specs(spec), _file_specs(found) if found else self._specs_16bit(spec))
            if quantized:
                writer.write(f"{spec.name}.comfy_quant", _padded(found.config))
                for name in sorted(quantized.tensors, key=lambda name: (-found.tensors[name].dtype.itemsize, name)):
                    writer.write(f"{spec.name}.{name}", quantized.tensors[name])
            else:
                for key, tensor in (("weight", weight), ("bias", bias)):
                    if tensor is not None:
                        writer.write(f"{spec.name}.{key}", tensor.to(spec.dtype))
        note = {"errors": _errors(quantized)} if quantized else {}
        if reason:
            note["kept"] = {"format": found.format if found else _16BIT, "reason": reason}
        return note

    def _quantize(self, spec: LayerSpec, weight, bias) -> tuple[QuantizedLayer | None, str]:
        """The layer in the first format that is close enough to 16 bits, and why not as planned; None for 16 bits."""
        attempts, reason = [spec], ""
        if spec.layout.low_rank and spec.format != SVDQUANT_W8A8:
            attempts.append(self._lowered(spec.name, SVDQUANT_W8A8))
        for attempt in attempts:
            try:
                quantized = self._quantize_as(attempt, weight, bias)
            except LayerError as error:
                if _finite(weight) and (bias is None or _finite(bias)):
                    raise
                if self._settings.keep_broken:
                    return None, "NaN or infinite weights"
                raise LayerError(f"{error} With --keep-broken (keep_broken) the layer stays in 16 bits.") from error
            error = quantized.weight_error if quantized.output_error is None else quantized.output_error
            if error <= self._settings.max_error:
                return quantized, reason
            reason = f"{attempt.format} has an error of {error:.3f}"
        return None, reason

    def _quantize_as(self, spec: LayerSpec, weight, bias) -> QuantizedLayer:
        statistics = self._statistics.get(spec.name)
        recipe = RECIPES["fast"] if statistics is None and self._recipe.calibrates else self._recipe
        with _naming(self._source):
            return quantize_within_memory(spec, weight, bias, statistics, recipe, self._settings.seed, self._device)

    def _lowered(self, name: str, format_name: str) -> LayerSpec | None:
        """A layer in a format of higher precision than planned; None for 16 bits."""
        if format_name == _16BIT:
            return None
        bias = f"{name}.bias" in self._source.specs
        return dataclasses.replace(self._planned.layers[name], format=format_name, act_unsigned=False, bias=bias)

    def _specs_16bit(self, spec: LayerSpec) -> dict[str, TensorSpec]:
        names = [f"{spec.name}.weight", f"{spec.name}.bias"]
        return {
            name: TensorSpec(self._source.specs[name].shape, spec.dtype) for name in names if name in self._source.specs
        }

    @contextlib.contextmanager
    def _timed(self, stage: str) -> Iterator[None]:
        start = time.monotonic()
        yield
        self.stages[stage] += time.monotonic() - start


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
        rank=rank,
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
    # Weight-only layers and modulations do without: files saved before they were quantized serve on.
    needed = {name for name in planned.smoothed if planned.architecture.kind(name) != MODULATION}
    calibration.check(name for name in planned.layers if name in calibration.layers or name in needed)
    return calibration.layers


def _about(planned: Plan, settings: Settings, calibration: Calibration | None) -> dict:
    about = {
        "version": __version__,
        "architecture": planned.architecture.name,
        "precision": settings.precision,
        "modulations": settings.modulation_precision,
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


def _file_specs(layer: LayerSpec) -> dict[str, TensorSpec]:
    """Every tensor of a quantized layer, by its name in the file."""
    config = _padded(layer.config)
    specs = {f"{layer.name}.comfy_quant": TensorSpec(tuple(config.shape), config.dtype)}
    return specs | {f"{layer.name}.{tensor}": spec for tensor, spec in layer.tensors.items()}


def _padded(config: torch.Tensor) -> torch.Tensor:
    """The JSON text with spaces after it, so that what follows in the file is aligned."""
    return torch.nn.functional.pad(config, (0, -len(config) % 8), value=ord(" "))


def _fingerprint(source, planned, settings, recipe, device, calibration) -> str:
    """Of all that decides the bytes of the file."""
    parts = {
        "version": __version__,
        "torch": torch.__version__,
        "device": device.type,
        "source": source.digest(),
        "specs": [(key, spec.shape, str(spec.dtype)) for key, spec in sorted(source.specs.items())],
        "layers": [repr(layer) for layer in planned.layers.values()],
        "settings": repr(settings),
        "recipe": repr(recipe),
        "calibration": calibration and calibration.digest(),
    }
    return hashlib.blake2b(json.dumps(parts).encode(), digest_size=16).hexdigest()


def _finite(tensor: torch.Tensor) -> bool:
    return not tensor.is_floating_point() or bool(torch.isfinite(tensor).all())


def _errors(layer: QuantizedLayer) -> dict[str, float]:
    errors = {"weight_error": round(layer.weight_error, 5)}
    if layer.output_error is not None:
        errors["output_error"] = round(layer.output_error, 5)
    return errors
