"""One layer from 16 to 4 (or 8) bits: the steps of SVDQuant, put together by a recipe.

SVDQuant (arXiv 2411.05007) section 4: smooth, split off a low-rank part, round the rest. What a recipe
chooses is which steps run and how hard they look; ``RECIPES`` holds the three that users pick from. In
weight-only formats there is nothing to smooth and no low-rank part: only rounding is left.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch

from ..errors import LayerError
from ..formats.comfy_quant import K_MULTIPLE, LayerSpec
from ..layers import SVDQLinear
from . import rounding, smoothing
from .codecs import Codec, codec_of
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
        statistics: calibration of this layer's input; required if ``recipe.calibrates``, except in weight-only
            formats.
        recipe: the steps to take.
        seed: of the randomized SVD.

    Raises:
        LayerError: NaN or Inf in the weights, K not a multiple of 64, or statistics of another shape.
    """
    _check(spec, weight, bias, statistics)
    if spec.layout.low_rank:
        work = _Layer(spec, weight.float(), statistics, recipe, seed)
        best = min((work.attempt(factor) for factor in work.smoothing_factors()), key=lambda found: found.error)
        tensors = work.tensors(work.polish(best), bias)
    else:
        tensors = _weight_only(spec, weight.float(), bias)
    return QuantizedLayer(spec, tensors, *_measure(spec, tensors, weight, bias, statistics))


def _weight_only(spec, weight, bias) -> dict[str, torch.Tensor]:
    """The tensors of a layer whose activations stay in 16 bits, rounded to nearest whatever the recipe.

    GPTQ was tried on modulations: it fits the few embeddings that calibration sees, images get no closer.
    """
    codec = codec_of(spec)
    scales = codec.scales(weight, spec.dtype)
    step, offset = codec.step(scales), codec.offset(scales)
    if offset is not None:
        weight = weight - offset.repeat_interleave(weight.shape[1] // offset.shape[1], dim=1)
    codes = rounding.round_to_nearest(weight, codec, step)
    tensors = {"weight": codec.pack(codes), **scales}
    return tensors if bias is None else tensors | {"bias": bias.to(spec.dtype)}


@dataclass(frozen=True)
class _Attempt:
    """One way to quantize the layer, everything as it would be stored."""

    error: float
    smooth_factor: torch.Tensor  # (K,)
    proj_down: torch.Tensor  # (K, r)
    proj_up: torch.Tensor  # (N, r)
    codes: torch.Tensor  # (N, K) int8
    scales: dict[str, torch.Tensor]  # the format's


class _Layer:
    """The layer being quantized: its float32 weight, and sampled inputs to fit to and to judge by."""

    def __init__(self, spec, weight, statistics, recipe, seed):
        self.spec, self.weight, self.recipe = spec, weight, recipe
        self.codec = codec_of(spec)
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
            act_range = (high + self.codec.shift).clamp(min=0)
        else:
            act_range = torch.maximum(high.abs(), low.abs())
        for factor in smoothing.candidates(act_range, self.weight, self.spec.dtype):
            yield self.codec.smooth_factor(factor, act_range)

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
            current = self._split(best.smooth_factor, smoothed, smoothed - self._rounded(current), round_weight)
            best = min(best, current, key=lambda found: found.error)
        return best

    def tensors(self, found: _Attempt, bias: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The layer as the file will hold it."""
        dtype = self.spec.dtype
        tensors = {
            "weight": self.codec.pack(found.codes),
            **found.scales,
            "smooth_factor": found.smooth_factor,
            "proj_down": found.proj_down,
            "proj_up": found.proj_up,
        }
        if self.spec.bias:
            shifted = torch.zeros(self.spec.out_features, device=self.weight.device)
            if bias is not None:
                shifted += bias.float()
            if self.codec.shift:
                shifted -= self._rounded(found) @ (self.codec.shift / found.smooth_factor.float())
            tensors["bias"] = shifted.to(dtype)
        return tensors

    def _split(
        self,
        smooth_factor: torch.Tensor,
        smoothed: torch.Tensor,
        to_approximate: torch.Tensor,
        round_weight: Callable[[torch.Tensor, Codec, torch.Tensor], torch.Tensor],
    ) -> _Attempt:
        """Fit the low-rank branch to ``to_approximate`` and round what it leaves of ``smoothed``."""
        dtype, factor = self.spec.dtype, smooth_factor.float()
        generator = torch.Generator().manual_seed(self.seed)
        up, down = truncated_svd(to_approximate, self.spec.rank, generator)
        # The residual is taken from the branch as stored, so its rounding to 16 bits is made up for.
        proj_down, proj_up = (down / factor[:, None]).to(dtype), up.to(dtype)
        residual = smoothed - proj_up.float() @ (proj_down.float() * factor[:, None]).t()
        scales = self.codec.scales(residual, dtype)
        step = self.codec.step(scales)
        codes = round_weight(residual, self.codec, step)
        error = self._error(residual, rounding.dequantize(codes, self.codec, step), smooth_factor)
        return _Attempt(error, smooth_factor, proj_down, proj_up, codes, scales)

    def _error(self, residual, rounded, smooth_factor) -> float:
        """Error of the layer's output; of the weight where there are no inputs.

        The low-rank branch sees the input in full precision, so only the residual's product differs.
        """
        if self.inputs is None:
            return float(torch.linalg.norm(residual - rounded))
        factor = smooth_factor.float()
        exact = (self.inputs / factor) @ residual.t()
        quantized = (self._quantized(self.inputs, smooth_factor) - self.codec.shift / factor) @ rounded.t()
        return float(torch.linalg.norm(exact - quantized))

    def _quantized(self, inputs: torch.Tensor, smooth_factor: torch.Tensor) -> torch.Tensor:
        """(R, K) inputs as the kernel's codes represent them."""
        return self.codec.activations((inputs + self.codec.shift) / smooth_factor.float())

    def _rounded(self, found: _Attempt) -> torch.Tensor:
        """(N, K) float32: the quantized part of the smoothed weight."""
        return rounding.dequantize(found.codes, self.codec, self.codec.step(found.scales))


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
    if spec.in_features % K_MULTIPLE:
        raise LayerError(
            f"layer {spec.name} has {spec.in_features} input channels, not a multiple of "
            f"{K_MULTIPLE}. Name it among the layers to skip."
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
