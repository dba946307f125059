"""Quantizing a layer on a device that may be too small for it."""

import copy
import logging

import torch

from ..formats.comfy_quant import LayerSpec
from .recipes import QuantizedLayer, Recipe, quantize_layer
from .statistics import LayerStatistics

_FEWEST_ROWS = 128
_log = logging.getLogger(__name__)


def quantize_within_memory(
    spec: LayerSpec,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    statistics: LayerStatistics | None,
    recipe: Recipe,
    seed: int,
    device: torch.device,
) -> QuantizedLayer:
    """:func:`quantize_layer` on ``device``; should its memory run out, with fewer calibration rows, then on the CPU.

    Args:
        weight, bias: on the CPU.
        device: where to compute; the others as for :func:`quantize_layer`.
    """
    while True:
        try:
            return _on(device, spec, weight, bias, statistics, recipe, seed)
        except torch.OutOfMemoryError:
            if device.type == "cpu":
                raise
        # Out of the except block: the traceback would keep the failed attempt's tensors alive.
        torch.cuda.empty_cache()
        rows = 0 if statistics is None else len(statistics.sample) // 2
        if rows >= _FEWEST_ROWS:
            _log.warning("%s: out of memory on %s; going on with %d calibration rows", spec.name, device, rows)
            statistics = _thinned(statistics, rows)
        else:
            _log.warning("%s: out of memory on %s; the layer is quantized on the CPU, which is slow", spec.name, device)
            device = torch.device("cpu")


def _on(device, spec, weight, bias, statistics, recipe, seed) -> QuantizedLayer:
    weight = weight.to(device, non_blocking=True)
    bias = None if bias is None else bias.to(device, non_blocking=True)
    return quantize_layer(spec, weight, bias, statistics, recipe, seed)


def _thinned(statistics: LayerStatistics, rows: int) -> LayerStatistics:
    """With the ``rows`` of the highest priority: a fair sample of the sample."""
    thinned = copy.copy(statistics)
    keep = torch.topk(statistics.priority, rows).indices.sort().values
    thinned.sample, thinned.priority = statistics.sample[keep], statistics.priority[keep]
    return thinned
