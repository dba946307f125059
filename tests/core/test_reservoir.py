"""Which rows calibration keeps."""

import numpy
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from svdq_core.quantizer.reservoir import Random, Reservoir


@pytest.mark.parametrize("seed", [0, 3, 2**40 + 17])
def test_draws_are_torch_s(seed):
    random, torch_s = Random(seed), torch.Generator().manual_seed(seed)
    for count, share in ((1000, 0.9), (7, 0.01), (0, 0.5), (300, 1e-4)):
        assert torch.equal(torch.from_numpy(random.uniform(count)), torch.rand(count, generator=torch_s))
        gaps = torch.empty(count, dtype=torch.float64).geometric_(share, generator=torch_s)
        trials = gaps.cumsum(0) - 1
        assert random.successes(share, count, 500) == trials[trials < 500].tolist()


def test_a_row_of_the_lowest_priority_there_is_gives_way():
    reservoir = Reservoir(4, seed=0)
    reservoir.choose(4)
    reservoir.priority = numpy.array([0, 0.5, 0.5, 0.5], dtype=numpy.float32)
    _, places = reservoir.choose(4)
    assert 0 in places


# Few different values, so that there are ties.
priorities = st.lists(st.integers(0, 12).map(lambda i: i / 16), max_size=40)


@settings(deadline=None)
@given(st.integers(1, 24), st.lists(priorities, max_size=6))
def test_the_highest_stay_each_at_its_place(capacity, batches):
    reservoir, sample, seen = Reservoir(capacity, seed=0), {}, []
    for batch in batches:
        priority = numpy.array(batch, dtype=numpy.float32)
        entering, places = reservoir.admit(priority)
        assert len(set(places.tolist())) == len(places) == len(entering)
        assert (numpy.diff(entering) > 0).all()
        sample.update(zip(places.tolist(), priority[entering].tolist(), strict=True))
        seen += batch
        assert sorted(sample) == list(range(min(len(seen), capacity)))
        assert reservoir.priority.tolist() == [sample[place] for place in sorted(sample)]
        assert sorted(sample.values()) == sorted(seen)[-capacity:]


def test_few_rows_are_told_apart_as_many_are():
    """One after another, or all at once by sorting: the same rows, at the same places."""
    random = numpy.random.default_rng(0)
    quick, sorting = Reservoir(64, seed=0), Reservoir(64, seed=0)
    for count in [64, *random.integers(0, 9, size=200)]:
        priority = random.random(count, dtype=numpy.float32)
        found = quick.admit(priority)
        sorting._admit_few = lambda _: None
        for a, b in zip(found, sorting.admit(priority), strict=True):
            assert a.tolist() == b.tolist()
        assert quick.priority.tolist() == sorting.priority.tolist()
