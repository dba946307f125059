"""The ``comfy_quant`` convention: how a quantized layer lies in a safetensors file.

A layer is a family of tensors under the host's module name, among them ``<layer>.comfy_quant``, a JSON
text in a uint8 tensor that names the format; layers of one file may have different ones. ``LAYOUTS`` says
which tensors each format has, ``docs/formats.md`` what they mean. ``svdquant_w4a4`` and ``awq_w4a16`` are
published by Comfy-Org (comfy-quants, ``docs/formats``); the others follow their example.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike

import torch

from ..errors import CheckpointError
from ..numerics import awq, int4, nf4, nvfp4
from .safetensors_file import SafetensorsFile, TensorSpec

SVDQUANT_W4A4 = "svdquant_w4a4"
SVDQUANT_NVFP4 = "svdquant_nvfp4"
SVDQUANT_W8A8 = "svdquant_w8a8"
AWQ_W4A16 = "awq_w4a16"
NF4_W4A16 = "nf4_w4a16"
METADATA_KEY = "svdquant"
_ROTATED_W4A4 = "svdquant_w4a4_rotated"  # in files, for a layer of svdquant_w4a4 that is rotated
K_MULTIPLE = 64  # in every format: kernels read K in such blocks

_CONFIG = ".comfy_quant"
_TILE_PACKED = "kitchen_tile_packed_w4a4"
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)
_CHANNEL_SCALE = "weight_channel_scale"


@dataclass(frozen=True)
class Layout:
    """How a format keeps the weight.

    Attributes:
        codes_per_byte: of ``weight``, an int8 tensor (N, K / codes_per_byte).
        scales: further tensors of the weight: their axes ("G" for groups along K, "N") and type, None for
            the layer's 16-bit type.
        group_size: along K; 0 if the format has no groups.
        low_rank: whether the layer has ``smooth_factor`` (K,), ``proj_down`` (K, r) and ``proj_up`` (N, r).
        states_group_size: whether ``comfy_quant`` says it.
    """

    codes_per_byte: int
    scales: Mapping[str, tuple[str, torch.dtype | None]]
    group_size: int = 0
    low_rank: bool = False
    states_group_size: bool = False


LAYOUTS = {
    SVDQUANT_W4A4: Layout(2, {"weight_scale": ("GN", None)}, int4.GROUP_SIZE, low_rank=True),
    SVDQUANT_NVFP4: Layout(
        2,
        {"weight_scale": ("GN", nvfp4.SCALE_DTYPE), "weight_tensor_scale": ("", torch.float32)},
        nvfp4.GROUP_SIZE,
        low_rank=True,
    ),
    SVDQUANT_W8A8: Layout(1, {"weight_scale": ("N", torch.float32)}, low_rank=True),
    AWQ_W4A16: Layout(
        2, {"weight_scale": ("GN", None), "weight_zero": ("GN", None)}, awq.GROUP_SIZE, states_group_size=True
    ),
    NF4_W4A16: Layout(2, {"weight_scale": ("GN", torch.float32)}, nf4.GROUP_SIZE),
}


@dataclass(frozen=True)
class LayerSpec:
    """What a file says of one quantized layer, shapes checked, data not yet read."""

    name: str
    format: str
    out_features: int
    in_features: int
    rank: int
    bias: bool
    dtype: torch.dtype  # of the smoothing, the low-rank branch, the bias, and the scales of some formats
    act_unsigned: bool = False
    channel_scale: bool = False  # svdquant_nvfp4: has the optional weight_channel_scale
    rotated: bool = False  # svdquant_w4a4: what is quantized of the input is rotated in groups of 64

    @property
    def layout(self) -> Layout:
        """How the format keeps the weight."""
        return LAYOUTS[self.format]

    @property
    def stored_format(self) -> str:
        """The format as a file names it. Who does not know of rotation must not take the layer for a plain one."""
        return _ROTATED_W4A4 if self.rotated else self.format

    @property
    def config(self) -> torch.Tensor:
        """The ``comfy_quant`` tensor."""
        entries: dict[str, object] = {"format": self.stored_format}
        if self.layout.states_group_size:
            entries["group_size"] = self.layout.group_size
        if self.act_unsigned:
            entries["act_unsigned"] = True
        return torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8)

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """The layer's tensors by their name inside the layer, ``comfy_quant`` left out."""
        n, k, r = self.out_features, self.in_features, self.rank
        size = {"N": n, "G": k // (self.layout.group_size or k)}
        specs = {"weight": TensorSpec((n, k // self.layout.codes_per_byte), torch.int8)}
        for name, (axes, dtype) in self.layout.scales.items():
            specs[name] = TensorSpec(tuple(size[axis] for axis in axes), dtype or self.dtype)
        if self.channel_scale:
            specs[_CHANNEL_SCALE] = TensorSpec((n,), self.dtype)
        if self.layout.low_rank:
            specs["smooth_factor"] = TensorSpec((k,), self.dtype)
            specs["proj_down"] = TensorSpec((k, r), self.dtype)
            specs["proj_up"] = TensorSpec((n, r), self.dtype)
        if self.bias:
            specs["bias"] = TensorSpec((n,), self.dtype)
        return specs

    def keeps_dtype(self, tensor: str) -> bool:
        """Whether a tensor's type is the format's, not the model's: it is never cast."""
        return tensor == "weight" or self.layout.scales.get(tensor, ("", None))[1] is not None

    @property
    def nbytes(self) -> int:
        """Bytes of the layer in the file."""
        return sum(spec.nbytes for spec in self.tensors.values())

    @property
    def nbytes_16bit(self) -> int:
        """Bytes the same layer takes in 16 bits."""
        return 2 * self.out_features * (self.in_features + self.bias)


class QuantizedCheckpoint:
    """A file in the ``comfy_quant`` convention, checked as a whole when it is opened.

    Attributes:
        layers: the quantized layers by the host's module name.
        plain: names of all other tensors.
        report: how the file was made (recipe, rank, errors per layer); empty for foreign files.

    Raises:
        CheckpointError: not a safetensors file, no quantized layer in it, a layer of an unknown
            format, or one whose tensors are missing or do not fit each other.
    """

    def __init__(self, path: str | PathLike):
        self.file = SafetensorsFile(path)
        self.layers: dict[str, LayerSpec] = {}
        for key in self.file.specs:
            if key.endswith(_CONFIG):
                name = key.removesuffix(_CONFIG)
                self.layers[name] = self._read_layer(name)
        if not self.layers:
            raise CheckpointError(
                f"{path} has no quantized layer. Load a 16-bit file with the stock Load Diffusion "
                "Model node, and make a 4-bit one of it with SVDQuant Quantize Checkpoint."
            )
        owned = {f"{layer.name}.{tensor}" for layer in self.layers.values() for tensor in (*layer.tensors, _CONFIG[1:])}
        self.plain = [key for key in self.file.specs if key not in owned]
        self.report = self._read_report()

    @property
    def path(self):
        """Where the file lies."""
        return self.file.path

    def read_layer(self, name: str) -> dict[str, torch.Tensor]:
        """The tensors of one layer, in natural layout, by their name inside the layer."""
        layer = self.layers[name]
        stored = {tensor: self.file.get(f"{name}.{tensor}") for tensor in layer.tensors}
        return {tensor: _natural(tensor, value, layer.tensors[tensor].shape) for tensor, value in stored.items()}

    def _read_layer(self, name: str) -> LayerSpec:
        config = self._read_config(name)
        layout = LAYOUTS[config["format"]]
        weight = self._spec(name, "weight")
        low_rank = {key: self._spec(name, key) for key in ("smooth_factor", "proj_down", "proj_up") if layout.low_rank}
        tiled = config["format"] == SVDQUANT_W4A4 and config.get("layout") == _TILE_PACKED
        try:
            if tiled:
                out_features = weight.shape[0] * weight.shape[2] * 4
                in_features = weight.shape[1] * int4.GROUP_SIZE
            else:
                out_features, in_features = weight.shape[0], weight.shape[1] * layout.codes_per_byte
            layer = LayerSpec(
                name=name,
                format=config["format"],
                out_features=out_features,
                in_features=in_features,
                rank=low_rank["proj_down"].shape[1] if layout.low_rank else 0,
                bias=f"{name}.bias" in self.file,
                dtype=self._dtype(name, layout),
                act_unsigned=bool(config.get("act_unsigned", False)),
                channel_scale=config["format"] == SVDQUANT_NVFP4 and f"{name}.{_CHANNEL_SCALE}" in self.file,
                rotated=config["rotated"],
            )
        except IndexError as error:
            shapes = ", ".join(f"{key} {spec.shape}" for key, spec in {"weight": weight, **low_rank}.items())
            raise CheckpointError(
                f"{self.path}: layer {name} has tensors of shapes {shapes}, which are not those of a "
                f"{config['format']} layer"
            ) from error
        self._check_shapes(layer, tiled)
        return layer

    def _dtype(self, name: str, layout: Layout) -> torch.dtype:
        """The 16-bit type of a layer: of the first tensor that has it."""
        halves = [key for key, (_, dtype) in layout.scales.items() if dtype is None]
        for key in (*halves, "smooth_factor", "bias"):
            if f"{name}.{key}" in self.file:
                return self.file.specs[f"{name}.{key}"].dtype
        return torch.bfloat16

    def _read_config(self, name: str) -> Mapping[str, object]:
        try:
            config = json.loads(bytes(self.file.get(name + _CONFIG).tolist()))
            format_name = config["format"]
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{self.path}: layer {name} has a comfy_quant entry that cannot be read ({error!r})"
            ) from error
        rotated = format_name == _ROTATED_W4A4
        if rotated:
            if config.get("act_unsigned"):
                raise CheckpointError(
                    f"{self.path}: layer {name} is rotated and has unsigned activations, which do not go together. "
                    "Quantize the model again."
                )
            format_name = SVDQUANT_W4A4
        if str(format_name) not in LAYOUTS:
            raise CheckpointError(
                f"{self.path}: layer {name} has the format {format_name!r}; this version reads "
                f"{', '.join((*LAYOUTS, _ROTATED_W4A4))}. Update ComfyUI-SVDQuant, or load the file with the tool "
                "that made it."
            )
        group = LAYOUTS[format_name].group_size
        if config.get("group_size", group) != group:
            raise CheckpointError(
                f"{self.path}: layer {name} has groups of {config['group_size']!r}; this version reads "
                f"{format_name} in groups of {group}"
            )
        return config | {"format": format_name, "rotated": rotated}

    def _spec(self, layer: str, tensor: str) -> TensorSpec:
        try:
            return self.file.specs[f"{layer}.{tensor}"]
        except KeyError:
            raise CheckpointError(
                f"{self.path}: layer {layer} lacks its tensor {tensor!r}. The file is incomplete."
            ) from None

    def _check_shapes(self, layer: LayerSpec, tiled: bool) -> None:
        if layer.in_features % K_MULTIPLE or not layer.in_features:
            raise CheckpointError(
                f"{self.path}: layer {layer.name} has K = {layer.in_features}, which is not a multiple of {K_MULTIPLE}"
            )
        for tensor, expected in layer.tensors.items():
            found = self._spec(layer.name, tensor)
            shape = _tiled_shape(tensor, expected.shape) if tiled else expected.shape
            floats = not layer.keeps_dtype(tensor)
            if found.shape != shape or (found.dtype not in _FLOATS if floats else found.dtype != expected.dtype):
                raise CheckpointError(
                    f"{self.path}: layer {layer.name}: {tensor} is {found.shape} {found.dtype}, "
                    f"expected {shape} {expected.dtype}"
                )

    def _read_report(self) -> dict:
        try:
            report = json.loads(self.file.metadata.get(METADATA_KEY, "{}"))
        except ValueError as error:
            raise CheckpointError(f"{self.path}: its metadata is damaged ({error})") from error
        return report if isinstance(report, dict) else {}


def _tiled_shape(tensor: str, natural: tuple[int, ...]) -> tuple[int, ...]:
    """Shape of a tensor in Comfy-Org's tile-packed layout: N is cut in tiles of 128."""
    if tensor == "weight":
        n, half_k = natural
        return (n // 128, half_k * 2 // int4.GROUP_SIZE, 32, 128)
    if tensor == "weight_scale":
        groups, n = natural
        return (n // 128, groups, 128)
    if tensor == "proj_up":
        n, rank = natural
        return (n // 128, rank, 128)
    return natural


def _natural(tensor: str, value: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """Undo the tile packing, if there is any."""
    if tuple(value.shape) == shape:
        return value
    if tensor == "weight":
        # (N/128, K/64, 32 quads, 4 rows x 32 bytes) -> (N/128, 32, 4, K/64, 32)
        return value.unflatten(3, (4, -1)).permute(0, 2, 3, 1, 4).reshape(shape)
    if tensor == "weight_scale":
        return value.permute(1, 0, 2).reshape(shape)
    return value.permute(0, 2, 1).reshape(shape)
