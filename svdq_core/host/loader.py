"""From a quantized file to a MODEL of the host."""

import inspect
from dataclasses import replace
from os import PathLike

import comfy.sd
import torch

from ..architectures import detect
from ..errors import CheckpointError
from ..formats.comfy_quant import QuantizedCheckpoint
from ..kernels import prefers_int8
from ..kernels.ahead import compile_for_adapters
from ..layers import FOUR_BITS
from .flux import fuse_blocks
from .operations import DeferredOperations, QuantizedLinear
from .patcher import SVDQuantModelPatcher

REPORT = "svdquant_report"  # attachment of the patcher: the file's report, for Inspect


def load_quantized(path: str | PathLike, exact: bool = False) -> SVDQuantModelPatcher:
    """Load a quantized denoiser; no GPU memory is taken before the host asks for it.

    Args:
        path: of the file.
        exact: evaluate layers as the file says, on any card (``SVDQLinear.exact``).

    Raises:
        CheckpointError: the file is damaged, not quantized, of an unknown family, or does not fit the
            host's model.
    """
    checkpoint = QuantizedCheckpoint(path)
    # The host detects the model from weights' shapes, so quantized weights are shown in their 16-bit
    # shape, without data.
    state_dict = {name: checkpoint.file.get(name) for name in checkpoint.plain}
    for name, layer in checkpoint.layers.items():
        state_dict[f"{name}.weight"] = torch.empty(
            (layer.out_features, layer.in_features), dtype=layer.dtype, device="meta"
        )
    detect(state_dict, str(path))
    patcher = _host_load(dict(state_dict))  # the host empties what it is given
    if patcher is None:
        raise CheckpointError(
            f"{path}: this ComfyUI does not know the model. The file is incomplete, or the model is "
            "newer than this ComfyUI."
        )
    model = patcher.model
    compute = model.manual_cast_dtype or model.get_dtype()
    for name in checkpoint.layers:
        _replace(checkpoint, name, model.diffusion_model, compute).exact = exact
    # Newer hosts rename some tensors as they load them.
    provided = set(model.model_config.process_unet_state_dict(state_dict))
    _check_complete(checkpoint, model.diffusion_model, provided)
    fuse_blocks(model.diffusion_model)
    quantized = SVDQuantModelPatcher(model, patcher.load_device, patcher.offload_device)
    quantized.set_attachments(REPORT, checkpoint.report)
    compile_for_adapters(patcher.load_device, compute, _with_branch(checkpoint, patcher.load_device, exact))
    return quantized


def _with_branch(checkpoint: QuantizedCheckpoint, device: torch.device, exact: bool) -> set[str]:
    """Formats of the layers whose low-rank branch is computed, and not part of a weight in 8 bits."""
    return {
        layer.format
        for layer in checkpoint.layers.values()
        if exact or layer.format not in FOUR_BITS or not prefers_int8(device, layer.out_features, layer.in_features)
    }


def _host_load(state_dict):
    load = comfy.sd.load_diffusion_model_state_dict
    options = {"model_options": {"custom_operations": DeferredOperations}}
    if "disable_dynamic" in inspect.signature(load).parameters:
        # ComfyUI 0.29: its dynamic memory management moves a layer's weight and bias only; ours have
        # more tensors and are loaded the classic way.
        options["disable_dynamic"] = True
    return load(state_dict, **options)


def _replace(checkpoint, name, diffusion_model, compute) -> QuantizedLinear:
    spec = checkpoint.layers[name]
    parent, _, child = name.rpartition(".")
    try:
        place = diffusion_model.get_submodule(name)
        shape = (place.out_features, place.in_features)
    except AttributeError as error:
        raise CheckpointError(f"{checkpoint.path}: the host's model has no layer {name}") from error
    if shape != (spec.out_features, spec.in_features):
        raise CheckpointError(
            f"{checkpoint.path}: layer {name} is {spec.out_features} x {spec.in_features}, "
            f"the host's model has {shape[0]} x {shape[1]} there"
        )
    tensors = checkpoint.read_layer(name)
    if compute in (torch.bfloat16, torch.float16):
        tensors = {key: tensor if spec.keeps_dtype(key) else tensor.to(compute) for key, tensor in tensors.items()}
        spec = replace(spec, dtype=compute)
    layer = QuantizedLinear(spec, tensors)
    setattr(diffusion_model.get_submodule(parent), child, layer)
    return layer


def _check_complete(checkpoint, diffusion_model, provided) -> None:
    """Every parameter of the host's model came from the file."""
    for name, module in diffusion_model.named_modules():
        if isinstance(module, QuantizedLinear):
            continue
        needed = {key for key, _ in module.named_parameters(recurse=False)}
        if isinstance(module, DeferredOperations.Linear):
            needed.add("weight")
        for key in sorted(needed):
            if f"{name}.{key}".lstrip(".") not in provided:
                raise CheckpointError(f"{checkpoint.path}: {name}.{key} is missing from the file. It is incomplete.")
