"""Runs ComfyUI on a machine that it was not made for: `comfy_launch.py COMFYUI_PATH [option ...]`.

Tests and the demo run on any machine and with small models, so three gaps are closed:

- PyPI's torchvision cannot load its compiled operators beside a CPU build of PyTorch, and its
  import then fails for want of their schemas. They are declared; nothing calls them.
- torchaudio may be missing. An empty one stands in; nothing calls it either.
- ComfyUI 0.3.75 gives every FLUX 24 heads. Newer versions derive the number from the hidden size,
  and so does this.

Each happens when the module in question is imported, so that ComfyUI imports things in its own
order. None of it is for the product: on a user's machine ComfyUI runs without.
"""

from __future__ import annotations

import runpy
import sys
from collections.abc import Callable, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from pathlib import Path
from types import ModuleType


class AfterImport(MetaPathFinder):
    """Calls a function with a module as soon as that has been imported."""

    def __init__(self, actions: dict[str, Callable[[ModuleType], None]]) -> None:
        self.actions = actions

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The usual spec, with a loader that ends in the action."""
        action = self.actions.get(fullname)
        spec = PathFinder.find_spec(fullname, path, target) if action else None
        if action is None or spec is None or spec.loader is None:
            return None
        execute = spec.loader.exec_module

        def exec_module(module: ModuleType) -> None:
            execute(module)
            action(module)

        spec.loader.exec_module = exec_module
        return spec


class EmptyTorchaudio(MetaPathFinder, Loader):
    """Finds an empty torchaudio. It comes after all other finders, so that a real one wins."""

    NAMES = ("torchaudio", "torchaudio.functional", "torchaudio.transforms")

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """A spec for torchaudio and its submodules only."""
        if fullname not in self.NAMES:
            return None
        return ModuleSpec(fullname, self, is_package=fullname == "torchaudio")

    def exec_module(self, module: ModuleType) -> None:
        """Leave it empty."""


def declare_operators(extension: ModuleType) -> None:
    """Declare the schemas that torchvision's import asks for, unless the real ones are there."""
    if extension._has_ops():
        return
    import torch

    library = torch.library.Library("torchvision", "DEF")
    for operator in ("nms", "qnms"):
        library.define(f"{operator}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
    extension.declared = library  # the schemas live as long as it does


def derive_flux_heads(detection: ModuleType) -> None:
    """Let a FLUX have as many heads as its hidden size holds."""
    detect = detection.detect_unet_config

    def detect_unet_config(*args, **kwargs):
        config = detect(*args, **kwargs)
        if config and config.get("image_model") == "flux":
            config["num_heads"] = config["hidden_size"] // sum(config["axes_dim"])
        return config

    detection.detect_unet_config = detect_unet_config


def prepare(root: Path) -> None:
    """Make the ComfyUI in ``root`` importable, with the gaps closed."""
    sys.path.insert(0, str(root))
    sys.meta_path.insert(
        0,
        AfterImport(
            {
                "torchvision.extension": declare_operators,
                "comfy.model_detection": derive_flux_heads,
            }
        ),
    )
    sys.meta_path.append(EmptyTorchaudio())


def main() -> None:
    """Run main.py as `python main.py [option ...]` would."""
    root, *options = sys.argv[1:]
    script = str(Path(root) / "main.py")
    sys.argv = [script, *options]
    sys.path.pop(0)  # this folder, which is not ComfyUI's
    prepare(Path(root))
    runpy.run_path(script, run_name="__main__")


if __name__ == "__main__":
    main()
