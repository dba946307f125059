"""An interrupted quantization goes on where it stopped, and ends in the same bytes."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
import small_flux
import torch
from safetensors.torch import save_file

from svdq_core.__main__ import main
from svdq_core.errors import CheckpointError
from svdq_core.quantizer import pipeline
from svdq_core.quantizer.pipeline import FileSource, Settings, quantize_checkpoint
from svdq_core.quantizer.statistics import Calibration

ROOT = Path(__file__).parents[2]
FAST = Settings(recipe="fast")


class Cancelled(Exception):
    """What a user's Cancel raises."""


@pytest.fixture
def full(tmp_path):
    save_file(small_flux.state_dict(), tmp_path / "full.safetensors")
    return tmp_path / "full.safetensors"


@pytest.fixture
def calibration():
    calibration = Calibration()
    for layer in small_flux.quantized_layers():
        calibration.observe(layer, small_flux.inputs(layer))
    return calibration


def run(full, path, settings=FAST, stop=None, **options):
    """Quantize; a number cancels before that step. Returns the report and the steps worked on."""
    steps = []

    def progress(done, total, step):
        steps.append(step)
        if done == stop:
            raise Cancelled

    return quantize_checkpoint(FileSource(full), path, settings, progress=progress, **options), steps


def cancelled(full, path, stop, settings=FAST, **options):
    with pytest.raises(Cancelled):
        run(full, path, settings, stop, **options)


def leftovers(folder):
    return [name for name in os.listdir(folder) if ".partial" in name]


def test_a_killed_command_run_again_ends_in_the_same_bytes(full, tmp_path, calibration):
    calibration.save(tmp_path / "c.safetensors")
    output, journal = tmp_path / "q.safetensors", tmp_path / ".q.safetensors.partial.journal"
    arguments = ["--recipe", "best", "--calibration", str(tmp_path / "c.safetensors"), "--device", "cpu", "--overwrite"]
    output.write_bytes(b"precious")
    command = [sys.executable, "-m", "svdq_core", "quantize", str(full), str(output), *arguments]
    committed = 0
    for lines in (4, 17, 23):
        process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
        while process.poll() is None and (not journal.exists() or journal.read_bytes().count(b"\n") <= lines):
            time.sleep(0.002)
        process.kill()
        assert process.wait() != 0, "it was done before it was killed"
        told = process.stderr.read()
        assert (f"going on with {output}: {committed} of" in told) == bool(committed)
        assert output.read_bytes() == b"precious"
        committed = journal.read_bytes().count(b"\n") - 1
    subprocess.run(command, cwd=ROOT, check=True, capture_output=True)
    assert main(["quantize", str(full), str(tmp_path / "whole.safetensors"), *arguments]) == 0
    assert output.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not leftovers(tmp_path)


@pytest.mark.parametrize("stop", [1, 12, 22, -1])
def test_a_cancelled_run_goes_on_and_says_so(full, tmp_path, stop, caplog):
    path = tmp_path / "q.safetensors"
    seen = []
    whole, steps = run(full, tmp_path / "whole.safetensors", on_layer=lambda name, errors: seen.append(name))
    stop = stop % len(steps)
    cancelled(full, path, stop)
    assert f"what is done so far is in {tmp_path / '.q.safetensors.partial'}" in caplog.text
    again = []
    report, rest = run(full, path, on_layer=lambda name, errors: again.append(name))
    assert rest == steps[stop:] and report.resumed == stop
    assert again == seen and report.layers == whole.layers and report.bytes_4bit == whole.bytes_4bit
    assert path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not leftovers(tmp_path)


def test_a_run_cancelled_before_its_first_step_leaves_nothing(full, tmp_path):
    cancelled(full, tmp_path / "q.safetensors", 0)
    assert os.listdir(tmp_path) == ["full.safetensors"]


def another_rank(full):
    return {"settings": Settings(recipe="fast", rank=16)}


def another_seed(full):
    return {"settings": Settings(recipe="fast", seed=1)}


def another_model(full):
    tensors = small_flux.state_dict(seed=1)
    save_file(tensors, full)
    os.utime(full, (1, 1))
    return {}


def another_version(full):
    pipeline.__version__ = "0.0.0"
    return {}


def asked_to(full):
    return {"restart": True}


@pytest.mark.parametrize("change", [another_rank, another_seed, another_model, another_version, asked_to])
def test_anything_else_starts_afresh(full, tmp_path, change, monkeypatch):
    monkeypatch.setattr(pipeline, "__version__", pipeline.__version__)  # puts back what a change leaves
    path = tmp_path / "q.safetensors"
    cancelled(full, path, 15)
    options = change(full)
    report, _ = run(full, path, **options)
    assert not report.resumed and not leftovers(tmp_path)
    options.pop("restart", None)
    run(full, tmp_path / "whole.safetensors", **options)
    assert path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_another_calibration_starts_afresh(full, tmp_path, calibration):
    path, settings = tmp_path / "q.safetensors", Settings(skip=("single_blocks.*", "*txt*"))
    cancelled(full, path, 24, settings, calibration=calibration)
    calibration.layers["double_blocks.0.img_attn.qkv"].sample[0, 0] += 1
    assert not run(full, path, settings, calibration=calibration)[0].resumed


def test_bad_input_found_midway_leaves_nothing(full, tmp_path):
    tensors = small_flux.state_dict()
    tensors["single_blocks.0.linear2.weight"][0, 0] = torch.nan
    save_file(tensors, full)
    with pytest.raises(Exception, match=r"single_blocks\.0\.linear2"):
        run(full, tmp_path / "q.safetensors")
    assert os.listdir(tmp_path) == ["full.safetensors"]


def test_the_same_file_is_not_made_twice_at_once(full, tmp_path):
    path = tmp_path / "q.safetensors"

    def another(done, total, step):
        if done == 5:
            with pytest.raises(CheckpointError, match="being made by another process"):
                run(full, path)

    quantize_checkpoint(FileSource(full), path, FAST, progress=another)
    assert path.exists() and not leftovers(tmp_path)
