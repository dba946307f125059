"""Whole images of SDXL at 1024 x 1024 in ComfyUI: seconds, and memory of the card, in 16 bits and in INT4.

python -m benchmarks.sdxl_images

As benchmarks.flux_images, with a prompt and a negative one: random weights, quantized by recipe ``fast``. "Replayed" is
with SVDQuant Replay Steps.
"""

import json
import tempfile
from pathlib import Path

import torch

from benchmarks.flux_images import RESULTS, drawn, in_16_bits, quantize
from benchmarks.flux_in_comfy import SEED
from benchmarks.full_size import sdxl, weight
from tools.comfy_in_process import InProcessHost

LATENT, TEXT, POOLED = (1, 4, 128, 128), (1, 77, 2048), (1, 1280)
CFG = 5.0


class SdxlHost(InProcessHost):
    """The host, and its 16-bit MODEL."""

    def __init__(self) -> None:
        super().__init__(())
        import comfy.sd

        tensors = {name: weight(name, shape, "cuda").cpu() for name, shape in sdxl(None).items()}
        self.model = comfy.sd.load_diffusion_model_state_dict(tensors)

    def draw(self, model, prompts: int, steps: int) -> list[torch.Tensor]:
        """A latent for each prompt (of no text encoder), as KSampler draws it."""
        random = torch.Generator().manual_seed(SEED)

        def prompt() -> list:
            about = {"pooled_output": torch.randn(POOLED, generator=random)}
            return [[torch.randn(TEXT, generator=random), about]]

        return [
            self.sample(model, prompt(), prompt(), LATENT, SEED + index, steps, cfg=CFG) for index in range(prompts)
        ]


@torch.inference_mode()
def main() -> None:
    """Measure on the current CUDA card and write the JSON."""
    host = SdxlHost()
    from svdq_core.host.replay import replay_steps

    result = in_16_bits(host, "benchmarks.sdxl_images")
    result["16 bits, replayed"] = drawn(host, replay_steps(host.model))
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "sdxl-int4.safetensors"
        quantize(host.model, path)
        host.unload_all()
        model = host.load(path)
        result["INT4"] = drawn(host, model)
        result["INT4, replayed"] = drawn(host, replay_steps(model))
    print(json.dumps(result, indent=1))
    (RESULTS / "sdxl_images_h200.json").write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
