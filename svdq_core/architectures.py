"""The denoisers this pack knows: how to tell them by their keys, and which of their layers to quantize.

Names are those of the host's modules. A layer's kind decides its precision: those of the body do the
arithmetic, the modulations only hold many weights (one row goes through them per image). Left in 16 bits
are the embedders and the final layer: small, and the most sensitive (SVDQuant, appendix).
"""

import re
from collections.abc import Collection
from dataclasses import dataclass

from .errors import CheckpointError

BODY, MODULATION = "body", "modulation"
PREFIXES = ("", "model.diffusion_model.", "diffusion_model.")


@dataclass(frozen=True)
class Architecture:
    """One family of denoisers.

    Attributes:
        signature: tensors that, all together, no other family has.
        body: pattern of the linear layers that every token goes through.
        after_gelu: pattern of those among them whose input is a GELU's output.
        modulation: pattern of the layers that turn the timestep's embedding into each block's own
            shifts, scales and gates.
        renamed: pattern and replacement that undo a renaming by newer hosts (ComfyUI 0.29).
    """

    name: str
    signature: tuple[str, ...]
    body: str
    after_gelu: str
    modulation: str = r"(?!)"
    renamed: tuple[str, str] = (r"(?!)", "")

    def published_name(self, key: str) -> str:
        """The name of a tensor in published checkpoints, which every version of the host reads."""
        return re.sub(self.renamed[0], self.renamed[1], key)

    def kind(self, layer: str) -> str | None:
        """``BODY`` or ``MODULATION`` for a layer (a module name) that can be quantized, else None."""
        if re.fullmatch(self.body, layer):
            return BODY
        return MODULATION if re.fullmatch(self.modulation, layer) else None

    def input_after_gelu(self, layer: str) -> bool:
        """Whether the layer's input is nearly non-negative, so that unsigned codes fit it better."""
        return re.fullmatch(self.after_gelu, layer) is not None


ARCHITECTURES = (
    Architecture(
        name="flux",
        signature=("double_blocks.0.img_attn.qkv.weight", "single_blocks.0.linear1.weight"),
        body=(
            r"double_blocks\.\d+\.(img|txt)_(attn\.(qkv|proj)|mlp\.[02])"
            r"|single_blocks\.\d+\.linear[12]"
        ),
        after_gelu=r"double_blocks\.\d+\.(img|txt)_mlp\.2",
        modulation=r"double_blocks\.\d+\.(img|txt)_mod\.lin|single_blocks\.\d+\.modulation\.lin",
        renamed=(r"(query|key)_norm\.weight$", r"\1_norm.scale"),
    ),
    Architecture(
        name="sdxl",
        signature=(
            "input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight",
            "label_emb.0.0.weight",
        ),
        body=(
            r"(input_blocks|middle_block|output_blocks)\..*transformer_blocks\.\d+\."
            r"(attn[12]\.to_([qkv]|out\.0)|ff\.net\.(0\.proj|2))"
        ),
        after_gelu=r"(?!)",  # GEGLU: the product of a GELU and a linear term has both signs
    ),
    Architecture(
        name="pixart",
        signature=("blocks.0.cross_attn.kv_linear.weight", "t_block.1.weight"),
        body=(r"blocks\.\d+\.(attn\.(qkv|proj)|cross_attn\.(q_linear|kv_linear|proj)|mlp\.fc[12])"),
        after_gelu=r"blocks\.\d+\.mlp\.fc2",
    ),
)


def detect(keys: Collection[str], source: str) -> tuple[Architecture, str]:
    """Which family a checkpoint belongs to, and the prefix its keys carry.

    Args:
        keys: the tensors' names.
        source: the file's or model's name, for the error message.

    Raises:
        CheckpointError: none of the known families.
    """
    for prefix in PREFIXES:
        for architecture in ARCHITECTURES:
            if all(prefix + key in keys for key in architecture.signature):
                return architecture, prefix
    known = ", ".join(architecture.name for architecture in ARCHITECTURES)
    raise CheckpointError(
        f"{source} is not a model this pack can quantize. It knows {known}, in ComfyUI's own key "
        "names (not diffusers')."
    )
