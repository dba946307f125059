"""LoRA files on a MODEL, through the host's own reading of their many key dialects."""

from os import PathLike

import comfy.lora
import comfy.lora_convert
import torch

from ..errors import CheckpointError
from ..formats.safetensors_file import SafetensorsFile


def apply_lora(patcher, path: str | PathLike, strength: float):
    """Put a LoRA on a model.

    Args:
        patcher: the MODEL; it is not changed.
        path: a safetensors LoRA.
        strength: factor on the LoRA; 0 gives the model back as it is.

    Returns:
        (a MODEL with the LoRA, a report of what matched).

    Raises:
        CheckpointError: the file is damaged, is not a LoRA, has NaN or Inf in it, or nothing in it fits
            the model.
    """
    file = SafetensorsFile(path)
    name = file.path.name
    if strength == 0:
        return patcher, f"{name}: strength 0, not applied"
    lora = {key: file.get(key) for key in file.specs}
    for key, tensor in lora.items():
        if not bool(torch.isfinite(tensor).all()):
            raise CheckpointError(f"{path}: {key} has NaN or infinite values. The LoRA is broken.")
    key_map = comfy.lora.model_lora_keys_unet(patcher.model, {})
    patches = comfy.lora.load_lora(comfy.lora_convert.convert_lora(lora), key_map)
    adapted = patcher.clone()
    matched = adapted.add_patches(patches, strength)
    if not matched:
        raise CheckpointError(
            f"{path}: none of its {len(lora)} tensors fits this {type(patcher.model).__name__} model. "
            f"It is a LoRA of another model, or no LoRA (its first key: {next(iter(lora), None)!r})."
        )
    used = {key for patch in patches.values() for key in getattr(patch, "loaded_keys", ())}
    unused = sorted(key for key in lora if key not in used)
    report = f"{name} at strength {strength:g}: {len(matched)} layers matched"
    if unused:
        report += f"; {len(unused)} tensors not used, e.g. {', '.join(unused[:3])}"
    return adapted, report
