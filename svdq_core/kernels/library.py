"""Machine code for builds: from the ahead-of-time build, from the disk cache, or compiled now."""

from __future__ import annotations

import contextlib
import hashlib
import logging
import threading
import time
from functools import lru_cache
from pathlib import Path

from ..errors import SVDQuantError
from . import cache, driver, nvrtc
from .plan import ARCHITECTURES, Build, build_name

_log = logging.getLogger(__name__)
_SOURCES = Path(__file__).resolve().parents[2] / "csrc"
_PACKAGED_SOURCES = Path(__file__).resolve().parent / "csrc"
PREBUILT = Path(__file__).resolve().parent / "prebuilt"

_functions: dict[tuple[int, Build], int] = {}
_lock = threading.Lock()


@lru_cache(maxsize=1)
def sources() -> dict[str, str]:
    """The device code, by file name."""
    folder = _SOURCES if _SOURCES.is_dir() else _PACKAGED_SOURCES
    return {path.name: path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.cu*"))}


@lru_cache(maxsize=1)
def source_hash() -> str:
    """Identifies the device code."""
    digest = hashlib.sha256()
    for name, text in sources().items():
        digest.update(f"{name}\0{text}\0".encode())
    return digest.hexdigest()[:16]


def options(build: Build, architecture: str) -> list[str]:
    """Compiler options of a build."""
    defines = [f"-D{name}={value}" for name, value in build.defines().items()]
    return ["-std=c++17", f"-arch=sm_{architecture}", *defines]


def prebuilt_code(build: Build, capability: int) -> bytes | None:
    """The build's code from the ahead-of-time build of this very source, if there is one."""
    path = PREBUILT / source_hash() / f"{build_name(build)}.fatbin"
    return path.read_bytes() if capability in ARCHITECTURES and path.is_file() else None


def machine_code(build: Build, capability: int) -> bytes:
    """The build's code for an architecture, from the cache or compiled.

    Raises:
        nvrtc.CompilerError: it is not cached, and cannot be compiled.
    """
    compiler = nvrtc.find()
    flags = options(build, ARCHITECTURES.get(capability, f"{capability}"))
    version = "{}.{}".format(*compiler.version)
    key = hashlib.sha256("\0".join([source_hash(), build.source, version, *flags]).encode()).hexdigest()[:40]
    code = cache.read(key)
    if code is None:
        _log.info("compiling %s for sm_%d (once per card and version) ...", build_name(build), capability)
        started = time.perf_counter()
        headers = {name: text for name, text in sources().items() if name.endswith(".cuh")}
        code = compiler.compile(build.source, sources()[build.source], headers, flags)
        cache.write(key, code)
        _log.info("compiled %s in %.1f s", build_name(build), time.perf_counter() - started)
    return code


def function(device: int, capability: int, build: Build) -> int:
    """The handle of a loaded kernel; ``device`` must be torch's current one."""
    found = _functions.get((device, build))
    if found is None:
        with _lock:
            found = _functions.get((device, build))
            if found is None:
                found = _load(build, capability)
                _functions[device, build] = found
    return found


def _load(build: Build, capability: int) -> int:
    launcher = driver.launcher()
    code = prebuilt_code(build, capability)
    if code is not None:
        # A fat binary may have been built for other cards only.
        with contextlib.suppress(RuntimeError, SVDQuantError):
            return launcher.load(code, build.entry, build.shared_bytes())
    return launcher.load(machine_code(build, capability), build.entry, build.shared_bytes())
