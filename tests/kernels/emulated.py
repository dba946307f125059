"""A card that is not there: kernels compiled for the CPU, and launched by the same code as on a GPU.

``emulation/device.cuh`` takes the place of ``csrc/device.cuh``, which is where kernels reach the hardware. So this
shows what is wrong in a kernel, in the plan of its launch or in its arguments, but not what a compiler for cards makes
of it, nor how fast it is.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import pytest
import torch

from svdq_core.kernels import block, descent, gemv, int8, launch, library, nvfp4, plan, rows, statistics, w4a4

_DYNAMIC = re.compile(r"extern __shared__ __align__\(\d+\) u8 (\w+)\[\];")
HERE = Path(__file__).parent / "emulation"
CARD = 89, 3  # capability and multiprocessors: few, so that they share a small input's rows


class Emulator:
    """Builds as functions of the CPU, compiled once each.

    Args:
        folder: for sources and libraries.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        self.compiler = shutil.which("g++") or shutil.which("clang++")
        for name, text in library.sources().items():
            (folder / name).write_text(_DYNAMIC.sub(r"u8* const \1 = emulated_memory;", text))
        for name in ("device.cuh", "run.cpp"):
            shutil.copyfile(HERE / name, folder / name)
        self.function = lru_cache(maxsize=None)(self._function)

    def _function(self, build: plan.Build) -> Callable[..., None]:
        target = self.folder / f"{plan.build_name(build)}.so"
        defines = build.defines() | {"SVDQ_SOURCE": f'"{build.source}"', "SVDQ_ENTRY": build.entry}
        command = [self.compiler, "-O1", "-std=c++17", "-shared", "-fPIC", "-pthread", "-w", "-o", str(target)]
        command += [f"-D{name}={value}" for name, value in defines.items()]
        subprocess.run([*command, str(self.folder / "run.cpp")], check=True)
        run = ctypes.CDLL(str(target)).run
        run.argtypes = [ctypes.c_char_p, *[ctypes.c_uint] * 4]
        return run

    def kernel_of(self, index: int, build: plan.Build, grid: tuple[int, int, int], shared: int) -> launch.Kernel:
        """``launch.kernel_of``."""

        def start(function, grid, threads, shared, stream, arguments, early):
            self.function(build)(arguments, *grid, threads)

        return launch.Kernel(start, 0, grid, build.threads, shared)


def use_card(monkeypatch: pytest.MonkeyPatch, kernel_of: Callable[..., launch.Kernel], card: tuple[int, int]) -> None:
    """Tensors of the CPU count as a card's, which launches what ``kernel_of`` makes."""
    counters = torch.zeros(4096, dtype=torch.int32)
    for module in (launch, nvfp4, int8, gemv, rows, block, statistics, descent):
        monkeypatch.setattr(module, "kernel_of", kernel_of, raising=False)
        monkeypatch.setattr(module, "card", lambda index: card, raising=False)
        monkeypatch.setattr(module, "starts_early", lambda index: False, raising=False)
        monkeypatch.setattr(module, "zero_counters", lambda *asked: counters, raising=False)
    monkeypatch.setattr(launch, "_device_count", lambda: 1)
    monkeypatch.setattr(torch._C, "_cuda_getCurrentRawStream", lambda index: 0, raising=False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    # Caches keep kernels of a real card from here, and these from other tests.
    names = {
        launch: ("gemm_kernel", "quantize_kernel"),
        nvfp4: ("quantizer", "_gemm_kernel"),
        int8: ("_quantize_kernel", "_gemm_kernel"),
        gemv: ("_kernel",),
        block: ("_kernel",),
        statistics: ("_kernel",),
        descent: ("_kernel",),
    }
    for module, cached in names.items():
        for name in cached:
            monkeypatch.setattr(module, name, getattr(module, name).__wrapped__)
    for name in ("gemm_kernel", "quantize_kernel"):
        monkeypatch.setattr(w4a4, name, getattr(launch, name))
