"""The host's model handle, taught that quantized weights are adapted, not overwritten."""

import comfy.model_patcher

from .operations import QuantizedLinear
from .patches import AdapterBuilder, AdapterSettings

_PATCHES, _HOOKS = "patches", "hooks"
# Attachments, which the host hands on to clones.
_BUILDER, _SETTINGS = "svdquant_adapter_builder", "svdquant_adapter_settings"


class SVDQuantModelPatcher(comfy.model_patcher.ModelPatcher):
    """A ``ModelPatcher`` for models with :class:`QuantizedLinear` layers.

    Loading, memory accounting, partial loading and cloning are the host's. Patches on a quantized
    weight are set on the layer as an adapter: those of ``add_patches`` whenever weights are loaded or
    moved, those of hooks whenever the hooks change.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.set_attachments(_BUILDER, AdapterBuilder())  # a clone is then given its origin's

    def quantized_layers(self):
        """Yield (key of the weight, layer) of every quantized layer."""
        for name, module in self.model.named_modules():
            if isinstance(module, QuantizedLinear):
                yield f"{name}.weight", module

    def load(self, *args, **kwargs):
        """As the host's; then adapters for the patches on quantized weights."""
        result = super().load(*args, **kwargs)
        self._set_adapters()
        return result

    def partially_unload(self, *args, **kwargs):
        """As the host's, which hangs patches on layers that it moves; ours are adapters already."""
        freed = super().partially_unload(*args, **kwargs)
        self._set_adapters()
        return freed

    def patch_weight_to_device(self, key, *args, **kwargs):
        """As the host's, except that a quantized weight stays as it is."""
        weight, _, _ = comfy.model_patcher.get_key_weight(self.model, key)
        if self._is_quantized(key):
            return weight
        return super().patch_weight_to_device(key, *args, **kwargs)

    def unpatch_model(self, device_to=None, unpatch_weights=True):
        """As the host's; taking weights' patches off takes the adapters off."""
        if unpatch_weights:
            for _, layer in self.quantized_layers():
                layer.set_adapter(_PATCHES, None)
                layer.set_adapter(_HOOKS, None)
        return super().unpatch_model(device_to, unpatch_weights)

    def patch_hooks(self, hooks):
        """As the host's; then adapters for the hooks' patches on quantized weights."""
        super().patch_hooks(hooks)
        patches = self.get_combined_hook_patches(hooks)
        for key, layer in self.quantized_layers():
            layer.set_adapter(_HOOKS, self.adapter(layer, key, patches.get(key)))

    def patch_hook_weight_to_device(self, hooks, combined_patches, key, *args, **kwargs):
        """As the host's, except that a quantized weight stays as it is."""
        if not self._is_quantized(key):
            super().patch_hook_weight_to_device(hooks, combined_patches, key, *args, **kwargs)

    def unpatch_hooks(self, whitelist_keys_set=None):
        """As the host's; quantized layers named (all, by default) lose their hooks' adapters."""
        super().unpatch_hooks(whitelist_keys_set)
        for key, layer in self.quantized_layers():
            if not whitelist_keys_set or key in whitelist_keys_set:
                layer.set_adapter(_HOOKS, None)

    def set_adapter_settings(self, settings: AdapterSettings) -> None:
        """How patches that are not low-rank by nature are kept on this clone and its clones."""
        self.set_attachments(_SETTINGS, settings)

    def adapter(self, layer: QuantizedLinear, key: str, patches: list[tuple] | None):
        """What patches make of a quantized layer; remembered, as far as it is work."""
        if not patches:
            return None
        return self.get_attachment(_BUILDER).build(layer, key, patches, self.load_device, self._settings)

    def measure_adapter(self, layer: QuantizedLinear, key: str) -> tuple[int, bool]:
        """Rank of what this model's patches make of a quantized layer, and whether it has a dense part."""
        builder = self.get_attachment(_BUILDER)
        return builder.measure(layer, key, self.patches[key], self.load_device, self._settings)

    @property
    def _settings(self) -> AdapterSettings:
        return self.get_attachment(_SETTINGS) or AdapterSettings()

    def _set_adapters(self) -> None:
        for key, layer in self.quantized_layers():
            # The host may have hung its own patch function on the layer, to run at every call.
            layer.weight_function = [
                function
                for function in layer.weight_function
                if not isinstance(function, comfy.model_patcher.LowVramPatch)
            ]
            layer.set_adapter(_PATCHES, self.adapter(layer, key, self.patches.get(key)))

    def _is_quantized(self, key: str) -> bool:
        name, _, parameter = key.rpartition(".")
        if parameter != "weight":
            return False
        return isinstance(self.model.get_submodule(name), QuantizedLinear)
