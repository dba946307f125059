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
    "empty": torch.empty((0, 4), dtype=torch.float16),
    "bytes": torch.arange(5, dtype=torch.uint8),
}


def specs(tensors):
    return {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in tensors.items()}


def write(path, tensors=TENSORS, **options):
    with SafetensorsWriter(path, specs(tensors), {"note": "x"}, **options) as writer:
        for name, tensor in tensors.items():
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


class FullDisk:
    """A file on a disk that has room for nothing more."""

    def __init__(self, file):
        self._file = file

    def write(self, data):
        raise OSError(errno.ENOSPC, "No space left on device")

    def __getattr__(self, name):
        return getattr(self._file, name)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_disk_that_fills_up_midway_leaves_what_was_there(tmp_path, overwrite):
    path = tmp_path / "a.safetensors"
    if overwrite:
        path.write_bytes(b"precious")
    with (
        pytest.raises(CheckpointError, match=r"a\.safetensors could not be written: .* is full.* MB"),
        SafetensorsWriter(path, specs(TENSORS), {}, overwrite=overwrite) as writer,
    ):
        writer._file._file = FullDisk(writer._file._file)
        writer.write("wide", TENSORS["wide"])
    assert os.listdir(tmp_path) == ["a.safetensors"] * overwrite
    assert not overwrite or path.read_bytes() == b"precious"


def test_a_tensor_before_which_lies_an_odd_number_of_bytes_is_a_bug(tmp_path):
    with (
        pytest.raises(ValueError, match="multiple of its element size"),
        SafetensorsWriter(tmp_path / "a", specs(TENSORS), {}) as writer,
    ):
        writer.write("bytes", TENSORS["bytes"])
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


class Stop(Exception):
    """A user's Cancel."""


def write_until(path, stop, fingerprint="f", **options):
    """Write and commit tensors; raises Stop before the tensor ``stop``. Returns what was written."""
    written = []
    with SafetensorsWriter(path, specs(TENSORS), {}, fingerprint=fingerprint, **options) as writer:
        done = {note["name"] for note in writer.notes}
        for name, tensor in TENSORS.items():
            if name == stop:
                raise Stop
            if name not in done:
                writer.write(name, tensor)
                writer.commit({"name": name})
                written.append(name)
    return written


@pytest.fixture
def begun(tmp_path):
    """A file of which two tensors are written."""
    path = tmp_path / "a.safetensors"
    with pytest.raises(Stop):
        write_until(path, "empty")
    return path


def test_a_writer_with_the_same_fingerprint_goes_on(begun, tmp_path):
    assert not begun.exists() and len(os.listdir(tmp_path)) == 2
    assert write_until(begun, None) == ["empty", "bytes"]
    assert os.listdir(tmp_path) == ["a.safetensors"]
    write_until(tmp_path / "b.safetensors", None)
    assert begun.read_bytes() == (tmp_path / "b.safetensors").read_bytes()


@pytest.mark.parametrize("change", [{"fingerprint": "other"}, {"restart": True}])
def test_any_other_starts_afresh(begun, tmp_path, change):
    assert write_until(begun, None, **change) == list(TENSORS)
    assert os.listdir(tmp_path) == ["a.safetensors"]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda data, journal: (data[:-1], journal),
        lambda data, journal: (data[:-1] + bytes([data[-1] ^ 1]), journal),
        lambda data, journal: (data, journal[:-3]),
        lambda data, journal: (data, journal.replace(b'"crc"', b'"cry"')),
        lambda data, journal: (data, b"[]\n" + journal),
        lambda data, journal: (data, b""),
        lambda data, journal: (b"", journal),
    ],
)
def test_what_lost_its_checksum_is_written_again(begun, tmp_path, spoil):
    partial, journal = tmp_path / ".a.safetensors.partial", tmp_path / ".a.safetensors.partial.journal"
    data, log = spoil(partial.read_bytes(), journal.read_bytes())
    partial.write_bytes(data)
    journal.write_bytes(log)
    assert "half" in write_until(begun, None)
    loaded = load_file(begun)
    assert all(torch.equal(loaded[name], tensor) for name, tensor in TENSORS.items())


def test_bad_input_is_not_worth_continuing(tmp_path):
    with (
        pytest.raises(CheckpointError, match="bad"),
        SafetensorsWriter(tmp_path / "a", specs(TENSORS), {}, fingerprint="f") as writer,
    ):
        writer.write("wide", TENSORS["wide"])
        writer.commit({})
        raise CheckpointError("bad input")
    assert not os.listdir(tmp_path)


def test_two_writers_of_one_file_are_refused(tmp_path):
    path = tmp_path / "a.safetensors"
    with SafetensorsWriter(path, specs(TENSORS), {}, fingerprint="f") as writer:
        with pytest.raises(CheckpointError, match="being made by another process"):
            write_until(path, None)
        for name, tensor in TENSORS.items():
            writer.write(name, tensor)
    assert os.listdir(tmp_path) == ["a.safetensors"]
    assert load_file(path).keys() == TENSORS.keys()


def test_tensors_can_be_replaced_before_they_are_written(tmp_path):
    path = tmp_path / "a.safetensors"
    wider = torch.randn(4, 4).to(torch.float64)
    with pytest.raises(Stop), SafetensorsWriter(path, specs(TENSORS), {}, fingerprint="f") as writer:
        writer.replace(["wide", "empty"], specs({"wider": wider}))
        writer.write("wider", wider)
        writer.commit({})
        raise Stop
    with SafetensorsWriter(path, specs(TENSORS), {}, fingerprint="f") as writer:
        writer.write("half", TENSORS["half"])
        writer.write("bytes", TENSORS["bytes"])
    loaded = load_file(path)
    assert loaded.keys() == {"wider", "half", "bytes"} and torch.equal(loaded["wider"], wider)
