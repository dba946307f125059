"""SVDQuant Model Loader."""

import folder_paths

from ..svdq_core.host.loader import load_quantized


class SVDQuantModelLoader:
    """A quantized file of ``models/diffusion_models`` -> MODEL."""

    CATEGORY = "SVDQuant"
    DESCRIPTION = (
        "Loads a 4-bit model made by SVDQuant Quantize Checkpoint. The MODEL works with every node "
        "that takes one: samplers, LoRA, ControlNet, model sampling, compile."
    )
    FUNCTION = "load"
    RETURN_TYPES = ("MODEL",)
    OUTPUT_TOOLTIPS = ("The quantized model, to use like any other.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model_name": (
                    folder_paths.get_filename_list("diffusion_models"),
                    {
                        "tooltip": "A quantized file in models/diffusion_models. 16-bit files are "
                        "loaded by the stock Load Diffusion Model node."
                    },
                )
            },
            "optional": {
                "evaluation": (
                    ["auto", "as stored"],
                    {
                        "default": "auto",
                        "tooltip": "auto: the way this card does best. H100 and H200 have fast 8-bit products and no "
                        "4-bit ones, so they run 4-bit layers with 8-bit weights and activations: faster, and closer "
                        "to the 16-bit model. as stored: the file's own arithmetic, to draw what other cards draw. "
                        "Elsewhere both are the same.",
                    },
                )
            },
        }

    def load(self, model_name: str, evaluation: str = "auto"):
        path = folder_paths.get_full_path_or_raise("diffusion_models", model_name)
        return (load_quantized(path, exact=evaluation == "as stored"),)
