"""Compiled kernels: finds or compiles the device code, picks tiles, launches."""

from __future__ import annotations

from functools import lru_cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

OLDEST = 75


def status(device: torch.device) -> tuple[bool, str]:
    """Whether the compiled kernels run on a device, and a sentence that says why or why not.

    Nothing is compiled: this says what the first launch would do.
    """
    if device.type != "cuda":
        return False, f"{device.type} is not a CUDA device"
    index = device.index
    if index is None:
        import torch

        index = torch.cuda.current_device()
    return _status(index)


def state_of(tensor: torch.Tensor) -> tuple[int, int]:
    """Changes when a tensor's memory or contents do (inference tensors do not count their changes)."""
    return tensor.data_ptr(), 0 if tensor.is_inference() else tensor._version


def prefers_int8(device: torch.device, out_features: int, in_features: int) -> bool:
    """Whether a layer of this size is best evaluated in 8 bits (``ops.as_int8``), as on H100 and H200."""
    return device.type == "cuda" and _prefers_int8(device.index, out_features, in_features)


# A layer asks while torch.compile traces it, which cannot enter the driver: the answer is a constant of the graph.
# As torch.compiler.assume_constant_result marks it, without its import of all of the compiler, a second's work.
prefers_int8._dynamo_marked_constant = True


@lru_cache(maxsize=4096)
def _prefers_int8(index: int, out_features: int, in_features: int) -> bool:
    import torch

    from . import plan

    return (
        torch.cuda.get_device_capability(index) == (9, 0)
        and _status(index)[0]
        and out_features % 8 == 0
        and in_features % plan.GROUP == 0
        and in_features <= plan.RowsBuild.most_k
    )


@lru_cache(maxsize=64)
def _status(index: int) -> tuple[bool, str]:
    import torch

    from ..errors import SVDQuantError
    from . import driver, library, nvrtc

    if torch.version.hip is not None:
        return False, "this torch is built for ROCm, and the kernels are CUDA's"
    major, minor = torch.cuda.get_device_capability(index)
    if major * 10 + minor < OLDEST:
        return False, f"the kernels need compute capability 7.5 or newer, this card has {major}.{minor}"
    try:
        driver.launcher()
        if (library.PREBUILT / library.source_hash()).is_dir():
            return True, "built ahead of time" + _sm_note(major)
        compiler = nvrtc.find()
    except SVDQuantError as error:
        return False, str(error)
    version = "{}.{}".format(*compiler.version)
    return True, f"compiled at first use by NVRTC {version}, which torch carries" + _sm_note(major)


def _sm_note(major: int) -> str:
    if major < 9:
        return ""
    if major == 9:
        return " (INT4, NVFP4 and INT8 layers are evaluated on its 8-bit tensor cores)"
    native = "NVFP4 runs on its 4-bit tensor cores; " if major == 12 else ""
    return f" ({native}this architecture emulates INT4 products: correct, but not fast)"
