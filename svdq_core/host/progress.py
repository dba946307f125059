"""How far a quantization is: on the host's progress bar, and in full to the browser."""

import time
from collections.abc import Mapping

import comfy.utils
from comfy_execution.utils import get_executing_context
from server import PromptServer

from ..quantizer.pipeline import Plan

EVENT = "svdquant.progress"


class QuantizationProgress:
    """One bar over calibration and quantization, and an event for the browser at each step.

    ``planned`` is None where there is nothing but calibration.

    The event's data: ``node``, ``stage``, ``step`` (what is worked on), ``done`` and ``total`` (of the bar),
    ``seconds_left`` (of the stage; null when unknown) and ``error`` (mean over the layers so far, or null).
    """

    def __init__(self, planned: Plan | None, sampling_steps: int):
        layers = planned.layers if planned else {}
        self._plain = planned.plain if planned else {}
        self._sampling_steps = sampling_steps
        self._total = sampling_steps + len(layers) + len(self._plain)
        self._bar = comfy.utils.ProgressBar(self._total)
        self._costs = {name: layer.out_features * layer.in_features for name, layer in layers.items()}
        self._spent = 0
        self._begun: set[str] = set()
        self._errors: list[float] = []
        self._stage = ""
        self._stage_began = 0.0

    def sampled(self, done: int, total: int) -> None:
        """A sampling step of the calibration is done."""
        self._tell("calibrating", f"sampling step {done} of {total}", done, done / total)

    def working(self, done: int, total: int, name: str) -> None:
        """The quantizer turns to a tensor or a layer."""
        done += self._sampling_steps
        if name in self._costs:
            share = self._spent / sum(self._costs.values())
            self._spent += self._costs[name]
            self._begun.add(name)
            self._tell("quantizing", name, done, share)
        elif name in self._plain:
            self._tell("copying", name, done)
        else:
            self._tell("finishing", "", done)

    def quantized(self, name: str, errors: Mapping[str, float]) -> None:
        """A layer is done, with these errors; one that an interrupted run had done costs this one nothing."""
        if name not in self._begun:
            del self._costs[name]
        self._errors.append(layer_error(errors))

    def _tell(self, stage: str, step: str, done: int, share: float = 0.0) -> None:
        now = time.monotonic()
        if stage != self._stage:
            self._stage, self._stage_began = stage, now
        elapsed = now - self._stage_began
        event = {
            "node": get_executing_context().node_id,
            "stage": stage,
            "step": step,
            "done": done,
            "total": self._total,
            "seconds_left": round(elapsed * (1 - share) / share, 1) if share and elapsed else None,
            "error": round(sum(self._errors) / len(self._errors), 5) if self._errors else None,
        }
        PromptServer.instance.send_sync(EVENT, event, PromptServer.instance.client_id)
        self._bar.update_absolute(done, self._total)


def layer_error(errors: Mapping[str, float]) -> float:
    """The error to show of a layer: of its output where calibration measured it, else of its weight."""
    return errors.get("output_error", errors["weight_error"])
