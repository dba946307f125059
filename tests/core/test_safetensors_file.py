"""Reading never trusts a header; writing is all or nothing."""

import errno
import json
import os

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from safetensors.torch import load_file, save_file

from svdq_core.errors import CheckpointError
from svdq_core.formats import safetensors_file
from svdq_core.formats.safetensors_file import SafetensorsFile, SafetensorsWriter, TensorSpec

TENSORS = {
    "wide": torch.randn(3, 5),
    "half": torch.randn(7).to(torch.bfloat16),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "empty": torch.empty((0, 4), dtype=torch.float16),
}


def specs(tensors):
    return {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}


def write(path, tensors=TENSORS, **options):
    with SafetensorsWriter(path, specs(tensors), {"note": "x"}, **options) as writer:
        for name, tensor in reversed(tensors.items()):
            writer.write(name, tensor)


def raw_file(path, header, data=b""):
    encoded = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes(len(encoded).to_bytes(8, "little") + encoded + data)
    return path


def test_the_library_reads_what_we_write(tmp_path):
    write(tmp_path / "a.safetensors", metadata_room=100)
    loaded = load_file(tmp_path / "a.safetensors")
    assert loaded.keys() == TENSORS.keys()
    for name, tensor in TENSORS.items():
        assert torch.equal(loaded[name], tensor)


def test_we_read_what_the_library_writes(tmp_path):
    save_file(TENSORS, tmp_path / "a.safetensors", metadata={"k": "v"})
    file = SafetensorsFile(tmp_path / "a.safetensors")
    assert file.metadata == {"k": "v"} and file.specs == specs(TENSORS)
    assert torch.equal(file.get("wide"), TENSORS["wide"])


def test_metadata_can_grow_inside_its_room(tmp_path):
    with SafetensorsWriter(tmp_path / "a", specs(TENSORS), {}, metadata_room=50) as writer:
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
        writer.metadata["report"] = "0.5"
    assert SafetensorsFile(tmp_path / "a").metadata == {"report": "0.5"}


def test_a_truncated_file_is_named(tmp_path):
    path = tmp_path / "a.safetensors"
    write(path)
    whole = path.read_bytes()
    for length in (0, 4, 8, 20, len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.raises(CheckpointError, match=r"a\.safetensors"):
            SafetensorsFile(path)


@pytest.mark.parametrize(
    ("header", "why"),
    [
        (b"\xff\x80", "not a safetensors file"),
        (b"[1]", "not a table"),
        ({"__metadata__": {"a": 1}}, "metadata"),
        ({"a": {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]}}, "'a'"),
        ({"a": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}, "describes 8 bytes"),
        ({"a": {"dtype": "F99", "shape": [2], "data_offsets": [0, 8]}}, "'a'"),
        ({"a": {"dtype": "U8", "shape": [-1], "data_offsets": [0, -1]}}, "'a'"),
        ({"a": {"dtype": "U8", "shape": [2**62, 4], "data_offsets": [0, 2**64]}}, "describes"),
        ({"a": {"dtype": "U8", "shape": ["4"], "data_offsets": [0, 4]}}, "'a'"),
        ({"a": 3}, "'a'"),
        ({"a": {"dtype": "U8", "shape": [2], "data_offsets": [2, 4]}}, "hole"),
    ],
)
def test_a_lying_header_is_found_before_any_data_is_read(tmp_path, header, why):
    path = raw_file(tmp_path / "a.safetensors", header)
    with pytest.raises(CheckpointError, match=why):
        SafetensorsFile(path)


def test_a_header_longer_than_the_file_is_not_read(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes((2**40).to_bytes(8, "little") + b"{}")
    with pytest.raises(CheckpointError, match="1099511627776"):
        SafetensorsFile(path)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(position=st.integers(0, 400), value=st.integers(0, 255))
def test_any_corrupt_byte_is_harmless_or_one_clear_error(tmp_path, position, value):
    path = tmp_path / "a.safetensors"
    write(path, overwrite=True)
    data = bytearray(path.read_bytes())
    data[position % len(data)] = value
    path.write_bytes(data)
    try:
        file = SafetensorsFile(path)
        for name in file.specs:
            file.get(name)
    except CheckpointError as error:
        assert "a.safetensors" in str(error)


def test_a_missing_file_and_a_pickle_are_refused(tmp_path):
    with pytest.raises(CheckpointError, match="does not exist"):
        SafetensorsFile(tmp_path / "none.safetensors")
    torch.save(TENSORS, tmp_path / "a.ckpt")
    with pytest.raises(CheckpointError, match=r"a\.ckpt"):
        SafetensorsFile(tmp_path / "a.ckpt")


def test_an_existing_file_stays_unless_overwrite(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"precious")
    with pytest.raises(CheckpointError, match="already exists"):
        write(path)
    assert path.read_bytes() == b"precious"
    write(path, overwrite=True)
    assert SafetensorsFile(path).specs


def test_an_interrupted_write_leaves_the_old_file_whole(tmp_path):
    path = tmp_path / "a.safetensors"
    path.write_bytes(b"precious")
    with (
        pytest.raises(KeyboardInterrupt),
        SafetensorsWriter(path, specs(TENSORS), {}, overwrite=True) as writer,
    ):
        writer.write("wide", TENSORS["wide"])
        raise KeyboardInterrupt
    assert path.read_bytes() == b"precious"
    assert os.listdir(tmp_path) == ["a.safetensors"]


def test_a_full_disk_is_found_before_anything_is_written(tmp_path, monkeypatch):
    usage = type("Usage", (), {"free": 100})
    monkeypatch.setattr(safetensors_file.shutil, "disk_usage", lambda path: usage)
    with pytest.raises(CheckpointError, match=r"a\.safetensors needs .* MB"):
        write(tmp_path / "a.safetensors")
    assert not os.listdir(tmp_path)


def test_a_disk_that_fills_up_midway_leaves_nothing(tmp_path):
    with (
        pytest.raises(CheckpointError, match=r"a\.safetensors could not be written"),
        SafetensorsWriter(tmp_path / "a.safetensors", specs(TENSORS), {}) as writer,
    ):

        class FullDisk:
            def __init__(self, file):
                self.name, self._file = file.name, file

            def seek(self, offset):
                pass

            def write(self, data):
                raise OSError(errno.ENOSPC, "No space left on device")

            def close(self):
                self._file.close()

        writer._file = FullDisk(writer._file)
        writer.write("wide", TENSORS["wide"])
    assert not os.listdir(tmp_path)


def test_a_tensor_of_another_shape_or_a_forgotten_one_is_a_bug(tmp_path):
    with (
        pytest.raises(ValueError, match="announced"),
        SafetensorsWriter(tmp_path / "a", specs(TENSORS), {}) as writer,
    ):
        writer.write("wide", TENSORS["wide"].t())
    with (
        pytest.raises(RuntimeError, match="never written"),
        SafetensorsWriter(tmp_path / "a", specs(TENSORS), {}),
    ):
        pass
    assert not os.listdir(tmp_path)
