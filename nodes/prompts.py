"""SVDQuant Prompts."""

import comfy.utils

from ..svdq_core.errors import SVDQuantError
from ..svdq_core.host.interrupt import Interruptible

# What people draw: subjects, styles, light, text, few words and many. A calibration wants variety above all.
PROMPTS = """\
portrait of an old fisherman, window light, photograph
a city street at night in the rain, neon signs
a watercolor of a mountain lake at dawn
a bowl of ramen, top view, food photography
a tabby cat on a stack of books, studio light
isometric drawing of a small workshop
a wooden sign that says OPEN above a bakery door
a steam locomotive crossing a stone bridge in autumn
anime girl with silver hair under cherry trees, soft colors
a knight in ornate armor facing a dragon, oil painting, dramatic light
macro photograph of a dew drop on a blade of grass
the interior of a modern living room with a concrete wall and large windows
a red vintage car on a desert road, sunset, wide angle
black and white photograph of two children running on a beach
a product shot of a perfume bottle on white marble
logo of a fox, flat vector, orange and white"""


class SVDQuantPrompts:
    """A text with a prompt in each line -> CONDITIONING with an entry for each."""

    CATEGORY = "SVDQuant"
    DESCRIPTION = (
        "Encodes many prompts at once, one in each line, for the input positive of SVDQuant Quantize Checkpoint and "
        "SVDQuant Calibrate: instead of many text encoders joined by Conditioning (Combine)."
    )
    FUNCTION = "encode"
    RETURN_TYPES = ("CONDITIONING",)
    RETURN_NAMES = ("prompts",)
    OUTPUT_TOOLTIPS = ("One entry for each prompt, in their order.",)

    @classmethod
    def INPUT_TYPES(cls):
        return {
            "required": {
                "clip": ("CLIP", {"tooltip": "The text encoders, as for CLIP Text Encode."}),
                "prompts": (
                    "STRING",
                    {
                        "default": PROMPTS,
                        "multiline": True,
                        "dynamicPrompts": False,
                        "tooltip": "One prompt in each line; empty lines count for nothing. The best are like those "
                        "you will draw.",
                    },
                ),
            }
        }

    def encode(self, clip, prompts):
        if clip is None:
            raise SVDQuantError("the input clip is empty: the checkpoint it comes from holds no text encoder")
        lines = [line.strip() for line in prompts.splitlines() if line.strip()]
        if not lines:
            raise SVDQuantError("there is no prompt: write one in each line")
        bar = comfy.utils.ProgressBar(len(lines))
        conditioning = []
        with Interruptible():
            for line in lines:
                conditioning += clip.encode_from_tokens_scheduled(clip.tokenize(line))
                bar.update(1)
        return (conditioning,)
