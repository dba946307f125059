"""ComfyUI's code in this process, drawing with the small FLUX."""

from dataclasses import dataclass
from pathlib import Path

import small_flux
import torch

from tools.comfy_in_process import InProcessHost

LATENT = (1, 16, 16, 16)


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The error's norm over the norm of what is expected."""
    return float(torch.linalg.norm(found - expected) / torch.linalg.norm(expected))


@dataclass(frozen=True)
class FluxFiles:
    """The model in 16 bits and quantized."""

    full: Path
    quantized: Path
    hidden: int = small_flux.HIDDEN


class SmallFluxHost(InProcessHost):
    """The host, drawing with the small FLUX."""

    steps = 2

    def conditioning(self, seed=9):
        """A prompt that no text encoder made."""
        random = torch.Generator().manual_seed(seed)
        context = torch.randn((1, 8, small_flux.CONTEXT), generator=random)
        return [[context, {"pooled_output": torch.randn((1, 768), generator=random)}]]

    def sample(self, model, positive=None):
        """A latent image drawn in a few steps."""
        positive = positive or self.conditioning()
        return super().sample(model, positive, positive, LATENT, seed=1, steps=self.steps)

    def source(self, model):
        """The MODEL as weights to quantize."""
        from svdq_core.host.source import ModelSource

        return ModelSource(model)

    @torch.inference_mode()
    def step(self, model, control=None):
        """One call of the denoiser, on the weights as they lie."""
        x = torch.randn(LATENT, generator=torch.Generator().manual_seed(1))
        context, extra = self.conditioning()[0]
        return model.model.apply_model(
            x,
            torch.tensor([0.7]),
            c_crossattn=context,
            y=extra["pooled_output"],
            control=control,
            transformer_options=model.model_options["transformer_options"],
        )

    def with_lora_hook(self, conditioning, path, strength):
        """The prompt with a LoRA hook, as Create Hook LoRA and Set CLIP Hooks make it."""
        import comfy.hooks
        import comfy.utils

        lora = comfy.utils.load_torch_file(str(path))
        hooks = comfy.hooks.create_hook_lora(lora, strength, strength)
        return comfy.hooks.set_hooks_for_conditioning(conditioning, hooks)

    def stock_lora(self, model, path, strength):
        """The model as the stock LoRA nodes give it."""
        import comfy.sd
        import comfy.utils

        return comfy.sd.load_lora_for_models(model, None, comfy.utils.load_torch_file(str(path)), strength, 0)[0]

    def loha(self, n, k, random):
        """A LoHa patch: the element-wise product of two low-rank matrices."""
        from comfy.weight_adapter.loha import LoHaAdapter

        a, b, c, d = (torch.randn(s, generator=random) * 0.4 for s in ((n, 2), (2, k)) * 2)
        return LoHaAdapter(set(), (a, b, 1.0, c, d, None, None, None))

    def model_sampling_flux(self, model):
        """The model as the ModelSamplingFlux node gives it."""
        from comfy_extras.nodes_model_advanced import ModelSamplingFlux

        return ModelSamplingFlux().patch(model, 1.15, 0.5, 128, 128)[0]
