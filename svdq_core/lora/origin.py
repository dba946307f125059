"""Which model an adapter file looks to be for, from its keys and shapes: for messages, not for loading."""

from collections.abc import Mapping

# Parts of key names that only one family of models has, the most telling first.
_FAMILIES = (
    ("FLUX", ("double_blocks", "single_blocks", "single_transformer_blocks", "double_stream")),
    ("SD3", ("joint_blocks", "context_block")),
    ("Qwen-Image or another dual-stream transformer", ("txt_mlp", "img_mlp", "add_q_proj")),
    ("Z-Image or Lumina", ("noise_refiner", "context_refiner")),
    ("Wan", ("self_attn", "cross_attn")),
    ("PixArt", ("caption_projection", "adaln_single", "scale_shift_table")),
)
_UNET = ("down_blocks", "up_blocks", "input_blocks", "output_blocks", "mid_block", "middle_block")
_TEXT_ENCODERS = ("lora_te", "text_encoder", "text_model", "lora_prior_te", "clip_l.", "t5xxl.")
# Width of the text that a UNet's cross-attention reads.
_CONTEXTS = {768: "SD 1.5", 1024: "SD 2", 2048: "SDXL", 1280: "the SDXL refiner"}


def looks_like(shapes: Mapping[str, tuple[int, ...]]) -> str:
    """What a file of adapters seems to be made for.

    Args:
        shapes: of its tensors, by key.

    Returns:
        The name of a model, "a text encoder only", or "no model known here".
    """
    if shapes and all(any(part in key for part in _TEXT_ENCODERS) for key in shapes):
        return "a text encoder only"
    for family, parts in _FAMILIES:
        if any(part in key for key in shapes for part in parts):
            return family
    if any(part in key for key in shapes for part in _UNET):
        for key, shape in shapes.items():
            if "attn2" in key and ("to_k" in key or "to_v" in key) and ("down" in key or "lora_A" in key):
                return _CONTEXTS.get(shape[1] if len(shape) > 1 else 0, "a UNet model")
        return "a UNet model (SD 1.5 or SDXL)"
    return "no model known here"
