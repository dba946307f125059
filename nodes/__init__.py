"""The nodes, one file per family. Ids and inputs are saved in users' graphs: add, never rename."""

from .calibrate import SVDQuantCalibrate
from .compare import SVDQuantCompare
from .inspect import SVDQuantInspect
from .loader import SVDQuantModelLoader
from .lora import SVDQuantLoraApply
from .prompts import SVDQuantPrompts
from .quantize import SVDQuantQuantizeCheckpoint
from .replay import SVDQuantReplaySteps

NODE_CLASS_MAPPINGS = {
    "SVDQuantModelLoader": SVDQuantModelLoader,
    "SVDQuantQuantizeCheckpoint": SVDQuantQuantizeCheckpoint,
    "SVDQuantCalibrate": SVDQuantCalibrate,
    "SVDQuantPrompts": SVDQuantPrompts,
    "SVDQuantLoraApply": SVDQuantLoraApply,
    "SVDQuantInspect": SVDQuantInspect,
    "SVDQuantCompare": SVDQuantCompare,
    "SVDQuantReplaySteps": SVDQuantReplaySteps,
}

NODE_DISPLAY_NAME_MAPPINGS = {
    "SVDQuantModelLoader": "SVDQuant Model Loader",
    "SVDQuantQuantizeCheckpoint": "SVDQuant Quantize Checkpoint",
    "SVDQuantCalibrate": "SVDQuant Calibrate",
    "SVDQuantPrompts": "SVDQuant Prompts",
    "SVDQuantLoraApply": "SVDQuant LoRA Apply",
    "SVDQuantInspect": "SVDQuant Inspect",
    "SVDQuantCompare": "SVDQuant Compare",
    "SVDQuantReplaySteps": "SVDQuant Replay Steps",
}
