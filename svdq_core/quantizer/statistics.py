"""What calibration keeps of a layer's inputs: ranges and second moments of each channel, a bounded sample of rows."""

import hashlib
import json
from collections import deque
from collections.abc import Iterable
from functools import lru_cache
from os import PathLike

import numpy
import torch

from ..errors import CheckpointError, LayerError
from ..formats.safetensors_file import SafetensorsFile, SafetensorsWriter, TensorSpec
from ..kernels import status

_KEY = "svdquant_calibration"
_IN_FLIGHT = 8  # layers whose rows are on their way from the device, in pinned memory


class LayerStatistics:
    """Running statistics of one layer's input.

    Every row gets a random priority and the ``rows`` with the highest stay: a uniform sample of all
    rows seen (reservoir sampling), the same for the same seed and order.

    Attributes:
        minimum, maximum: (K,) float32, per channel.
        square_sum: (K,) float64, of each channel's squares; ``second_moment`` is their mean.
        sample: (R, K) bf16, R at most ``capacity``.
        count: rows seen.
    """

    @torch.inference_mode(False)  # hosts sample in that mode; what changes in place later must not be of it
    def __init__(self, in_features: int, capacity: int, seed: int):
        self.minimum = torch.full((in_features,), torch.inf)
        self.maximum = torch.full((in_features,), -torch.inf)
        self.square_sum = torch.zeros(in_features, dtype=torch.float64)
        self.sample = torch.empty((0, in_features), dtype=torch.bfloat16)
        self.priority = torch.empty(0)
        self.count = 0
        self._capacity = capacity
        self._random = torch.Generator().manual_seed(seed)
        self._lowest = 0.0  # of the kept priorities, once the sample is full; rows below it need no drawing
        self._arriving: list[tuple[torch.Tensor, torch.Tensor, torch.cuda.Event]] = []

    @property
    def second_moment(self) -> torch.Tensor:
        """(K,) float32: the mean square of each channel over all rows seen."""
        return (self.square_sum / self.count).float()

    def observe(self, x: torch.Tensor) -> None:
        """Take in one batch of inputs, (..., K), on any device.

        Nothing here waits for a CUDA device; ``settle`` before the sample is looked at.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        self._take_in(rows)
        keep, priority = self._draw(rows.shape[0])
        self.count += rows.shape[0]
        if not len(keep):
            return
        sampled = rows[keep.to(rows.device, non_blocking=True)].to(torch.bfloat16)
        if rows.is_cuda:
            self._fetch(sampled, priority)
        else:
            self._merge_sample(sampled.cpu(), priority)

    def _take_in(self, rows: torch.Tensor) -> None:
        """Update ranges and squares. NaN propagates, so bad inputs are found at the end without a sync here."""
        for name in ("minimum", "maximum", "square_sum"):
            setattr(self, name, getattr(self, name).to(rows.device))
        if rows.is_cuda and status(rows.device)[0]:
            from ..kernels import statistics as kernel

            if kernel.takes(rows):
                kernel.take_in(rows, self.minimum, self.maximum, self.square_sum)
                return
        # On the CPU aminmax and vector_norm along rows take ten times as long as what they would replace.
        self.minimum = torch.minimum(self.minimum, rows.amin(dim=0).float())
        self.maximum = torch.maximum(self.maximum, rows.amax(dim=0).float())
        if rows.is_cuda:
            squares = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32).double().square()
        else:
            squares = rows.float().square().sum(dim=0).double()
        self.square_sum = self.square_sum + squares

    def _fetch(self, sampled: torch.Tensor, priority: torch.Tensor) -> None:
        """Start copying rows to the host, on a stream of its own: what computes does not wait for it."""
        copies, now = _copy_stream(sampled.device), torch.cuda.current_stream(sampled.device)
        copies.wait_stream(now)
        arriving = torch.empty(sampled.shape, dtype=torch.bfloat16, pin_memory=True)
        with torch.cuda.stream(copies):
            arriving.copy_(sampled, non_blocking=True)
        sampled.record_stream(copies)
        self._arriving.append((arriving, priority, copies.record_event()))

    def _draw(self, count: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Which of so many new rows may be kept, and their priorities.

        Those are uniform, but only rows above the lowest kept one matter. The gaps between such rows are geometric,
        so that few random numbers are drawn once many rows were seen.
        """
        if self._lowest == 0:
            priority = torch.rand(count, generator=self._random)
            keep = torch.topk(priority, min(self._capacity, count)).indices
            return keep, priority[keep]
        share = max(1 - self._lowest, 2.0**-24)
        most = int(count * share + 8 * (count * share) ** 0.5 + 16)  # eight standard deviations above the mean
        gaps = torch.empty(most).geometric_(share, generator=self._random)
        keep = gaps.numpy().cumsum(dtype="int64") - 1
        keep = torch.from_numpy(keep[keep < count])
        return keep, 1 - share * torch.rand(len(keep), generator=self._random)

    @property
    def settled(self) -> bool:
        """Whether all rows to keep have come from the device."""
        return not self._arriving

    def settle(self) -> None:
        """Wait for rows that are still on their way from the device."""
        for rows, priority, arrived in self._arriving:
            arrived.synchronize()
            self._merge_sample(rows, priority)
        self._arriving.clear()

    def merge(self, other: "LayerStatistics") -> None:
        """Take in what another run saw of the same layer.

        Both samples stand for all rows seen only as far as the smaller one goes, so its capacity is kept.
        """
        self._capacity = min(self._capacity, other._capacity)
        self.minimum = torch.minimum(self.minimum.cpu(), other.minimum.cpu())
        self.maximum = torch.maximum(self.maximum.cpu(), other.maximum.cpu())
        self.square_sum = self.square_sum.cpu() + other.square_sum.cpu()
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

    @torch.inference_mode(False)
    def _merge_sample(self, sample: torch.Tensor, priority: torch.Tensor) -> None:
        """Let new rows take the places of those with a lower priority, which are few after the first batches."""
        if not len(priority):
            return
        before, ranks = len(self.priority), numpy.concatenate((self.priority.numpy(), priority.numpy()))
        keep = numpy.zeros(len(ranks), dtype=bool)
        keep[ranks.argsort()[-self._capacity :]] = True
        places, new = (~keep[:before]).nonzero()[0], keep[before:].nonzero()[0]
        filled = min(len(places), len(new))
        self.priority.numpy()[places[:filled]] = priority.numpy()[new[:filled]]
        # Row by row through numpy: five times as fast as torch's indexing of bf16 on the CPU.
        held, arrived = self.sample.view(torch.int16).numpy(), sample.view(torch.int16).numpy()
        for place, row in zip(places[:filled].tolist(), new[:filled].tolist(), strict=True):
            held[place] = arrived[row]
        if len(new) != len(places):  # the sample still grows, or its capacity has shrunk
            stay = torch.ones(before, dtype=torch.bool)
            stay[torch.from_numpy(places[filled:])] = False
            grown = torch.from_numpy(new[filled:])
            self.sample = torch.cat((self.sample[stay], sample[grown]))
            self.priority = torch.cat((self.priority[stay], priority[grown]))
        self._lowest = float(self.priority.numpy().min()) if len(self.priority) == self._capacity else 0.0


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
        self._in_flight: deque[LayerStatistics] = deque()

    def observe(self, layer: str, x: torch.Tensor) -> None:
        """Take in an input of a layer."""
        if layer not in self.layers:
            self.layers[layer] = self._new_layer(layer, x.shape[-1])
        self.layers[layer].observe(x)
        if not self.layers[layer].settled:
            self._in_flight.append(self.layers[layer])
        if len(self._in_flight) > _IN_FLIGHT:
            self._in_flight.popleft().settle()

    def settle(self) -> None:
        """Wait for rows that are still on their way from the device."""
        while self._in_flight:
            self._in_flight.popleft().settle()

    def check(self, layers: Iterable[str]) -> None:
        """Raise LayerError unless every layer of ``layers`` has clean statistics, all of them here."""
        self.settle()
        for name in layers:
            if name not in self.layers:
                raise LayerError(
                    f"layer {name} has no calibration data: the calibration is of another model, "
                    "or the sampling run did not reach the layer"
                )
            self.layers[name].check(name)

    def merge(self, other: "Calibration") -> None:
        """Take in another calibration of the same model.

        Raises:
            LayerError: a layer of both has another width; nothing is taken in.
        """
        for name, statistics in other.layers.items():
            width, theirs = (len(layer.minimum) for layer in (self.layers.get(name, statistics), statistics))
            if width != theirs:
                raise LayerError(
                    f"layer {name} has {width} input channels in one calibration and {theirs} in the other: "
                    "they are of different models and cannot be merged"
                )
        self.settle()
        other.settle()
        self.rows = min(self.rows, other.rows)
        for name, statistics in other.layers.items():
            if name in self.layers:
                self.layers[name].merge(statistics)
            else:
                self.layers[name] = statistics

    def save(self, path: str | PathLike, overwrite: bool = False) -> None:
        """Write to a safetensors file; see :meth:`load`."""
        tensors = self._tensors()
        counts = {name: layer.count for name, layer in self.layers.items()}
        about = {"seed": self.seed, "rows": self.rows, "counts": counts}
        specs = {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}
        metadata = {_KEY: json.dumps(about)}
        with SafetensorsWriter(path, specs, metadata, overwrite=overwrite) as writer:
            for name in sorted(tensors, key=lambda name: -tensors[name].dtype.itemsize):
                writer.write(name, tensors[name])

    def digest(self) -> str:
        """Of everything it holds."""
        found = hashlib.blake2b(f"{self.seed} {self.rows}".encode(), digest_size=16)
        for name, tensor in sorted(self._tensors().items()):
            found.update(name.encode())
            found.update(tensor.contiguous().view(torch.uint8).numpy())
        for name, layer in sorted(self.layers.items()):
            found.update(f"{name} {layer.count}".encode())
        return found.hexdigest()

    @classmethod
    @torch.inference_mode(False)
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
            minimum = file.read(f"{name}.minimum")
            layer = calibration._new_layer(name, minimum.shape[0])
            layer.minimum, layer.maximum = minimum, file.read(f"{name}.maximum")
            layer.sample, layer.priority = file.read(f"{name}.sample"), file.read(f"{name}.priority")
            layer.count = count
            if f"{name}.square_sum" in file:
                layer.square_sum = file.read(f"{name}.square_sum")
            else:  # a file from before they were kept
                layer.square_sum = layer.sample.double().square().mean(dim=0) * count
            if not layer.minimum.shape == layer.maximum.shape == layer.sample.shape[1:]:
                raise CheckpointError(f"{path}: the statistics of layer {name} do not fit together")
            calibration.layers[name] = layer
        return calibration

    def _tensors(self) -> dict[str, torch.Tensor]:
        """On the CPU, by the names they have in a file."""
        self.settle()
        kept = ("minimum", "maximum", "square_sum", "sample", "priority")
        return {f"{name}.{key}": getattr(layer, key).cpu() for name, layer in self.layers.items() for key in kept}

    def _new_layer(self, name: str, in_features: int) -> LayerStatistics:
        return LayerStatistics(in_features, self.rows, layer_seed(self.seed, name))


@lru_cache(maxsize=64)
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


def layer_seed(seed: int, layer: str) -> int:
    """A seed of its own for each layer, the same on every platform."""
    digest = hashlib.blake2b(f"{seed}:{layer}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "little")
