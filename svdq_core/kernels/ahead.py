"""Compiles in the background what a LoRA will want, so that adding one to a loaded model stops for nothing."""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable
from dataclasses import replace
from itertools import product

import torch

from ..errors import SVDQuantError
from ..formats import comfy_quant
from . import library, plan, status

_log = logging.getLogger(__name__)
_W4A4_INPUTS = ((False, plan.PLAIN), (True, plan.PLAIN), (False, plan.ROTATE))  # (unsigned, prologue)
_EXTENDED_RANK = 48  # any rank above 32 runs the same builds; GEMMs take every rank as they are


def adapter_builds(
    capability: int, multiprocessors: int, bf16: bool, formats: Iterable[str]
) -> list[plan.QuantizeBuild | plan.Nvfp4QuantizeBuild]:
    """The quantizers that layers of these formats run once an adapter extends their rank."""
    card, shape, hopper = (capability, multiprocessors), (4608, 3072, _EXTENDED_RANK, bf16), capability == plan.HOPPER
    builds = []
    if comfy_quant.SVDQUANT_W4A4 in formats:
        outputs = (plan.IMAGE, plan.BYTES) if hopper else (plan.NIBBLES,)
        builds += [
            replace(plan.quantize_launch(*card, *shape, unsigned, prologue, output).build, shares=shares)
            for (unsigned, prologue), output in product(_W4A4_INPUTS, outputs)
            for shares in plan.quantize_sharing(output)
        ]
    if comfy_quant.SVDQUANT_NVFP4 in formats:
        builds.append(plan.nvfp4_quantize_launch(*card, *shape, plan.WIDE if hopper else plan.CODES).build)
    if comfy_quant.SVDQUANT_W8A8 in formats:
        builds.append(plan.nvfp4_quantize_launch(*card, *shape, plan.ABSMAX).build)
    return builds


def compile_for_adapters(device: torch.device, dtype: torch.dtype, formats: Iterable[str]) -> threading.Thread | None:
    """Start compiling :func:`adapter_builds` to the disk cache; what is there already costs a look.

    Args:
        device: where the model will run; nothing happens if the kernels do not run there.
        dtype: that it will compute in.
        formats: of its quantized layers.

    Returns:
        The thread that works on it, or None.
    """
    if dtype not in (torch.bfloat16, torch.float16) or not status(device)[0]:
        return None
    properties = torch.cuda.get_device_properties(device)
    capability = 10 * properties.major + properties.minor
    builds = adapter_builds(capability, properties.multi_processor_count, dtype == torch.bfloat16, set(formats))

    def work() -> None:
        try:
            for build in builds:
                if plan.runs_on(build, capability) and library.prebuilt_code(build, capability) is None:
                    library.machine_code(build, capability)
        except SVDQuantError as error:  # the first launch will say so to the user
            _log.debug("compiling ahead: %s", error)

    thread = threading.Thread(target=work, name="svdquant-compile", daemon=True)
    thread.start()
    return thread
