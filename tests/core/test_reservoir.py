"""Which rows calibration keeps."""

import numpy
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from svdq_core.quantizer.reservoir import Random, Reservoir


def test_draws_are_uniform_and_the_same_for_a_seed():
    found = [Random(seed).priorities(4000) for seed in (3, 3, 2**40 + 17)]
    assert (found[0] == found[1]).all() and (found[0] != found[2]).any()
    assert found[0].min() >= 0 and found[0].max() < 1
    tenths = numpy.histogram(found[0], 10, (0, 1))[0]  # 400 expected each, standard deviation 19
    assert abs(tenths - 400).max() < 5 * 19


@pytest.mark.parametrize("share", [1e-6, 0.01, 0.2])
def test_successes_are_as_many_trials_apart_and_their_priorities_as_high(share):
    distances, priority = Random(1).successes(share, 20_000)
    assert distances.min() >= 1
    assert abs(distances.mean() * share - 1) < 5 / 20_000**0.5  # the standard deviation is about the mean
    assert abs((distances <= numpy.log(2) / share).mean() - 0.5) < 5 * 0.5 / 20_000**0.5 + share
    height = (priority.astype(float) - (1 - share)) / share
    assert height.min() > -0.1 and height.max() < 1.1  # a share of a millionth is 17 steps of float32
    assert abs(height.mean() - 0.5) < 5 * 0.29 / 20_000**0.5 + 0.01


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


def test_rows_that_would_give_way_are_not_taken_where_their_number_is_known():
    for expected, least, most in ((0, 5, 8), (100_000, 1, 1.5)):
        reservoir = Reservoir(512, seed=0, expected=expected)
        entered = sum(len(reservoir.choose(1000)[0]) for _ in range(100))
        assert len(reservoir.priority) == 512
        assert least * 512 <= entered <= most * 512


def test_a_sample_of_a_known_number_is_fair():
    """Every row as likely, and the same priorities as where nothing is known."""
    kept, lowest = numpy.zeros(2000), []
    for seed in range(400):
        reservoir, sample = Reservoir(10, seed, expected=2000), numpy.zeros(10, dtype=int)
        for start in range(0, 2000, 250):
            new, places = reservoir.choose(250)
            sample[places] = start + new
        assert len(reservoir.priority) == 10
        kept[sample] += 1
        lowest.append(reservoir.priority.min())
    by_batch = kept.reshape(8, 250).sum(1)  # 500 expected each, standard deviation 21
    assert abs(by_batch - 500).max() < 5 * 21 and kept.max() <= 12
    # Of 2000 uniform numbers the tenth largest is 1 - 10 / 2001 in the mean, with a standard deviation of 0.0016.
    assert abs(numpy.mean(lowest) - (1 - 10 / 2001)) < 4 * 0.0016 / 400**0.5


def test_fewer_rows_than_expected_leave_room():
    reservoir = Reservoir(64, seed=0, expected=100_000)
    entered = sum(len(reservoir.choose(1000)[0]) for _ in range(20))
    assert 10 < len(reservoir.priority) == entered < 64
    assert (reservoir.priority > 1 - 2 * 64 / 100_000).all()
