"""What a quantization does when a layer, the disk or the device's memory fails it."""

import errno
import os

import hypothesis.strategies as st
import pytest
import small_flux
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file, save_file

from svdq_core.errors import LayerError, SVDQuantError
from svdq_core.formats.comfy_quant import QuantizedCheckpoint
from svdq_core.formats.partial_file import PartialFile, WriteError
from svdq_core.quantizer import memory
from svdq_core.quantizer.pipeline import FileSource, Settings, quantize_checkpoint
from svdq_core.quantizer.statistics import Calibration
from svdq_core.summary import summarize_file

FAST = Settings(recipe="fast", rank=16)
FEW = ("*attn*", "*txt*", "single_blocks.*")  # layers to skip where a run is slow
LAYER = "double_blocks.0.img_mlp.2"  # unsigned codes in int4: its other formats have another bias


@pytest.fixture
def full(tmp_path):
    save_file(small_flux.state_dict(), tmp_path / "full.safetensors")
    return tmp_path / "full.safetensors"


@pytest.fixture
def calibration():
    calibration = Calibration(rows=512)
    for layer in small_flux.quantized_layers():
        calibration.observe(layer, small_flux.inputs(layer, rows=1024))
    return calibration


def broken(tmp_path, key):
    tensors = small_flux.state_dict()
    tensors[key].view(-1)[3] = torch.nan
    save_file(tensors, tmp_path / "broken.safetensors")
    return tmp_path / "broken.safetensors"


# Layers


@pytest.mark.parametrize("key", [f"{LAYER}.weight", f"{LAYER}.bias", "img_in.weight"])
def test_a_broken_tensor_stays_as_it_is_if_asked(tmp_path, key):
    source, path = broken(tmp_path, key), tmp_path / "q.safetensors"
    with pytest.raises(LayerError, match="keep_broken"):
        quantize_checkpoint(FileSource(source), path, FAST)
    report = quantize_checkpoint(FileSource(source), path, Settings(recipe="fast", rank=16, keep_broken=True))
    kept, original = load_file(path)[key], load_file(source)[key]
    assert torch.allclose(kept.float(), original.float(), rtol=0, atol=0, equal_nan=True)
    layer = key.rsplit(".", 1)[0]
    if layer in small_flux.quantized_layers():
        assert report.kept[layer]["format"] == "16-bit" and layer not in QuantizedCheckpoint(path).layers
        assert f"kept in 16-bit: {layer} (NaN" in report.text()
        assert f"kept in 16-bit: {layer} (NaN" in summarize_file(path).text()


def hard(tmp_path, calibration):
    """A model of which LAYER's output is a small difference of large terms: 4 bits cannot hold it."""
    tensors = small_flux.state_dict()
    weight = tensors[f"{LAYER}.weight"].float()
    random = torch.Generator().manual_seed(7)
    weight[:, 1::2] = -weight[:, ::2] * (1 + 0.02 * torch.randn(weight[:, ::2].shape, generator=random))
    tensors[f"{LAYER}.weight"] = weight.to(torch.bfloat16)
    x = small_flux.inputs(LAYER, rows=1024)
    x[:, 1::2] = x[:, ::2]
    calibration.layers.pop(LAYER)
    calibration.observe(LAYER, x)
    save_file(tensors, tmp_path / "hard.safetensors")
    return FileSource(tmp_path / "hard.safetensors")


def test_a_layer_that_4_bits_cannot_hold_is_kept_in_more(tmp_path, calibration):
    source, path = hard(tmp_path, calibration), tmp_path / "q.safetensors"
    report = quantize_checkpoint(source, path, Settings(rank=0, max_error=1e9, skip=FEW), calibration)
    error = report.layers[LAYER]["output_error"]
    others = max(errors["output_error"] for name, errors in report.layers.items() if name != LAYER)
    assert error > 2 * others and not report.kept

    settings = Settings(rank=0, max_error=0.9 * error, skip=FEW)
    eight = quantize_checkpoint(source, path, settings, calibration, overwrite=True)
    assert eight.kept[LAYER]["format"] == "svdquant_w8a8" and list(eight.kept) == [LAYER]
    assert eight.layers[LAYER]["output_error"] < 0.5 * error
    checkpoint = QuantizedCheckpoint(path)
    assert checkpoint.layers[LAYER].format == "svdquant_w8a8"
    assert checkpoint.report["kept"] == eight.kept
    assert eight.bytes_4bit == sum(layer.nbytes for layer in checkpoint.layers.values())
    assert f"kept in svdquant_w8a8: {LAYER} (svdquant_w4a4 has an error of {error:.3f})" in summarize_file(path).text()

    settings = Settings(rank=0, max_error=0.9 * eight.layers[LAYER]["output_error"], skip=FEW)
    sixteen = quantize_checkpoint(source, path, settings, calibration, overwrite=True)
    assert sixteen.kept[LAYER]["format"] == "16-bit"
    assert torch.equal(load_file(path)[f"{LAYER}.weight"], source.get(f"{LAYER}.weight"))


def test_a_run_that_kept_layers_goes_on_to_the_same_bytes(tmp_path, calibration):
    source, chosen = hard(tmp_path, calibration), Settings(rank=0, max_error=0.12, skip=FEW)
    reports = []
    for name, stop in (("whole", None), ("stopped", "double_blocks.0.img_mod.lin"), ("stopped", None)):

        def progress(done, total, step, stop=stop):
            if step == stop:
                raise KeyboardInterrupt

        path = tmp_path / f"{name}.safetensors"
        try:
            reports.append(quantize_checkpoint(source, path, chosen, calibration, progress))
        except KeyboardInterrupt:
            assert stop
    whole, resumed = reports
    assert LAYER in whole.kept and resumed.resumed
    assert (whole.kept, whole.layers, whole.bytes_4bit) == (resumed.kept, resumed.layers, resumed.bytes_4bit)
    assert path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()


def test_a_threshold_that_makes_no_sense_is_refused(full, tmp_path):
    for value in (0.0, -1.0, float("nan")):
        with pytest.raises(SVDQuantError, match="max_error"):
            quantize_checkpoint(FileSource(full), tmp_path / "q", Settings(recipe="fast", max_error=value))


# Disk


class SmallDisk:
    """A file on a disk that fills up after so many bytes."""

    def __init__(self, file, room):
        self._file, self._room = file, room

    def write(self, data):
        self._room -= len(data)
        if self._room < 0:
            raise OSError(errno.ENOSPC, "No space left on device")
        return self._file.write(data)

    def __getattr__(self, name):
        return getattr(self._file, name)


@given(room=st.integers(0, 1_000_000), overwrite=st.booleans())
@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_disk_that_fills_up_anywhere_spoils_nothing_and_work_goes_on(full, tmp_path, room, overwrite):
    path = tmp_path / "q.safetensors"
    path.unlink(missing_ok=True)
    if overwrite:
        path.write_bytes(b"precious")
    opened = PartialFile.open

    def open_on_a_small_disk(self, *arguments):
        notes = opened(self, *arguments)
        self._file = SmallDisk(self._file, room)
        return notes

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(PartialFile, "open", open_on_a_small_disk)
        try:
            quantize_checkpoint(FileSource(full), path, FAST, overwrite=overwrite)
        except WriteError as error:
            assert "is full" in str(error) and "MB are still to come" in str(error) and str(path) in str(error)
            assert path.exists() == overwrite and (not overwrite or path.read_bytes() == b"precious")
        else:
            assert room >= path.stat().st_size - 8
    quantize_checkpoint(FileSource(full), path, FAST, overwrite=True)
    if not (tmp_path / "whole.safetensors").exists():
        quantize_checkpoint(FileSource(full), tmp_path / "whole.safetensors", FAST)
    assert path.read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert not [name for name in os.listdir(tmp_path) if ".partial" in name]


# The device's memory


@pytest.mark.parametrize("fits", [256, 128, 0])
def test_out_of_memory_takes_fewer_rows_and_then_the_cpu(full, tmp_path, calibration, monkeypatch, caplog, fits):
    tried, quantize_layer = [], memory.quantize_layer

    def small_device(spec, weight, bias, statistics, *rest):
        if spec.name == LAYER:
            tried.append((weight.device.type, len(statistics.sample)))
            if weight.device.type == "meta" and len(statistics.sample) > fits:
                raise torch.OutOfMemoryError("not enough memory")
        # The device of these tests can hold shapes only; the work is done beside it.
        weight, bias = (full_tensors[f"{spec.name}.{key}"] for key in ("weight", "bias"))
        return quantize_layer(spec, weight, bias, statistics, *rest)

    full_tensors = load_file(full)
    monkeypatch.setattr(memory, "quantize_layer", small_device)
    path = tmp_path / "q.safetensors"
    quantize_checkpoint(FileSource(full), path, Settings(rank=16, skip=FEW), calibration, device="meta")
    ladder = [("meta", rows) for rows in (512, 256, 128) if rows >= fits]
    assert tried == (ladder if fits else [*ladder, ("cpu", 128)])
    assert LAYER in caplog.text and "out of memory" in caplog.text
    assert ("on the CPU" in caplog.text) == (not fits)
    assert LAYER in QuantizedCheckpoint(path).layers


def test_out_of_memory_on_the_cpu_is_told_and_can_be_continued(full, tmp_path, monkeypatch):
    quantize_layer = memory.quantize_layer

    def no_memory(spec, *rest):
        if spec.name == LAYER:
            raise torch.OutOfMemoryError("not enough memory")
        return quantize_layer(spec, *rest)

    path = tmp_path / "q.safetensors"
    with monkeypatch.context() as patch, pytest.raises(torch.OutOfMemoryError):
        patch.setattr(memory, "quantize_layer", no_memory)
        quantize_checkpoint(FileSource(full), path, FAST)
    assert quantize_checkpoint(FileSource(full), path, FAST).resumed > 0
