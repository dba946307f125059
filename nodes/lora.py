"""SVDQuant LoRA Apply."""

import comfy.model_management
import comfy.utils
import folder_paths

from ..svdq_core.host.lora import LoraFiles, LoraRow, apply_loras
from ..svdq_core.host.patches import AdapterSettings

ROWS = 8
NONE = "None"
_STRENGTH = {"default": 1.0, "min": -20.0, "max": 20.0, "step": 0.01}


def _files() -> list[str]:
    return [NONE, *folder_paths.get_filename_list("loras")]


class SVDQuantLoraApply:
    """MODEL (and CLIP) and LoRA files -> the same with the LoRAs as extra rank."""

    CATEGORY = "SVDQuant"
    DESCRIPTION = (
        "Puts LoRAs on a model. On a quantized model they join the 16-bit low-rank branch: exact, nothing is "
        "requantized, and strengths can be changed without reloading. The stock LoRA nodes do the same; this "
        "one takes several at once and reports what matched and what it costs."
    )
    FUNCTION = "apply"
    RETURN_TYPES = ("MODEL", "STRING", "CLIP")
    RETURN_NAMES = ("model", "report", "clip")
    OUTPUT_TOOLTIPS = (
        "The model with the LoRAs.",
        "What matched, what did not, and what it costs.",
        "The text encoder with the LoRAs' part for it; empty if none is connected.",
    )

    @classmethod
    def INPUT_TYPES(cls):
        rows = {}
        for row in range(2, ROWS + 1):
            rows[f"lora_name_{row}"] = (_files(), {"default": NONE, "tooltip": f"LoRA {row}, or None."})
            rows[f"strength_{row}"] = ("FLOAT", {**_STRENGTH, "tooltip": f"How strongly LoRA {row} acts."})
            rows[f"on_{row}"] = ("BOOLEAN", {"default": True, "tooltip": f"Whether LoRA {row} acts at all."})
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "A quantized model (a 16-bit one works too)."}),
                "lora_name": (
                    [*folder_paths.get_filename_list("loras"), NONE],
                    {"tooltip": "A .safetensors file in models/loras, or None."},
                ),
                "strength": (
                    "FLOAT",
                    {
                        **_STRENGTH,
                        "tooltip": "How strongly the LoRA acts. 0 leaves the model as it is and "
                        "costs nothing; negative values invert it.",
                    },
                ),
            },
            "optional": {
                "clip": ("CLIP", {"tooltip": "The text encoder, for LoRAs that have a part for it."}),
                "on": ("BOOLEAN", {"default": True, "tooltip": "Whether the first LoRA acts at all."}),
                **rows,
                "strength_clip": (
                    "FLOAT",
                    {
                        **_STRENGTH,
                        "advanced": True,
                        "tooltip": "Factor on every strength for the text encoder's part.",
                    },
                ),
                "recompress": (
                    "FLOAT",
                    {
                        "default": 0.0,
                        "min": 0.0,
                        "max": 0.1,
                        "step": 0.001,
                        "advanced": True,
                        "tooltip": "Error, relative to the LoRAs' sum, that may be made to keep its rank low. "
                        "0 adds the ranks and is exact.",
                    },
                ),
                "error_bound": (
                    "FLOAT",
                    {
                        "default": 0.01,
                        "min": 0.0001,
                        "max": 0.5,
                        "step": 0.0001,
                        "advanced": True,
                        "tooltip": "For LoHa, LoKr, DoRA and their kin, which are fitted with a low rank: the "
                        "largest error, relative to the change. What no rank fits is kept in full, in 16 bits.",
                    },
                ),
                "max_rank": (
                    "INT",
                    {
                        "default": 256,
                        "min": 16,
                        "max": 1024,
                        "step": 16,
                        "advanced": True,
                        "tooltip": "The highest rank of such a fit.",
                    },
                ),
            },
        }

    def __init__(self):
        self._loaded = LoraFiles()

    def apply(
        self,
        model,
        lora_name,
        strength,
        clip=None,
        on=True,
        strength_clip=1.0,
        recompress=0.0,
        error_bound=0.01,
        max_rank=256,
        **more,
    ):
        chosen = [(lora_name, strength, on)]
        for row in range(2, ROWS + 1):
            name = more.get(f"lora_name_{row}", NONE)
            chosen.append((name, more.get(f"strength_{row}", 1.0), more.get(f"on_{row}", True)))
        rows = [
            LoraRow(folder_paths.get_full_path_or_raise("loras", name), factor, factor * strength_clip)
            for name, factor, active in chosen
            if active and name != NONE
        ]
        names = [name for name, _, active in chosen if active and name != NONE]
        bar = comfy.utils.ProgressBar(1)

        def progress(done: int, total: int) -> None:
            comfy.model_management.throw_exception_if_processing_interrupted()
            bar.update_absolute(done, total)

        settings = AdapterSettings(error_bound, max_rank, recompress)
        model, clip, reports = apply_loras(model, clip, rows, settings, self._loaded, progress)
        shown = [{**report.fields(), "name": name} for name, report in zip(names, reports, strict=True)]
        text = "\n".join(report.text() for report in reports) or "no LoRA chosen"
        return {"ui": {"svdquant_lora": shown, "text": [text]}, "result": (model, text, clip)}
