"""The quantized linear layer, free of any host."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from .formats import comfy_quant
from .formats.comfy_quant import LayerSpec
from .formats.weights import quantized_part
from .kernels import prefers_int8
from .numerics import int4
from .ops import as_int8
from .ops.awq import linear_awq_w4a16, linears_awq_w4a16
from .ops.block import gelu_concat
from .ops.cuda import linear_as_int8_now, linear_as_int8_of_gelu_now, release
from .ops.dispatch import runs_now
from .ops.fused import HEAD, gelu_quantize_act_int4, linear_norm_rope_int4
from .ops.int4 import linear_int4, linear_w4a4, quantize_act_int4
from .ops.int8 import linear_int8, linears_int8
from .ops.nf4 import linear_nf4
from .ops.nvfp4 import linear_nvfp4


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


_Tensors = Mapping[str, torch.Tensor | None]


def _int4(x: torch.Tensor, tensors: _Tensors, spec: LayerSpec) -> torch.Tensor:
    names = ("smooth_factor", "proj_down", "weight", "weight_scale", "proj_up", "bias")
    return linear_w4a4(x, *(tensors[name] for name in names), spec.act_unsigned, spec.rotated)


def _nvfp4(x: torch.Tensor, tensors: _Tensors, spec: LayerSpec) -> torch.Tensor:
    return linear_nvfp4(
        x,
        tensors["smooth_factor"],
        tensors["proj_down"],
        tensors["weight"],
        tensors["weight_scale"],
        tensors["weight_tensor_scale"],
        tensors.get("weight_channel_scale"),
        tensors["proj_up"],
        tensors["bias"],
    )


def _int8(x: torch.Tensor, tensors: _Tensors, spec: LayerSpec) -> torch.Tensor:
    names = ("smooth_factor", "proj_down", "weight", "weight_scale", "proj_up", "bias")
    return linear_int8(x, *(tensors[name] for name in names))


def _awq(x: torch.Tensor, tensors: _Tensors, spec: LayerSpec) -> torch.Tensor:
    names = ("weight", "weight_scale", "weight_zero", "bias")
    return linear_awq_w4a16(x, *(tensors[name] for name in names))


def _nf4(x: torch.Tensor, tensors: _Tensors, spec: LayerSpec) -> torch.Tensor:
    return linear_nf4(x, tensors["weight"], tensors["weight_scale"], tensors["bias"])


# (M, K) -> (M, N), low-rank branch (where the format has one) and bias included, by the tensors that
# ``SVDQLinear.active_tensors`` gives.
_LINEAR: Mapping[str, Callable[[torch.Tensor, _Tensors, LayerSpec], torch.Tensor]] = {
    comfy_quant.SVDQUANT_W4A4: _int4,
    comfy_quant.SVDQUANT_NVFP4: _nvfp4,
    comfy_quant.SVDQUANT_W8A8: _int8,
    comfy_quant.AWQ_W4A16: _awq,
    comfy_quant.NF4_W4A16: _nf4,
}


FOUR_BITS = (comfy_quant.SVDQUANT_W4A4, comfy_quant.SVDQUANT_NVFP4)


def _as_int8(x: torch.Tensor, tensors: _Tensors, spec: LayerSpec) -> torch.Tensor:
    """Of any shape."""
    operands, form = _of_image(tensors, spec)
    if runs_now(x):
        return linear_as_int8_now(x.contiguous(), operands, form)
    rows = x.reshape(-1, spec.in_features).contiguous()
    return as_int8.linear_as_int8(rows, *operands, *form).reshape(*x.shape[:-1], spec.out_features)


def _of_image(tensors: _Tensors, spec: LayerSpec) -> tuple[tuple[torch.Tensor | None, ...], tuple]:
    """What ``linear_as_int8`` is told of a layer."""
    return tuple(map(tensors.get, as_int8.NAMES)), (spec.format, spec.act_unsigned, spec.rotated)


class SVDQLinear(torch.nn.Module):
    """``y = x Wᵀ + b`` with a quantized weight, and a 16-bit low-rank branch in the formats that have one.

    SVDQuant, arXiv 2411.05007, section 4.2. The parameters have the names and shapes of the file
    (``svdq_core.formats.comfy_quant``) and are never changed: adapters are kept beside them, as an
    extended copy of the low-rank branch (a branch of their own in a weight-only format), so taking an
    adapter off gives back the very same bytes.

    In a rotated layer (``numerics.hadamard``) the smoothed input is rotated before it is quantized, and the weight
    is as well; the low-rank branch sees the input itself, as everywhere.

    A card may evaluate the layer in 8 bits (``ops.as_int8``), where that is faster than what the format says and
    nearer to the 16-bit layer.

    Args:
        spec: shapes and format.
        tensors: the layer's tensors by their name inside the layer.

    Attributes:
        exact: evaluate what the format says, on any card.
    """

    def __init__(self, spec: LayerSpec, tensors: Mapping[str, torch.Tensor]):
        super().__init__()
        self.spec = spec
        self.in_features = spec.in_features
        self.out_features = spec.out_features
        self.rank = spec.rank
        self.act_unsigned = spec.act_unsigned
        self.exact = False
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

    def of_gelu(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """``forward([x, GELU(y)])``, of which the input is not written where what quantizes it takes both.

        Args:
            x: (B, L, K - C), perhaps of no columns.
            y: (B, L, C), perhaps the last columns of something wider.

        Returns:
            (B, L, N).
        """
        tensors = self.active_tensors()
        found = None
        if tensors["delta"] is None and y.dtype == self.spec.dtype:
            if self._runs_as_int8(y, tensors):
                found = linear_as_int8_of_gelu_now(x, y, *_of_image(tensors, self.spec)) if runs_now(y) else None
            elif self._runs_as_int4(y) and y.shape[-1] % int4.GROUP_SIZE == 0:
                quantized = gelu_quantize_act_int4(
                    x.flatten(0, 1).contiguous(),
                    y.flatten(0, 1),
                    tensors["smooth_factor"],
                    tensors["proj_down"],
                    self.act_unsigned,
                    self.spec.rotated,
                )
                names = ("weight", "weight_scale", "proj_up", "bias")
                rows = linear_int4(*quantized, *(tensors[name] for name in names), self.act_unsigned)
                found = rows.unflatten(0, y.shape[:2])
        return self(gelu_concat(x, y)) if found is None else found

    def normed_heads(
        self,
        x: torch.Tensor,
        norm_q: torch.Tensor,
        norm_k: torch.Tensor,
        rope: torch.Tensor,
        heads: int,
        epsilon: float,
    ) -> torch.Tensor | None:
        """``forward(x)``, which begins with q, k and v, q and k normed and rotated; None where no kernel does both.

        Args:
            x: (B, L, K).
            norm_q, norm_k: (128,) weights of the norms.
            rope: (B or 1, 1, L, 64, 2, 2) float32, as for ``ops.block.norm_rope``.
            heads: of 128 columns each, of q, of k and of v.
            epsilon: of the norms.

        Returns:
            (B, L, N).
        """
        tensors = self.active_tensors()
        if tensors["delta"] is not None or len(norm_q) != HEAD or x.dtype != self.spec.dtype or not x.numel():
            return None
        if not self._runs_as_int4(x):
            return None
        names = "smooth_factor", "proj_down", "weight", "weight_scale", "proj_up", "bias"
        smooth_factor, proj_down, *layer = (tensors[name] for name in names)
        rows = x.flatten(0, 1).contiguous()
        quantized = quantize_act_int4(rows, smooth_factor, proj_down, self.act_unsigned, self.spec.rotated)
        matrices = rope.flatten(0, 2).contiguous()
        y = linear_norm_rope_int4(*quantized, *layer, self.act_unsigned, norm_q, norm_k, matrices, heads, epsilon)
        return y.unflatten(0, x.shape[:2])

    def _runs_as_int4(self, x: torch.Tensor) -> bool:
        """Whether this layer's two halves are the 4-bit kernels with more around them, or the reference.

        An H100 has others for the same codes.
        """
        prefers = prefers_int8(x.device, self.out_features, self.in_features)
        return self.spec.format == comfy_quant.SVDQUANT_W4A4 and not prefers

    def active_tensors(self) -> dict[str, torch.Tensor | None]:
        """The tensors the next call computes with, adapters included.

        Those of the file by their names there, and ``delta``. ``proj_down`` and ``proj_up`` hold the adapters' rank
        too, and are None in a weight-only layer without adapters; ``bias`` and ``delta`` are None if there is none.
        """
        # From the module's own dictionary: going through all parameters properly takes longer than a launch.
        buffers = self._buffers
        tensors = {"proj_down": None, "proj_up": None, "bias": None, **self._parameters, "delta": buffers["delta"]}
        if buffers["adapted_down"] is not None:
            tensors["proj_down"], tensors["proj_up"] = buffers["adapted_down"], buffers["adapted_up"]
        return tensors

    def _apply(self, fn, recurse: bool = True):
        """As ``torch.nn.Module``'s, which ``to`` ends in; what a device made of the tensors there is freed."""
        result = super()._apply(fn, recurse)
        dtypes = {self._parameters[name].dtype for name in self.spec.tensors if not self.spec.keeps_dtype(name)}
        if len(dtypes) == 1:
            self.spec = replace(self.spec, dtype=dtypes.pop())
        release((*self.parameters(), *self.buffers()))
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
        release((self.weight,))
        self.adapted_down = self._extended("proj_down", [a.down for a in adapters if a.down.shape[1]])
        self.adapted_up = self._extended("proj_up", [a.up for a in adapters if a.up.shape[1]])
        deltas = [a.delta.to(self.weight.device) for a in adapters if a.delta is not None]
        self.delta = sum(deltas).to(self.spec.dtype) if deltas else None

    def dequantized_weight(self) -> torch.Tensor:
        """(N, K) float32: the weight that this layer stands for, adapters left out."""
        return self._weight(dict(self.named_parameters(recurse=False)))

    def adapted_weight(self) -> torch.Tensor:
        """(N, K) float32: the weight that this layer stands for, adapters included."""
        weight = self._weight(self.active_tensors())
        return weight if self.delta is None else weight + self.delta.float()

    def bias_shift(self) -> torch.Tensor | float:
        """(N,) float32: what the file adds to the bias to undo the GELU shift; 0 for signed layers."""
        if not self.act_unsigned:
            return 0.0
        return -int4.GELU_SHIFT * self._residual().sum(dim=1)

    def _weight(self, tensors: Mapping[str, torch.Tensor | None]) -> torch.Tensor:
        """(N, K) float32: what the quantized weight and a low-rank branch stand for together."""
        weight = self._residual()
        if tensors.get("proj_up") is not None:
            weight = weight + tensors["proj_up"].float() @ tensors["proj_down"].float().t()
        return weight

    def _residual(self) -> torch.Tensor:
        """(N, K) float32: the quantized part of the weight, smoothing and rotation undone."""
        return quantized_part(self.spec.format, dict(self.named_parameters(recurse=False)), self.spec.rotated)

    def _evaluate(self, x: torch.Tensor, tensors: Mapping[str, torch.Tensor | None]) -> torch.Tensor:
        """Run on ``tensors`` (those of ``active_tensors``, wherever they were moved to)."""
        tensors = self._in_type_of(x, tensors)
        if self._runs_as_int8(x, tensors):
            y = _as_int8(x, tensors, self.spec)
            delta = tensors["delta"]
            return y if delta is None else y + torch.nn.functional.linear(x, delta)
        rows = x.reshape(-1, self.in_features).contiguous()
        y = self._adapted(_LINEAR[self.spec.format](rows, tensors, self.spec), rows, tensors)
        return y.reshape(*x.shape[:-1], self.out_features)

    def _in_type_of(self, x: torch.Tensor, tensors: _Tensors) -> _Tensors:
        if x.dtype == self.spec.dtype:
            return tensors
        return {
            name: tensor
            if tensor is None or tensor.dtype == x.dtype or self.spec.keeps_dtype(name)
            else tensor.to(x.dtype)
            for name, tensor in tensors.items()
        }

    def _adapted(self, y: torch.Tensor, rows: torch.Tensor, tensors: _Tensors) -> torch.Tensor:
        """What the format's operator gave for rows (M, K), with the adapters that it knows nothing of."""
        if not self.spec.layout.low_rank and tensors["proj_up"] is not None:
            y = y + rows @ tensors["proj_down"] @ tensors["proj_up"].t()
        if tensors["delta"] is not None:
            y = y + torch.nn.functional.linear(rows, tensors["delta"])
        return y

    def _runs_as_int8(self, x: torch.Tensor, tensors: _Tensors) -> bool:
        """Whether this call is evaluated in 8 bits.

        Tensors that were moved, cast or patched for it alone are no base for an image that is worth keeping.
        """
        parameters = self._parameters
        return (
            not self.exact
            and self.spec.format in FOUR_BITS
            and x.dtype == self.spec.dtype != torch.float32
            and tensors["weight"] is parameters["weight"]
            and tensors["bias"] is parameters["bias"]
            and prefers_int8(x.device, self.out_features, self.in_features)
        )

    def _extended(self, branch: str, extra: list[torch.Tensor]) -> torch.Tensor | None:
        if not extra:
            return None
        base = [getattr(self, branch)] if self.spec.layout.low_rank else []
        extra = [tensor.to(self.weight.device, self.spec.dtype) for tensor in extra]
        rank = sum(tensor.shape[1] for tensor in (*base, *extra))
        # Kernels multiply ranks in sixteens; padding once here saves a copy at every call.
        padding = extra[0].new_zeros((extra[0].shape[0], -rank % 16))
        return torch.cat([*base, *extra, padding], dim=1)

    def extra_repr(self) -> str:
        """Shape, format and rank, for ``print(model)``."""
        extra = 0 if self.adapted_down is None else self.adapted_down.shape[1] - self.rank
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, format={self.spec.stored_format}, "
            f"rank={self.rank}" + (f"+{extra}" if extra else "") + (", act_unsigned=True" if self.act_unsigned else "")
        )


# (x, a list of each tensor) -> outputs of layers that have no low-rank branch, by the names of those tensors.
_LINEARS: Mapping[str, tuple[Callable[..., list[torch.Tensor]], tuple[str, ...]]] = {
    comfy_quant.AWQ_W4A16: (linears_awq_w4a16, ("weight", "weight_scale", "weight_zero", "bias")),
    comfy_quant.SVDQUANT_W8A8: (linears_int8, ("smooth_factor", "weight", "weight_scale", "bias")),
}


def goes_together(layer: SVDQLinear) -> bool:
    """Whether :func:`evaluate_together` takes a layer: in W4A16, or in INT8 without a branch or an adapter's rank."""
    has_branch = layer.spec.layout.low_rank and (layer.rank > 0 or layer.adapted_up is not None)
    return layer.spec.format in _LINEARS and not has_branch


def evaluate_together(layers: Sequence[SVDQLinear], x: torch.Tensor) -> list[torch.Tensor]:
    """What each of these layers gives for the same input, by one kernel for those of one format.

    Args:
        layers: that ``goes_together``, of the same K, their tensors on the input's device.
        x: (M, K).

    Returns:
        (M, N) of each, adapters included.
    """
    rows = x.contiguous()
    outputs: dict[SVDQLinear, torch.Tensor] = {}
    for format_name, (operator, names) in _LINEARS.items():
        some = [layer for layer in layers if layer.spec.format == format_name]
        tensors = [layer._in_type_of(rows, layer.active_tensors()) for layer in some]
        found = operator(rows, *([each[name] for each in tensors] for name in names)) if some else []
        for layer, y, each in zip(some, found, tensors, strict=True):
            outputs[layer] = layer._adapted(y, rows, each)
    return [outputs[layer] for layer in layers]
