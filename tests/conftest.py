"""Fixtures for all tests: the GPU marker, and one ComfyUI that the host tests share."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import pytest
import torch

if TYPE_CHECKING:
    from tools.comfy_host import ComfyHost

ROOT = Path(__file__).resolve().parent.parent


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Skip the tests that need a CUDA device where there is none."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how much was left untested for want of a GPU."""
    skipped = [r for r in terminalreporter.getreports("skipped") if "gpu" in r.keywords]
    if skipped:
        terminalreporter.section("GPU")
        terminalreporter.line(f"{len(skipped)} GPU tests skipped here")


@pytest.fixture(scope="session")
def comfy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ComfyHost]:
    """A running ComfyUI with this pack, and with the demo's nodes and models."""
    from tools.comfy_host import ComfyHost

    packs = {"ComfyUI-SVDQuant": ROOT, "svdquant_demo": ROOT / "demo/custom_nodes/svdquant_demo"}
    assets = ROOT / "demo/assets"
    models = {
        "diffusion_models": assets.glob("svdquant_demo_flux.safetensors"),
        "vae_approx": assets.glob("taef1_*.safetensors"),
    }
    packs = {name: folder for name, folder in packs.items() if folder.is_dir()}
    with ComfyHost(tmp_path_factory.mktemp("comfy"), packs=packs, models=models) as host:
        yield host
