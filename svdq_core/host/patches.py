"""Weight patches of the host (LoRA and its kin) as adapters of a quantized layer."""

from __future__ import annotations

import logging
from collections import OrderedDict, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace

import comfy.lora
import torch
from comfy.weight_adapter.lora import LoRAAdapter

from ..layers import Adapter, SVDQLinear
from ..lora.fit import fit, recompress

# Kinds of patches whose change of a weight is proportional to the strength and free of the weight.
_PROPORTIONAL = ("loha", "lokr", "diff")
_MOST_FITS = 4  # remembered for a weight


@dataclass(frozen=True)
class AdapterSettings:
    """How changes that are not low-rank by nature are kept.

    Attributes:
        error_bound: relative, of a fit; a layer that no rank up to ``max_rank`` fits so well keeps its
            change densely, in 16 bits.
        max_rank: of a fit.
        recompress: allowed relative error of the sum of all low-rank changes; 0 leaves it as it is.
    """

    error_bound: float = 0.01
    max_rank: int = 256
    recompress: float = 0.0


@dataclass(frozen=True)
class _Part:
    """What one patch adds to a layer, as it is kept: not moved, scaled or padded to the layer's size yet.

    Attributes:
        down: (k, r) and
        up: (n, r): of all of the layer, or of a slice of a fused one: q, k or v along N, an input along K.
        delta: (N, K) added densely, or None.
        scale: factor on ``up`` and ``delta``.
        row, column: of the layer's weight, where the slice begins.
    """

    down: torch.Tensor
    up: torch.Tensor
    delta: torch.Tensor | None = None
    scale: float = 1.0
    row: int = 0
    column: int = 0

    @property
    def rank(self) -> int:
        return self.down.shape[1]


class AdapterBuilder:
    """Builds the adapters of one model's layers, and remembers fits: a change of strength repeats none.

    What is remembered lies in main memory: the host accounts for the device's.
    """

    def __init__(self) -> None:
        # By weight, then by what was fitted, the latest last; the tensors' addresses are part of its name.
        self._fits: dict[str, OrderedDict[tuple, tuple[list[torch.Tensor], _Part]]] = defaultdict(OrderedDict)

    def build(
        self,
        layer: SVDQLinear,
        key: str,
        patches: Sequence[tuple],
        device: torch.device,
        settings: AdapterSettings = AdapterSettings(),
    ) -> Adapter | None:
        """Turn what ``ModelPatcher.add_patches`` collected for one weight into an adapter.

        Ordinary LoRA becomes extra rank, exactly and without touching the quantized weight (SVDQuant,
        arXiv 2411.05007, section 4.3). LoHa, LoKr and plain differences are worked out by the host and
        fitted with a product of low rank, each once. What depends on the weight (DoRA, OFT, BOFT,
        GLoRA, merges) is worked out on the layer's dequantized weight with all patches in order, and
        fitted.

        Args:
            layer: the quantized layer.
            key: of the weight, for messages.
            patches: (strength, patch, strength of the model, offset, function), as the host keeps them.
            device: where to compute.
            settings: of the fits.

        Returns:
            The adapter, in the layer's own type, or None if the patches change nothing.
        """
        parts = self._parts(layer, key, patches, device, settings)
        rank = sum(part.rank for part in parts)
        deltas = [part.delta.to(device) * part.scale for part in parts if part.delta is not None]
        if not rank and not deltas:
            return None
        dtype = torch.float32 if settings.recompress else layer.spec.dtype
        down = torch.zeros((layer.in_features, rank), dtype=dtype, device=device)
        up = torch.zeros((layer.out_features, rank), dtype=dtype, device=device)
        end = 0
        for part in parts:
            start, end = end, end + part.rank
            # Moved in the file's own type, half the bytes, and worked on over there.
            down[part.column : part.column + len(part.down), start:end] = part.down.to(device)
            up[part.row : part.row + len(part.up), start:end] = part.up.to(device).float() * part.scale
        if settings.recompress:
            down, up = (factor.to(layer.spec.dtype) for factor in recompress(down, up, settings.recompress))
        return Adapter(down, up, sum(deltas).to(layer.spec.dtype) if deltas else None)

    def measure(
        self,
        layer: SVDQLinear,
        key: str,
        patches: Sequence[tuple],
        device: torch.device,
        settings: AdapterSettings = AdapterSettings(),
    ) -> tuple[int, bool]:
        """Rank of the adapter that :meth:`build` would give, and whether it has a dense part; fits are done now."""
        if settings.recompress:
            adapter = self.build(layer, key, patches, device, settings)
            return (0, False) if adapter is None else (adapter.down.shape[1], adapter.delta is not None)
        parts = self._parts(layer, key, patches, device, settings)
        return sum(part.rank for part in parts), any(part.delta is not None for part in parts)

    def _parts(self, layer, key, patches, device, settings) -> list[_Part]:
        active = [patch for patch in patches if patch[0] != 0 or patch[2] != 1.0]
        parts = [self._additive(layer, key, patch, device, settings) for patch in active]
        if any(part is None for part in parts):
            name = ("all", *((patch[0], _identity(patch)) for patch in active))
            return [self._remembered(name, layer, key, active, device, settings)]
        return parts

    def _additive(self, layer, key, patch, device, settings) -> _Part | None:
        """A patch's own change, strength included; None where it depends on the weight it changes."""
        strength, adapter, strength_model, _, function = patch
        if strength_model != 1.0 or function is not None:
            return None
        low_rank = _low_rank(layer, key, patch)
        if low_rank is not None:
            return low_rank
        if _kind(adapter) not in _PROPORTIONAL or _decomposes(adapter):
            return None
        at_one = (1.0, *patch[1:])
        unit = self._remembered(("one", _identity(patch)), layer, key, [at_one], device, settings, of_zero=True)
        return replace(unit, scale=strength)

    def _remembered(self, name, layer, key, patches, device, settings, of_zero=False) -> _Part:
        fits = self._fits[key]
        signature = (name, settings.error_bound, settings.max_rank)
        if signature not in fits:
            weight = layer.dequantized_weight().to(device)
            base = torch.zeros_like(weight) if of_zero else weight
            original = {key: [(weight.clone(), None)]}
            changed = comfy.lora.calculate_weight(list(patches), base.clone(), key, original_weights=original)
            adapter = fit(changed - base, settings.error_bound, settings.max_rank)
            # The patches' tensors are kept so that no other ones come to have their addresses.
            kept = [tensor for patch in patches for tensor in _tensors(patch[1])]
            delta = None if adapter.delta is None else adapter.delta.cpu()
            fits[signature] = kept, _Part(adapter.down.cpu(), adapter.up.cpu(), delta)
            if len(fits) > _MOST_FITS:
                fits.popitem(last=False)
        fits.move_to_end(signature)
        return fits[signature][1]


def _kind(adapter) -> str | None:
    """The name of a patch's kind; None for what the host nests (merges)."""
    if isinstance(adapter, tuple):
        return adapter[0] if isinstance(adapter[0], str) else "diff"
    return getattr(adapter, "name", None)


def _tensors(patch) -> list[torch.Tensor]:
    """The tensors of a patch, in whatever the host keeps it."""
    if isinstance(patch, torch.Tensor):
        return [patch]
    values = patch if isinstance(patch, (list, tuple)) else getattr(patch, "weights", ())
    return [tensor for value in values for tensor in _tensors(value)] if not isinstance(patch, str) else []


def _identity(patch: tuple) -> tuple:
    """Names a patch but for its strength: its kind, its tensors, where it acts."""
    _, adapter, strength_model, offset, function = patch
    numbers = tuple(value for value in getattr(adapter, "weights", ()) if isinstance(value, (int, float)))
    tensors = tuple((tensor.data_ptr(), tuple(tensor.shape)) for tensor in _tensors(adapter))
    return _kind(adapter), tensors, numbers, strength_model, offset, id(function) if function else None


def _decomposes(adapter) -> bool:
    """Whether it is a DoRA of its kind: relative to the norms of the weight it changes."""
    weights = getattr(adapter, "weights", None)
    if weights is None:
        return False
    dora = {"loha": 7, "lokr": 8}.get(adapter.name)
    return dora is not None and len(weights) > dora and weights[dora] is not None


def _low_rank(layer: SVDQLinear, key: str, patch: tuple) -> _Part | None:
    """A plain LoRA's factors; of rank 0 if they do not fit; None for other kinds."""
    strength, adapter, _, offset, _ = patch
    if not isinstance(adapter, LoRAAdapter):
        return None
    up, down, alpha, middle, dora_scale, reshape = adapter.weights
    if middle is not None or dora_scale is not None or reshape is not None:
        return None
    up, down = up.flatten(start_dim=1), down.flatten(start_dim=1)
    if not fits_layer(layer, patch):
        logging.error(
            f"SVDQuant: LoRA for {key} was left out: its factors are {tuple(up.shape)} and "
            f"{tuple(down.shape)}, the layer is {layer.out_features} x {layer.in_features}"
        )
        return _Part(down.new_empty((layer.in_features, 0)), up.new_empty((layer.out_features, 0)))
    start = [0, 0]
    if offset is not None:
        start[offset[0]] = offset[1]
    return _Part(down.t(), up, None, strength * (1.0 if alpha is None else alpha / down.shape[0]), *start)


def fits_layer(layer: SVDQLinear, patch: tuple) -> bool:
    """Whether a plain LoRA's factors have the shape of the part of the layer that it is for."""
    _, adapter, _, offset, _ = patch
    if not isinstance(adapter, LoRAAdapter):
        return True
    up, down = (factor.flatten(start_dim=1) for factor in adapter.weights[:2])
    size = [layer.out_features, layer.in_features]
    if offset is not None:
        size[offset[0]] = offset[2]
    return (up.shape[0], down.shape[1]) == tuple(size) and up.shape[1] == down.shape[0]
