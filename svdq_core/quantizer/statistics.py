"""What calibration keeps of a layer's inputs: ranges and second moments of each channel, a bounded sample of rows."""

import hashlib
import json
from collections import deque
from collections.abc import Iterable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache
from os import PathLike

import numpy
import torch

from ..errors import CheckpointError, LayerError
from ..formats.safetensors_file import SafetensorsFile, SafetensorsWriter, TensorSpec
from ..kernels import status
from .reservoir import Reservoir

_KEY = "svdquant_calibration"
_TOGETHER = 2**24  # bytes of rows that come from a device in one copy


class LayerStatistics:
    """Running statistics of one layer's input.

    Rows are kept by a :class:`Reservoir`: a uniform sample of all rows seen, the same for the same seed and order, on
    any device.

    Attributes:
        minimum, maximum: (K,) float32, per channel.
        square_sum: (K,) float64, of each channel's squares; ``second_moment`` is their mean.
        sample: (R, K) bf16, R at most ``capacity``.
        priority: (R,) float32.
        count: rows seen.

    Args:
        capacity: the most rows to keep.
        seed: decides which.
        expected: how many there will be, see :class:`Reservoir`; 0 if nobody knows.
        device: where inputs will be.
    """

    @torch.inference_mode(False)  # hosts sample in that mode; what changes in place later must not be of it
    def __init__(
        self, in_features: int, capacity: int, seed: int, expected: int = 0, device: torch.device | str = "cpu"
    ):
        self.minimum = torch.full((in_features,), torch.inf, device=device)
        self.maximum = torch.full((in_features,), -torch.inf, device=device)
        self.square_sum = torch.zeros(in_features, dtype=torch.float64, device=device)
        # bf16, in memory of numpy's: it asks for large pages, of which new ones are had in a fifth of the time.
        self._rows = numpy.empty((capacity, in_features), dtype=numpy.int16)
        self.count = 0
        self._reservoir = Reservoir(capacity, seed, expected)

    @property
    def priority(self) -> torch.Tensor:
        return torch.from_numpy(self._reservoir.priority)

    @priority.setter
    def priority(self, priority: torch.Tensor) -> None:
        self._reservoir.priority = priority.numpy()

    @property
    def sample(self) -> torch.Tensor:
        return torch.from_numpy(self._rows[: len(self._reservoir.priority)]).view(torch.bfloat16)

    @sample.setter
    def sample(self, rows: torch.Tensor) -> None:
        self._rows = numpy.empty((max(self._reservoir.capacity, len(rows)), rows.shape[1]), dtype=numpy.int16)
        self._rows[: len(rows)] = rows.view(torch.int16).numpy()

    @property
    def second_moment(self) -> torch.Tensor:
        """(K,) float32: the mean square of each channel over all rows seen."""
        return (self.square_sum / self.count).float()

    def observe(self, x: torch.Tensor) -> tuple[torch.Tensor, numpy.ndarray] | None:
        """Take in one batch of inputs, (..., K), on any device.

        Nothing here waits for a CUDA device: where a row will stand is decided without looking at it.

        Returns:
            Rows that are still on a device and must be ``put`` where the second says, in the order of calls.
        """
        rows = x.detach().reshape(-1, x.shape[-1])
        new, places = self._reservoir.choose(rows.shape[0])
        self.count += rows.shape[0]
        chosen = self._take_in(rows, new)
        if chosen.dtype != torch.bfloat16:
            chosen = chosen.to(torch.bfloat16)
        if rows.is_cuda:
            return (chosen, places) if len(new) else None
        self.put(chosen, places)
        return None

    def _take_in(self, rows: torch.Tensor, new: numpy.ndarray) -> torch.Tensor:
        """Update ranges and squares, and return the rows of these numbers.

        NaN propagates, so bad inputs are found at the end without a sync here.
        """
        if self.minimum.device != rows.device:
            for name in ("minimum", "maximum", "square_sum"):
                setattr(self, name, getattr(self, name).to(rows.device))
        if rows.is_cuda and status(rows.device)[0]:
            from ..kernels import statistics as kernel

            if kernel.takes(rows):
                return kernel.take_in(rows, self.minimum, self.maximum, self.square_sum, new)
        # On the CPU aminmax and vector_norm along rows take ten times as long as what they would replace.
        self.minimum = torch.minimum(self.minimum, rows.amin(dim=0).float())
        self.maximum = torch.maximum(self.maximum, rows.amax(dim=0).float())
        if rows.is_cuda:
            squares = torch.linalg.vector_norm(rows, dim=0, dtype=torch.float32).double().square()
        else:
            squares = rows.float().square().sum(dim=0).double()
        self.square_sum = self.square_sum + squares
        return rows.index_select(0, torch.from_numpy(new).to(rows.device, non_blocking=True))

    def put(self, rows: torch.Tensor, places: numpy.ndarray) -> None:
        """Rows that were chosen, (R, K) bf16 on the CPU, into the sample."""
        # By numpy, which copies rows several times as fast as torch's indexing does on the CPU.
        self._rows[places] = rows.view(torch.int16).numpy()

    @torch.inference_mode(False)
    def merge(self, other: "LayerStatistics") -> None:
        """Take in what another run saw of the same layer.

        Both samples stand for all rows seen only as far as the smaller one goes, so no more are kept.
        """
        capacity = self._reservoir.capacity = min(self._most_merged(), other._most_merged())
        self.minimum = torch.minimum(self.minimum.cpu(), other.minimum.cpu())
        self.maximum = torch.maximum(self.maximum.cpu(), other.maximum.cpu())
        self.square_sum = self.square_sum.cpu() + other.square_sum.cpu()
        highest = torch.topk(self.priority, min(capacity, len(self.priority))).indices.sort().values
        self.sample, self.priority = self.sample[highest], self.priority[highest]
        entering, places = self._reservoir.admit(other._reservoir.priority)
        self.put(other.sample[torch.from_numpy(entering)], places)
        self.count += other.count

    def _most_merged(self) -> int:
        rows = len(self._reservoir.priority)
        return rows if rows < self.count else self._reservoir.capacity  # all rows seen are in a short sample

    def clean(self) -> torch.Tensor:
        """() bool, on the inputs' device: whether all of them were finite."""
        return torch.isfinite(self.minimum + self.maximum).all()


class _Arrivals:
    """Rows on their way from a CUDA device to their layers: many in one copy, on a stream and a thread of their own."""

    def __init__(self) -> None:
        self._waiting: list[tuple[LayerStatistics, torch.Tensor, numpy.ndarray]] = []
        self._nbytes = 0
        self._sent: deque[Future] = deque()

    def add(self, layer: LayerStatistics, rows: torch.Tensor, places: numpy.ndarray) -> None:
        """Rows (R, K) bf16 on a device."""
        if self._waiting and self._waiting[0][1].device != rows.device:
            self._send()
        self._waiting.append((layer, rows, places))
        self._nbytes += rows.nbytes
        if self._nbytes >= _TOGETHER:
            self._send()

    def _send(self) -> None:
        waiting, self._waiting, self._nbytes = self._waiting, [], 0
        while len(self._sent) > 1:
            self._sent.popleft().result()
        device = waiting[0][1].device
        together = torch.cat([rows.flatten() for _, rows, _ in waiting])
        copies = _copy_stream(device)
        copies.wait_stream(torch.cuda.current_stream(device))
        arriving = torch.empty(together.shape, dtype=torch.bfloat16, pin_memory=True)
        with torch.cuda.stream(copies):
            arriving.copy_(together, non_blocking=True)
        together.record_stream(copies)
        arrived = copies.record_event()
        places = [(layer, tuple(rows.shape), places) for layer, rows, places in waiting]

        def put() -> None:
            arrived.synchronize()
            sizes = [rows * columns for _, (rows, columns), _ in places]
            for (layer, shape, where), rows in zip(places, arriving.split(sizes), strict=True):
                layer.put(rows.view(shape), where)

        self._sent.append(_thread().submit(put))

    def settle(self) -> None:
        """Wait for all of them."""
        if self._waiting:
            self._send()
        while self._sent:
            self._sent.popleft().result()


class Calibration:
    """Statistics of many layers, made by sampling a model and used by the quantizer.

    Args:
        seed: decides which rows are kept.
        rows: how many input rows to keep per layer.
        calls: how many inputs each layer will see, all of about as many rows; 0 if nobody knows. Then rows that
            would give way later are not copied before, which is most of what watching costs. Where fewer come, a
            sample may end with fewer rows than it has room for.
    """

    def __init__(self, seed: int = 0, rows: int = 512, calls: int = 0):
        self.seed = seed
        self.rows = rows
        self.calls = calls
        self.layers: dict[str, LayerStatistics] = {}
        self._arrivals = _Arrivals()

    def observe(self, layer: str, x: torch.Tensor) -> None:
        """Take in an input of a layer."""
        statistics = self.layers.get(layer)
        if statistics is None:
            width = x.shape[-1]
            expected = self.calls * (x.numel() // width)
            statistics = self.layers[layer] = self._new_layer(layer, width, expected, x.device)
        chosen = statistics.observe(x)
        if chosen is not None:
            self._arrivals.add(statistics, *chosen)

    def settle(self) -> None:
        """Wait for rows that are still on their way from a device: before a sample is looked at."""
        self._arrivals.settle()

    def check(self, layers: Iterable[str]) -> None:
        """Raise LayerError unless every layer of ``layers`` has clean statistics, all of them here."""
        self.settle()
        found = {}
        for name in layers:
            if name not in self.layers:
                raise LayerError(
                    f"layer {name} has no calibration data: the calibration is of another model, "
                    "or the sampling run did not reach the layer"
                )
            if not self.layers[name].count:
                raise LayerError(f"layer {name} saw no input during calibration: the sampling run did not reach it")
            found[name] = self.layers[name].clean()
        # All are asked before the first answer is waited for.
        for name, clean in found.items():
            if not bool(clean):
                raise LayerError(
                    f"layer {name} got NaN or infinite inputs during calibration. Check that the "
                    "16-bit model gives a clean image with the same sampler settings."
                )

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

    def _new_layer(self, name: str, in_features: int, expected: int = 0, device="cpu") -> LayerStatistics:
        return LayerStatistics(in_features, self.rows, layer_seed(self.seed, name), expected, device)


@lru_cache(maxsize=64)
def _copy_stream(device: torch.device) -> torch.cuda.Stream:
    return torch.cuda.Stream(device)


@lru_cache(maxsize=1)
def _thread() -> ThreadPoolExecutor:
    """One, so that rows are put down in the order in which they were chosen."""
    return ThreadPoolExecutor(1, "svdquant-calibration")


def layer_seed(seed: int, layer: str) -> int:
    """A seed of its own for each layer, the same on every platform."""
    digest = hashlib.blake2b(f"{seed}:{layer}".encode(), digest_size=6).digest()
    return int.from_bytes(digest, "little")
