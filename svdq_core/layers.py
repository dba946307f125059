"""The quantized linear layer, free of any host."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch

from .formats.comfy_quant import LayerSpec
from .numerics import int4
from .ops.cuda import release
from .ops.int4 import linear_w4a4


@dataclass(frozen=True)
class Adapter:
    """A change of a layer's weight (a LoRA, say) that leaves the quantized weight alone.

    Attributes:
        down: (K, r) and
        up: (N, r): adds ``up @ down.T`` to the weight as extra rank, scale and strength included.
        delta: (N, K) added to the weight densely, for changes that are not low-rank; or None.
    """

    down: torch.Tensor
    up: torch.Tensor
    delta: torch.Tensor | None = None


class SVDQLinear(torch.nn.Module):
    """``y = x Wᵀ + b`` with 4-bit weights and activations and a 16-bit low-rank branch.

    SVDQuant, arXiv 2411.05007, section 4.2. The parameters have the names and shapes of the file
    (``svdq_core.formats.comfy_quant``) and are never changed: adapters are kept beside them, as an
    extended copy of the low-rank branch, so taking an adapter off gives back the very same bytes.

    Args:
        spec: shapes and format.
        tensors: the layer's tensors by their name inside the layer.
    """

    def __init__(self, spec: LayerSpec, tensors: Mapping[str, torch.Tensor]):
        super().__init__()
        self.spec = spec
        self.in_features = spec.in_features
        self.out_features = spec.out_features
        self.rank = spec.rank
        self.act_unsigned = spec.act_unsigned
        for name in spec.tensors:
            parameter = torch.nn.Parameter(tensors[name], requires_grad=False)
            self.register_parameter(name, parameter)
        if not spec.bias:
            self.register_parameter("bias", None)
        self._adapters: dict[str, Adapter] = {}
        for name in ("adapted_down", "adapted_up", "delta"):
            self.register_buffer(name, None, persistent=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) floating point -> (..., N) in the same type."""
        return self._evaluate(x, self.active_tensors())

    def active_tensors(self) -> dict[str, torch.Tensor | None]:
        """The tensors the next call computes with, adapters included."""
        return {
            "weight": self.weight,
            "weight_scale": self.weight_scale,
            "smooth_factor": self.smooth_factor,
            "proj_down": self.proj_down if self.adapted_down is None else self.adapted_down,
            "proj_up": self.proj_up if self.adapted_up is None else self.adapted_up,
            "bias": self.bias,
            "delta": self.delta,
        }

    def _apply(self, fn, recurse: bool = True):
        """As ``torch.nn.Module``'s, which ``to`` ends in; what a device made of the weight there is freed."""
        result = super()._apply(fn, recurse)
        release(self.weight)
        return result

    def set_adapter(self, slot: str, adapter: Adapter | None) -> None:
        """Put an adapter in a named slot (replacing the one there), or empty the slot with None.

        All slots act together. The extended branch is built here, once, not at every call.
        """
        if adapter is None:
            if self._adapters.pop(slot, None) is None:
                return
        else:
            self._adapters[slot] = adapter
        adapters = [self._adapters[name] for name in sorted(self._adapters)]
        downs = [a.down for a in adapters if a.down.shape[1]]
        ups = [a.up for a in adapters if a.up.shape[1]]
        self.adapted_down = self._extended(self.proj_down, downs)
        self.adapted_up = self._extended(self.proj_up, ups)
        deltas = [a.delta.to(self.proj_up.device) for a in adapters if a.delta is not None]
        self.delta = sum(deltas).to(self.proj_up.dtype) if deltas else None

    def dequantized_weight(self) -> torch.Tensor:
        """(N, K) float32: the weight that this layer stands for, adapters left out."""
        return self._residual() + self.proj_up.float() @ self.proj_down.float().t()

    def adapted_weight(self) -> torch.Tensor:
        """(N, K) float32: the weight that this layer stands for, adapters included."""
        active = self.active_tensors()
        weight = self._residual() + active["proj_up"].float() @ active["proj_down"].float().t()
        return weight if self.delta is None else weight + self.delta.float()

    def bias_shift(self) -> torch.Tensor | float:
        """(N,) float32: what the file adds to the bias to undo the GELU shift; 0 for signed layers."""
        if not self.act_unsigned:
            return 0.0
        return -int4.GELU_SHIFT * self._residual().sum(dim=1)

    def _residual(self) -> torch.Tensor:
        """(N, K) float32: the 4-bit part of the weight, smoothing undone."""
        codes = int4.unpack(self.weight)
        return int4.dequantize(codes, self.weight_scale.t()) / self.smooth_factor.float()

    def _evaluate(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor | None]) -> torch.Tensor:
        """Run on ``tensors`` (those of ``active_tensors``, wherever they were moved to)."""
        small = {
            name: None if tensor is None else tensor.to(x.dtype) for name, tensor in tensors.items() if name != "weight"
        }
        rows = x.reshape(-1, self.in_features).contiguous()
        y = linear_w4a4(
            rows,
            small["smooth_factor"],
            small["proj_down"],
            tensors["weight"],
            small["weight_scale"],
            small["proj_up"],
            small["bias"],
            self.act_unsigned,
        )
        if small["delta"] is not None:
            y = y + torch.nn.functional.linear(rows, small["delta"])
        return y.reshape(*x.shape[:-1], self.out_features)

    def _extended(self, base: torch.Tensor, extra: list[torch.Tensor]) -> torch.Tensor | None:
        if not extra:
            return None
        extended = torch.cat([base, *(tensor.to(base) for tensor in extra)], dim=1)
        # Kernels multiply ranks in sixteens; padding once here saves a copy at every call.
        return torch.nn.functional.pad(extended, (0, -extended.shape[1] % 16))

    def extra_repr(self) -> str:
        """Shape and rank, for ``print(model)``."""
        extra = 0 if self.adapted_down is None else self.adapted_down.shape[1] - self.rank
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, rank={self.rank}"
            + (f"+{extra}" if extra else "")
            + (", act_unsigned=True" if self.act_unsigned else "")
        )
