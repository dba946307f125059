"""What a checkpoint or a loaded model holds, layer by layer."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from os import PathLike

import torch

from .architectures import detect
from .errors import CheckpointError
from .formats.comfy_quant import QuantizedCheckpoint
from .formats.safetensors_file import SafetensorsFile
from .layers import SVDQLinear


@dataclass(frozen=True)
class LayerSummary:
    """One layer: quantized, or a 16-bit one that could be."""

    name: str
    format: str
    shape: tuple[int, int]
    rank: int
    nbytes: int
    nbytes_16bit: int
    errors: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Summary:
    """A whole model.

    Attributes:
        title: the file or model.
        architecture: its family.
        layers: the linear layers that are, or could be, quantized.
        other_bytes: of all other tensors.
        about: how it was made (recipe, rank, calibration); empty if unknown.
    """

    title: str
    architecture: str
    layers: tuple[LayerSummary, ...]
    other_bytes: int
    about: Mapping[str, object]

    @property
    def quantized(self) -> bool:
        """Whether any layer is quantized."""
        return any(layer.format != "16-bit" for layer in self.layers)

    def text(self) -> str:
        """For a person to read."""
        nbytes = sum(layer.nbytes for layer in self.layers)
        full = sum(layer.nbytes_16bit for layer in self.layers)
        lines = [
            self.title,
            f"family {self.architecture}; {len(self.layers)} "
            + ("quantized layers" if self.quantized else "layers to quantize, all in 16 bits"),
        ]
        if self.quantized:
            made = [f"{key} {self.about[key]}" for key in ("recipe", "rank") if key in self.about]
            lines += [", ".join(made)] if made else []
            lines.append(
                f"quantized layers {nbytes / 1e6:.1f} MB (16-bit: {full / 1e6:.1f} MB, "
                f"{full / nbytes:.2f}x smaller); other tensors {self.other_bytes / 1e6:.1f} MB"
            )
        else:
            lines.append(f"{(nbytes + self.other_bytes) / 1e6:.1f} MB")
        width = max(len(layer.name) for layer in self.layers)
        lines += ["", f"{'layer':{width}}  {'N x K':>13}  {'format':21} rank      kB  error"]
        for layer in self.layers:
            shape = f"{layer.shape[0]} x {layer.shape[1]}"
            error = layer.errors.get("output_error", layer.errors.get("weight_error"))
            lines.append(
                f"{layer.name:{width}}  {shape:>13}  {layer.format:21} {layer.rank:4d} "
                f"{layer.nbytes / 1e3:7.0f}  {'' if error is None else f'{error:.4f}'}".rstrip()
            )
        kept = kept_lines(self.about.get("kept", {}))
        lines += ["", *kept] if kept else []
        if any("output_error" in layer.errors for layer in self.layers):
            lines += ["", "error: of the layer's output on the calibration sample, relative"]
        elif any(layer.errors for layer in self.layers):
            lines += ["", "error: of the weight, relative (quantized without calibration)"]
        return "\n".join(lines)


def kept_lines(kept: Mapping[str, Mapping[str, str]]) -> list[str]:
    """A line for each layer that was left in a higher precision than asked for, and why."""
    return [f"kept in {entry['format']}: {name} ({entry['reason']})" for name, entry in kept.items()]


def summarize_file(path: str | PathLike) -> Summary:
    """Summary of a quantized or 16-bit checkpoint, from its header.

    Raises:
        CheckpointError: the file is damaged or of an unknown family.
    """
    if not any(key.endswith(".comfy_quant") for key in SafetensorsFile(path).specs):
        return _summarize_16bit(path)
    checkpoint = QuantizedCheckpoint(path)
    errors = checkpoint.report.get("layers", {})
    layers = tuple(
        LayerSummary(
            name=layer.name,
            format=layer.stored_format,
            shape=(layer.out_features, layer.in_features),
            rank=layer.rank,
            nbytes=layer.nbytes,
            nbytes_16bit=layer.nbytes_16bit,
            errors=errors.get(layer.name, {}),
        )
        for layer in checkpoint.layers.values()
    )
    keys = {*checkpoint.plain, *(f"{name}.weight" for name in checkpoint.layers)}
    other = sum(checkpoint.file.specs[key].nbytes for key in checkpoint.plain)
    return Summary(str(path), detect(keys, str(path))[0].name, layers, other, checkpoint.report)


def summarize_model(model: torch.nn.Module, title: str, about: Mapping[str, object], prefix: str = "") -> Summary:
    """Summary of a loaded model.

    Args:
        model: holds the quantized layers.
        title: what to call it.
        about: the report of the file it came from.
        prefix: of the modules' names, left out of the layers' names.

    Raises:
        CheckpointError: no layer of it is quantized.
    """
    quantized = [(n, m) for n, m in model.named_modules() if isinstance(m, SVDQLinear)]
    if not quantized:
        raise CheckpointError(f"{title} has no quantized layer")
    errors = about.get("layers", {})
    layers, own_bytes = [], 0
    for name, module in quantized:
        name = name.removeprefix(prefix)
        nbytes = _nbytes(module.parameters())
        own_bytes += nbytes
        layers.append(
            LayerSummary(
                name=name,
                format=module.spec.stored_format,
                shape=(module.out_features, module.in_features),
                rank=_rank(module),
                nbytes=nbytes,
                nbytes_16bit=module.spec.nbytes_16bit,
                errors=errors.get(name, {}),
            )
        )
    other = _nbytes(model.parameters()) - own_bytes
    return Summary(title, str(about.get("architecture", "unknown")), tuple(layers), other, about)


def _summarize_16bit(path) -> Summary:
    specs = SafetensorsFile(path).specs
    architecture, prefix = detect(specs, str(path))
    layers, other = [], 0
    for key, spec in specs.items():
        name = key.removeprefix(prefix).removesuffix(".weight")
        if key.endswith(".weight") and architecture.kind(name):
            layers.append(LayerSummary(name, "16-bit", tuple(spec.shape), 0, spec.nbytes, spec.nbytes))
        else:
            other += spec.nbytes
    return Summary(str(path), architecture.name, tuple(layers), other, {})


def _rank(layer: SVDQLinear) -> int:
    """Of the low-rank branch, adapters included."""
    up = layer.active_tensors()["proj_up"]
    return 0 if up is None else up.shape[1]


def _nbytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(tensor.nbytes for tensor in tensors)
