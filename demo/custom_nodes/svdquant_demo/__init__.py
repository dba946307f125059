"""ComfyUI nodes that encode prompts for the SVDQuant demo model."""

from __future__ import annotations

from .hash_encoder import encode


class DemoTextEncoder:
    """What the host's CLIP is to its text-encoding nodes: prompts through the weightless encoder."""

    def tokenize(self, text: str) -> str:
        """The text as it is."""
        return text

    def encode_from_tokens_scheduled(self, tokens: str) -> list:
        """CONDITIONING of one prompt."""
        context, pooled = encode(tokens)
        return [[context.unsqueeze(0), {"pooled_output": pooled.unsqueeze(0)}]]


class SVDQuantDemoCLIP:
    """The encoder that the demo model was trained with, as a CLIP for any node that encodes prompts with one."""

    DESCRIPTION = (
        "The text encoder of the bundled SVDQuant demo model (and of no other). It needs no file: each word is a fixed "
        "pseudo-random vector."
    )
    CATEGORY = "SVDQuant/demo"
    RETURN_TYPES = ("CLIP",)
    OUTPUT_TOOLTIPS = ("For CLIP Text Encode or SVDQuant Prompts.",)
    FUNCTION = "load"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {"required": {}}

    def load(self) -> tuple:
        return (DemoTextEncoder(),)


class SVDQuantDemoTextEncode:
    """Prompt -> conditioning, through the weightless encoder that the demo model was trained with."""

    DESCRIPTION = (
        "Encodes a prompt for the bundled SVDQuant demo model (and for no other). It needs no text-encoder file: "
        "each word is a fixed pseudo-random vector."
    )
    CATEGORY = "SVDQuant/demo"
    RETURN_TYPES = ("CONDITIONING",)
    OUTPUT_TOOLTIPS = ("Conditioning for the demo model.",)
    FUNCTION = "encode"

    @classmethod
    def INPUT_TYPES(cls) -> dict:
        return {
            "required": {
                "text": (
                    "STRING",
                    {
                        "default": "red apple on a blue background",
                        "multiline": True,
                        "tooltip": "The name of an emoji, optionally followed by 'on a ... background' with white, "
                        "grey, black, red, orange, yellow, green, blue, purple or pink. Empty means unconditional: "
                        "use it as the negative prompt.",
                    },
                )
            }
        }

    def encode(self, text: str) -> tuple:
        return (DemoTextEncoder().encode_from_tokens_scheduled(text),)


NODE_CLASS_MAPPINGS = {"SVDQuantDemoCLIP": SVDQuantDemoCLIP, "SVDQuantDemoTextEncode": SVDQuantDemoTextEncode}
NODE_DISPLAY_NAME_MAPPINGS = {
    "SVDQuantDemoCLIP": "SVDQuant Demo CLIP",
    "SVDQuantDemoTextEncode": "SVDQuant Demo Text Encode",
}
