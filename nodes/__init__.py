"""The nodes, one file per family. Ids and inputs are saved in users' graphs: add, never rename."""

from .compare import SVDQuantCompare
from .inspect import SVDQuantInspect
from .loader import SVDQuantModelLoader
from .lora import SVDQuantLoraApply
from .quantize import SVDQuantQuantizeCheckpoint

NODE_CLASS_MAPPINGS = {
    "SVDQuantModelLoader": SVDQuantModelLoader,
    "SVDQuantQuantizeCheckpoint": SVDQuantQuantizeCheckpoint,
    "SVDQuantLoraApply": SVDQuantLoraApply,
    "SVDQuantInspect": SVDQuantInspect,
    "SVDQuantCompare": SVDQuantCompare,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "SVDQuantModelLoader": "SVDQuant Model Loader",
    "SVDQuantQuantizeCheckpoint": "SVDQuant Quantize Checkpoint",
    "SVDQuantLoraApply": "SVDQuant LoRA Apply",
    "SVDQuantInspect": "SVDQuant Inspect",
    "SVDQuantCompare": "SVDQuant Compare",
}
