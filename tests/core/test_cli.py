"""The command line as a user runs it."""

import subprocess
import sys
from pathlib import Path

import pytest
import small_flux
import torch
from safetensors.torch import save_file

from svdq_core.__main__ import main
from svdq_core.formats.comfy_quant import QuantizedCheckpoint
from svdq_core.quantizer.statistics import Calibration

ROOT = Path(__file__).parents[2]


@pytest.fixture
def full(tmp_path):
    save_file(small_flux.state_dict(), tmp_path / "full.safetensors")
    return str(tmp_path / "full.safetensors")


def test_quantize_then_inspect(full, tmp_path, capsys):
    output = str(tmp_path / "q.safetensors")
    command = ["quantize", full, output, "--rank", "16", "--skip", "double_blocks.*", "--modulations", "16bit"]
    assert main(command) == 0
    assert list(QuantizedCheckpoint(output).layers) == [
        "single_blocks.0.linear1",
        "single_blocks.0.linear2",
    ]
    assert "2 layers quantized" in capsys.readouterr().out
    assert main(["inspect", output]) == 0
    text = capsys.readouterr().out
    assert "single_blocks.0.linear1" in text and "svdquant_w4a4" in text and "error" in text


def test_a_calibration_file_selects_the_balanced_recipe(full, tmp_path):
    calibration = Calibration()
    for layer in small_flux.quantized_layers():
        calibration.observe(layer, small_flux.inputs(layer))
    calibration.save(tmp_path / "c.safetensors")
    output = str(tmp_path / "q.safetensors")
    assert main(["quantize", full, output, "--calibration", str(tmp_path / "c.safetensors")]) == 0
    assert QuantizedCheckpoint(output).report["recipe"] == "balanced"


def test_inspect_shows_what_a_16_bit_file_could_become(full, capsys):
    assert main(["inspect", full]) == 0
    assert f"{len(small_flux.quantized_layers())} layers to quantize" in capsys.readouterr().out


@pytest.mark.parametrize("command", [["inspect", "none.safetensors"], ["quantize", "none", "q"]])
def test_bad_input_is_one_line_and_an_exit_code(command, capsys):
    assert main(command) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("error: none") and "\n" not in error


def test_an_existing_file_is_not_overwritten(full, tmp_path, capsys):
    (tmp_path / "q.safetensors").write_bytes(b"precious")
    assert main(["quantize", full, str(tmp_path / "q.safetensors")]) == 2
    assert (tmp_path / "q.safetensors").read_bytes() == b"precious"
    assert main(["quantize", full, str(tmp_path / "q.safetensors"), "--overwrite"]) == 0


def test_doctor_runs_as_a_program_and_needs_no_host():
    done = subprocess.run(
        [sys.executable, "-m", "svdq_core", "doctor"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    assert torch.__version__ in done.stdout
    assert "backend" in done.stdout or "kernels" in done.stdout
