"""The CUDA driver, called directly: load machine code, launch a kernel.

The ahead-of-time build puts a small compiled launcher beside this package, which does the same with less
overhead per launch; without it these calls go through ctypes.
"""

from __future__ import annotations

import contextlib
import ctypes
import sys
from functools import lru_cache
from typing import Protocol

from ..errors import SVDQuantError

_MAX_DYNAMIC_SHARED = 8  # CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
_GROUP_BYTES = 128  # of 64 columns in 16 bits
_SWIZZLES = {64: 2, 128: 3}  # CU_TENSOR_MAP_SWIZZLE_64B and _128B, by the bytes of a box's row
_INVALID_CONTEXT = 201  # this thread has not used CUDA yet


_EARLY_IN_GRAPHS = 12030  # the version that captures such launches in graphs


class _LaunchAttribute(ctypes.Structure):
    """``CUlaunchAttribute``."""

    _fields_ = (("id", ctypes.c_int), ("padding", ctypes.c_int), ("value", ctypes.c_int * 16))


class _LaunchConfig(ctypes.Structure):
    """``CUlaunchConfig``."""

    _fields_ = (
        ("grid", ctypes.c_uint * 3),
        ("block", ctypes.c_uint * 3),
        ("shared", ctypes.c_uint),
        ("stream", ctypes.c_void_p),
        ("attributes", ctypes.POINTER(_LaunchAttribute)),
        ("count", ctypes.c_uint),
    )


# CU_LAUNCH_ATTRIBUTE_PROGRAMMATIC_STREAM_SERIALIZATION
_EARLY = _LaunchAttribute(id=6, value=(ctypes.c_int * 16)(1))


class DriverError(SVDQuantError):
    """The CUDA driver refused a call."""


class Launcher(Protocol):
    """What both launchers offer; handles are integers."""

    def load(self, image: bytes, entry: str, shared_bytes: int) -> int:
        """Load machine code into the current context; the handle of a kernel that may use that much memory."""

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        stream: int,
        arguments: bytes,
        early: bool,
    ) -> None:
        """Start a kernel whose one parameter is a structure with these bytes.

        Args:
            early: before the kernel in front of it has ended, whose results it waits for itself (Hopper and later).
        """


class DriverLauncher:
    """A :class:`Launcher` over ctypes."""

    def __init__(self) -> None:
        self._driver = _library()
        self._check(self._driver.cuInit(0), "cuInit")
        self._launch = self._driver.cuLaunchKernel
        self._launch.argtypes = [
            ctypes.c_void_p,
            *[ctypes.c_uint] * 7,
            *[ctypes.c_void_p] * 3,
        ]
        version = ctypes.c_int()
        self._check(self._driver.cuDriverGetVersion(ctypes.byref(version)), "cuDriverGetVersion")
        self._knows_early = version.value >= _EARLY_IN_GRAPHS
        # It takes a launch's configuration in one piece, which spares half of what ctypes costs.
        self._launch_configured = getattr(self._driver, "cuLaunchKernelEx", None)
        if self._launch_configured is not None:
            self._launch_configured.argtypes = [ctypes.c_void_p] * 4

    def load(self, image: bytes, entry: str, shared_bytes: int) -> int:
        module, function = ctypes.c_void_p(), ctypes.c_void_p()
        self._check(self._driver.cuModuleLoadData(ctypes.byref(module), image), f"loading {entry}")
        self._check(self._driver.cuModuleGetFunction(ctypes.byref(function), module, entry.encode()), entry)
        self._check(
            self._driver.cuFuncSetAttribute(function, _MAX_DYNAMIC_SHARED, shared_bytes),
            f"giving {entry} {shared_bytes} bytes of shared memory",
        )
        return function.value

    def launch(
        self,
        function: int,
        grid: tuple[int, int, int],
        threads: int,
        shared: int,
        stream: int,
        arguments: bytes,
        early: bool,
    ) -> None:
        # The driver copies the structure out of the bytes object before it returns.
        parameters = ctypes.byref(ctypes.c_char_p(arguments))
        if self._launch_configured is not None:
            start = self._launch_configured
            call = (_config(grid, threads, shared, stream, early and self._knows_early), function, parameters, None)
        else:  # before CUDA 11.8
            start, call = self._launch, (function, *grid, threads, 1, 1, shared, stream, parameters, None)
        result = start(*call)
        if result == _INVALID_CONTEXT:
            import torch

            torch.cuda.synchronize()  # binds this thread to the device
            result = start(*call)
        if result:
            self._check(result, f"launching {grid} blocks of {threads} threads, {shared} bytes of shared memory")

    def _check(self, result: int, what: str) -> None:
        if result:
            text = ctypes.c_char_p()
            self._driver.cuGetErrorString(result, ctypes.byref(text))
            message = text.value.decode() if text.value else "unknown error"
            raise DriverError(f"CUDA driver: {message} ({result}) while {what}")


@lru_cache(maxsize=4096)
def _config(grid: tuple[int, int, int], threads: int, shared: int, stream: int, early: bool):
    """A launch's, to pass on; they are few, and making one takes as long as the launch."""
    return ctypes.pointer(_LaunchConfig(grid, (threads, 1, 1), shared, stream, ctypes.pointer(_EARLY), int(early)))


def _library() -> ctypes.CDLL:
    return ctypes.CDLL("nvcuda.dll" if sys.platform == "win32" else "libcuda.so.1")


def capture_id(stream: int) -> int:
    """Which capture of a graph a stream is in; 0 outside of any.

    Raises:
        DriverError: the driver does not say.
    """
    status, identity = ctypes.c_int(), ctypes.c_uint64()
    result = _library().cuStreamGetCaptureInfo_v2(
        ctypes.c_void_p(stream), ctypes.byref(status), ctypes.byref(identity), None, None, None
    )
    if result:
        raise DriverError(f"CUDA driver: error {result} while asking for a stream's capture")
    return identity.value if status.value else 0


@lru_cache(maxsize=16384)
def tensor_map(pointer: int, rows: int, row_bytes: int, box_rows: int, box_bytes: int, swizzled: bool) -> bytes:
    """How a Hopper kernel is told of a contiguous matrix that it copies boxes of (``cuTensorMapEncodeTiled``).

    Elements are bytes: what is beyond the edges reads as zeros of any type. It depends on its arguments
    alone, so it may be kept.

    Args:
        pointer: on a 16-byte boundary.
        row_bytes: a multiple of 16.
        swizzled: in shared memory 16-byte chunk c of a row lies at c ^ (row % 8) where a box's rows are 128 bytes,
            at c ^ (row / 2 % 4) where they are 64.

    Raises:
        DriverError: the driver refuses.
    """
    return _encoded(
        pointer, (row_bytes, rows), (row_bytes,), (box_bytes, box_rows), _SWIZZLES[box_bytes] if swizzled else 0
    )


@lru_cache(maxsize=16384)
def grouped_tensor_map(
    pointer: int, rows: int, row_bytes: int, box_rows: int, box_groups: int, stride: int = 0
) -> bytes:
    """The same of a matrix taken as groups of 128 bytes along its rows: (groups, rows, 128 bytes), swizzled.

    A box has its groups one after another, each with all of the box's rows. Rows are ``stride`` bytes apart, if they
    do not follow one another.
    """
    sizes, strides = (_GROUP_BYTES, rows, -(-row_bytes // _GROUP_BYTES)), (stride or row_bytes, _GROUP_BYTES)
    return _encoded(pointer, sizes, strides, (_GROUP_BYTES, box_rows, box_groups), _SWIZZLES[128])


def _encoded(
    pointer: int, sizes: tuple[int, ...], strides: tuple[int, ...], box: tuple[int, ...], swizzle: int
) -> bytes:
    """``cuTensorMapEncodeTiled`` of elements that are bytes, innermost first."""
    encoded = (ctypes.c_uint64 * 32)()
    aligned = -ctypes.addressof(encoded) % 64
    target = ctypes.c_void_p(ctypes.addressof(encoded) + aligned)
    dimensions = len(sizes)
    result = _library().cuTensorMapEncodeTiled(
        target,
        0,  # bytes
        dimensions,
        ctypes.c_void_p(pointer),
        (ctypes.c_uint64 * dimensions)(*sizes),
        (ctypes.c_uint64 * (dimensions - 1))(*strides),
        (ctypes.c_uint32 * dimensions)(*box),
        (ctypes.c_uint32 * dimensions)(*[1] * dimensions),
        0,  # not interleaved
        swizzle,
        3,  # fetched by 256 bytes to the second-level cache
        0,  # zeros beyond the edges
    )
    if result:
        raise DriverError(f"CUDA driver: error {result} while describing a tensor of {sizes} bytes")
    return ctypes.string_at(target, 128)


def clusters_at_once(function: int, threads: int, shared: int, cluster: int) -> int:
    """How many clusters of so many blocks of a kernel the current device runs at the same time.

    Raises:
        DriverError: the driver does not say.
    """
    count = ctypes.c_int()
    attribute = _LaunchAttribute(4, 0, (cluster, 1, 1))  # CU_LAUNCH_ATTRIBUTE_CLUSTER_DIMENSION
    config = _LaunchConfig((cluster, 1, 1), (threads, 1, 1), shared, None, ctypes.pointer(attribute), 1)
    result = _library().cuOccupancyMaxActiveClusters(
        ctypes.byref(count), ctypes.c_void_p(function), ctypes.byref(config)
    )
    if result:
        raise DriverError(f"CUDA driver: error {result} while asking for clusters of {cluster} blocks")
    return count.value


@lru_cache(maxsize=1)
def launcher() -> Launcher:
    """The compiled launcher if it was built, else the one over ctypes.

    Raises:
        DriverError: there is no CUDA driver.
    """
    with contextlib.suppress(ImportError):
        from . import _launcher

        return _launcher.Launcher()
    try:
        return DriverLauncher()
    except OSError as error:
        raise DriverError(f"the CUDA driver library does not load: {error}") from error
