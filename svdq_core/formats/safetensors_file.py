"""safetensors files: opened with their header checked, written as a stream and put in place atomically.

A file is 8 bytes of header length, a JSON header, then the tensors' bytes. Nothing the header says is
believed before it was compared with the file.
"""

import json
import math
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from types import TracebackType

import torch
from safetensors import SafetensorError, safe_open

from ..errors import CheckpointError

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
        self.specs, self.metadata = _read_header(self.path)

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


def _damaged(path: Path, why: str) -> str:
    return f"{path} is damaged or incomplete ({why}). Download or create it again."


def _read_header(path: Path) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """The header, held against the file: sizes add up, offsets stay inside and leave no holes."""
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
    specs, spans = {}, []
    for name, entry in header.items():
        specs[name], span = _read_entry(path, name, entry)
        spans.append(span)
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise CheckpointError(_damaged(path, f"tensor data overlaps or has a hole at {end}"))
        end = stop
    if end != size - 8 - length:
        raise CheckpointError(
            _damaged(path, f"its header describes {end} bytes of data, the file has {size - 8 - length}")
        )
    return specs, metadata


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

    All names, shapes and types are given first, so that the header can stand in front while the data
    is still being made; ``metadata`` may be changed until the end, inside ``metadata_room`` bytes.
    Use as a context manager: leaving it normally checks that every tensor was written, syncs and
    renames; leaving it by an exception removes the temporary file and leaves an older file as it was.

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
    ):
        self.path = Path(path)
        self.metadata = dict(metadata)
        self._overwrite = overwrite
        # Wide types first: every tensor then starts at a multiple of its element size.
        self._specs = dict(sorted(specs.items(), key=lambda item: (-item[1].dtype.itemsize, item[0])))
        self._missing = set(self._specs)
        self._offsets, self._data_bytes = {}, 0
        for name, spec in self._specs.items():
            self._offsets[name] = self._data_bytes
            self._data_bytes += spec.nbytes
        needed = len(self._encode_header()) + metadata_room
        self._header_bytes = -(-needed // 8) * 8
        self._file = None

    def __enter__(self) -> "SafetensorsWriter":
        check_writable(self.path, 8 + self._header_bytes + self._data_bytes, self._overwrite)
        temporary = self.path.with_name(f".{self.path.name}.{uuid.uuid4().hex[:8]}.partial")
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            self._file = temporary.open("xb")
        except OSError as error:
            raise CheckpointError(f"{self.path.parent} cannot be written: {error}") from error
        return self

    def write(self, name: str, tensor: torch.Tensor) -> None:
        """Write one tensor, in any order, each once.

        Args:
            name: one of the names given at the start.
            tensor: of exactly the shape and type given there; any device.
        """
        spec = self._specs[name]
        if tuple(tensor.shape) != spec.shape or tensor.dtype != spec.dtype:
            raise ValueError(f"{name} was announced as {spec}, got {tuple(tensor.shape)} {tensor.dtype}")
        self._missing.remove(name)
        data = tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8)
        self._put(8 + self._header_bytes + self._offsets[name], data.numpy())

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        temporary = Path(self._file.name)
        try:
            if kind is None:
                self._finish()
                self._file.close()
                _replace(temporary, self.path, self._overwrite)
        finally:
            self._file.close()
            temporary.unlink(missing_ok=True)

    def _finish(self) -> None:
        if self._missing:
            raise RuntimeError(f"never written: {sorted(self._missing)}")
        header = self._encode_header()
        if len(header) > self._header_bytes:
            raise RuntimeError("the metadata outgrew the room reserved for it")
        header = header.ljust(self._header_bytes, b" ")
        self._put(0, len(header).to_bytes(8, "little") + header)
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
        except OSError as error:
            raise CheckpointError(f"{self.path} could not be written: {error}") from error

    def _put(self, offset: int, data: object) -> None:
        try:
            self._file.seek(offset)
            self._file.write(data)
        except OSError as error:
            raise CheckpointError(
                f"{self.path} could not be written: {error}. Nothing was left behind; "
                "free some disk space and try again."
            ) from error

    def _encode_header(self) -> bytes:
        header: dict[str, object] = {"__metadata__": self.metadata}
        for name, spec in self._specs.items():
            start = self._offsets[name]
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
    free = shutil.disk_usage(parent).free
    if free < nbytes:
        raise CheckpointError(
            f"{path} needs {nbytes / 1e6:,.0f} MB, the disk of {parent} has {free / 1e6:,.0f} MB free."
        )


def _replace(temporary: Path, path: Path, overwrite: bool) -> None:
    try:
        if path.exists() and not overwrite:
            raise CheckpointError(f"{path} appeared while it was being made; it was left as it is.")
        os.replace(temporary, path)
    except PermissionError as error:
        raise CheckpointError(
            f"{path} is in use and cannot be replaced: unload the model that was loaded from it, "
            "or choose another name."
        ) from error
