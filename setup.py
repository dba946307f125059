"""Builds the optional parts: ahead-of-time kernels and a compiled launcher. Neither is needed to run.

    python setup.py build_kernels [--architectures 86,89] [--jobs 4]    where nvcc is found
    python setup.py build_ext --inplace                                 where pybind11 and a C++ compiler are

Without them the kernels are compiled at first use by the NVRTC that torch carries, and launched through
ctypes. The metadata is in pyproject.toml.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from setuptools import Command, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
sys.path.insert(0, str(ROOT))


def find_nvcc() -> str | None:
    """nvcc from CUDA_HOME, CUDA_PATH or PATH."""
    for variable in ("CUDA_HOME", "CUDA_PATH"):
        found = os.environ.get(variable) and shutil.which("nvcc", path=str(Path(os.environ[variable]) / "bin"))
        if found:
            return found
    return shutil.which("nvcc")


class BuildKernels(Command):
    """Compile every build in the launch plan to a fat binary for several architectures."""

    description = "compile the kernels ahead of time with nvcc"
    user_options = [  # noqa: RUF012 (setuptools reads it from the class)
        ("architectures=", None, "comma-separated compute capabilities; default: all in the launch plan"),
        ("jobs=", "j", "compilers at once"),
        ("match=", None, "only builds whose name contains this"),
    ]

    def initialize_options(self) -> None:
        self.architectures = None
        self.jobs = 2
        self.match = ""

    def finalize_options(self) -> None:
        self.jobs = int(self.jobs)

    def run(self) -> None:
        from svdq_core.kernels import library, plan

        nvcc = find_nvcc()
        if nvcc is None:
            print("nvcc was not found: kernels will be compiled at first use by NVRTC instead")
            return
        chosen = [int(a) for a in self.architectures.split(",")] if self.architectures else list(plan.ARCHITECTURES)
        wanted: dict[plan.Build, list[int]] = defaultdict(list)
        for architecture in chosen:
            for build in plan.all_builds(architecture):
                if self.match in plan.build_name(build):
                    wanted[build].append(architecture)
        folder = library.PREBUILT / library.source_hash()
        shutil.rmtree(library.PREBUILT, ignore_errors=True)
        folder.mkdir(parents=True)
        with ThreadPoolExecutor(self.jobs) as pool:
            list(pool.map(lambda item: self._compile(nvcc, folder, *item), wanted.items()))
        print(f"{len(wanted)} fat binaries for {', '.join(f'sm_{a}' for a in chosen)} in {folder}")

    def _compile(self, nvcc: str, folder: Path, build, architectures: list[int]) -> None:
        from svdq_core.kernels import plan

        command = [nvcc, "-std=c++17", "-fatbin", "-o", str(folder / f"{plan.build_name(build)}.fatbin")]
        command += [f"-D{name}={value}" for name, value in build.defines().items()]
        for architecture in architectures:
            name = plan.ARCHITECTURES[architecture]
            command.append(f"-gencode=arch=compute_{name},code=sm_{name}")
        subprocess.run([*command, str(ROOT / "csrc" / build.source)], check=True)


class OptionalBuildExt(build_ext):
    """Goes on without the launcher where it does not compile."""

    def build_extension(self, ext) -> None:
        try:
            super().build_extension(ext)
        except Exception as error:
            print(f"the compiled launcher was not built ({error}): launches will go through ctypes")


def extensions() -> list:
    """The launcher, if pybind11 is there to build it."""
    try:
        from pybind11.setup_helpers import Pybind11Extension
    except ImportError:
        return []
    return [Pybind11Extension("svdq_core.kernels._launcher", ["csrc/launcher.cpp"], cxx_std=17)]


setup(ext_modules=extensions(), cmdclass={"build_kernels": BuildKernels, "build_ext": OptionalBuildExt})
