"""What each step of the recipes gains, on inputs whose channels go together and that calibration did not see."""

import dataclasses
import functools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from svdq_core.formats.comfy_quant import LayerSpec
from svdq_core.layers import SVDQLinear
from svdq_core.numerics import hadamard, int4
from svdq_core.quantizer import rounding, smoothing
from svdq_core.quantizer.codecs import codec_of
from svdq_core.quantizer.lowrank import truncated_svd
from svdq_core.quantizer.moments import InputMoments
from svdq_core.quantizer.recipes import RECIPES, Recipe, quantize_layer
from svdq_core.quantizer.statistics import LayerStatistics

N, K, RANK = 192, 256, 16
PAPER = Recipe(smooth="grid", rounds=101)
FORMATS = ("svdquant_w4a4", "svdquant_nvfp4", "svdquant_w8a8")


class Layer:
    """A random layer, its calibration, and inputs to judge by."""

    def __init__(self, seed: int, form: str = "svdquant_w4a4", unsigned: bool = False):
        random = torch.Generator().manual_seed(seed)
        self.weight = (
            torch.randn((N, K), generator=random)
            + 2 * torch.randn((N, 8), generator=random) @ torch.randn((8, K), generator=random) / 8**0.5
        )
        mixing = torch.randn((K, K), generator=random) / torch.arange(1, K + 1)[:, None] ** 0.5
        strength = torch.randn(K, generator=random).exp()
        strength[::61] *= 20

        def inputs(rows):
            common = torch.randn((rows, K), generator=random) @ mixing
            x = (common + 0.3 * torch.randn((rows, K), generator=random)) * strength
            return torch.nn.functional.gelu(x / strength, approximate="tanh") if unsigned else x

        self.statistics = LayerStatistics(K, 512, seed)
        self.statistics.observe(inputs(2048))
        self.inputs = inputs(512)
        self.spec = LayerSpec("layer", form, N, K, RANK, True, torch.bfloat16, unsigned)

    def quantize(self, recipe: Recipe, **changes):
        spec = dataclasses.replace(self.spec, **changes)
        return quantize_layer(spec, self.weight, None, self.statistics, recipe)

    def error(self, recipe: Recipe, **changes) -> float:
        """Relative output error against float64."""
        quantized = self.quantize(recipe, **changes)
        exact = self.inputs.double() @ self.weight.double().t()
        given = SVDQLinear(quantized.spec, quantized.tensors)(self.inputs).double()
        return float(torch.linalg.norm(given - exact) / torch.linalg.norm(exact))


def gain_db(
    recipe: Recipe, against: Recipe, form: str = "svdquant_w4a4", unsigned: bool = False, seeds: tuple = (1, 2)
) -> float:
    """Mean over layers."""
    errors = [[_error(seed, form, unsigned, each) for each in (against, recipe)] for seed in seeds]
    return sum(20 * math.log10(before / after) for before, after in errors) / len(errors)


@functools.cache
def _error(seed: int, form: str, unsigned: bool, recipe: Recipe) -> float:
    return Layer(seed, form, unsigned).error(recipe)


@pytest.mark.parametrize("unsigned", [False, True])
def test_recipes_beat_the_paper_s(unsigned):
    balanced, best = (gain_db(RECIPES[name], PAPER, unsigned=unsigned) for name in ("balanced", "best"))
    assert balanced > 1.0 and best > balanced


@pytest.mark.parametrize(("name", "pays"), [("fast", 1.0), ("balanced", 0.3), ("best", 0.3)])
def test_rotation_pays_where_inputs_are_signed(name, pays):
    rotating, plain = RECIPES[name], dataclasses.replace(RECIPES[name], rotate=False)
    assert Layer(1).quantize(rotating).spec.rotated
    assert gain_db(rotating, plain) > pays


def test_a_mean_that_channels_have_in_common_does_not_add_up():
    """Half of the signs are turned before the rotation, whose first column is a plain sum."""
    factor = Layer(1).quantize(RECIPES["fast"]).tensors["smooth_factor"]
    assert 0.3 < (factor < 0).float().mean() < 0.7
    rotated = hadamard.smooth_and_rotate(torch.ones(1, K), factor.float()).unflatten(-1, (-1, 64))
    assert rotated.abs().amax() < 0.6 * 64**0.5


def test_nothing_else_is_rotated():
    assert not Layer(1, unsigned=True).quantize(RECIPES["best"]).spec.rotated
    for form in FORMATS[1:]:
        assert not Layer(1, form).quantize(RECIPES["best"]).spec.rotated


def test_levelled_groups_have_the_least_expected_noise():
    """No other factor brings the product of the two powers of a group further down."""
    layer = Layer(2)
    factor = smoothing.levelled(layer.inputs, layer.weight)
    power, gain = layer.inputs.square().mean(dim=0), layer.weight.square().mean(dim=0)

    def noise(factor):
        inputs, weights = (each.unflatten(0, (-1, 64)).sum(dim=1) for each in (power / factor**2, gain * factor**2))
        return (inputs * weights).sum()

    least = noise(factor)
    for _ in range(20):
        assert noise(factor * torch.randn(K).mul(0.1).exp()) > least


@pytest.mark.parametrize("form", FORMATS)
def test_every_step_pays_in_every_format(form):
    balanced = RECIPES["balanced"]
    for step in ({"smooth": "grid"}, {"moments": False}):
        assert gain_db(balanced, dataclasses.replace(balanced, **step), form, seeds=(1,)) > 0.2, step
    assert gain_db(balanced, PAPER, form, seeds=(1,)) > 0.5
    # These two are of no use to 8 bits, and then take no part.
    least = -1e-3 if form == "svdquant_w8a8" else 0.02
    for step in ({"refit": False}, {"clip": False}):
        assert gain_db(balanced, dataclasses.replace(balanced, **step), form, seeds=(1, 2, 3)) > least, step
    assert gain_db(RECIPES["fast"], Recipe(), form, seeds=(1,)) > least


def test_low_rank_of_the_error_alone_is_worse():
    """LoRC; the paper's section 4.2: what is hard to round has to be taken off before rounding."""
    assert gain_db(RECIPES["fast"], Recipe(split=False, refit=True)) > 0
    assert gain_db(Recipe(split=False, refit=True), Recipe(split=False)) > 0


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("recipe", RECIPES)
def test_what_comes_out_is_as_kernels_and_files_have_it(recipe, form):
    quantized = Layer(1, form).quantize(RECIPES[recipe])
    assert quantized.tensors.keys() == quantized.spec.tensors.keys()
    for name, tensor in quantized.tensors.items():
        wanted = quantized.spec.tensors[name]
        assert tensor.is_contiguous() and tensor.shape == wanted.shape and tensor.dtype == wanted.dtype, name


def test_rank_zero_is_served_by_every_recipe():
    layer = Layer(3)
    assert layer.error(RECIPES["best"], rank=0) < layer.error(RECIPES["fast"], rank=0)


@pytest.mark.parametrize("diagonal", [False, True])
def test_svd_in_a_metric_is_the_best_of_its_rank(diagonal):
    random = torch.Generator().manual_seed(5)
    matrix, root = torch.randn((96, 64), generator=random), torch.randn((64, 64), generator=random).double()
    root = root.diagonal().abs().add(0.1).diag() if diagonal else root
    root = root * 0.9 ** torch.arange(64)[:, None]
    metric = root.t() @ root
    up, down = truncated_svd(
        matrix, 8, torch.Generator().manual_seed(1), (metric.diagonal() if diagonal else metric).float()
    )
    error = torch.linalg.norm((matrix - up @ down.t()).double() @ root.t())
    best = torch.linalg.svdvals(matrix.double() @ root.t())[8:].square().sum().sqrt()
    assert best * 0.999 <= error <= 1.001 * best


def test_moments_give_the_least_error_of_unrounded_weights():
    """The compensated weight against the closed form in float64, and the spread against the inverse."""
    random = torch.Generator().manual_seed(6)
    inputs = torch.randn((512, 64), generator=random) @ torch.randn((64, 64), generator=random)
    moments = InputMoments(inputs, inputs + torch.randn(inputs.shape, generator=random))
    signal, noise = moments.signal.double(), moments.noise.double()
    weight, spread = torch.randn((32, 64), generator=random), moments.spread()
    assert torch.equal(spread, spread.triu())
    inverse = torch.linalg.inv(signal + noise.diag())
    torch.testing.assert_close((spread.t() @ spread).double(), inverse, rtol=1e-3, atol=1e-5)
    exact = weight.double() @ signal @ inverse
    torch.testing.assert_close(moments.compensated(weight, spread).double(), exact, rtol=1e-3, atol=1e-4)


def test_moments_of_channels_that_are_never_used_can_be_inverted():
    inputs = torch.randn(16, 64)
    inputs[:, ::3] = 0
    for x in (inputs, torch.zeros(16, 64)):
        assert torch.isfinite(InputMoments(x, x).spread()).all()


def test_gptq_loses_less_output_than_rounding_to_nearest():
    layer = Layer(7)
    codec, inputs = codec_of(layer.spec), layer.inputs.float()
    moments = InputMoments(inputs, inputs)
    step = codec.step(codec.scales(layer.weight, torch.bfloat16))
    before = layer.weight.clone()
    errors = []
    for codes in (
        rounding.round_to_nearest(layer.weight, codec, step),
        rounding.gptq(layer.weight, codec, step, moments.spread()),
    ):
        wrong = rounding.dequantize(codes, codec, step).double() - layer.weight.double()
        errors.append(float((wrong @ moments.signal.double() * wrong).sum()))
    assert errors[1] < 0.9 * errors[0]
    assert torch.equal(layer.weight, before)


@pytest.mark.parametrize("form", FORMATS[:2])  # 8 bits have no use for clipping
def test_clipped_scales_never_round_worse(form):
    layer = Layer(8, form)
    codec, power = codec_of(layer.spec), torch.rand(K) + 0.1
    full = codec.scales(layer.weight, torch.bfloat16)
    errors = []
    for scales in (full, rounding.clipped_scales(layer.weight, codec, torch.bfloat16, power)):
        step = codec.step(scales)
        wrong = rounding.dequantize(rounding.round_to_nearest(layer.weight, codec, step), codec, step) - layer.weight
        errors.append((wrong.double().square() * power).unflatten(-1, (step.shape[1], -1)).sum(dim=-1))
    assert (errors[1] <= errors[0] * (1 + 1e-5)).all() and errors[1].sum() < errors[0].sum()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@given(exponent=st.integers(-16, 12), seed=st.integers(0, 2**32))
def test_int4_scales_lie_on_a_grid_and_reach_their_groups(dtype, exponent, seed):
    random = torch.Generator().manual_seed(seed)
    spread = torch.randn((6, 5, 1), generator=random).mul(3).exp().clamp(2.0**-6, 2.0**3)
    weight = (torch.randn((6, 5, 64), generator=random) * spread * 2.0**exponent).flatten(1)
    weight[:, :64], weight[0] = 0, 0
    codec, power = codec_of(LayerSpec("layer", FORMATS[0], 6, 320, 0, False, dtype)), torch.ones(320)
    full = codec.scales(weight, dtype)["weight_scale"]
    for scale in (full, rounding.clipped_scales(weight, codec, dtype, power)["weight_scale"]):
        assert scale.dtype == dtype and bool(torch.isfinite(scale).all())
        assert int4.scale_grid(scale) is not None
    assert not full[0].any() and not full[:, 0].any() and full[1:, 1:].all(), "a scale of 0 for zeros only"
    reached = full.t().double() * int4.SIGNED_MAX
    assert (reached >= 0.94 * weight.unflatten(1, (5, 64)).double().abs().amax(dim=-1)).all()


@pytest.mark.parametrize("form", FORMATS)
def test_descended_factors_are_finite_where_channels_are_dead(form):
    layer = Layer(9, form)
    inputs, weight = layer.inputs.clone(), layer.weight.clone()
    inputs[:, :64] = 0  # a whole group of INT4 that is never used
    weight[:, 100:110] = 0
    start = torch.ones(K, dtype=torch.float16)
    factor = smoothing.descend(start, inputs, weight, codec_of(layer.spec))
    assert factor.dtype == start.dtype and torch.isfinite(factor).all() and (factor > 0).all()


def test_recipes_work_where_nothing_can_be_learned():
    """Inputs that are all zero, and a weight that is: finite tensors, no error."""
    for zero_weight in (False, True):
        statistics = LayerStatistics(K, 64, 0)
        statistics.observe(torch.zeros(64, K) if not zero_weight else torch.randn(64, K))
        weight = torch.zeros(N, K) if zero_weight else torch.randn(N, K)
        for recipe in (*RECIPES.values(), PAPER):
            spec = LayerSpec("layer", "svdquant_w4a4", N, K, RANK, False, torch.bfloat16, False)
            quantized = quantize_layer(spec, weight, None, statistics, recipe)
            assert quantized.output_error == pytest.approx(0, abs=1e-6)
            assert all(torch.isfinite(tensor.float()).all() for tensor in quantized.tensors.values())


@pytest.mark.parametrize("seed", [1, 2])
def test_calibration_helps_weights_with_16_bit_inputs(seed):
    """Ranges go by the channels that vary, and the bias takes the mean error: of inputs that have a mean."""
    layer, mean = Layer(seed, "awq_w4a16"), torch.randn(K, generator=torch.Generator().manual_seed(seed))
    bias = torch.randn(N)
    statistics = LayerStatistics(K, 512, seed)
    statistics.observe(layer.inputs[:256] + 3 * mean)
    inputs = layer.inputs[256:] + 3 * mean
    exact = inputs.double() @ layer.weight.double().t() + bias.double()
    spec = dataclasses.replace(layer.spec, rank=0)

    def error(seen):
        quantized = quantize_layer(spec, layer.weight, bias, seen, RECIPES["balanced"])
        return torch.linalg.norm(SVDQLinear(spec, quantized.tensors)(inputs).double() - exact)

    assert error(statistics) < 0.75 * error(None)


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMATS)
def test_columns_recorded_on_a_device_round_as_they_do_without(form):
    layer = Layer(11, form)
    codec, inputs = codec_of(layer.spec), layer.inputs.float()
    spread = InputMoments(inputs, inputs).spread()
    step = codec.step(codec.scales(layer.weight, torch.bfloat16))
    here = rounding.gptq(layer.weight, codec, step, spread)
    there = rounding.gptq(layer.weight.cuda(), codec, step.cuda(), spread.cuda()).cpu()
    assert (here != there).float().mean() < 0.01, "sums in another order tip a few"
