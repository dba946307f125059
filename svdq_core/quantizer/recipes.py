"""One layer from 16 to 4 bits: the steps of SVDQuant, put together by a recipe.

SVDQuant (arXiv 2411.05007) section 4: smooth, split off a low-rank part, round the rest. What a recipe
chooses is which steps run and how hard they look; ``RECIPES`` holds the three that users pick from.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import LayerError
from ..formats.comfy_quant import LayerSpec
from ..layers import SVDQLinear
from ..numerics import int4
from . import rounding, smoothing
from .lowrank import truncated_svd
from .statistics import LayerStatistics, layer_seed


@dataclass(frozen=True)
class Recipe:
    """Which steps a quantization takes.

    Attributes:
        smooth: search a smoothing factor against the layer's output error (needs calibration).
        refine: times to refit the low-rank branch to what rounding lost, keeping the best.
        gptq: round with GPTQ instead of to nearest (needs calibration).
    """

    smooth: bool = True
    refine: int = 0
    gptq: bool = False

    @property
    def calibrates(self) -> bool:
        """Whether the recipe needs calibration statistics."""
        return self.smooth or self.gptq


RECIPES = {
    "fast": Recipe(smooth=False),
    "balanced": Recipe(),
    "best": Recipe(refine=8, gptq=True),
}


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer ready to be written.

    Attributes:
        tensors: by their name inside the layer.
        weight_error: relative Frobenius error of the weight it stands for.
        output_error: relative error of its output on the calibration sample; None without one.
    """

    spec: LayerSpec
    tensors: dict[str, torch.Tensor]
    weight_error: float
    output_error: float | None


def quantize_layer(
    spec: LayerSpec,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    statistics: LayerStatistics | None,
    recipe: Recipe,
    seed: int = 0,
) -> QuantizedLayer:
    """Quantize one linear layer.

    Args:
        spec: what the file will hold; its ``rank`` and ``dtype`` are used.
        weight: (N, K) in any floating type, on the device to work on.
        bias: (N,) or None.
        statistics: calibration of this layer's input; required if ``recipe.calibrates``.
        recipe: the steps to take.
        seed: of the randomized SVD.

    Raises:
        LayerError: NaN or Inf in the weights, K not a multiple of 64, or statistics of another shape.
    """
    _check(spec, weight, bias, statistics)
    work = _Layer(spec, weight.float(), statistics, recipe, seed)
    best = min((work.attempt(factor) for factor in work.smoothing_factors()), key=lambda found: found.error)
    best = work.polish(best)
    tensors = work.tensors(best, bias)
    return QuantizedLayer(spec, tensors, *_measure(spec, tensors, weight, bias, statistics))


@dataclass(frozen=True)
class _Attempt:
    """One way to quantize the layer, everything as it would be stored."""

    error: float
    smooth_factor: torch.Tensor  # (K,)
    proj_down: torch.Tensor  # (K, r)
    proj_up: torch.Tensor  # (N, r)
    codes: torch.Tensor  # (N, K) int8
    scale: torch.Tensor  # (N, K / 64)


class _Layer:
    """The layer being quantized: its float32 weight, and sampled inputs to fit to and to judge by."""

    def __init__(self, spec, weight, statistics, recipe, seed):
        self.spec, self.weight, self.recipe = spec, weight, recipe
        self.seed = layer_seed(seed, spec.name)
        self.statistics = statistics
        self.inputs = None if statistics is None else statistics.sample.to(weight.device).float()
        self.fit_inputs = self.inputs
        if recipe.gptq:
            # GPTQ can fit its own inputs arbitrarily well; it is judged on rows that it did not see.
            held_out = torch.arange(len(self.inputs), device=weight.device) % 4 == 0
            self.inputs, self.fit_inputs = self.inputs[held_out], self.inputs[~held_out]

    def smoothing_factors(self):
        if not self.recipe.smooth:
            yield torch.ones(self.spec.in_features, dtype=self.spec.dtype, device=self.weight.device)
            return
        low = self.statistics.minimum.to(self.weight.device)
        high = self.statistics.maximum.to(self.weight.device)
        if self.spec.act_unsigned:
            act_range = (high + int4.GELU_SHIFT).clamp(min=0)
        else:
            act_range = torch.maximum(high.abs(), low.abs())
        yield from smoothing.candidates(act_range, self.weight, self.spec.dtype)

    def attempt(self, smooth_factor: torch.Tensor) -> _Attempt:
        """Low rank, then round to nearest."""
        smoothed = self.weight * smooth_factor.float()
        return self._split(smooth_factor, smoothed, smoothed, rounding.round_to_nearest)

    def polish(self, best: _Attempt) -> _Attempt:
        """The slower steps, on the smoothing that won; each result is kept only if it is better."""
        smoothed = self.weight * best.smooth_factor.float()
        round_weight = rounding.round_to_nearest
        current = best
        if self.recipe.gptq:
            seen = self._quantized(self.fit_inputs, best.smooth_factor)
            round_weight = functools.partial(rounding.gptq, inputs=seen)
            current = self._split(best.smooth_factor, smoothed, smoothed, round_weight)
            best = min(best, current, key=lambda found: found.error)
        for _ in range(self.recipe.refine):
            lost = smoothed - int4.dequantize(current.codes, current.scale)
            current = self._split(best.smooth_factor, smoothed, lost, round_weight)
            best = min(best, current, key=lambda found: found.error)
        return best

    def tensors(self, found: _Attempt, bias: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The layer as the file will hold it."""
        dtype = self.spec.dtype
        tensors = {
            "weight": int4.pack(found.codes),
            "weight_scale": found.scale.t().contiguous(),
            "smooth_factor": found.smooth_factor,
            "proj_down": found.proj_down,
            "proj_up": found.proj_up,
        }
        if self.spec.bias:
            shifted = torch.zeros(self.spec.out_features, device=self.weight.device)
            if bias is not None:
                shifted += bias.float()
            if self.spec.act_unsigned:
                residual = int4.dequantize(found.codes, found.scale)
                shifted -= residual @ (int4.GELU_SHIFT / found.smooth_factor.float())
            tensors["bias"] = shifted.to(dtype)
        return tensors

    def _split(
        self,
        smooth_factor: torch.Tensor,
        smoothed: torch.Tensor,
        to_approximate: torch.Tensor,
        round_weight: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
    ) -> _Attempt:
        """Fit the low-rank branch to ``to_approximate`` and round what it leaves of ``smoothed``."""
        dtype, factor = self.spec.dtype, smooth_factor.float()
        generator = torch.Generator().manual_seed(self.seed)
        up, down = truncated_svd(to_approximate, self.spec.rank, generator)
        # The residual is taken from the branch as stored, so its rounding to 16 bits is made up for.
        proj_down, proj_up = (down / factor[:, None]).to(dtype), up.to(dtype)
        residual = smoothed - proj_up.float() @ (proj_down.float() * factor[:, None]).t()
        scale = rounding.group_scale(residual, dtype)
        codes = round_weight(residual, scale)
        error = self._error(residual, codes, scale, smooth_factor)
        return _Attempt(error, smooth_factor, proj_down, proj_up, codes, scale)

    def _error(self, residual, codes, scale, smooth_factor) -> float:
        """Error of the layer's output; of the weight where there are no inputs.

        The low-rank branch sees the input in full precision, so only the residual's product differs.
        """
        rounded = int4.dequantize(codes, scale)
        if self.inputs is None:
            return float(torch.linalg.norm(residual - rounded))
        exact = (self.inputs / smooth_factor.float()) @ residual.t()
        shift = int4.GELU_SHIFT / smooth_factor.float() if self.spec.act_unsigned else 0.0
        quantized = (self._quantized(self.inputs, smooth_factor) - shift) @ rounded.t()
        return float(torch.linalg.norm(exact - quantized))

    def _quantized(self, inputs: torch.Tensor, smooth_factor: torch.Tensor) -> torch.Tensor:
        """(R, K) inputs as the kernel's codes represent them."""
        shift = int4.GELU_SHIFT if self.spec.act_unsigned else 0.0
        codes, scale = int4.quantize_groups((inputs + shift) / smooth_factor.float(), self.spec.act_unsigned)
        return int4.dequantize(codes, scale)


def _measure(spec, tensors, weight, bias, statistics) -> tuple[float, float | None]:
    """Errors of the finished layer, through the very operators that will run it."""
    layer = SVDQLinear(spec, tensors)
    weight = weight.float()
    weight_error = _relative(layer.dequantized_weight(), weight)
    if statistics is None:
        return weight_error, None
    inputs = statistics.sample.to(weight.device).float()
    exact = torch.nn.functional.linear(inputs, weight, None if bias is None else bias.float())
    return weight_error, _relative(layer(inputs), exact)


def _relative(approximate: torch.Tensor, exact: torch.Tensor) -> float:
    norm = torch.linalg.norm(exact)
    return float(torch.linalg.norm(approximate - exact) / norm) if norm > 0 else 0.0


def check_width(spec: LayerSpec) -> None:
    """Raise LayerError unless K is a multiple of 64."""
    if spec.in_features % int4.GROUP_SIZE:
        raise LayerError(
            f"layer {spec.name} has {spec.in_features} input channels, not a multiple of "
            f"{int4.GROUP_SIZE}. Name it among the layers to skip."
        )


def _check(spec, weight, bias, statistics) -> None:
    check_width(spec)
    for name, tensor in (("weight", weight), ("bias", bias)):
        if tensor is not None and not bool(torch.isfinite(tensor).all()):
            raise LayerError(f"layer {spec.name}: its {name} has NaN or infinite values. The checkpoint is broken.")
    if statistics is not None and statistics.sample.shape[1] != spec.in_features:
        raise LayerError(
            f"layer {spec.name} has {spec.in_features} input channels, its calibration has "
            f"{statistics.sample.shape[1]}: the calibration is of another model."
        )
