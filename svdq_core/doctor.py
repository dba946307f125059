"""Which backend runs on this machine, and why: the first thing to look at when something is slow."""

import platform

import torch

from . import __version__
from .kernels import status


def diagnose() -> str:
    """A short report for a person, or for a bug report."""
    lines = [
        f"ComfyUI-SVDQuant {__version__}, torch {torch.__version__}, "
        f"Python {platform.python_version()}, {platform.system()} {platform.machine()}",
    ]
    if not torch.cuda.is_available():
        lines.append("cpu: reference backend (plain torch): no CUDA device is visible to torch")
        return "\n".join(lines)
    for index in range(torch.cuda.device_count()):
        name = torch.cuda.get_device_name(index)
        major, minor = torch.cuda.get_device_capability(index)
        lines.append(f"cuda:{index} {name} (sm_{major}{minor}): {_backend(index)}")
    return "\n".join(lines)


def _backend(index: int) -> str:
    ok, why = status(torch.device("cuda", index))
    return f"{'compiled kernels' if ok else 'reference backend (plain torch)'}: {why}"
