"""LoRA files on a MODEL, through the host's own reading of their many key dialects."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path

import comfy.lora
import comfy.lora_convert
import torch

from ..errors import CheckpointError
from ..formats.safetensors_file import SafetensorsFile
from ..lora.origin import looks_like
from .patcher import SVDQuantModelPatcher
from .patches import AdapterSettings, fits_layer


@dataclass(frozen=True)
class LoraRow:
    """One LoRA to apply.

    Attributes:
        path: of a safetensors file.
        strength: factor on the model's part; 0 leaves it out and costs nothing.
        strength_clip: factor on the text encoder's part.
    """

    path: str | PathLike
    strength: float
    strength_clip: float = 0.0


@dataclass
class LoraReport:
    """What became of one LoRA.

    Attributes:
        name: of the file.
        matched: weights of the model (and text encoder) that it changes, of
        total: weights that it has tensors for.
        rank: most that a quantized layer gained.
        bytes: that adapters take beside the quantized layers, together.
        percent: products that they add, relative to the quantized layers' own.
        message: what a user should know, or empty.
    """

    name: str
    matched: int = 0
    total: int = 0
    rank: int = 0
    bytes: int = 0
    percent: float = 0.0
    message: str = ""

    def text(self) -> str:
        """For a person to read."""
        if not self.total:
            return f"{self.name}: {self.message}"
        text = f"{self.name}: {self.matched} of {self.total} layers matched"
        if self.rank:
            text += f", up to {self.rank} ranks more, {self.bytes / 1e6:.1f} MB, {self.percent:.1f} % more work"
        return text + (f"; {self.message}" if self.message else "")

    def fields(self) -> dict:
        """As plain values."""
        return asdict(self)


@dataclass
class _LoraFile:
    """A file that was read, and what the host made of it."""

    state: tuple[int, int] | None
    tensors: dict[str, torch.Tensor]
    key_map: dict | None = None
    patches: dict | None = None  # for a model with that key map


def _state(path: str | PathLike) -> tuple[int, int] | None:
    """Time of change and size of a file; None if it cannot be looked at, which reading it will explain."""
    try:
        stat = Path(path).stat()
    except OSError:
        return None
    return stat.st_mtime_ns, stat.st_size


class LoraFiles:
    """Reads LoRA files, and keeps the latest of each path while it is unchanged."""

    def __init__(self) -> None:
        self._loaded: dict[str, _LoraFile] = {}

    def read(self, path: str | PathLike) -> dict[str, torch.Tensor]:
        """The tensors of a file.

        Raises:
            CheckpointError: the file is damaged, or a tensor has NaN, infinite values or no elements.
        """
        return self._read(path).tensors

    def patches(self, path: str | PathLike, key_map: dict) -> dict:
        """What the host makes of a file: patches by the weights that they change.

        Args:
            key_map: the host's, from names in LoRA files to weights of a model.

        Raises:
            CheckpointError: as :meth:`read`.
        """
        found = self._read(path)
        if found.key_map != key_map:
            found.patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(found.tensors), key_map)
            found.key_map = key_map
        return found.patches

    def _read(self, path: str | PathLike) -> _LoraFile:
        found, state = self._loaded.get(str(path)), _state(path)
        if found is None or found.state != state:
            file = SafetensorsFile(path)
            lora = {key: file.get(key) for key in file.specs}
            for key, tensor in lora.items():
                if not tensor.numel():
                    raise CheckpointError(f"{path}: {key} is empty, of rank 0. The LoRA is broken.")
                if not bool(torch.isfinite(tensor).all()):
                    raise CheckpointError(f"{path}: {key} has NaN or infinite values. The LoRA is broken.")
            found = self._loaded[str(path)] = _LoraFile(state, lora)
        return found

    def keep(self, paths: Sequence[str | PathLike]) -> None:
        """Forget all others."""
        wanted = {str(path) for path in paths}
        self._loaded = {path: value for path, value in self._loaded.items() if path in wanted}


def apply_lora(patcher, path: str | PathLike, strength: float) -> tuple[object, str]:
    """Put one LoRA on a model: :func:`apply_loras` with one row.

    Returns:
        (a MODEL with the LoRA, a report of what matched).
    """
    patcher, _, reports = apply_loras(patcher, None, [LoraRow(path, strength)])
    return patcher, reports[0].text()


def apply_loras(
    patcher,
    clip,
    rows: Sequence[LoraRow],
    settings: AdapterSettings | None = None,
    files: LoraFiles | None = None,
    progress: Callable[[int, int], None] = lambda done, total: None,
):
    """Put LoRAs on a model, and on a text encoder if one is given.

    Args:
        patcher: the MODEL, quantized or not; it is not changed.
        clip: the CLIP, or None; it is not changed.
        rows: the LoRAs, in order.
        settings: of the adapters on quantized layers; None for the usual ones.
        files: where read files are kept.
        progress: called with (done, total) while adapters are worked out.

    Returns:
        (MODEL, CLIP, a :class:`LoraReport` for each row).

    Raises:
        CheckpointError: a file is damaged, is not a LoRA, has NaN or Inf in it, or nothing in it fits the
            model (it says what the file looks to be for).
    """
    files = files or LoraFiles()
    reports = []
    for row in rows:
        name = Path(row.path).name
        if row.strength == 0 and (clip is None or row.strength_clip == 0):
            reports.append(LoraReport(name, message="strength 0, not applied"))
            continue
        patcher, clip, report = _apply_one(patcher, clip, row, files, name)
        reports.append(report)
    files.keep([row.path for row in rows])
    if isinstance(patcher, SVDQuantModelPatcher) and any(report.total for report in reports):
        if settings is not None:
            patcher.set_adapter_settings(settings)  # of a clone: something was applied
        _measure(patcher, reports, progress)
    return patcher, clip, reports


def _apply_one(patcher, clip, row: LoraRow, files: LoraFiles, name: str):
    key_map = comfy.lora.model_lora_keys_unet(patcher.model, {})
    if clip is not None:
        key_map = comfy.lora.model_lora_keys_clip(clip.cond_stage_model, key_map)
    lora, patches = files.read(row.path), files.patches(row.path, key_map)
    report = LoraReport(name, total=len(patches))
    misfits = _misfits(patcher, patches)
    patches = {key: patch for key, patch in patches.items() if key not in misfits}
    matched: set = set()
    if row.strength:
        patcher = patcher.clone()
        matched |= set(patcher.add_patches(patches, row.strength))
    if clip is not None and row.strength_clip:
        clip = clip.clone()
        matched |= set(clip.add_patches(patches, row.strength_clip))
    if not matched:
        model = type(patcher.model).__name__
        problem = (
            f"{len(misfits)} of its layers are in this {model} model with other shapes, the rest is not"
            if misfits
            else f"none of its {len(lora)} tensors fits this {model} model"
        )
        shapes = {key: tuple(tensor.shape) for key, tensor in lora.items()}
        raise CheckpointError(
            f"{row.path}: {problem}. It looks to be for {looks_like(shapes)} "
            f"(its first key: {next(iter(lora), None)!r})."
        )
    report.matched = len(matched)
    used = {key for patch in patches.values() for key in getattr(patch, "loaded_keys", ())}
    unused = sorted(key for key in lora if key not in used and not key.endswith((".diff", ".diff_b")))
    remarks = []
    if misfits:
        remarks.append(f"{len(misfits)} layers have other shapes and were left out, e.g. {min(misfits, key=str)}")
    if unused:
        remarks.append(f"{len(unused)} tensors not used, e.g. {', '.join(unused[:3])}")
    report.message = "; ".join(remarks)
    return patcher, clip, report


def _misfits(patcher, patches: dict) -> set:
    """Patches whose factors do not have the shape of the quantized layer they are for."""
    if not isinstance(patcher, SVDQuantModelPatcher):
        return set()
    layers = dict(patcher.quantized_layers())
    misfits = set()
    for key, patch in patches.items():
        name, offset = (key, None) if isinstance(key, str) else (key[0], key[1])
        if name in layers and not fits_layer(layers[name], (1.0, patch, 1.0, offset, None)):
            misfits.add(key)
    return misfits


def _measure(patcher: SVDQuantModelPatcher, reports: list[LoraReport], progress) -> None:
    """Work the adapters out now, while a user watches, and say in the last report what they are."""
    layers = [(key, layer) for key, layer in patcher.quantized_layers() if key in patcher.patches]
    report = [report for report in reports if report.total][-1]
    added = own = dense = 0
    for done, (key, layer) in enumerate(layers):
        progress(done, len(layers))
        n, k = layer.out_features, layer.in_features
        rank, has_delta = patcher.measure_adapter(layer, key)
        products = rank * (n + k) + has_delta * n * k
        report.rank = max(report.rank, rank)
        report.bytes += 2 * products
        added += products
        dense += has_delta
    for _, layer in patcher.quantized_layers():
        own += layer.out_features * layer.in_features + layer.rank * (layer.out_features + layer.in_features)
    report.percent = 100 * added / own if own else 0.0
    if dense:
        remark = f"{dense} layers keep a dense 16-bit difference (no rank allowed fits them within the error bound)"
        report.message = f"{report.message}; {remark}" if report.message else remark
    progress(len(layers), max(len(layers), 1))
