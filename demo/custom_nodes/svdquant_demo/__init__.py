"""A ComfyUI node that encodes prompts for the SVDQuant demo model."""

from __future__ import annotations

from .hash_encoder import encode


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
        context, pooled = encode(text)
        return ([[context.unsqueeze(0), {"pooled_output": pooled.unsqueeze(0)}]],)


NODE_CLASS_MAPPINGS = {"SVDQuantDemoTextEncode": SVDQuantDemoTextEncode}
NODE_DISPLAY_NAME_MAPPINGS = {"SVDQuantDemoTextEncode": "SVDQuant Demo Text Encode"}
