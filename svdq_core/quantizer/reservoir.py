"""Which rows of a long stream are kept: a uniform sample of bounded size."""

import heapq
import math

import numpy

_LEAST_SHARE = 2.0**-24


class Reservoir:
    """Every row gets a random priority, and the ``capacity`` rows with the highest stay (reservoir sampling).

    The same rows for the same seed and order, whatever they are made of: nothing here looks at them. It is asked at
    every call of a layer that is watched, by the thread that launches the layer's kernels, so of few rows the
    decisions are made in plain Python, which takes a quarter of the time of as many small operations on arrays.
    """

    def __init__(self, capacity: int, seed: int):
        self.capacity = capacity
        self._random = Random(seed)
        self._priority = numpy.empty(0, dtype=numpy.float32)
        self._lowest: list[tuple[float, int]] | None = None  # a heap of (priority, place) where the sample is full

    @property
    def priority(self) -> numpy.ndarray:
        """(R,) float32 of the rows that are kept, by their place; to be replaced as a whole or left alone."""
        return self._priority

    @priority.setter
    def priority(self, priority: numpy.ndarray) -> None:
        self._priority, self._lowest = priority, None

    def choose(self, count: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Which of so many new rows are kept, and where in the sample.

        Priorities are uniform, but only rows above the lowest kept one matter. The gaps between such rows are
        geometric, so that few random numbers are drawn once many rows were seen.
        """
        if len(self._priority) < self.capacity:
            priority = self._random.uniform(count)
            new = (-priority).argsort(kind="stable")[: self.capacity]
            priority = priority[new]
        else:
            share = min(max(1 - self._heap()[0][0], _LEAST_SHARE), 1 - _LEAST_SHARE)
            most = int(count * share + 8 * (count * share) ** 0.5 + 16)  # eight standard deviations above the mean
            new = numpy.array(self._random.successes(share, most, count), dtype=numpy.int64)
            priority = 1 - numpy.float32(share) * self._random.uniform(len(new))
        entering, places = self.admit(priority)
        return new[entering], places

    def admit(self, priority: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Which rows of these priorities are among the highest, and whose places they take."""
        if len(self._priority) == self.capacity and 8 * len(priority) <= self.capacity:
            found = self._admit_few(priority.tolist())
            if found is not None:
                return found
        before = len(self._priority)
        ranks = numpy.concatenate((self._priority, priority))
        stays = numpy.ones(len(ranks), dtype=bool)
        if len(ranks) > self.capacity:
            stays[ranks.argpartition(-self.capacity)[: -self.capacity]] = False
        entering, left = stays[before:].nonzero()[0], (~stays[:before]).nonzero()[0]
        places = numpy.concatenate((left, numpy.arange(before, before + len(entering) - len(left))))
        kept = numpy.concatenate((self._priority, numpy.empty(len(entering) - len(left), dtype=numpy.float32)))
        kept[places] = priority[entering]
        self.priority = kept
        return entering, places

    def _admit_few(self, priority: list[float]) -> tuple[numpy.ndarray, numpy.ndarray] | None:
        """The same for a full sample; None where it is a tie, which the sort above breaks."""
        heap, entering, left = self._heap(), [], []
        value = lowest = -1.0
        for value, row in sorted(zip(priority, range(len(priority)), strict=True), reverse=True):
            if value <= heap[0][0]:
                break
            entering.append(row)
            lowest, place = heapq.heappop(heap)
            left.append(place)
        if heap[0][0] in (value, lowest):
            self._lowest = None
            return None
        entering.sort()
        left.sort()
        for row, place in zip(entering, left, strict=True):
            heapq.heappush(heap, (priority[row], place))
            self._priority[place] = priority[row]
        return numpy.array(entering, dtype=numpy.int64), numpy.array(left, dtype=numpy.int64)

    def _heap(self) -> list[tuple[float, int]]:
        if self._lowest is None:
            self._lowest = list(zip(self._priority.tolist(), range(len(self._priority)), strict=True))
            heapq.heapify(self._lowest)
        return self._lowest


class Random:
    """Draws as torch's generator on the CPU makes them of the same seed.

    But without letting other threads run meanwhile: the one that puts rows down would keep the one that launches
    waiting.
    """

    def __init__(self, seed: int):
        self._words = numpy.random.MT19937()  # the same Mersenne twister
        self._words.state = numpy.random.RandomState(seed & 0xFFFFFFFF).get_state(legacy=False)

    def uniform(self, count: int) -> numpy.ndarray:
        """(count,) float32 in [0, 1)."""
        return (self._words.random_raw(count) & 0xFFFFFF).astype(numpy.float32) * numpy.float32(2.0**-24)

    def successes(self, share: float, draws: int, count: int) -> list[int]:
        """Which of ``count`` trials succeed, each with probability ``share``, in (0, 1).

        By the distances between them, of which ``draws`` are drawn, however many are needed.
        """
        words = self._words.random_raw(2 * draws).tolist()
        log_failure, found, trial = math.log1p(-share), [], -1
        for high, low in zip(words[::2], words[1::2], strict=True):
            uniform = max((high << 32 | low) & (2**53 - 1), 1) * 2.0**-53
            trial += max(math.ceil(math.log(uniform) / log_failure), 1)
            if trial >= count:
                break
            found.append(trial)
        return found
