"""A denoiser's steps as CUDA graphs: one is recorded, and the others are replayed.

A step of SDXL launches thousands of kernels, which takes a processor longer than a fast card needs to run them. A
graph has all of them in one launch. It repeats what was recorded to the letter, on the same memory, so it lasts for
one sampling run, in which weights stay what and where they are; and whatever may decide anew at every step (patches,
hooks, functions in the host's places, layers in main memory) is run as ever.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator
from functools import lru_cache
from types import FunctionType, MethodType
from typing import Any, NamedTuple

import torch

from ..ops.cuda import release_count

_log = logging.getLogger(__name__)
KEY = "svdquant_replay"
# What the host tells a model beside its inputs, and the model itself notes on its way. Anything else, unless it is
# turned off, is somebody's who wants to be asked.
_PLAIN_OPTIONS = {
    *("cond_or_uncond", "uuids", "sigmas", "sample_sigmas", "callbacks", "wrappers", "patches", "patches_replace"),
    *("original_shape", "activations_shape", "transformer_index", "block", "block_index", "block_type", "total_blocks"),
    "img_slice",
}
_MOST = 8  # graphs of a run: each keeps what its step computes with
_LEAST_STEPS = 6  # of a run: recording takes as long as two or three


class _Graph(NamedTuple):
    """A recorded call."""

    graph: torch.cuda.CUDAGraph
    inputs: list[torch.Tensor]
    output: torch.Tensor


class _Run:
    """A sampling run: what it has seen and recorded.

    Args:
        patcher: the host's handle of the model.
        steps: of the run.
    """

    def __init__(self, patcher: Any, steps: int):
        self._patcher = patcher
        self._records = steps >= _LEAST_STEPS
        self._seen: dict[tuple, torch.Tensor] = {}  # a place for the output
        self._graphs: dict[tuple, _Graph] = {}
        self._releases = release_count()

    def step(self, executor: Callable, args: tuple, kwargs: dict) -> torch.Tensor:
        """The model's call, replayed if it was recorded."""
        model = executor.class_obj
        if not self._records or getattr(self._patcher, "hook_patches", None) or _has_own_functions(model):
            return executor(*args, **kwargs)
        tensors: list[torch.Tensor] = []
        signature = _signature((args, kwargs), tensors)
        if signature is None or not tensors:
            return executor(*args, **kwargs)
        if self._releases != release_count():  # a layer is not what it was
            self._releases = release_count()
            self._seen.clear()
            self._graphs.clear()
        recorded = self._graphs.get(signature)
        if recorded is None:
            if signature not in self._seen:  # the first one compiles and allocates
                result = executor(*args, **kwargs)
                if isinstance(result, torch.Tensor):
                    self._seen[signature] = torch.empty_like(result)
                return result
            if len(self._graphs) == _MOST:
                return executor(*args, **kwargs)
            recorded = self._record(executor, args, kwargs, tensors, self._seen[signature])
            if recorded is None:
                return executor(*args, **kwargs)
            self._graphs[signature] = recorded
        for static, tensor in zip(recorded.inputs, tensors, strict=True):
            static.copy_(tensor)
        recorded.graph.replay()
        return recorded.output.clone()  # the next replay writes there

    def _record(
        self, executor: Callable, args: tuple, kwargs: dict, tensors: list[torch.Tensor], output: torch.Tensor
    ) -> _Graph | None:
        self._records = False  # if it does not work out, it will not later
        device = tensors[0].device
        if device.type != "cuda" or not _stays(executor.class_obj, device):
            return None
        inputs = [tensor.clone() for tensor in tensors]
        args, kwargs = _with_tensors((args, kwargs), iter(inputs))
        graph, collects = torch.cuda.CUDAGraph(), gc.isenabled()
        gc.disable()  # of tensors that others left it would free memory, which cannot be recorded
        try:
            with torch.cuda.device(device):
                torch.cuda.empty_cache()  # a graph has memory of its own
                stream = _recording_stream(device)
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    graph.capture_begin(capture_error_mode="thread_local")
                    try:
                        output.copy_(executor(*args, **kwargs))
                    finally:
                        graph.capture_end()
                torch.cuda.current_stream().wait_stream(stream)
        except RuntimeError as error:  # something waited for the device, or there is not enough memory
            _log.info("SVDQuant: steps are not replayed: %s", str(error).split("\n", 1)[0])
            _record_nothing(device)
            return None
        finally:
            if collects:
                gc.enable()
        self._records = True
        return _Graph(graph, inputs, output)


class StepReplay:
    """Two wrappers in the host's terms: of a sampling run, and of each call of the denoiser in it."""

    def __init__(self) -> None:
        self._run: _Run | None = None

    def outer_sample(self, executor: Callable, *args, **kwargs):
        """Around a run; its graphs end with it."""
        sigmas = kwargs["sigmas"] if "sigmas" in kwargs else args[3]
        before, self._run = self._run, _Run(executor.class_obj.model_patcher, len(sigmas) - 1)
        try:
            return executor(*args, **kwargs)
        finally:
            self._run = before

    def diffusion_model(self, executor: Callable, *args, **kwargs):
        """Around a call."""
        return executor(*args, **kwargs) if self._run is None else self._run.step(executor, args, kwargs)


def replay_steps(patcher: Any) -> Any:
    """A clone of the host's MODEL whose steps are replayed."""
    from comfy.patcher_extension import WrappersMP

    patcher, replay = patcher.clone(), StepReplay()
    wrappers = {
        WrappersMP.OUTER_SAMPLE: replay.outer_sample,
        WrappersMP.DIFFUSION_MODEL: replay.diffusion_model,
    }
    for kind, wrapper in wrappers.items():
        patcher.remove_wrappers_with_key(kind, KEY)
        patcher.add_wrapper_with_key(kind, KEY, wrapper)
    return patcher


@lru_cache(maxsize=16)
def _recording_stream(device: torch.device) -> torch.cuda.Stream:
    """One for all recordings: cuBLAS has memory for each stream it was used on, and may not find it while recording."""
    stream = torch.cuda.Stream(device)
    with torch.cuda.stream(stream):
        for dtype in (torch.float16, torch.float32):
            x = torch.ones((64, 64), device=device, dtype=dtype)
            torch.nn.functional.linear(x @ x, x, x[0])
    stream.synchronize()
    return stream


def _record_nothing(device: torch.device) -> None:
    """After a recording that failed, torch's random numbers believe to be recorded until one has succeeded."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.device(device), torch.cuda.stream(_recording_stream(device)):
        place = torch.zeros(1, device=device)
        graph.capture_begin(capture_error_mode="thread_local")
        place.add_(1)
        graph.capture_end()


def _signature(value: Any, tensors: list[torch.Tensor]) -> tuple | None:
    """What a recorded call may not differ in, tensors apart, which are noted; None for what is not recorded."""
    if isinstance(value, torch.Tensor):
        tensors.append(value)
        return value.shape, value.stride(), value.dtype, value.device
    if value is None or isinstance(value, (bool, int, float, str)):
        return type(value), value
    if isinstance(value, (list, tuple)):
        parts = [_signature(part, tensors) for part in value]
        return None if None in parts else (type(value), *parts)
    if isinstance(value, dict):
        if "wrappers" in value:  # options
            return (tuple(value.get("cond_or_uncond", ())),) if _are_plain(value) else None
        parts = [_signature(part, tensors) for part in value.values()]
        return None if None in parts else (*value, *parts)
    return None


def _with_tensors(value: Any, tensors: Iterator[torch.Tensor]) -> Any:
    """The same with other tensors in the places that :func:`_signature` noted."""
    if isinstance(value, torch.Tensor):
        return next(tensors)
    if isinstance(value, (list, tuple)):
        return type(value)([_with_tensors(part, tensors) for part in value])
    if isinstance(value, dict) and "wrappers" not in value:
        return {name: _with_tensors(part, tensors) for name, part in value.items()}
    return value


def _are_plain(options: dict) -> bool:
    """Whether nobody but the host and this file has a part in a call with these options."""
    return (
        all(name in _PLAIN_OPTIONS or value is None or value is False for name, value in options.items())
        and not any(options.get("patches", {}).values())
        and not any(options.get("patches_replace", {}).values())
        and options["wrappers"].get("diffusion_model", {}).keys() == {KEY}
    )


def _has_own_functions(module: torch.nn.Module) -> bool:
    """Whether somebody put a function in the place of the class's."""
    return any(
        isinstance(value, (FunctionType, MethodType)) and hasattr(type(module), name)
        for name, value in vars(module).items()
    )


def _stays(model: torch.nn.Module, device: torch.device) -> bool:
    """Whether a model is on the device as a whole, and calls nobody's functions but its classes'."""
    return all(tensor.device == device for tensor in (*model.parameters(), *model.buffers())) and not any(
        module._forward_hooks or module._forward_pre_hooks or _has_own_functions(module) for module in model.modules()
    )
