"""ComfyUI's own code inside this process, for tests that look at a MODEL's state and for benchmarks."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from tools.bootstrap import comfyui_path
from tools.comfy_launch import prepare


class InProcessHost:
    """A few verbs on ComfyUI's modules. One per process, made before anything imports comfy.

    Args:
        options: of ComfyUI's command line.
    """

    def __init__(self, options: Sequence[str] = ("--cpu",)) -> None:
        root = comfyui_path()
        if not (root / "comfy").is_dir():
            raise FileNotFoundError(f"no ComfyUI in {root}: run `make test`, which fetches one")
        prepare(root)
        # Read once at import, before any module looks for a GPU.
        arguments, sys.argv = sys.argv, [sys.argv[0], *options]
        try:
            import comfy.options

            comfy.options.enable_args_parsing()
            import comfy.cli_args
        finally:
            sys.argv = arguments
        import comfy.sample
        import comfy.sd
        from comfyui_version import __version__

        from svdq_core.host.loader import load_quantized
        from svdq_core.host.lora import apply_lora

        self.version: str = __version__
        self.load = load_quantized
        self.apply_lora = apply_lora

    def load_16bit(self, path: str | Path):
        """A MODEL, as the stock Load Diffusion Model node gives it."""
        import comfy.sd

        return comfy.sd.load_diffusion_model(str(path))

    def sample(
        self,
        model,
        positive: list,
        negative: list,
        shape: tuple[int, ...],
        seed: int,
        steps: int,
        cfg: float = 1.0,
        sampler: str = "euler",
        scheduler: str = "simple",
    ) -> torch.Tensor:
        """A latent drawn as KSampler does."""
        import comfy.sample

        empty = torch.zeros(shape)
        noise = comfy.sample.prepare_noise(empty, seed)
        return comfy.sample.sample(
            model,
            noise,
            steps,
            cfg,
            sampler,
            scheduler,
            positive,
            negative,
            empty,
            disable_pbar=True,
            seed=seed,
        )

    def compiled(self, model, backend: str):
        """The model as the TorchCompileModel node gives it, with any backend."""
        from comfy_api.torch_helpers import set_torch_compile_wrapper

        model = model.clone()
        set_torch_compile_wrapper(model=model, backend=backend)
        return model

    def unload_all(self) -> None:
        """As when the host needs the memory for another model."""
        import comfy.model_management

        comfy.model_management.unload_all_models()
