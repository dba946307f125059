"""A 16-bit model that the host has loaded, as weights to quantize."""

import hashlib
import uuid

import comfy.lora
import torch

from ..architectures import detect
from ..errors import CheckpointError
from ..formats.safetensors_file import TensorSpec
from .operations import QuantizedLinear

_PREFIX = "diffusion_model."
_SAMPLE = 4096  # elements from the start and from the middle of a tensor


class ModelSource:
    """The denoiser's weights of a MODEL, with the patches (LoRAs) that the graph put on it.

    Args:
        patcher: the MODEL.

    Raises:
        CheckpointError: the model is quantized already.
    """

    reads_ahead = False  # the weights are in memory, and patching them belongs to the host's own thread

    def __init__(self, patcher):
        self.name = f"the loaded {type(patcher.model).__name__} model"
        for name, module in patcher.model.named_modules():
            if isinstance(module, QuantizedLinear):
                raise CheckpointError(
                    f"{self.name} is quantized already ({name.removeprefix(_PREFIX)}). Connect the "
                    "16-bit model, from the stock Load Diffusion Model node for example."
                )
        patches = patcher.get_key_patches(_PREFIX)
        architecture, _ = detect([key.removeprefix(_PREFIX) for key in patches], self.name)
        self._patches = {
            architecture.published_name(key.removeprefix(_PREFIX)): (key, entries) for key, entries in patches.items()
        }
        self.specs = {
            name: TensorSpec(tuple(entries[0][0].shape), entries[0][0].dtype)
            for name, (_, entries) in self._patches.items()
        }

    def get(self, name: str) -> torch.Tensor:
        """One tensor, patched; the model itself is not touched."""
        key, ((weight, convert), *patches) = self._patches[name]
        if not patches:
            return weight
        full = convert(weight.detach().to(torch.float32, copy=True), inplace=True)
        return comfy.lora.calculate_weight(patches, full, key).to(weight.dtype)

    def digest(self) -> str:
        """Of a sample of every weight, and of what the patches hold."""
        found = hashlib.blake2b(digest_size=16)
        for name, (_, ((weight, _), *patches)) in sorted(self._patches.items()):
            found.update(name.encode())
            _feed(found, [weight, *patches])
        return found.hexdigest()


def _feed(digest, value: object) -> None:
    """Add what identifies a weight, or any part of a patch."""
    if isinstance(value, torch.Tensor):
        flat = value.detach().reshape(-1)
        sample = torch.cat((flat[:_SAMPLE], flat[flat.numel() // 2 :][:_SAMPLE]))
        digest.update(f"{tuple(value.shape)} {value.dtype}".encode())
        digest.update(sample.cpu().view(torch.uint8).numpy().tobytes())
    elif isinstance(value, (tuple, list)):
        for item in value:
            _feed(digest, item)
    elif value is None or isinstance(value, (str, int, float)):
        digest.update(repr(value).encode())
    elif hasattr(value, "weights"):  # the host's adapters
        _feed(digest, [type(value).__name__, value.weights])
    else:
        digest.update(uuid.uuid4().bytes)  # unknown, so never the same as another


def without_patches(patcher):
    """The MODEL without the patches (LoRAs) that the graph put on it."""
    bare = patcher.clone()
    bare.patches = {}
    bare.patches_uuid = uuid.uuid4()
    return bare


def with_patches_of(patcher, origin):
    """A MODEL with the patches of another one of the same architecture, on top of its own."""
    patched = patcher.clone()
    for key, patches in origin.patches.items():
        patched.patches[key] = patched.patches.get(key, []) + list(patches)
    patched.patches_uuid = uuid.uuid4()
    return patched
