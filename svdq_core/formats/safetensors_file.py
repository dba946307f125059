"""safetensors files: opened with their header checked, written as a stream and put in place atomically.

A file is 8 bytes of header length, a JSON header, then the tensors' bytes. Nothing the header says is
believed before it was compared with the file.
"""

import json
import math
import os
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError, SVDQuantError
from .partial_file import PartialFile, WriteError, partial_path

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_MAX_HEADER_BYTES = 100_000_000  # the format's own limit


@dataclass(frozen=True)
class TensorSpec:
    """Shape and type of one tensor of a file, before its data is touched."""

    shape: tuple[int, ...]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Bytes the tensor takes in the file."""
        return math.prod(self.shape) * self.dtype.itemsize


class SafetensorsFile:
    """A safetensors file open for reading; tensors are read (memory-mapped) one at a time.

    Raises:
        CheckpointError: missing, not a safetensors file, truncated, or with a header that does not
            match the file.
    """

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.specs, self.metadata, self._offsets = _read_header(self.path)

    @cached_property
    def _handle(self):
        # Opened with the first tensor: who only looks at the header maps no memory.
        return safe_open(self.path, framework="pt", device="cpu")

    def __contains__(self, name: str) -> bool:
        return name in self.specs

    def get(self, name: str) -> torch.Tensor:
        """One tensor on the CPU, backed by the file's memory map.

        Raises:
            CheckpointError: the file has no such tensor, or it cannot be read.
        """
        if name not in self.specs:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing from the file")
        try:
            return self._handle.get_tensor(name)
        except (SafetensorError, OSError) as error:
            raise CheckpointError(_damaged(self.path, f"{name}: {error}")) from error

    def read(self, name: str) -> torch.Tensor:
        """One tensor on the CPU in memory of its own: when it goes, nothing of the file stays in the process.

        Raises:
            CheckpointError: the file has no such tensor, or it cannot be read.
        """
        if name not in self.specs:
            raise CheckpointError(f"{self.path}: tensor {name!r} is missing from the file")
        spec = self.specs[name]
        data = torch.empty(spec.nbytes, dtype=torch.uint8)
        try:
            with self.path.open("rb", buffering=0) as file:
                file.seek(self._offsets[name])
                view, filled = memoryview(data.numpy()), 0
                while filled < spec.nbytes:  # one call reads 2 GB at most
                    count = file.readinto(view[filled:])
                    if not count:
                        raise CheckpointError(_damaged(self.path, f"{name} is cut off"))
                    filled += count
        except OSError as error:
            raise CheckpointError(f"{self.path} cannot be read: {error}") from error
        return data.view(spec.dtype).reshape(spec.shape)


def _damaged(path: Path, why: str) -> str:
    return f"{path} is damaged or incomplete ({why}). Download or create it again."


def _read_header(path: Path) -> tuple[dict[str, TensorSpec], dict[str, str], dict[str, int]]:
    """Specs, metadata and each tensor's place in the file.

    The header is held against the file: sizes add up, offsets stay inside and leave no holes.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if size < 8 or length > min(size - 8, _MAX_HEADER_BYTES):
                raise CheckpointError(_damaged(path, f"its header would be {length} bytes, the file has {size}"))
            header = json.loads(file.read(length))
    except FileNotFoundError as error:
        raise CheckpointError(f"{path} does not exist") from error
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error}") from error
    except (ValueError, RecursionError) as error:
        raise CheckpointError(
            f"{path} is not a safetensors file (its header is not JSON: {error}). "
            "Pickled checkpoints (.ckpt, .pt) are not supported: convert it to safetensors first."
        ) from error
    if not isinstance(header, dict):
        raise CheckpointError(_damaged(path, "its header is not a table of tensors"))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise CheckpointError(_damaged(path, "its metadata is not a table of strings"))
    specs, spans = {}, {}
    for name, entry in header.items():
        specs[name], spans[name] = _read_entry(path, name, entry)
    end = 0
    for start, stop in sorted(spans.values()):
        if start != end:
            raise CheckpointError(_damaged(path, f"tensor data overlaps or has a hole at {end}"))
        end = stop
    if end != size - 8 - length:
        raise CheckpointError(
            _damaged(path, f"its header describes {end} bytes of data, the file has {size - 8 - length}")
        )
    return specs, metadata, {name: 8 + length + start for name, (start, _) in spans.items()}


def _read_entry(path: Path, name: str, entry: object) -> tuple[TensorSpec, tuple[int, int]]:
    try:
        shape = tuple(entry["shape"])
        start, stop = entry["data_offsets"]
        dtype = DTYPES[entry["dtype"]]
        whole = all(type(n) is int and n >= 0 for n in (*shape, start, stop))
    except (KeyError, TypeError, ValueError) as error:
        raise CheckpointError(
            _damaged(path, f"tensor {name!r} has a header entry that makes no sense: {error!r}")
        ) from error
    spec = TensorSpec(shape, dtype)
    if not whole or stop - start != spec.nbytes:
        raise CheckpointError(_damaged(path, f"tensor {name!r} of shape {shape} does not fit its {stop - start} bytes"))
    return spec, (start, stop)


class SafetensorsWriter:
    """Writes a safetensors file tensor by tensor; the file appears whole or not at all.

    All names, shapes and types are given first, so that room for the header can stand in front while the data
    are still being made; ``metadata`` may be changed until the end, inside ``metadata_room`` bytes. Tensors lie
    in the order in which they are written. Use as a context manager: leaving it normally checks that every
    tensor was written, syncs and renames; leaving it by an exception leaves an older file as it was, and of the
    new one nothing but what is worth continuing.

    Args:
        path: the file to write.
        specs: the tensors to come.
        metadata: of the header.
        metadata_room: bytes by which the header may grow.
        overwrite: whether an existing file may be replaced.
        fingerprint: of whatever decides the bytes. Given one, what was committed survives an interruption, and
            a later writer with the same fingerprint goes on from there.
        restart: do not go on, begin again.

    Attributes:
        notes: what earlier commits of this file noted, to see where to go on.
        kept: after an exception, the partial file that was left to be continued; else None.

    Raises:
        CheckpointError: the file exists and ``overwrite`` is false, or the disk is too small.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        specs: Mapping[str, TensorSpec],
        metadata: Mapping[str, str],
        metadata_room: int = 0,
        overwrite: bool = False,
        fingerprint: str | None = None,
        restart: bool = False,
    ):
        self.path = Path(path)
        self.metadata = dict(metadata)
        self.notes: list[dict] = []
        self.kept: Path | None = None
        self._overwrite, self._restart = overwrite, restart
        self._missing = dict(specs)
        self._written: dict[str, tuple[TensorSpec, int]] = {}
        self._change: dict[str, dict] = {"tensors": {}, "dropped": []}  # since the last commit
        self._data_bytes = sum(spec.nbytes for spec in specs.values())
        most = 8 * self._data_bytes  # an offset with as many digits as any, should tensors be replaced by wider ones
        needed = len(self._encode_header({name: (spec, most) for name, spec in specs.items()})) + metadata_room
        self._header_bytes = -(-needed // 8) * 8
        self._file = PartialFile(self.path, fingerprint)

    def __enter__(self) -> "SafetensorsWriter":
        start = 8 + self._header_bytes
        check_writable(self.path, start + self._data_bytes, self._overwrite)
        try:
            for entry in self._file.open(start, start + self._data_bytes, self._restart):
                self._replay(entry)
        except BaseException:
            self._file.close(keep=True)
            raise
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Append one tensor; wider types first, where both are of odd size.

        Args:
            name: one of the names announced, each once.
            tensor: of exactly the shape and type announced; any device.
        """
        spec = self._missing[name]
        if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
            raise ValueError(f"{name} was announced as {spec}, got {tuple(tensor.shape)} {tensor.dtype}")
        offset = self._file.end - 8 - self._header_bytes
        if offset % spec.dtype.itemsize:
            raise ValueError(f"{name} would not lie at a multiple of its element size; write it before narrower ones")
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._file.append(memoryview(data.numpy()))
        self._record(name, spec, offset)

    def replace(self, names: Iterable[str], specs: Mapping[str, TensorSpec]) -> None:
        """Announce other tensors in the place of some that were not written yet."""
        for name in names:
            del self._missing[name]
            self._change["dropped"].append(name)
        self._missing.update(specs)

    def commit(self, note: dict) -> None:
        """What was written so far survives an interruption, together with ``note`` (JSON)."""
        self._file.commit({**self._change, "note": note})
        self._change = {"tensors": {}, "dropped": []}

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            if kind is None:
                self._finish()
        except WriteError:
            kind = WriteError
            raise
        except BaseException:
            kind = CheckpointError
            raise
        finally:
            # Bad input stays bad; an interruption, a full disk or a crash is worth continuing.
            keep = kind is not None and (issubclass(kind, WriteError) or not issubclass(kind, SVDQuantError))
            if self._file.close(keep):
                self.kept = self._file.partial

    def _finish(self) -> None:
        if self._missing:
            raise RuntimeError(f"never written: {sorted(self._missing)}")
        header = self._encode_header(self._written)
        if len(header) > self._header_bytes:
            raise RuntimeError("the metadata outgrew the room reserved for it")
        header = header.ljust(self._header_bytes, b" ")
        self._file.finish(len(header).to_bytes(8, "little") + header, self._overwrite)

    def _record(self, name: str, spec: TensorSpec, offset: int) -> None:
        self._missing.pop(name, None)
        self._written[name] = (spec, offset)
        self._change["tensors"][name] = [DTYPE_NAMES[spec.dtype], spec.shape, offset]

    def _replay(self, entry: dict) -> None:
        for name in entry["dropped"]:
            del self._missing[name]
        for name, (dtype, shape, offset) in entry["tensors"].items():
            self._record(name, TensorSpec(tuple(shape), DTYPES[dtype]), offset)
        self._change = {"tensors": {}, "dropped": []}
        self.notes.append(entry["note"])

    def _encode_header(self, tensors: Mapping[str, tuple[TensorSpec, int]]) -> bytes:
        header: dict[str, object] = {"__metadata__": self.metadata}
        for name, (spec, start) in tensors.items():
            header[name] = {
                "dtype": DTYPE_NAMES[spec.dtype],
                "shape": list(spec.shape),
                "data_offsets": [start, start + spec.nbytes],
            }
        return json.dumps(header, separators=(",", ":")).encode()


def check_writable(path: Path, nbytes: int, overwrite: bool) -> None:
    """Refuse early what would fail late.

    Raises:
        CheckpointError: ``path`` exists and ``overwrite`` is false, or its disk lacks ``nbytes``.
    """
    if path.exists() and not overwrite:
        raise CheckpointError(f"{path} already exists. Choose another name or turn on overwrite.")
    parent = next(folder for folder in path.absolute().parents if folder.exists())
    partial = partial_path(path)
    nbytes -= partial.stat().st_size if partial.exists() else 0  # of an interrupted run: continued or overwritten
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise CheckpointError(
            f"{path} needs {nbytes / 1e6:,.0f} MB, the disk of {parent} has {free / 1e6:,.0f} MB free."
        )
