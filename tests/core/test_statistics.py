"""Calibration statistics: ranges, a fair sample, files."""

import pytest
import torch
from safetensors.torch import load_file, save_file

from svdq_core.errors import CheckpointError, LayerError
from svdq_core.formats.safetensors_file import SafetensorsFile
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
    assert torch.allclose(layer.second_moment.double(), rows.double().square().mean(0), rtol=1e-6)
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


def test_each_kept_row_keeps_its_priority():
    calibration, before = Calibration(rows=8), {}
    for start in range(0, 240, 40):  # bf16 holds integers up to 256 exactly
        calibration.observe("a", torch.arange(start, start + 40.0)[:, None].expand(40, 64))
        layer = calibration.layers["a"]
        now = dict(zip(layer.sample[:, 0].tolist(), layer.priority.tolist(), strict=True))
        assert len(now) == 8 and all(0 <= priority <= 1 for priority in now.values())
        assert all(now[row] == before[row] for row in now.keys() & before.keys())
        assert all(before[row] <= min(now.values()) for row in before.keys() - now.keys()), "the lowest go"
        before = now


def test_priorities_are_uniform_however_rows_arrive():
    # Of 400 uniform numbers the eighth largest is 1 - 8 / 401 in the mean, with a standard deviation of 0.007.
    eighths = []
    for seed in range(300):
        calibration = Calibration(seed, rows=8)
        for _ in range(10):
            calibration.observe("a", torch.zeros(40, 64))
        eighths.append(float(calibration.layers["a"].priority.min()))
    assert abs(sum(eighths) / 300 - (1 - 8 / 401)) < 4 * 0.007 / 300**0.5


def test_a_merged_sample_is_of_all_rows_whatever_the_sizes():
    large, small = Calibration(seed=1, rows=64), Calibration(seed=2, rows=16)
    large.observe("a", torch.zeros(1000, 64))
    small.observe("a", torch.ones(1000, 64))
    large.merge(small)
    assert large.rows == 16 and len(large.layers["a"].sample) == 16
    assert 2 <= large.layers["a"].sample[:, 0].sum() <= 14  # 8 expected, standard deviation 2
    assert torch.allclose(large.layers["a"].second_moment, torch.full((64,), 0.5))


def test_a_sample_that_ended_short_is_merged_as_far_as_it_stands():
    """Rows were expected that did not come: the rows that it has are the best of all that it saw."""
    short, full = Calibration(seed=1, rows=256, calls=10), Calibration(seed=2, rows=256)
    short.observe("a", torch.zeros(10_000, 64))
    full.observe("a", torch.ones(10_000, 64))
    kept = len(short.layers["a"].sample)
    assert 10 < kept < 100
    short.merge(full)
    assert len(short.layers["a"].sample) == kept and short.layers["a"].count == 20_000
    assert 2 < short.layers["a"].sample[:, 0].sum() < kept - 2


def test_calibrations_of_different_models_are_not_merged():
    one, other = Calibration(), Calibration()
    one.observe("a", torch.zeros(8, 64))
    other.observe("b", torch.zeros(8, 64))
    other.observe("a", torch.zeros(8, 128))
    with pytest.raises(LayerError, match=r"layer a has 64 .* 128"):
        one.merge(other)
    assert list(one.layers) == ["a"] and one.layers["a"].count == 8


def test_a_sample_made_in_inference_mode_can_be_merged_outside_of_it():
    with torch.inference_mode():
        one, other = Calibration(seed=1, rows=16), Calibration(seed=2, rows=16)
        for calibration in (one, other):
            calibration.observe("a", torch.rand(100, 64))
    one.merge(other)
    assert one.layers["a"].count == 200


def test_files_from_before_second_moments_serve_on(tmp_path):
    calibration = Calibration(rows=256)
    calibration.observe("a", torch.randn(256, 64))
    calibration.save(tmp_path / "new.safetensors")
    tensors = load_file(tmp_path / "new.safetensors")
    del tensors["a.square_sum"]
    save_file(tensors, tmp_path / "old.safetensors", SafetensorsFile(tmp_path / "new.safetensors").metadata)
    old = Calibration.load(tmp_path / "old.safetensors").layers["a"]
    assert torch.allclose(old.second_moment, calibration.layers["a"].second_moment, rtol=1e-2)


def test_the_digest_tells_calibrations_apart(tmp_path):
    calibration = Calibration()
    calibration.observe("a", torch.rand(100, 64))
    calibration.save(tmp_path / "c.safetensors")
    again = Calibration.load(tmp_path / "c.safetensors")
    assert again.digest() == calibration.digest()
    again.layers["a"].sample[3, 3] += 1
    assert again.digest() != calibration.digest()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [256, 3080])
@pytest.mark.parametrize(("kept", "calls"), [(64, 0), (64, 3), (600, 0)])
def test_a_device_keeps_the_same_rows(dtype, width, kept, calls):
    random = torch.Generator().manual_seed(0)
    batches = [torch.randn((rows, width), generator=random).to(dtype) for rows in (3000, 1, 77, 4608)]
    found = {}
    for device in ("cpu", "cuda"):
        calibration = Calibration(rows=kept, calls=calls)
        for batch in batches:
            for layer in range(12):
                calibration.observe(str(layer), batch.to(device))
        calibration.check(calibration.layers)
        found[device] = calibration
    for name, layer in found["cpu"].layers.items():
        other = found["cuda"].layers[name]
        assert torch.equal(layer.sample, other.sample) and torch.equal(layer.minimum, other.minimum.cpu())
        assert torch.equal(layer.maximum, other.maximum.cpu())
        assert torch.allclose(layer.second_moment, other.second_moment.cpu(), rtol=1e-5)


@pytest.mark.gpu
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_device_does_not_forget_bad_inputs(dtype, value):
    calibration = Calibration(rows=64)
    for bad in (False, True, False):
        x = torch.randn((500, 320), device="cuda").to(dtype)
        x[321, 5] = value if bad else 0
        calibration.observe("a", x)
    with pytest.raises(LayerError, match="layer a got NaN or infinite"):
        calibration.check(["a"])
