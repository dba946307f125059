"""Weight patches of the host (LoRA and its kin) as adapters of a quantized layer."""

import logging
from collections.abc import Sequence

import comfy.lora
import torch
from comfy.weight_adapter.lora import LoRAAdapter

from ..layers import Adapter, SVDQLinear


def adapter_from_patches(layer: SVDQLinear, key: str, patches: Sequence[tuple], device: torch.device) -> Adapter | None:
    """Turn what ``ModelPatcher.add_patches`` collected for one weight into an adapter.

    Ordinary LoRA becomes extra rank, exactly and without touching the quantized weight (SVDQuant,
    arXiv 2411.05007, section 4.3). Anything else (LoHa, DoRA, full differences, merges ...) is worked
    out by the host on the layer's dequantized weight and kept as a dense 16-bit difference.

    Args:
        layer: the quantized layer.
        key: of the weight, for messages.
        patches: (strength, patch, strength of the model, offset, function), as the host keeps them.
        device: where to compute.

    Returns:
        The adapter, or None if the patches change nothing.
    """
    low_rank = [_low_rank(layer, key, patch) for patch in patches]
    if any(factors is None for factors in low_rank):
        return _dense(layer, key, patches, device)
    factors = [pair for pair in low_rank if pair[0].shape[1]]
    if not factors:
        return None
    down = torch.cat([down.to(device) for down, _ in factors], dim=1)
    up = torch.cat([up.to(device) for _, up in factors], dim=1)
    return Adapter(down, up)


def _low_rank(layer: SVDQLinear, key: str, patch: tuple) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(K, r) and (N, r) float32 of a plain LoRA; r = 0 if it has no effect; None for other kinds."""
    strength, adapter, strength_model, offset, function = patch
    if not isinstance(adapter, LoRAAdapter) or strength_model != 1.0 or function is not None:
        return None
    up, down, alpha, middle, dora_scale, reshape = adapter.weights
    if middle is not None or dora_scale is not None or reshape is not None:
        return None
    up, down = up.flatten(start_dim=1).float(), down.flatten(start_dim=1).float()
    rank = down.shape[0]
    rows, columns = [0, layer.out_features], [0, layer.in_features]
    if offset is not None:  # a slice of a fused layer: q, k or v along N, an input along K
        axis, start, length = offset
        (rows, columns)[axis][:] = [start, length]
    if (up.shape, down.shape) != ((rows[1], rank), (rank, columns[1])):
        logging.error(
            f"SVDQuant: LoRA for {key} was left out: its factors are {tuple(up.shape)} and "
            f"{tuple(down.shape)}, the layer is {layer.out_features} x {layer.in_features}"
        )
        rank = 0
    if strength == 0:
        rank = 0
    full_up = torch.zeros((layer.out_features, rank))
    full_down = torch.zeros((layer.in_features, rank))
    if rank:
        scale = strength * (1.0 if alpha is None else alpha / rank)
        full_up[rows[0] : rows[0] + rows[1]] = up * scale
        full_down[columns[0] : columns[0] + columns[1]] = down.t()
    return full_down, full_up


def _dense(layer, key, patches, device) -> Adapter:
    weight = layer.dequantized_weight().to(device)
    original = {key: [(weight.clone(), None)]}
    patched = comfy.lora.calculate_weight(patches, weight.clone(), key, original_weights=original)
    down = weight.new_empty((layer.in_features, 0))
    up = weight.new_empty((layer.out_features, 0))
    return Adapter(down, up, delta=patched - weight)
