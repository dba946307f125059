"""What a model file is and how it will do on this machine, before anything is loaded: the loader's badge."""

import logging
from functools import lru_cache
from pathlib import Path

import comfy.model_management
import folder_paths

from ..errors import SVDQuantError
from ..kernels import prefers_int8, status
from ..layers import FOUR_BITS
from ..summary import Summary, summarize_file

FOLDER = "diffusion_models"


def badge(name: str) -> dict:
    """A model file and this machine, as JSON for the browser; reads the file's header, not its weights.

    Args:
        name: as the host lists it under ``models/diffusion_models``.

    Returns:
        ``error`` alone if the file cannot be used, and why; else ``family``, ``quantized``, ``formats``
        (layers by format), ``ranks`` (of the layers with a low-rank branch; 0 if none has), ``recipe``,
        ``file_bytes``, ``needed_bytes`` (weights and the host's reserve for activations), ``free_bytes``
        and ``total_bytes`` of ``device``, ``compiled_kernels``, ``kernels`` (a sentence) and ``warnings``
        (sentences).

    Raises:
        LookupError: the host lists no such file.
    """
    if name not in folder_paths.get_filename_list(FOLDER):
        raise LookupError(f"there is no model {name!r} in models/{FOLDER}")
    path = Path(folder_paths.get_full_path_or_raise(FOLDER, name)).resolve()
    # The folders themselves may be links: users keep models on other disks.
    if not any(path.is_relative_to(Path(root).resolve()) for root in folder_paths.get_folder_paths(FOLDER)):
        return {"error": f"{name} is a link that leads out of the model folders. It can be loaded, not previewed."}
    try:
        stat = path.stat()
        summary = _summary(path, stat.st_mtime_ns, stat.st_size)
    except SVDQuantError as error:
        return {"error": str(error).replace(str(path), name)}
    except Exception as error:  # whatever a damaged file provokes, the browser gets an answer
        logging.exception("SVDQuant: %s cannot be described", path)
        return {"error": f"{name} cannot be read: {error!r}"}
    return _on_this_machine(summary, stat.st_size)


@lru_cache(maxsize=1024)
def _summary(path: Path, modified_ns: int, size: int) -> Summary:
    return summarize_file(path)


def _on_this_machine(summary: Summary, file_bytes: int) -> dict:
    device = comfy.model_management.get_torch_device()
    weights = sum(layer.nbytes for layer in summary.layers) + summary.other_bytes
    # Where 4-bit layers are evaluated in 8 bits, each weight takes a byte beside the file's tensors.
    four_bits = [layer.shape for layer in summary.layers if layer.format.startswith(FOUR_BITS)]
    weights += sum(n * k for n, k in four_bits if prefers_int8(device, n, k))
    needed = int(weights + comfy.model_management.minimum_inference_memory())
    free = int(comfy.model_management.get_free_memory(device))
    total = int(comfy.model_management.get_total_memory(device))
    compiled, kernels = status(device)
    formats = [layer.format for layer in summary.layers]
    ranks = sorted({layer.rank for layer in summary.layers if layer.rank} or {0})
    return {
        "error": None,
        "family": summary.architecture,
        "quantized": summary.quantized,
        "formats": {name: formats.count(name) for name in sorted(set(formats))},
        "ranks": ranks,
        "recipe": summary.about.get("recipe"),
        "file_bytes": file_bytes,
        "needed_bytes": needed,
        "free_bytes": free,
        "total_bytes": total,
        "device": comfy.model_management.get_torch_device_name(device),
        "compiled_kernels": compiled,
        "kernels": kernels,
        "warnings": _warnings(summary.quantized, needed, free, total, compiled),
    }


def _warnings(quantized: bool, needed: int, free: int, total: int, compiled: bool) -> list[str]:
    warnings = []
    if not quantized:
        warnings.append(
            "A 16-bit file: load it with Load Diffusion Model, or make a 4-bit one of it with "
            "SVDQuant Quantize Checkpoint."
        )
    elif not compiled:
        warnings.append("Slow here: plain torch computes, not the compiled kernels.")
    if needed > total:
        warnings.append("Does not fit: ComfyUI will keep part of it in system memory, which is slow.")
    elif needed > free:
        warnings.append(
            "Needs more than is free now: ComfyUI unloads other models first; if that is not enough, part "
            "of this one stays in system memory, which is slow."
        )
    return warnings
