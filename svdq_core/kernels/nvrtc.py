"""Compiles device code with the NVRTC library that torch carries; no CUDA toolkit is needed."""

from __future__ import annotations

import ctypes
import os
import sys
import sysconfig
from collections.abc import Iterator, Mapping, Sequence
from functools import lru_cache
from pathlib import Path

from ..errors import SVDQuantError


class CompilerError(SVDQuantError):
    """NVRTC is missing, or did not compile a kernel."""


def _candidates() -> Iterator[str]:
    """Paths of NVRTC, likeliest first: torch's own, NVIDIA's packages, a toolkit, the loader's choice."""
    pattern = "nvrtc64_*.dll" if sys.platform == "win32" else "libnvrtc.so*"
    folders: list[Path] = []
    for root in dict.fromkeys(sysconfig.get_path(name) for name in ("purelib", "platlib")):
        folders += [Path(root) / "torch/lib", *sorted(Path(root).glob("nvidia/cu*/lib"))]
        folders += [Path(root) / "nvidia/cuda_nvrtc/lib", *sorted(Path(root).glob("nvidia/cu*/bin/**"))]
    if "torch" in sys.modules:
        folders.insert(0, Path(sys.modules["torch"].__file__).parent / "lib")
    for variable in ("CUDA_PATH", "CUDA_HOME"):
        if os.environ.get(variable):
            folders += [Path(os.environ[variable]) / name for name in ("lib64", "bin", "bin/x64")]
    for folder in folders:
        # "alt" is a build for other drivers, "builtins" a part that the library loads itself.
        names = [p for p in folder.glob(pattern) if "alt" not in p.name and "builtins" not in p.name]
        yield from (str(path) for path in sorted(names))
    if sys.platform != "win32":
        yield from ("libnvrtc.so.13", "libnvrtc.so.12", "libnvrtc.so")


class Compiler:
    """The NVRTC library.

    Attributes:
        path: where it was found.
        version: (major, minor).
    """

    def __init__(self, path: str):
        self.path = path
        self._library = ctypes.CDLL(path)
        self._library.nvrtcGetErrorString.restype = ctypes.c_char_p
        major, minor = ctypes.c_int(), ctypes.c_int()
        self._check(self._library.nvrtcVersion(ctypes.byref(major), ctypes.byref(minor)), "version")
        self.version = major.value, minor.value

    def compile(self, name: str, source: str, headers: Mapping[str, str], options: Sequence[str]) -> bytes:
        """Compile one program to machine code (a cubin).

        Raises:
            CompilerError: with the compiler's log.
        """
        program = ctypes.c_void_p()
        texts = (ctypes.c_char_p * len(headers))(*(text.encode() for text in headers.values()))
        names = (ctypes.c_char_p * len(headers))(*(header.encode() for header in headers))
        self._check(
            self._library.nvrtcCreateProgram(
                ctypes.byref(program), source.encode(), name.encode(), len(headers), texts, names
            ),
            name,
        )
        try:
            flags = (ctypes.c_char_p * len(options))(*(option.encode() for option in options))
            result = self._library.nvrtcCompileProgram(program, len(options), flags)
            if result:
                log = self._bytes(program, "ProgramLog").decode(errors="replace").strip("\0\n ")
                self._check(result, f"{name} with {' '.join(options)}\n{log}")
            return self._bytes(program, "CUBIN")
        finally:
            self._library.nvrtcDestroyProgram(ctypes.byref(program))

    def _bytes(self, program: ctypes.c_void_p, what: str) -> bytes:
        size = ctypes.c_size_t()
        self._check(getattr(self._library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)), what)
        buffer = ctypes.create_string_buffer(size.value)
        self._check(getattr(self._library, f"nvrtcGet{what}")(program, buffer), what)
        return buffer.raw

    def _check(self, result: int, what: str) -> None:
        if result:
            message = self._library.nvrtcGetErrorString(result).decode()
            raise CompilerError(f"NVRTC ({self.path}) failed with {message}: {what}")


@lru_cache(maxsize=1)
def find() -> Compiler:
    """The NVRTC of this installation.

    Raises:
        CompilerError: there is none that loads.
    """
    for path in _candidates():
        try:
            return Compiler(path)
        except OSError:
            continue
    raise CompilerError(
        "the runtime compiler NVRTC was not found beside torch: install a CUDA build of torch, or nvidia-cuda-nvrtc"
    )
