"""The ``comfy_quant`` convention: how a quantized layer lies in a safetensors file.

Published by Comfy-Org (comfy-quants, ``docs/formats/svdquant_w4a4_kitchen_tilepack.md``). A layer is a
family of tensors under the host's module name, among them ``<layer>.comfy_quant``, a JSON text in a
uint8 tensor that names the format. N = out_features, K = in_features, r = rank; "16" is bf16 or fp16:

    ===============  ===========  =====  ==============================================
    ``weight``        (N, K / 2)   int8   signed 4-bit codes, low nibble = even column
    ``weight_scale``  (K / 64, N)  16     per group of 64 along K
    ``smooth_factor`` (K,)         16     the activation is divided by it
    ``proj_down``     (K, r)       16     acts on the unsmoothed activation
    ``proj_up``       (N, r)       16
    ``bias``          (N,)         16     optional
    ===============  ===========  =====  ==============================================

With ``"act_unsigned": true`` the activation is quantized as ``x + 0.171875`` to [0, 15] and the bias
already holds the correction for the shift.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from os import PathLike

import torch

from ..errors import CheckpointError
from ..numerics.int4 import GROUP_SIZE
from .safetensors_file import SafetensorsFile, TensorSpec

SVDQUANT_W4A4 = "svdquant_w4a4"
KNOWN_FORMATS = (SVDQUANT_W4A4,)
METADATA_KEY = "svdquant"

_CONFIG = ".comfy_quant"
_TILE_PACKED = "kitchen_tile_packed_w4a4"
_FLOATS = (torch.bfloat16, torch.float16, torch.float32)


@dataclass(frozen=True)
class LayerSpec:
    """What a file says of one quantized layer, shapes checked, data not yet read."""

    name: str
    format: str
    out_features: int
    in_features: int
    rank: int
    bias: bool
    dtype: torch.dtype  # of the scales, the smoothing and the low-rank branch
    act_unsigned: bool = False

    @property
    def config(self) -> torch.Tensor:
        """The ``comfy_quant`` tensor."""
        entries: dict[str, object] = {"format": self.format}
        if self.act_unsigned:
            entries["act_unsigned"] = True
        return torch.tensor(list(json.dumps(entries).encode()), dtype=torch.uint8)

    @property
    def tensors(self) -> dict[str, TensorSpec]:
        """The layer's tensors by their name inside the layer, ``comfy_quant`` left out."""
        n, k, r = self.out_features, self.in_features, self.rank
        specs = {
            "weight": TensorSpec((n, k // 2), torch.int8),
            "weight_scale": TensorSpec((k // GROUP_SIZE, n), self.dtype),
            "smooth_factor": TensorSpec((k,), self.dtype),
            "proj_down": TensorSpec((k, r), self.dtype),
            "proj_up": TensorSpec((n, r), self.dtype),
        }
        if self.bias:
            specs["bias"] = TensorSpec((n,), self.dtype)
        return specs

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
        weight, scale = self._spec(name, "weight"), self._spec(name, "weight_scale")
        down, up = self._spec(name, "proj_down"), self._spec(name, "proj_up")
        tiled = config.get("layout") == _TILE_PACKED
        try:
            if tiled:
                out_features = weight.shape[0] * weight.shape[2] * 4
                in_features = weight.shape[1] * GROUP_SIZE
            else:
                out_features, in_features = weight.shape[0], weight.shape[1] * 2
            layer = LayerSpec(
                name=name,
                format=config["format"],
                out_features=out_features,
                in_features=in_features,
                rank=down.shape[1],
                bias=f"{name}.bias" in self.file,
                dtype=scale.dtype,
                act_unsigned=bool(config.get("act_unsigned", False)),
            )
        except IndexError as error:
            raise CheckpointError(
                f"{self.path}: layer {name} has tensors of shapes {weight.shape}, {down.shape}, "
                f"{up.shape}, which are not those of a {config['format']} layer"
            ) from error
        self._check_shapes(layer, tiled)
        return layer

    def _read_config(self, name: str) -> Mapping[str, object]:
        try:
            config = json.loads(bytes(self.file.get(name + _CONFIG).tolist()))
            format_name = config["format"]
        except (ValueError, TypeError, KeyError) as error:
            raise CheckpointError(
                f"{self.path}: layer {name} has a comfy_quant entry that cannot be read ({error!r})"
            ) from error
        if format_name not in KNOWN_FORMATS:
            raise CheckpointError(
                f"{self.path}: layer {name} has the format {format_name!r}; this version reads "
                f"{', '.join(KNOWN_FORMATS)}. Update ComfyUI-SVDQuant, or load the file with the "
                "tool that made it."
            )
        return config

    def _spec(self, layer: str, tensor: str) -> TensorSpec:
        try:
            return self.file.specs[f"{layer}.{tensor}"]
        except KeyError:
            raise CheckpointError(
                f"{self.path}: layer {layer} lacks its tensor {tensor!r}. The file is incomplete."
            ) from None

    def _check_shapes(self, layer: LayerSpec, tiled: bool) -> None:
        if layer.in_features % GROUP_SIZE or not layer.in_features:
            raise CheckpointError(
                f"{self.path}: layer {layer.name} has K = {layer.in_features}, which is not a multiple of {GROUP_SIZE}"
            )
        for tensor, expected in layer.tensors.items():
            found = self._spec(layer.name, tensor)
            shape = _tiled_shape(tensor, expected.shape) if tiled else expected.shape
            floats = expected.dtype in _FLOATS
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
        return (n // 128, half_k * 2 // GROUP_SIZE, 32, 128)
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
