"""SVDQuant LoRA Apply."""

import folder_paths

from ..svdq_core.host.lora import apply_lora


class SVDQuantLoraApply:
    """MODEL and a LoRA file -> MODEL with the LoRA as extra rank."""

    CATEGORY = "SVDQuant"
    DESCRIPTION = (
        "Puts a LoRA on a model. On a quantized model it joins the 16-bit low-rank branch: exact, "
        "nothing is requantized, and the strength can be changed without reloading. The stock LoRA "
        "nodes do the same; this one also reports what matched."
    )
    FUNCTION = "apply"
    RETURN_TYPES = ("MODEL", "STRING")
    RETURN_NAMES = ("model", "report")
    OUTPUT_TOOLTIPS = ("The model with the LoRA.", "What matched and what did not.")

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model": ("MODEL", {"tooltip": "A quantized model (a 16-bit one works too)."}),
                "lora_name": (
                    folder_paths.get_filename_list("loras"),
                    {"tooltip": "A .safetensors file in models/loras."},
                ),
                "strength": (
                    "FLOAT",
                    {
                        "default": 1.0,
                        "min": -20.0,
                        "max": 20.0,
                        "step": 0.01,
                        "tooltip": "How strongly the LoRA acts. 0 leaves the model as it is and "
                        "costs nothing; negative values invert it.",
                    },
                ),
            }
        }

    def apply(self, model, lora_name: str, strength: float):
        return apply_lora(model, folder_paths.get_full_path_or_raise("loras", lora_name), strength)
