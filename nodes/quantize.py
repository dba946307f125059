"""SVDQuant Quantize Checkpoint."""

import comfy.model_management
import folder_paths

from ..svdq_core.errors import SVDQuantError
from ..svdq_core.host.calibration import calibrate
from ..svdq_core.host.interrupt import Interruptible
from ..svdq_core.host.loader import load_quantized
from ..svdq_core.host.progress import QuantizationProgress, layer_error
from ..svdq_core.host.source import ModelSource, with_patches_of, without_patches
from ..svdq_core.quantizer.pipeline import (
    AUTO,
    DEFAULT_RANK,
    MAX_RANK,
    MODULATIONS,
    PRECISIONS,
    Settings,
    check_output,
    plan,
    quantize_checkpoint,
)
from ..svdq_core.quantizer.recipes import RECIPES
from ..svdq_core.quantizer.statistics import Calibration
from ..svdq_core.summary import kept_lines
from .calibrate import LATENT, NEGATIVE, SAMPLING_WIDGETS, check_guidance
from .folders import models_folder, output_path


class SVDQuantQuantizeCheckpoint:
    """A 16-bit MODEL -> a 4-bit file, calibrated by sampling, and the quantized MODEL."""

    CATEGORY = "SVDQuant"
    DESCRIPTION = (
        "Makes a 4-bit checkpoint of a 16-bit model and loads it. For the balanced and best recipes "
        "the model is calibrated by drawing your own prompts with your own sampler settings: "
        "connect SVDQuant Prompts with 8 or more of them, each is sampled on its own."
    )
    FUNCTION = "quantize"
    OUTPUT_NODE = True
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "report")
    OUTPUT_TOOLTIPS = (
        "The quantized model, loaded from the new file.",
        "What was quantized, how small it became and how long it took.",
    )

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": (
                    "MODEL",
                    {
                        "tooltip": "The 16-bit model. LoRAs that the graph put on it are baked in, unless "
                        "bake_loras is off."
                    },
                ),
                "file_name": (
                    "STRING",
                    {
                        "default": "svdquant/model_int4",
                        "tooltip": "The file to write under models/diffusion_models; .safetensors is added.",
                    },
                ),
                "precision": (
                    list(PRECISIONS),
                    {
                        "tooltip": "Of the layers that do the work. int4, nvfp4: weights and activations in 4 bits. "
                        "int8: both in 8, nearly lossless. nf4: weights only, without calibration or low-rank "
                        "branch, to compare with. Every file runs on every card; nvfp4 is fastest on Blackwell, "
                        "int4 before it."
                    },
                ),
                "recipe": (
                    list(RECIPES),
                    {
                        "default": "balanced",
                        "tooltip": "fast: no calibration, lower quality. balanced: smoothing, low-rank "
                        "branch and rounding fitted to what each layer sees. best: that in several "
                        "rounds, slower.",
                    },
                ),
                "rank": (
                    "INT",
                    {
                        "default": DEFAULT_RANK,
                        "min": 0,
                        "max": MAX_RANK,
                        "step": 16,
                        "tooltip": "Of the 16-bit low-rank branch. Higher is closer to 16 bits, "
                        "larger and a little slower.",
                    },
                ),
                **SAMPLING_WIDGETS,
                "skip_layers": (
                    "STRING",
                    {
                        "default": "",
                        "multiline": True,
                        "tooltip": "Layers to leave in 16 bits, one per line; * stands for anything, "
                        "e.g. double_blocks.0.*",
                    },
                ),
                "overwrite": (
                    "BOOLEAN",
                    {"default": False, "tooltip": "Replace the file if it exists."},
                ),
            },
            "optional": {
                "positive": (
                    "CONDITIONING",
                    {
                        "tooltip": "Calibration: the prompts, from SVDQuant Prompts or joined by Conditioning "
                        "(Combine). Not needed for the fast recipe."
                    },
                ),
                "negative": NEGATIVE,
                "latent": LATENT,
                "save_calibration": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "advanced": True,
                        "tooltip": "Also write the calibration under the output folder, for "
                        "python -m svdq_core quantize --calibration.",
                    },
                ),
                "bake_loras": (
                    "BOOLEAN",
                    {
                        "default": True,
                        "advanced": True,
                        "tooltip": "Make LoRAs that the graph put on the model part of the file. Off: the file is "
                        "of the model alone, and the LoRAs act on the returned model as on the given one.",
                    },
                ),
                "modulations": (
                    [AUTO, *MODULATIONS],
                    {
                        "default": AUTO,
                        "advanced": True,
                        "tooltip": "Of FLUX's modulation layers, a quarter of its weights. auto: awq_w4a16, "
                        "and int8 for a model in int8. awq_w4a16: 4-bit weights. int8: twice as large, much closer. "
                        "16bit: as they are.",
                    },
                ),
                "calibration": (
                    "STRING",
                    {
                        "default": "",
                        "advanced": True,
                        "tooltip": "A file under the output folder that SVDQuant Calibrate (or save_calibration) "
                        "wrote: it is used instead of sampling. Empty: sample.",
                    },
                ),
                "keep_broken": (
                    "BOOLEAN",
                    {
                        "default": False,
                        "advanced": True,
                        "tooltip": "Leave layers with NaN or infinite weights as they are, and report them, instead of "
                        "stopping.",
                    },
                ),
            },
        }

    def quantize(
        self,
        model,
        file_name,
        precision,
        recipe,
        rank,
        steps,
        cfg,
        sampler_name,
        scheduler,
        seed,
        skip_layers,
        overwrite,
        positive=None,
        negative=None,
        latent=None,
        save_calibration=False,
        bake_loras=True,
        modulations=AUTO,
        calibration="",
        keep_broken=False,
    ):
        path = output_path(models_folder(), file_name)
        given = model
        if not bake_loras:
            model = without_patches(model)
        skip = tuple(skip_layers.split())
        settings = Settings(precision, recipe, rank, skip, seed, modulations, keep_broken=keep_broken)
        planned = plan(ModelSource(model), settings)
        check_output(path, planned, overwrite)

        calibrates = planned.calibrates(RECIPES[recipe])
        output = folder_paths.get_output_directory()
        statistics = Calibration.load(output_path(output, calibration)) if calibrates and calibration.strip() else None
        samples = calibrates and statistics is None
        if samples:
            _check_sampling_inputs(recipe, cfg, positive, negative, latent)
        progress = QuantizationProgress(planned, steps * len(positive) if samples else 0)
        if samples:
            with Interruptible():
                statistics = calibrate(
                    model,
                    planned.layers,
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
            if save_calibration:
                statistics.save(output_path(output, f"{file_name}.calibration"), overwrite)

        comfy.model_management.unload_all_models()  # the quantizer needs the room, not the model
        source = ModelSource(model)  # only now: one made earlier would keep a second copy of the weights
        device = comfy.model_management.get_torch_device()
        with Interruptible():
            done = quantize_checkpoint(
                source,
                path,
                settings,
                statistics,
                progress.working,
                overwrite,
                device,
                on_layer=progress.quantized,
            )
        report = (
            f"{path.name}: {len(done.layers)} layers quantized ({precision}, {recipe}, rank {rank}), "
            f"{done.size_ratio:.2f}x smaller ({done.bytes_16bit / 1e6:.1f} -> "
            f"{done.bytes_4bit / 1e6:.1f} MB); file {done.file_bytes / 1e6:.1f} MB, "
            f"{done.seconds:.1f} s"
        )
        report = "\n".join([report, *kept_lines(done.kept)])
        chart = [{"name": name, "error": layer_error(errors)} for name, errors in done.layers.items()]
        quantized = load_quantized(path)
        if not bake_loras:
            quantized = with_patches_of(quantized, given)
        return {"ui": {"text": [report], "svdquant_layers": chart}, "result": (quantized, report)}


def _check_sampling_inputs(recipe, cfg, positive, negative, latent) -> None:
    for name, value in (("positive", positive), ("latent", latent)):
        if not value:
            raise SVDQuantError(f"the recipe {recipe!r} is calibrated by sampling: connect {name}, or choose 'fast'.")
    check_guidance(cfg, negative)
