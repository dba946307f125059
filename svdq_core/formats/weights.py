"""What a quantized layer's tensors stand for."""

from collections.abc import Callable, Mapping

import torch

from ..numerics import awq, hadamard, int4, int8, nf4, nvfp4
from .comfy_quant import AWQ_W4A16, LAYOUTS, NF4_W4A16, SVDQUANT_NVFP4, SVDQUANT_W4A4, SVDQUANT_W8A8

Tensors = Mapping[str, torch.Tensor | None]


def _int4(tensors: Tensors) -> torch.Tensor:
    return int4.dequantize(int4.unpack(tensors["weight"]), tensors["weight_scale"].t())


def _nvfp4(tensors: Tensors) -> torch.Tensor:
    weight = nvfp4.dequantize(int4.unpack(tensors["weight"], unsigned=True), tensors["weight_scale"].t())
    weight *= tensors["weight_tensor_scale"]
    channel_scale = tensors.get("weight_channel_scale")
    return weight if channel_scale is None else weight * channel_scale.float()[:, None]


def _int8(tensors: Tensors) -> torch.Tensor:
    return int8.dequantize(tensors["weight"], tensors["weight_scale"][:, None])


def _awq(tensors: Tensors) -> torch.Tensor:
    codes = int4.unpack(tensors["weight"], unsigned=True)
    return awq.dequantize(codes, tensors["weight_scale"].t(), tensors["weight_zero"].t())


def _nf4(tensors: Tensors) -> torch.Tensor:
    return nf4.dequantize(int4.unpack(tensors["weight"], unsigned=True), tensors["weight_scale"].t())


_DEQUANTIZE: Mapping[str, Callable[[Tensors], torch.Tensor]] = {
    SVDQUANT_W4A4: _int4,
    SVDQUANT_NVFP4: _nvfp4,
    SVDQUANT_W8A8: _int8,
    AWQ_W4A16: _awq,
    NF4_W4A16: _nf4,
}


def quantized_part(layer_format: str, tensors: Tensors, rotated: bool = False) -> torch.Tensor:
    """(N, K) float32: the quantized part of a layer's weight, smoothing and rotation undone.

    Args:
        layer_format: of ``comfy_quant.LAYOUTS``.
        tensors: the layer's, by their names inside the layer.
        rotated: whether the layer quantizes a rotated input.
    """
    weight = _DEQUANTIZE[layer_format](tensors)
    if rotated:
        weight = hadamard.rotate(weight)
    return weight / tensors["smooth_factor"].float() if LAYOUTS[layer_format].low_rank else weight


def of_outputs(layer_format: str, tensors: Tensors, outputs: slice) -> dict[str, torch.Tensor | None]:
    """A layer's tensors for some of its outputs only: views."""
    axes = {name: axes for name, (axes, _) in LAYOUTS[layer_format].scales.items()}
    axes |= {"weight": "NK", "weight_channel_scale": "N", "proj_up": "NR", "bias": "N"}

    def part(name: str, tensor: torch.Tensor | None) -> torch.Tensor | None:
        place = axes.get(name, "").find("N")
        return tensor if tensor is None or place < 0 else tensor[(slice(None),) * place + (outputs,)]

    return {name: part(name, tensor) for name, tensor in tensors.items()}
