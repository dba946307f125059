"""SVDQuant Inspect."""

from dataclasses import replace

import folder_paths
import numpy
import torch

from ..svdq_core.host.loader import REPORT
from ..svdq_core.plot import plot_summary
from ..svdq_core.summary import summarize_file, summarize_model


class SVDQuantInspect:
    """A file or a MODEL -> what it holds, as text and as a plot."""

    CATEGORY = "SVDQuant"
    DESCRIPTION = (
        "Shows per layer the format, rank, bytes and error against 16 bits of a file, or of a loaded "
        "quantized model if one is connected. Reads a file's header only."
    )
    FUNCTION = "inspect"
    OUTPUT_NODE = True
    RETURN_TYPES = ("STRING", "IMAGE")
    RETURN_NAMES = ("text", "plot")
    OUTPUT_TOOLTIPS = ("A table of all layers.", "Sizes and errors as a bar chart.")

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "model_name": (
                    folder_paths.get_filename_list("diffusion_models"),
                    {"tooltip": "A file in models/diffusion_models, quantized or 16-bit."},
                )
            },
            "optional": {
                "model": (
                    "MODEL",
                    {"tooltip": "A loaded quantized model to look at instead of the file."},
                )
            },
        }

    def inspect(self, model_name: str, model=None):
        if model is None:
            path = folder_paths.get_full_path_or_raise("diffusion_models", model_name)
            summary = replace(summarize_file(path), title=model_name)
        else:
            title = f"loaded {type(model.model).__name__} model"
            about = model.get_attachment(REPORT) or {}
            summary = summarize_model(model.model, title, about, prefix="diffusion_model.")
        pixels = numpy.asarray(plot_summary(summary), dtype=numpy.float32) / 255
        text = summary.text()
        return {"ui": {"text": [text]}, "result": (text, torch.from_numpy(pixels)[None])}
