"""The host inside the test process, and a small FLUX for it."""

import pytest
import small_flux
from in_process import FluxFiles, SmallFluxHost
from safetensors.torch import save_file

from svdq_core.quantizer.pipeline import FileSource, Settings, quantize_checkpoint


@pytest.fixture(scope="session")
def host():
    """ComfyUI's code in this process."""
    return SmallFluxHost()


@pytest.fixture(scope="session")
def flux_files(tmp_path_factory):
    """A small FLUX, in 16 bits and quantized."""
    folder = tmp_path_factory.mktemp("flux")
    files = FluxFiles(folder / "full.safetensors", folder / "quantized.safetensors")
    save_file(small_flux.state_dict(), files.full)
    quantize_checkpoint(FileSource(files.full), files.quantized, Settings(recipe="fast"))
    return files
