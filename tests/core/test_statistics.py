"""Calibration statistics: ranges, a fair sample, files."""

import pytest
import torch
from safetensors.torch import save_file

from svdq_core.errors import CheckpointError
from svdq_core.quantizer.statistics import Calibration


def test_ranges_and_counts_are_exact_over_many_batches():
    random = torch.Generator().manual_seed(0)
    batches = [torch.randn((2, 50, 64), generator=random) for _ in range(5)]
    calibration = Calibration(rows=32)
    for batch in batches:
        calibration.observe("a", batch)
    rows = torch.cat(batches).reshape(-1, 64)
    layer = calibration.layers["a"]
    assert torch.equal(layer.minimum, rows.amin(0)) and torch.equal(layer.maximum, rows.amax(0))
    assert layer.count == 500 and layer.sample.shape == (32, 64)
    kept = layer.sample.float()[:, None] == rows.to(torch.bfloat16).float()
    assert kept.all(-1).any(1).all()


def test_every_row_is_as_likely_to_be_kept():
    kept = torch.zeros(100)
    for seed in range(300):
        calibration = Calibration(seed, rows=10)
        for start in range(0, 100, 25):
            rows = torch.arange(start, start + 25.0)[:, None].expand(25, 64)
            calibration.observe("a", rows)
        kept[calibration.layers["a"].sample[:, 0].long()] += 1
    # 30 expected each, standard deviation 5.2
    assert kept.min() > 10 and kept.max() < 55


def test_the_sample_is_the_same_for_the_same_seed():
    samples = []
    for _ in range(2):
        calibration = Calibration(seed=3, rows=8)
        calibration.observe("a", torch.arange(6400.0).reshape(100, 64))
        samples.append(calibration.layers["a"].sample)
    assert torch.equal(*samples)


def test_files_and_merging_lose_nothing(tmp_path):
    halves = [Calibration(seed=1, rows=16), Calibration(seed=2, rows=16)]
    for sign, half in zip((1, -1), halves, strict=True):
        half.observe("a.b", sign * torch.rand(40, 64))
    halves[0].merge(halves[1])
    halves[0].save(tmp_path / "c.safetensors")
    loaded = Calibration.load(tmp_path / "c.safetensors").layers["a.b"]
    assert loaded.count == 80 and len(loaded.sample) == 16
    assert bool((loaded.minimum < 0).all()) and bool((loaded.maximum > 0).all())
    assert torch.equal(loaded.sample, halves[0].layers["a.b"].sample)


def test_a_file_that_is_no_calibration_is_refused(tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    with pytest.raises(CheckpointError, match=r"x\.safetensors is not a calibration"):
        Calibration.load(tmp_path / "x.safetensors")
