"""SVDQuant Calibrate, and the inputs of sampling that the quantizer shares with it."""

import comfy.samplers
import folder_paths

from ..svdq_core.errors import SVDQuantError
from ..svdq_core.host.calibration import calibrate
from ..svdq_core.host.interrupt import Interruptible
from ..svdq_core.host.progress import QuantizationProgress
from ..svdq_core.host.source import ModelSource
from ..svdq_core.quantizer.pipeline import quantizable_layers
from ..svdq_core.quantizer.statistics import Calibration
from .folders import output_path

SAMPLING_WIDGETS = {
    "steps": (
        "INT",
        {"default": 8, "min": 1, "max": 200, "tooltip": "Calibration: sampling steps."},
    ),
    "cfg": (
        "FLOAT",
        {
            "default": 1.0,
            "min": 0.0,
            "max": 100.0,
            "step": 0.1,
            "tooltip": "Calibration: guidance scale. 1 for FLUX and turbo models.",
        },
    ),
    "sampler_name": (
        comfy.samplers.KSampler.SAMPLERS,
        {"default": "euler", "tooltip": "Calibration: the sampler you will use."},
    ),
    "scheduler": (
        comfy.samplers.KSampler.SCHEDULERS,
        {"default": "simple", "tooltip": "Calibration: the scheduler you will use."},
    ),
    "seed": (
        "INT",
        {
            "default": 0,
            "min": 0,
            "max": 0xFFFFFFFFFFFFFFFF,
            "control_after_generate": False,
            "tooltip": "Of the calibration's noise and of everything else random: the same seed gives the same file.",
        },
    ),
}
NEGATIVE = ("CONDITIONING", {"tooltip": "Calibration: the negative prompt; only needed if cfg is not 1."})
LATENT = ("LATENT", {"tooltip": "Calibration: an empty latent of the size you will draw."})


class SVDQuantCalibrate:
    """A 16-bit MODEL -> a file of statistics of its layers' inputs, from which any precision can be made."""

    CATEGORY = "SVDQuant"
    DESCRIPTION = (
        "Draws your own prompts with the 16-bit model and saves what goes into each of its layers. "
        "SVDQuant Quantize Checkpoint and python -m svdq_core quantize make files of any precision, recipe and rank "
        "from it without sampling again. Several runs (other prompts, sizes, samplers) can be merged in one file."
    )
    FUNCTION = "calibrate"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING", "STRING")
    RETURN_NAMES = ("calibration", "report")
    OUTPUT_TOOLTIPS = (
        "The file's name, for the quantizer's input calibration.",
        "How many layers and rows were seen.",
    )

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "The 16-bit model, with the LoRAs that will be baked in."}),
                "positive": (
                    "CONDITIONING",
                    {"tooltip": "From SVDQuant Prompts or Conditioning (Combine): each prompt is sampled on its own."},
                ),
                "latent": LATENT,
                "file_name": (
                    "STRING",
                    {
                        "default": "svdquant/calibration",
                        "tooltip": "The file to write under the output folder; .safetensors is added.",
                    },
                ),
                "if_exists": (
                    ["stop", "merge", "replace"],
                    {
                        "tooltip": "When the file is there already. stop: an error, before anything is drawn. merge: "
                        "add to what it holds. replace: forget what it holds."
                    },
                ),
                **SAMPLING_WIDGETS,
            },
            "optional": {"negative": NEGATIVE},
        }

    def calibrate(
        self,
        model,
        positive,
        latent,
        file_name,
        if_exists,
        steps,
        cfg,
        sampler_name,
        scheduler,
        seed,
        negative=None,
    ):
        output = folder_paths.get_output_directory()
        path = output_path(output, file_name)
        if path.exists() and if_exists == "stop":
            raise SVDQuantError(f"{path} already exists. Choose another name, or set if_exists to merge or replace.")
        earlier = Calibration.load(path) if path.exists() and if_exists == "merge" else None
        check_guidance(cfg, negative)
        progress = QuantizationProgress(None, steps * len(positive))
        with Interruptible():
            found = calibrate(
                model,
                quantizable_layers(ModelSource(model)),
                positive,
                negative or positive,
                latent,
                steps,
                cfg,
                sampler_name,
                scheduler,
                seed,
                progress.sampled,
            )
        if earlier is not None:
            earlier.merge(found)
            found = earlier
        found.save(path, overwrite=True)
        rows = max(layer.count for layer in found.layers.values())
        report = (
            f"{path.name}: {len(found.layers)} layers, up to {rows} input rows seen and {found.rows} kept of each; "
            f"{path.stat().st_size / 1e6:.1f} MB"
        )
        name = path.relative_to(output_path(output, "x").parent).as_posix()
        return {"ui": {"text": [report]}, "result": (name, report)}


def check_guidance(cfg: float, negative: list | None) -> None:
    """Raise SVDQuantError when guidance needs a negative prompt and there is none."""
    if cfg != 1 and negative is None:
        raise SVDQuantError("connect negative, or set cfg to 1 (then it is not used)")
