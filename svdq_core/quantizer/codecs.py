"""How each format rounds: the scales it stores for a weight, its grid of codes, what it makes of an input.

A weight's code stands for ``decode(code) * step + offset``, with a step (and in ``awq_w4a16`` an offset) for
each group along K.
"""

from __future__ import annotations

import itertools
from abc import ABC, abstractmethod

import torch

from ..formats import comfy_quant
from ..formats.comfy_quant import LayerSpec
from ..numerics import awq, int4, int8, nf4, nvfp4


class Codec(ABC):
    """One format.

    Attributes:
        shift: added to the layer's input before it is smoothed and quantized.
        act_unsigned: whether codes of the input are never negative.
        group_size: values along K that share a scale; None where a whole row does.
        act_limit, weight_limit: steps that a scale divides the largest value into.
    """

    shift = 0.0
    act_unsigned = False
    group_size: int | None = None
    act_limit = weight_limit = 1.0

    @abstractmethod
    def scales(
        self, weight: torch.Tensor, dtype: torch.dtype, reach: torch.Tensor | float = 1.0
    ) -> dict[str, torch.Tensor]:
        """The scales of a weight as the file holds them, by their names there.

        Args:
            weight: (N, K) float32, smoothed and without its low-rank part.
            dtype: 16-bit type of the file.
            reach: (N, groups), how much of a group's largest value the codes reach; weights beyond are clipped.
        """

    def fitted_scales(
        self, weight: torch.Tensor, dtype: torch.dtype, importance: torch.Tensor
    ) -> dict[str, torch.Tensor]:
        """The same, chosen for the least square error with these weights (K,) float32 on the channels."""
        return self.scales(weight, dtype)

    def step(self, scales: dict[str, torch.Tensor]) -> torch.Tensor:
        """(N, groups) float32 step of each group."""
        return scales["weight_scale"].t().float()

    def offset(self, scales: dict[str, torch.Tensor]) -> torch.Tensor | None:
        """(N, groups) float32 offset of each group; None in a symmetric format."""
        return None

    @abstractmethod
    def encode(self, values: torch.Tensor) -> torch.Tensor:
        """int8 codes nearest to float32 values given in steps."""

    def decode(self, codes: torch.Tensor) -> torch.Tensor:
        """float32 values, in steps, of int8 codes."""
        return codes.float()

    def round_(self, values: torch.Tensor) -> None:
        """Round float32 values, given in steps, to what their codes stand for, in place."""
        values.copy_(self.decode(self.encode(values)))

    def pack(self, codes: torch.Tensor) -> torch.Tensor:
        """The file's ``weight`` of (N, K) codes."""
        return int4.pack(codes)

    def smooth_factor(self, factor: torch.Tensor, act_range: torch.Tensor) -> torch.Tensor:
        """A smoothing factor (K,) moved to the range that the activation's scales like, its ratios kept."""
        return factor

    def activations(self, x: torch.Tensor) -> torch.Tensor:
        """(R, K) smoothed inputs as their codes represent them at run time."""
        return x


class Int4(Codec):
    """``svdquant_w4a4``."""

    group_size = int4.GROUP_SIZE
    weight_limit = int4.SIGNED_MAX

    def __init__(self, act_unsigned: bool):
        self.shift = int4.GELU_SHIFT if act_unsigned else 0.0
        self.act_unsigned = act_unsigned
        self.act_limit = int4.UNSIGNED_MAX if act_unsigned else int4.SIGNED_MAX

    # Of a scale, to the next on the grid: clipping so little costs a group no more than a coarser step does.
    _LEAST_REACH = 0.95

    def scales(self, weight, dtype, reach=1.0):
        largest = weight.unflatten(-1, (-1, int4.GROUP_SIZE)).abs().amax(dim=-1) / int4.SIGNED_MAX
        largest = largest * self._LEAST_REACH
        unit = int4.scale_unit(largest.amax(dim=-1), dtype).unsqueeze(-1)
        steps = torch.where(largest > 0, (largest * reach / unit).ceil().clamp(1, int4.MOST_STEPS), 0.0)
        return {"weight_scale": (steps * unit).to(dtype).t().contiguous()}

    def encode(self, values):
        return values.round().clamp(-int4.SIGNED_MAX, int4.SIGNED_MAX).to(torch.int8)

    def round_(self, values):
        values.round_().clamp_(-int4.SIGNED_MAX, int4.SIGNED_MAX)

    def activations(self, x):
        return int4.dequantize(*int4.quantize_groups(x, self.act_unsigned))


class NVFP4(Codec):
    """``svdquant_nvfp4``."""

    group_size = nvfp4.GROUP_SIZE
    act_limit = weight_limit = nvfp4.LARGEST

    # Where the largest calibrated activation should lie: an eighth of what E4M3 scales reach leaves room for
    # larger ones later, and lets groups 3500 times smaller keep a normal scale.
    _AIM = nvfp4.LARGEST * nvfp4.SCALE_LARGEST / 8

    def scales(self, weight, dtype, reach=1.0):
        tensor_scale = weight.abs().amax() / (nvfp4.LARGEST * nvfp4.SCALE_LARGEST)
        scale = nvfp4.group_scale(weight, tensor_scale)
        scale = (scale.float() * reach).to(scale.dtype)
        return {"weight_scale": scale.t().contiguous(), "weight_tensor_scale": tensor_scale}

    def step(self, scales):
        return super().step(scales) * scales["weight_tensor_scale"]

    def encode(self, values):
        return nvfp4.encode(values)

    def decode(self, codes):
        return nvfp4.decode(codes)

    def round_(self, values):
        values.copy_(nvfp4.nearest(values))

    def smooth_factor(self, factor, act_range):
        largest = (act_range / factor.float()).amax()
        if not largest > 0:
            return factor
        # A power of two changes no factor's mantissa; none may leave the normal range of its type.
        exponent = (largest / self._AIM).log2().ceil()
        lowest = (torch.finfo(factor.dtype).tiny / factor.float().amin()).log2().ceil()
        return (factor.float() * torch.maximum(exponent, lowest).exp2()).to(factor.dtype)

    def activations(self, x):
        return nvfp4.dequantize(*nvfp4.quantize_groups(x))


class Int8(Codec):
    """``svdquant_w8a8``."""

    act_limit = weight_limit = int8.LARGEST

    def scales(self, weight, dtype, reach=1.0):
        largest = weight.abs().amax(dim=-1, keepdim=True) * reach
        return {"weight_scale": largest.squeeze(-1) / int8.LARGEST}

    def step(self, scales):
        return scales["weight_scale"][:, None]

    def encode(self, values):
        return values.round().clamp(-int8.LARGEST, int8.LARGEST).to(torch.int8)

    def round_(self, values):
        values.round_().clamp_(-int8.LARGEST, int8.LARGEST)

    def pack(self, codes):
        return codes

    def activations(self, x):
        return int8.dequantize(*int8.quantize_rows(x))


class AWQ(Codec):
    """``awq_w4a16``."""

    _SHRINKS = (1.0, 0.9, 0.8, 0.7, 0.6)  # of a group's range, tried below and above its middle

    def scales(self, weight, dtype, reach=1.0):
        reach = torch.as_tensor(reach, device=weight.device).unsqueeze(-1)
        return self._named(*self._range(weight.unflatten(-1, (-1, awq.GROUP_SIZE)), dtype, reach, reach))

    def fitted_scales(self, weight, dtype, importance):
        groups, importance = (t.unflatten(-1, (-1, awq.GROUP_SIZE)) for t in (weight, importance))
        best = None
        for below, above in itertools.product(self._SHRINKS, repeat=2):
            scale, zero = self._range(groups, dtype, below, above)
            step, centre = scale.float().unsqueeze(-1), zero.float().unsqueeze(-1)
            codes = awq.encode(torch.where(step > 0, (groups - centre) / step, 0.0))
            error = ((awq.decode(codes) * step + centre - groups).square() * importance).sum(dim=-1)
            if best is None:
                best = error, scale, zero
            better = error < best[0]
            best = tuple(torch.where(better, new, old) for new, old in zip((error, scale, zero), best, strict=True))
        return self._named(*best[1:])

    @staticmethod
    def _range(groups, dtype, below, above):
        low, high = groups.aminmax(dim=-1, keepdim=True)
        middle = (low + high) / 2
        clipped = groups.clamp(middle + (low - middle) * below, middle + (high - middle) * above)
        return awq.group_range(clipped.flatten(-2), dtype)

    @staticmethod
    def _named(scale, zero):
        return {"weight_scale": scale.t().contiguous(), "weight_zero": zero.t().contiguous()}

    def offset(self, scales):
        return scales["weight_zero"].t().float()

    def encode(self, values):
        return awq.encode(values)

    def decode(self, codes):
        return awq.decode(codes)


class NF4(Codec):
    """``nf4_w4a16``."""

    def scales(self, weight, dtype, reach=1.0):
        return {"weight_scale": (nf4.group_absmax(weight) * reach).t().contiguous()}

    def encode(self, values):
        return nf4.encode(values)

    def decode(self, codes):
        return nf4.decode(codes)


def codec_of(spec: LayerSpec) -> Codec:
    """The codec of a layer's format."""
    if spec.format == comfy_quant.SVDQUANT_W4A4:
        return Int4(spec.act_unsigned)
    others = {
        comfy_quant.SVDQUANT_NVFP4: NVFP4,
        comfy_quant.SVDQUANT_W8A8: Int8,
        comfy_quant.AWQ_W4A16: AWQ,
        comfy_quant.NF4_W4A16: NF4,
    }
    return others[spec.format]()
