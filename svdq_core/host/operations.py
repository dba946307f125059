"""Layers as the host builds and runs them."""

import comfy.model_management
import comfy.ops
import torch

from ..layers import SVDQLinear
from ..ops.block import gelu_concat
from ..ops.cuda import release


class DeferredOperations(comfy.ops.manual_cast):
    """The host's own layers, except that a ``Linear`` takes no memory until its weight is loaded.

    A quantized layer's 16-bit weight never exists: its place is held by a tensor on the meta device
    (of the right shape, for the host's detection), which is not loaded, and the loader puts a
    :class:`QuantizedLinear` in the module's stead.
    """

    class Linear(comfy.ops.manual_cast.Linear):
        """A 16-bit linear layer, or a place held for a quantized one."""

        def __init__(self, in_features, out_features, bias=True, device=None, dtype=None):
            torch.nn.Module.__init__(self)
            self.in_features = in_features
            self.out_features = out_features
            self._factory = {"device": device, "dtype": dtype}
            self._has_bias = bias
            self.register_parameter("weight", None)
            self.register_parameter("bias", None)

        def _load_from_state_dict(self, state_dict, prefix, metadata, strict, missing, *rest):
            weight = state_dict.get(prefix + "weight")
            if weight is None:
                missing.append(prefix + "weight")
            elif not weight.is_meta:
                self.weight = self._empty(self.out_features, self.in_features)
                if self._has_bias:
                    self.bias = self._empty(self.out_features)
                super()._load_from_state_dict(state_dict, prefix, metadata, strict, missing, *rest)

        def _empty(self, *shape: int) -> torch.nn.Parameter:
            return torch.nn.Parameter(torch.empty(shape, **self._factory), requires_grad=False)


class QuantizedLinear(SVDQLinear, comfy.ops.CastWeightBiasOp):
    """``SVDQLinear`` that may be left in main memory by the host (lowvram) and come over per call."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """(..., K) floating point -> (..., N) in the same type."""
        comfy.ops.run_every_op()  # where the host looks for an interrupt
        tensors = self.active_tensors()
        if tensors["weight"].device != x.device:
            non_blocking = comfy.model_management.device_supports_non_blocking(x.device)
            tensors = {
                name: None if tensor is None else tensor.to(x.device, non_blocking=non_blocking)
                for name, tensor in tensors.items()
            }
        for function in self.bias_function:
            tensors["bias"] = function(tensors["bias"])
        if self.weight_function:
            return self._forward_wrapped(x, tensors["bias"])
        return self._evaluate(x, tensors)

    def of_gelu(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        """As ``SVDQLinear``'s, where nobody else has a part in what this layer does."""
        if not self.is_plain_on(y.device):
            return self(gelu_concat(x, y))
        comfy.ops.run_every_op()
        return super().of_gelu(x, y)

    def normed_heads(self, x: torch.Tensor, *operands) -> torch.Tensor | None:
        """As ``SVDQLinear``'s, where nobody else has a part in what this layer does."""
        if not self.is_plain_on(x.device):
            return None
        comfy.ops.run_every_op()
        return super().normed_heads(x, *operands)

    def is_plain_on(self, device: torch.device) -> bool:
        """Whether a call does nothing but evaluate the layer on its own tensors, which are on that device."""
        hooks = self._forward_hooks, self._forward_pre_hooks
        return self.weight.device == device and not any((self.weight_function, self.bias_function, *hooks))

    def convert_weight(self, weight: torch.Tensor, inplace: bool = False, **_) -> torch.Tensor:
        """The host's hook to read a weight: (N, K) float32, e.g. to merge it into another model.

        Args:
            weight: this layer's packed ``weight``, on any device and perhaps cast to floating point.
            inplace: part of the host's interface; the packed weight is never overwritten.
        """
        return self.dequantized_weight().to(weight.device)

    def convert_bias(self, bias: torch.Tensor, inplace: bool = False, **_) -> torch.Tensor:
        """The host's hook to read a bias: (N,) float32, free of the GELU shift's correction."""
        return bias.float() - self._bias_shift_on(bias.device)

    def set_bias(
        self,
        bias: torch.Tensor,
        inplace_update: bool = False,
        seed: int | None = None,
        return_weight: bool = False,
        **_,
    ) -> torch.Tensor | None:
        """The host's hook to write a patched bias: the inverse of :meth:`convert_bias`.

        Args:
            bias: (N,) as the 16-bit model would have it.
            inplace_update: overwrite the parameter's memory instead of replacing it.
            seed: part of the host's interface; nothing here is rounded at random.
            return_weight: return what would be stored instead of storing it.
        """
        stored = (bias + self._bias_shift_on(bias.device)).to(self.bias.dtype)
        if return_weight:
            return stored
        release((self.weight,))  # what a device made of the layer may hold its bias
        if inplace_update:
            self.bias.data.copy_(stored)
        else:
            self.bias = torch.nn.Parameter(stored, requires_grad=False)
        return None

    def _bias_shift_on(self, device: torch.device) -> torch.Tensor | float:
        shift = self.bias_shift()
        return shift.to(device) if self.act_unsigned else shift

    def _forward_wrapped(self, x: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """In 16 bits, for packs that wrap the weight itself (``add_weight_wrapper``)."""
        weight = self.adapted_weight().to(x)
        for function in self.weight_function:
            weight = function(weight)
        if bias is not None:
            bias = self.convert_bias(bias.to(x.device)).to(x.dtype)
        return torch.nn.functional.linear(x, weight, bias)
