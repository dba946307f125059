"""Calibration by sampling: the host draws images, we look at what goes into each layer."""

import contextlib
from collections.abc import Callable, Iterable

import comfy.sample
import torch

from ..errors import LayerError
from ..quantizer.statistics import Calibration


@contextlib.contextmanager
def observed(diffusion_model: torch.nn.Module, layers: Iterable[str], calibration: Calibration):
    """While inside, every input of the named layers goes into ``calibration``."""
    handles = []
    try:
        for name in layers:
            module = diffusion_model.get_submodule(name)
            handles.append(module.register_forward_pre_hook(_observer(calibration, name)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def calibrate(
    patcher,
    layers: Iterable[str],
    positive: list,
    negative: list,
    latent: dict,
    steps: int,
    cfg: float,
    sampler_name: str,
    scheduler: str,
    seed: int,
    progress: Callable[[int, int], None],
) -> Calibration:
    """Sample once for each entry of ``positive`` and keep statistics of the layers' inputs.

    Args:
        patcher: the 16-bit MODEL.
        layers: module names inside the diffusion model.
        positive: CONDITIONING; each entry is a prompt of its own.
        negative: CONDITIONING, used with every prompt.
        latent: LATENT that gives size and batch.
        steps, cfg, sampler_name, scheduler: as for KSampler.
        seed: of the noise of the first prompt, counting up; and of which rows are kept.
        progress: called with (sampling steps done, in all).

    Raises:
        LayerError: a layer got NaN or infinite inputs.
    """
    total = steps * len(positive)
    # Every sampler calls the model once a step or more often, but one that has its own idea of steps.
    calibration = Calibration(seed, calls=0 if sampler_name == "dpm_adaptive" else total)
    layers = list(layers)
    samples = comfy.sample.fix_empty_latent_channels(patcher, latent["samples"])
    with observed(patcher.model.diffusion_model, layers, calibration):
        for index, prompt in enumerate(positive):

            def on_step(step, *_, base=index * steps):
                progress(min(base + step + 1, total), total)

            noise = comfy.sample.prepare_noise(samples, seed + index)
            image = comfy.sample.sample(
                patcher,
                noise,
                steps,
                cfg,
                sampler_name,
                scheduler,
                [prompt],
                negative,
                samples,
                callback=on_step,
                disable_pbar=True,
                seed=seed + index,
            )
            if not bool(torch.isfinite(image).all()):
                calibration.check(layers)
                raise LayerError(
                    "the 16-bit model gave NaN or infinite values while sampling for calibration. "
                    "Check that it gives a clean image with the same sampler settings."
                )
    calibration.check(layers)
    return calibration


def _observer(calibration: Calibration, name: str):
    def observe(module, inputs):
        calibration.observe(name, inputs[0])

    return observe
