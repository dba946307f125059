"""The demo model in this process, without a server: for benchmarks that go round the nodes."""

import sys
from collections.abc import Iterable

import numpy
import torch
from PIL import Image

from demo.settings import ASSETS, CALIBRATION, DEMO, MODEL, SAMPLING, SIZE
from tools.comfy_in_process import InProcessHost


class DemoHost(InProcessHost):
    """ComfyUI's code, drawing with the demo model, its text encoder and its autoencoder."""

    def __init__(self) -> None:
        super().__init__()
        sys.path.append(str(DEMO / "custom_nodes"))
        import comfy.sd
        from safetensors.torch import load_file
        from svdquant_demo.hash_encoder import encode

        self._encode = encode
        weights = {"vae_scale": torch.tensor(0.3611), "vae_shift": torch.tensor(0.1159)}  # as VAELoader does
        for part in ("encoder", "decoder"):
            for name, tensor in load_file(ASSETS / f"taef1_{part}.safetensors").items():
                weights[f"taesd_{part}.{name}"] = tensor
        self._vae = comfy.sd.VAE(sd=weights)

    def load_demo(self):
        """The 16-bit MODEL."""
        return self.load_16bit(MODEL)

    def conditioning(self, prompt: str) -> list:
        """CONDITIONING of a prompt."""
        context, pooled = self._encode(prompt)
        return [[context[None], {"pooled_output": pooled[None]}]]

    def draw(self, model, prompt: str, seed: int) -> Image.Image:
        """The image that the demo's graph gives for a prompt and seed."""
        latent = self.sample(
            model,
            self.conditioning(prompt),
            self.conditioning(""),
            (1, 16, SIZE // 8, SIZE // 8),
            seed,
            SAMPLING["steps"],
            SAMPLING["cfg"],
            SAMPLING["sampler_name"],
            SAMPLING["scheduler"],
        )
        pixels = self._vae.decode(latent)[0]
        return Image.fromarray((pixels * 255).round().clamp(0, 255).to(torch.uint8).numpy().astype(numpy.uint8))

    def calibrate(self, model, layers: Iterable[str], prompts: Iterable[str], seed: int = 0):
        """Statistics of the layers' inputs, as SVDQuant Quantize Checkpoint takes them."""
        from svdq_core.host.calibration import calibrate

        return calibrate(
            model,
            layers,
            [entry for prompt in prompts for entry in self.conditioning(prompt)],
            self.conditioning(""),
            {"samples": torch.zeros((1, 16, SIZE // 8, SIZE // 8))},
            seed=seed,
            progress=lambda done, total: None,
            **CALIBRATION,
        )
