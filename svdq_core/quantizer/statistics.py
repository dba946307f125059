"""What calibration keeps of a layer's inputs: per-channel ranges and a bounded sample of rows."""

import hashlib
import json
from collections.abc import Iterable
from os import PathLike

import torch

from ..errors import CheckpointError, LayerError
from ..formats.safetensors_file import SafetensorsFile, SafetensorsWriter, TensorSpec

_KEY = "svdquant_calibration"


class LayerStatistics:
    """Running statistics of one layer's input.

    Every row gets a random priority and the ``rows`` with the highest stay: a uniform sample of all
    rows seen (reservoir sampling), the same for the same seed and order.

    Attributes:
        minimum, maximum: (K,) float32, per channel.
        sample: (R, K) bf16, R at most ``capacity``.
        count: rows seen.
    """

    def __init__(self, in_features: int, capacity: int, seed: int):
        self.minimum = torch.full((in_features,), torch.inf)
        self.maximum = torch.full((in_features,), -torch.inf)
        self.sample = torch.empty((0, in_features), dtype=torch.bfloat16)
        self.priority = torch.empty(0)
        self.count = 0
        self._capacity = capacity
        self._random = torch.Generator().manual_seed(seed)

    def observe(self, x: torch.Tensor) -> None:
        """Take in one batch of inputs, (..., K), on any device."""
        rows = x.detach().reshape(-1, x.shape[-1])
        # torch.minimum and amin propagate NaN, so bad inputs are found at the end without a sync here.
        self.minimum = torch.minimum(self.minimum.to(rows.device), rows.amin(dim=0).float())
        self.maximum = torch.maximum(self.maximum.to(rows.device), rows.amax(dim=0).float())
        priority = torch.rand(rows.shape[0], generator=self._random)
        keep = torch.topk(priority, min(self._capacity, rows.shape[0])).indices
        if len(self.priority) == self._capacity:
            keep = keep[priority[keep] > self.priority.min()]
        sampled = rows[keep.to(rows.device)].to("cpu", torch.bfloat16)
        self._merge_sample(sampled, priority[keep])
        self.count += rows.shape[0]

    def merge(self, other: "LayerStatistics") -> None:
        """Take in what another run saw of the same layer."""
        self.minimum = torch.minimum(self.minimum.cpu(), other.minimum.cpu())
        self.maximum = torch.maximum(self.maximum.cpu(), other.maximum.cpu())
        self._merge_sample(other.sample, other.priority)
        self.count += other.count

    def check(self, layer: str) -> None:
        """Raise LayerError when an input was NaN or infinite, or nothing was seen."""
        if not self.count:
            raise LayerError(f"layer {layer} saw no input during calibration: the sampling run did not reach it")
        if not bool(torch.isfinite(self.minimum + self.maximum).all()):
            raise LayerError(
                f"layer {layer} got NaN or infinite inputs during calibration. Check that the "
                "16-bit model gives a clean image with the same sampler settings."
            )

    def _merge_sample(self, sample: torch.Tensor, priority: torch.Tensor) -> None:
        priority = torch.cat((self.priority, priority))
        sample = torch.cat((self.sample, sample))
        keep = torch.topk(priority, min(self._capacity, len(priority))).indices.sort().values
        self.priority, self.sample = priority[keep], sample[keep]


class Calibration:
    """Statistics of many layers, made by sampling a model and used by the quantizer.

    Args:
        seed: decides which rows are kept.
        rows: how many input rows to keep per layer.
    """

    def __init__(self, seed: int = 0, rows: int = 512):
        self.seed = seed
        self.rows = rows
        self.layers: dict[str, LayerStatistics] = {}

    def observe(self, layer: str, x: torch.Tensor) -> None:
        """Take in an input of a layer."""
        if layer not in self.layers:
            self.layers[layer] = self._new_layer(layer, x.shape[-1])
        self.layers[layer].observe(x)

    def check(self, layers: Iterable[str]) -> None:
        """Raise LayerError unless every layer of ``layers`` has clean statistics."""
        for name in layers:
            if name not in self.layers:
                raise LayerError(
                    f"layer {name} has no calibration data: the calibration is of another model, "
                    "or the sampling run did not reach the layer"
                )
            self.layers[name].check(name)

    def merge(self, other: "Calibration") -> None:
        """Take in another calibration of the same model."""
        for name, statistics in other.layers.items():
            if name in self.layers:
                self.layers[name].merge(statistics)
            else:
                self.layers[name] = statistics

    def save(self, path: str | PathLike, overwrite: bool = False) -> None:
        """Write to a safetensors file; see :meth:`load`."""
        tensors = {}
        for name, layer in self.layers.items():
            tensors[f"{name}.minimum"] = layer.minimum.cpu()
            tensors[f"{name}.maximum"] = layer.maximum.cpu()
            tensors[f"{name}.sample"] = layer.sample
            tensors[f"{name}.priority"] = layer.priority
        counts = {name: layer.count for name, layer in self.layers.items()}
        about = {"seed": self.seed, "rows": self.rows, "counts": counts}
        specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
        metadata = {_KEY: json.dumps(about)}
        with SafetensorsWriter(path, specs, metadata, overwrite=overwrite) as writer:
            for name, tensor in tensors.items():
                writer.write(name, tensor)

    @classmethod
    def load(cls, path: str | PathLike) -> "Calibration":
        """Read a file written by :meth:`save`.

        Raises:
            CheckpointError: not a calibration file, or damaged.
        """
        file = SafetensorsFile(path)
        try:
            about = json.loads(file.metadata[_KEY])
            calibration = cls(int(about["seed"]), int(about["rows"]))
            counts = {str(name): int(count) for name, count in about["counts"].items()}
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise CheckpointError(f"{path} is not a calibration file of SVDQuant") from error
        for name, count in counts.items():
            minimum = file.get(f"{name}.minimum")
            layer = calibration._new_layer(name, minimum.shape[0])
            layer.minimum, layer.maximum = minimum, file.get(f"{name}.maximum")
            layer.sample, layer.priority = file.get(f"{name}.sample"), file.get(f"{name}.priority")
            layer.count = count
            if not layer.minimum.shape == layer.maximum.shape == layer.sample.shape[1:]:
                raise CheckpointError(f"{path}: the statistics of layer {name} do not fit together")
            calibration.layers[name] = layer
        return calibration

    def _new_layer(self, name: str, in_features: int) -> LayerStatistics:
        return LayerStatistics(in_features, self.rows, layer_seed(self.seed, name))


def layer_seed(seed: int, layer: str) -> int:
    """A seed of its own for each layer, the same on every platform."""
    digest = hashlib.blake2b(f"{seed}:{layer}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "little")
