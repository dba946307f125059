"""Smoothing: moving outliers from activations into weights, where the low-rank branch takes them."""

from collections.abc import Iterator

import torch

from .codecs import Codec

# Migration strengths tried for the activation range, and whether the weight range counters it
# (SmoothQuant's s = ax^a / aw^(1 - a), or s = ax^a alone); the paper searches the same family.
_STRENGTHS = tuple(step / 10 for step in range(1, 11))
_STEPS, _RATE, _MOMENTUM, _DECAY, _EPSILON = 20, 0.1, 0.9, 0.999, 1e-8  # of the descent; Adam's
_WIDEST = 2.0**12


def candidates(act_range: torch.Tensor, weight: torch.Tensor, dtype: torch.dtype) -> Iterator[torch.Tensor]:
    """The paper's grid of smoothing factors, rounded to the type the file keeps.

    Args:
        act_range: (K,) float32, the largest magnitude seen per input channel.
        weight: (N, K) float32.
        dtype: 16-bit type of the file.

    Yields:
        (K,) of ``dtype``, positive and finite; all ones (no smoothing) first.
    """
    yield torch.ones_like(act_range).to(dtype)
    for strength in _STRENGTHS:
        for against in (0.0, 1.0 - strength):
            yield migrated(act_range, weight, strength, against, dtype)


def migrated(
    act_range: torch.Tensor, weight: torch.Tensor, strength: float, against: float, dtype: torch.dtype
) -> torch.Tensor:
    """(K,) ``act_range ** strength / weight_range ** against``; arguments as for :func:`candidates`."""
    weight_range = weight.abs().amax(dim=0)
    # A channel that is never used or never weighted has no range to balance: leave it alone.
    alive = (act_range > 0) & (weight_range > 0)
    factor = torch.where(alive, act_range, 1.0) ** strength / torch.where(alive, weight_range, 1.0) ** against
    return torch.where(alive, _centred(factor), 1.0).to(dtype)


def descend(factor: torch.Tensor, inputs: torch.Tensor, weight: torch.Tensor, codec: Codec) -> torch.Tensor:
    """A smoothing factor of its own for every channel, by gradient descent on the expected rounding noise.

    Rounding errs by a uniform share of its group's step, and the step follows the group's largest value. So with
    group maxima ``a`` of x / s over tokens and ``w`` of R s over rows, the output's squared error is about

        sum over groups of  E[a^2] ||R s||^2 / la^2  +  sum(w^2) E[||x / s||^2] / lw^2

    with la, lw the largest codes. Its gradient in log s costs no matrix product: a maximum hands it to the channel
    that is largest. A grid has two parameters for all channels; this has one for each.

    Args:
        factor: (K,) where to start.
        inputs: (R, K) float32, unsmoothed, shifted as the codec asks.
        weight: (N, K) float32, unsmoothed, without the low-rank branch.
        codec: of the layer's format.

    Returns:
        (K,) of ``factor``'s dtype.
    """
    group = codec.group_size or inputs.shape[1]
    squares = (inputs.clamp(min=0) if codec.act_unsigned else inputs).square()
    weights = weight.square()
    power, gain = inputs.square().mean(dim=0), weights.sum(dim=0)
    squares, weights = squares * (codec.act_limit**-2 / len(inputs)), weights * codec.weight_limit**-2
    log = factor.float().log()
    first, second = torch.zeros_like(log), torch.zeros_like(log)
    for step in range(1, _STEPS + 1):
        square = (2 * log).exp()
        act, weighed = power / square, gain * square
        act_max, act_of = _largest(squares / square, group)
        weight_max, weight_of = _largest(weights * square, group)
        weighed_sum, act_sum = _per_group(weighed, group), _per_group(act, group)
        gradient = act_max * weighed - act_of * weighed_sum + weight_of * act_sum - weight_max * act
        gradient = gradient / gradient.abs().mean().clamp(min=torch.finfo(torch.float32).tiny)
        first = _MOMENTUM * first + (1 - _MOMENTUM) * gradient
        second = _DECAY * second + (1 - _DECAY) * gradient.square()
        scale = (second / (1 - _DECAY**step)).sqrt() + _EPSILON
        rate = _RATE * (1 - (step - 1) / _STEPS)
        log = log - rate * first / (1 - _MOMENTUM**step) / scale
    return _centred(log.exp()).to(factor.dtype)


def levelled(inputs: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """The smoothing factor for a layer that is to be rotated, in closed form.

    Rotated, every channel of a group has its share of the others: of a group's expected noise only the powers of its
    inputs and weights are left, ||x / s||^2 ||R s||^2, least where both have the same.

    Args:
        inputs: (R, K) float32, unsmoothed.
        weight: (N, K) float32, unsmoothed, without the low-rank branch.

    Returns:
        (K,) float32.
    """
    power, gain = inputs.square().mean(dim=0), weight.square().mean(dim=0)
    alive = (power > 0) & (gain > 0)
    factor = (torch.where(alive, power, 1.0) / torch.where(alive, gain, 1.0)) ** 0.25
    return _centred(torch.where(alive, factor, 1.0))


def _largest(squares: torch.Tensor, group: int) -> tuple[torch.Tensor, torch.Tensor]:
    """(K,) each: the sum over rows of the group's largest value, and the part of it that is this channel's."""
    rows = squares.unflatten(-1, (-1, group))
    largest = rows.amax(dim=-1)
    # Not by index_add, whose order on a GPU changes from run to run, and with it the last bits.
    part = torch.where(rows == largest.unsqueeze(-1), rows, 0.0).sum(dim=0).flatten()
    return largest.sum(dim=0).repeat_interleave(group), part


def _per_group(values: torch.Tensor, group: int) -> torch.Tensor:
    """(K,) each channel's group's sum."""
    return values.unflatten(0, (-1, group)).sum(dim=1).repeat_interleave(group)


def _centred(factor: torch.Tensor) -> torch.Tensor:
    """Only ratios matter: around 1, and none further than 16-bit types bear."""
    return (factor / factor.log().mean().exp()).clamp(1 / _WIDEST, _WIDEST)
