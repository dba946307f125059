"""``svdq::linear_as_int8``, a whole SVDQuant layer evaluated in 8 bits, whatever its file keeps it in.

Where a card multiplies 8-bit numbers fast and 4-bit ones not at all (H100, H200), a layer is worth more as one
int8 weight, low-rank branch and adapters included, with an input that has 8 bits too: nothing is scaled before the
end of a sum, and errors of the 4-bit input are gone. Both operands are rotated in groups of 64
(``numerics.hadamard``), so that one scale a row does for them::

    x ── · inverse ─ rotate ─ quantize rows ─> codes, act_scale ─> y = codes·weightᵀ · scales + bias
"""

from dataclasses import dataclass
from typing import Any

import torch

from ..formats.weights import of_outputs, quantized_part
from ..kernels.kept import Kept
from ..numerics import hadamard, int4, int8
from .dispatch import call

_library = torch.library.Library("svdq", "FRAGMENT")
_library.define(
    "linear_as_int8(Tensor x, Tensor smooth_factor, Tensor proj_down, Tensor weight, Tensor weight_scale,"
    " Tensor? weight_tensor_scale, Tensor? weight_channel_scale, Tensor proj_up, Tensor? bias, str layer_format,"
    " bool act_unsigned, bool act_rotated) -> Tensor"
)
NAMES = (
    "smooth_factor",
    "proj_down",
    "weight",
    "weight_scale",
    "weight_tensor_scale",
    "weight_channel_scale",
    "proj_up",
    "bias",
)
OPERANDS, WEIGHT = len(NAMES), NAMES.index("weight")  # how many make up a layer, and which is its key
_PIECE = 2**24  # elements of a weight that are made at once, in several float32 copies
_ROOM = 8.0  # what is rotated is rounded to 16 bits over this, so that it stays in fp16's range


def linear_as_int8(
    x: torch.Tensor,
    smooth_factor: torch.Tensor,
    proj_down: torch.Tensor,
    weight: torch.Tensor,
    weight_scale: torch.Tensor,
    weight_tensor_scale: torch.Tensor | None,
    weight_channel_scale: torch.Tensor | None,
    proj_up: torch.Tensor,
    bias: torch.Tensor | None,
    layer_format: str,
    act_unsigned: bool,
    act_rotated: bool,
) -> torch.Tensor:
    """The layer that a file's tensors stand for, with 8-bit weights and activations.

    Args:
        x: (M, K) bf16, fp16 or (reference only) float32.
        smooth_factor: (K,), kept in so far as its reciprocal fits 16 bits; the weight makes up for the rest.
        proj_down: (K, r), and ``proj_up`` (N, r), whose dtype is the output's: merged into the weight.
        weight, weight_scale, weight_tensor_scale, weight_channel_scale: as the format has them.
        bias: (N,) as a file has it, or None.
        layer_format: of ``comfy_quant.LAYOUTS``, one with a low-rank branch.
        act_unsigned: whether the bias undoes a GELU's shift, which is not needed here.
        act_rotated: whether the weight is of a rotated input.

    Returns:
        (M, N) in ``proj_up``'s dtype.
    """
    return call(
        "linear_as_int8",
        x,
        smooth_factor,
        proj_down,
        weight,
        weight_scale,
        weight_tensor_scale,
        weight_channel_scale,
        proj_up,
        bias,
        layer_format,
        act_unsigned,
        act_rotated,
    )


@dataclass(eq=False)
class Image:
    """A layer in 8 bits.

    Attributes:
        inverse: (K,) in the layer's type: what an input is multiplied by before it is rotated.
        weight: (N, K) int8 and
        weight_scale: (N,) float32: of the rotated weight.
        bias: (N,) in the layer's type, or None.
        launches: what the kernels keep of it from call to call.
    """

    inverse: torch.Tensor
    weight: torch.Tensor
    weight_scale: torch.Tensor
    bias: torch.Tensor | None
    launches: Any = None

    @property
    def nbytes(self) -> int:
        tensors = self.inverse, self.weight, self.weight_scale, self.bias
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)


def image(operands: tuple[torch.Tensor | None, ...], layer_format: str, unsigned: bool, rotated: bool) -> Image:
    """A layer in 8 bits.

    Args:
        operands: ``smooth_factor`` to ``bias`` of the operator.
        layer_format, unsigned, rotated: the operator's last.
    """
    tensors = dict(zip(NAMES, operands, strict=True))
    smooth_factor, proj_up, bias = tensors["smooth_factor"], tensors["proj_up"], tensors["bias"]
    n, k = proj_up.shape[0], smooth_factor.shape[0]
    inverse = (1 / smooth_factor.float()).to(smooth_factor.dtype)
    weight = torch.empty((n, k), dtype=torch.int8, device=proj_up.device)
    weight_scale = torch.empty(n, dtype=torch.float32, device=proj_up.device)
    corrected = None if bias is None else bias.to(torch.float32, copy=True)
    step = max(_PIECE // k, 1)
    for start in range(0, n, step):
        outputs = slice(start, start + step)
        part = of_outputs(layer_format, tensors, outputs)
        full = quantized_part(layer_format, part, rotated)
        if unsigned and corrected is not None:
            corrected[outputs] += int4.GELU_SHIFT * full.sum(dim=1)
        full.addmm_(part["proj_up"].float(), tensors["proj_down"].float().t())
        codes, scale = int8.quantize_rows(hadamard.rotate(full / inverse.float()))
        weight[outputs], weight_scale[outputs] = codes, scale.flatten()
    return Image(inverse, weight, weight_scale, None if bias is None else corrected.to(bias.dtype))


def quantize_input(x: torch.Tensor, inverse: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Codes (M, K) int8 of ``x * inverse``, rotated, and their scale (M, 1) float32; both steps round to x's type."""
    most = torch.finfo(x.dtype).max
    smoothed = (x.float() * inverse.float()).clamp(-most, most).to(x.dtype).float()
    rotated = hadamard.rotate(smoothed / hadamard.GROUP_SIZE) * (hadamard.GROUP_SIZE / _ROOM)
    codes, scale = int8.quantize_rows(rotated.to(x.dtype))
    return codes, (scale * _ROOM).clamp_max(torch.finfo(torch.float32).max)


_images: Kept[Image] = Kept()


def kept_image(operands: tuple[torch.Tensor | None, ...], *form) -> Image:
    """The same, made once and kept for as long as all operands live and stay what they are.

    While a CUDA graph is captured what is not there is made for the graph alone.
    """
    weight = operands[WEIGHT]
    found = _images.get(weight, operands)
    if found is not None:
        return found
    if torch.cuda.is_current_stream_capturing():
        return image(operands, *form)
    forget(weight)  # before the next one takes memory
    made = image(operands, *form)
    _images.put(weight, operands, made)
    return made


def memory(weight: torch.Tensor) -> int:
    """Bytes that a weight's image takes now, beside the file's tensors."""
    found = _images.of(weight)
    return 0 if found is None else found.nbytes


def forget(weight: torch.Tensor) -> None:
    """Free the image of a weight."""
    _images.forget(weight)


@torch.library.impl(_library, "linear_as_int8", "CompositeExplicitAutograd")
def _linear_as_int8_reference(x, *operands):
    of_layer = image(operands[:OPERANDS], *operands[OPERANDS:])
    codes, act_scale = quantize_input(x, of_layer.inverse)
    y = codes.float() @ of_layer.weight.float().t()
    y *= act_scale
    y *= of_layer.weight_scale
    if of_layer.bias is not None:
        y += of_layer.bias.float()
    return y.to(operands[NAMES.index("proj_up")].dtype)


@torch.library.register_fake("svdq::linear_as_int8")
def _linear_as_int8_fake(x, smooth_factor, proj_down, weight, *operands):
    return operands[3].new_empty((x.shape[0], weight.shape[0]))
