"""One layer from 16 to 4 (or 8) bits: the steps of SVDQuant, put together by a recipe.

SVDQuant (arXiv 2411.05007) section 4: smooth, split off a low-rank part, round the rest. What a recipe
chooses is which steps run and how hard they look; ``RECIPES`` holds the three that users pick from. In
weight-only formats there is nothing to smooth and no low-rank part: only rounding is left.
"""

import dataclasses
from dataclasses import dataclass
from typing import Literal

import torch

from ..errors import LayerError
from ..formats.comfy_quant import AWQ_W4A16, K_MULTIPLE, SVDQUANT_W4A4, LayerSpec
from ..layers import SVDQLinear
from ..numerics import hadamard
from . import descent, rounding, smoothing
from .codecs import Codec, codec_of
from .lowrank import truncated_svd
from .moments import InputMoments
from .statistics import LayerStatistics, layer_seed


@dataclass(frozen=True)
class Recipe:
    """Which steps a quantization takes; the defaults are the plainest: split, round to nearest.

    Attributes:
        smooth: how the smoothing factor is found: not at all, by the paper's grid search or by descent (both
            need calibration).
        split: whether the branch is fitted to the weight before anything is rounded; without, to the error only.
        clip: whether scales may clip the largest weights.
        moments: whether the branch and the rounding (GPTQ, of a weight that makes up for the noise of the input's
            codes) are fitted to the input's second moments, and not to the weight alone (needs calibration).
        rounds: how often the rest is rounded at most, the branch fitted to the error in between; the best is kept,
            and the first that is no better ends it.
        refit: whether a round ends with the branch fitted to the error of its codes, where that is better.
        rotate: whether signed INT4 layers are rotated. What is left for smoothing there has a closed form.
    """

    smooth: Literal["none", "grid", "descent"] = "none"
    split: bool = True
    clip: bool = False
    moments: bool = False
    rounds: int = 1
    refit: bool = False
    rotate: bool = False

    @property
    def calibrates(self) -> bool:
        """Whether the recipe needs calibration statistics."""
        return self.smooth != "none" or self.moments


RECIPES = {
    "fast": Recipe(clip=True, refit=True, rotate=True),
    "balanced": Recipe(smooth="descent", clip=True, moments=True, refit=True, rotate=True),
    "best": Recipe(smooth="descent", clip=True, moments=True, rounds=8, refit=True, rotate=True),
}


@dataclass(frozen=True)
class QuantizedLayer:
    """A layer ready to be written.

    Attributes:
        spec: the one asked for, rotated if the recipe wants it so.
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
        rotated = recipe.rotate and spec.format == SVDQUANT_W4A4 and not spec.act_unsigned
        spec = dataclasses.replace(spec, rotated=rotated)
        tensors = _Layer(spec, weight.float(), statistics, recipe, seed).quantized().tensors(spec, bias)
    else:
        tensors = _weight_only(spec, weight.float(), bias, statistics)
    return QuantizedLayer(spec, tensors, *_measure(spec, tensors, weight, bias, statistics))


def _weight_only(spec, weight, bias, statistics) -> dict[str, torch.Tensor]:
    """The tensors of a layer whose activations stay in 16 bits, whatever the recipe.

    What calibration saw of its input decides which errors matter, as far as it can be believed (``descent``), and the
    bias takes up what the error is on average.
    """
    codec = codec_of(spec)
    if statistics is None:
        scales = codec.scales(weight, spec.dtype)
    else:
        inputs = statistics.sample.to(weight.device).float()
        covariance = descent.shrunk_covariance(inputs)
        scales = codec.fitted_scales(weight, spec.dtype, covariance.diagonal())
    codes = _nearest(weight, codec, scales)
    if statistics is not None and spec.format == AWQ_W4A16:
        codes, scales = _descended(weight, codes, scales, covariance)
    tensors = {"weight": codec.pack(codes), **scales}
    if bias is None:
        return tensors
    bias = bias.float()
    if statistics is not None:
        offset = codec.offset(scales)
        wrong = rounding.dequantize(codes, codec, codec.step(scales)) - weight
        if offset is not None:
            wrong += _of_groups(offset, weight)
        bias = bias - wrong @ inputs.mean(dim=0)
    return tensors | {"bias": bias.to(spec.dtype)}


def _nearest(weight: torch.Tensor, codec: Codec, scales: dict[str, torch.Tensor]) -> torch.Tensor:
    """(N, K) int8 codes of a weight-only layer."""
    offset = codec.offset(scales)
    centred = weight if offset is None else weight - _of_groups(offset, weight)
    return rounding.round_to_nearest(centred, codec, codec.step(scales))


def _of_groups(values: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(N, K) of (N, groups)."""
    return values.repeat_interleave(weight.shape[1] // values.shape[1], dim=1)


def _descended(
    weight: torch.Tensor, codes: torch.Tensor, scales: dict[str, torch.Tensor], covariance: torch.Tensor
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    names = "weight_scale", "weight_zero"
    codes, *ranges = descent.descend(weight, codes, *(scales[name].t() for name in names), covariance)
    return codes, {name: values.t().contiguous() for name, values in zip(names, ranges, strict=True)}


@dataclass(frozen=True)
class _Attempt:
    """One way to quantize the layer, everything as it would be stored."""

    error: float
    smooth_factor: torch.Tensor  # (K,)
    proj_down: torch.Tensor  # (K, r)
    proj_up: torch.Tensor  # (N, r)
    codes: torch.Tensor  # (N, K) int8
    scales: dict[str, torch.Tensor]  # the format's

    def rounded(self, codec: Codec) -> torch.Tensor:
        """(N, K) float32: the quantized part of the smoothed weight."""
        return rounding.dequantize(self.codes, codec, codec.step(self.scales))

    def tensors(self, spec: LayerSpec, bias: torch.Tensor | None) -> dict[str, torch.Tensor]:
        """The layer as the file will hold it."""
        codec = codec_of(spec)
        tensors = {
            "weight": codec.pack(self.codes),
            **self.scales,
            "smooth_factor": self.smooth_factor,
            "proj_down": self.proj_down,
            "proj_up": self.proj_up,
        }
        if spec.bias:
            shifted = torch.zeros(spec.out_features, device=self.codes.device)
            if bias is not None:
                shifted += bias.float()
            if codec.shift:
                shifted -= self.rounded(codec) @ (codec.shift / self.smooth_factor.float())
            tensors["bias"] = shifted.to(spec.dtype)
        return tensors


class _Layer:
    """The layer being quantized: its float32 weight, and sampled inputs to fit to and to judge by."""

    def __init__(self, spec, weight, statistics, recipe, seed):
        self.spec, self.weight, self.recipe = spec, weight, recipe
        self.codec = codec_of(spec)
        self._seed = layer_seed(seed, spec.name)
        self._statistics = statistics
        self.inputs = None if statistics is None else statistics.sample.to(weight.device).float()

    def quantized(self) -> _Attempt:
        """Follow the recipe: smooth, then round and fit the branch in turns."""
        starts = (_Smoothed(self, factor) for factor in self._smoothing_factors())
        smoothed, best = min(((each, each.first()) for each in starts), key=lambda start: start[1].error)
        current = best
        for _ in range(1, self.recipe.rounds):
            current = smoothed.next(current)
            if not current.error < best.error:
                break
            best = current
        return best

    def fit(self, matrix: torch.Tensor, metric: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Up (N, r) and down (K, r) of the branch nearest to an (N, K) matrix."""
        return truncated_svd(matrix, self.spec.rank, torch.Generator().manual_seed(self._seed), metric)

    def _smoothing_factors(self) -> list[torch.Tensor]:
        """(K,) each, to choose from."""
        signs = torch.ones(self.spec.in_features)
        if self.spec.rotated:  # or a mean that channels have in common would add up in one of them
            random = torch.Generator().manual_seed(self._seed)
            signs -= 2 * torch.randint(0, 2, signs.shape, generator=random)
        signs = signs.to(self.weight.device, self.spec.dtype)
        if self.recipe.smooth == "none":
            return [signs]
        return [signs * factor for factor in self._positive_factors()]

    def _positive_factors(self) -> list[torch.Tensor]:
        dtype = self.spec.dtype
        low = self._statistics.minimum.to(self.weight.device)
        high = self._statistics.maximum.to(self.weight.device)
        act_range = (high + self.codec.shift).clamp(min=0) if self.codec.act_unsigned else high.maximum(-low)
        if self.recipe.smooth == "grid":
            factors = smoothing.candidates(act_range, self.weight, dtype)
        else:
            start = smoothing.migrated(act_range, self.weight, 0.5, 0.5, dtype)
            up, down = self.fit(self.weight * start.float(), None)
            rest = self.weight - up @ (down / start.float()[:, None]).t()
            if self.spec.rotated:
                factors = (smoothing.levelled(self.inputs, rest).to(dtype),)
            else:
                factors = (smoothing.descend(start, self.inputs + self.codec.shift, rest, self.codec),)
        return [self.codec.smooth_factor(factor, act_range) for factor in factors]


class _Smoothed:
    """The layer under one smoothing factor, rotated if it is to be."""

    def __init__(self, layer: _Layer, factor: torch.Tensor):
        self._layer, self._factor = layer, factor
        self._recipe, self._codec = layer.recipe, layer.codec
        scale = factor.float()
        self._weight = self._rotate(layer.weight * scale)
        if layer.inputs is not None:
            self._inputs = self._rotate(layer.inputs / scale)
            # What the codes of the shifted input stand for; the bias takes the shift back.
            shift = self._codec.shift / scale
            self._quantized = self._codec.activations(self._inputs + shift) - shift
        self._metric = self._first_metric = None
        if layer.recipe.moments:
            moments = InputMoments(self._inputs, self._quantized)
            self._spread = moments.spread()
            self._moments, self._metric, self._first_metric = moments, moments.signal, moments.cost

    def first(self) -> _Attempt:
        """The first round."""
        if not self._recipe.split:
            n, k = self._weight.shape
            rank, device, dtype = self._layer.spec.rank, self._weight.device, self._layer.spec.dtype
            return self._round(*(torch.zeros((size, rank), device=device, dtype=dtype) for size in (k, n)))
        return self._round(*self._fit(self._weight, self._first_metric))

    def next(self, current: _Attempt) -> _Attempt:
        """A round on top of another one."""
        return self._round(*self._fit(self._weight - current.rounded(self._codec), self._metric))

    def _fit(self, matrix: torch.Tensor, metric: torch.Tensor | None) -> tuple[torch.Tensor, torch.Tensor]:
        """The branch as stored: down (K, r), which sees the layer's own input, and up (N, r)."""
        up, down = self._layer.fit(matrix, metric)
        dtype = self._layer.spec.dtype
        down = (self._rotate(down.t()) / self._factor.float()).t()
        return down.to(dtype).contiguous(), up.to(dtype).contiguous()  # as files and kernels have them

    def _rest(self, proj_down: torch.Tensor, proj_up: torch.Tensor) -> torch.Tensor:
        """(N, K) what a branch leaves of the smoothed weight; its own rounding to 16 bits is made up for."""
        return self._weight - proj_up.float() @ self._rotate(proj_down.float().t() * self._factor.float())

    def _rotate(self, values: torch.Tensor) -> torch.Tensor:
        """(..., K): rotated if the layer is; its own inverse."""
        return hadamard.rotate(values) if self._layer.spec.rotated else values

    def _round(self, proj_down: torch.Tensor, proj_up: torch.Tensor) -> _Attempt:
        """Round what the branch leaves; then, if so asked, fit the branch to what the codes leave."""
        codec, dtype = self._codec, self._layer.spec.dtype
        target = rest = self._rest(proj_down, proj_up)
        if self._recipe.moments:
            target = self._moments.compensated(rest, self._spread)
        if self._recipe.clip:
            power = self._moments.power if self._recipe.moments else torch.ones_like(target[0])
            scales = rounding.clipped_scales(target, codec, dtype, power)
        else:
            scales = codec.scales(target, dtype)
        step = codec.step(scales)
        if self._recipe.moments:
            codes = rounding.gptq(target, codec, step, self._spread)
        else:
            codes = rounding.round_to_nearest(target, codec, step)
        rounded = rounding.dequantize(codes, codec, step)
        error = self._error(rest, rounded)
        best = _Attempt(error, self._factor, proj_down, proj_up, codes, scales)
        if not self._recipe.refit:
            return best
        # Nothing makes up for the 16-bit rounding of a branch that comes last: with 8-bit codes it can lose.
        proj_down, proj_up = self._fit(self._weight - rounded, self._metric)
        error = self._error(self._rest(proj_down, proj_up), rounded)
        if error < best.error:
            best = dataclasses.replace(best, error=error, proj_down=proj_down, proj_up=proj_up)
        return best

    def _error(self, rest: torch.Tensor, rounded: torch.Tensor) -> float:
        """Error of the layer's output; of the weight where there are no inputs.

        The low-rank branch sees the input in full precision, so only the rest's product differs.
        """
        if self._layer.inputs is None:
            return float(torch.linalg.norm(rest - rounded))
        return float(torch.linalg.norm(self._inputs @ rest.t() - self._quantized @ rounded.t()))


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
