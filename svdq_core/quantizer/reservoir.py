"""Which rows of a long stream are kept: a uniform sample of bounded size."""

import heapq
import math

import numpy

_LEAST_SHARE, _SMALL_SHARE = 2.0**-24, 0.25
_DRAWN_TOGETHER = 256
_NONE = numpy.empty(0, dtype=numpy.int64), numpy.empty(0, dtype=numpy.float32)


class Reservoir:
    """Every row gets a random priority, and the ``capacity`` rows with the highest stay (reservoir sampling).

    The same rows for the same seed and order, whatever they are made of: nothing here looks at them. It is asked at
    every call of a layer that is watched, by the thread that launches the layer's kernels, so what can be is drawn
    ahead, and few rows are told apart in plain Python, which is faster than many small operations on arrays.

    Args:
        capacity: the most rows to keep.
        seed: of the priorities.
        expected: how many rows will come, if somebody knows; 0 if not. Then rows below the priority that so many
            will leave as the lowest are not kept in the meantime, and far fewer have to give way. The rest is the
            same: after fewer rows the sample may have room left, after more it is as good.
    """

    def __init__(self, capacity: int, seed: int, expected: int = 0):
        self.capacity = capacity
        # Of the rows, those that come into question: the priority of others is too low, and is never drawn. What is
        # expected leaves eight standard deviations more than have to be kept.
        share = (capacity + 8 * capacity**0.5) / expected if expected else 1
        self._share = share if share < _SMALL_SHARE else 1.0
        self._seen = 0
        self._coming, self._their_priority = _NONE  # of the rows to come, the next in question
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
        """Which of so many new rows are kept, and where in the sample."""
        if len(self._priority) == self.capacity:
            share = min(max(1 - self._heap()[0][0], _LEAST_SHARE), 1 - _LEAST_SHARE)
            if share < self._share / 2:  # fewer come into question by now
                self._share = share
                self._coming, self._their_priority = _NONE
        if self._share == 1:
            priority = self._random.priorities(count)
            new = (-priority).argsort(kind="stable")[: self.capacity]
            priority = priority[new]
        else:
            new, priority = self._in_question(count)
        self._seen += count
        entering, places = self.admit(priority)
        return new[entering], places

    def _in_question(self, count: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Of so many new rows those with high priorities, and these."""
        end = self._seen + count
        while not len(self._coming) or self._coming[-1] < end:
            last = self._coming[-1] if len(self._coming) else self._seen - 1
            distances, priority = self._random.successes(self._share, _DRAWN_TOGETHER)
            self._coming = numpy.concatenate((self._coming, last + distances.cumsum()))
            self._their_priority = numpy.concatenate((self._their_priority, priority))
        now = int(self._coming.searchsorted(end))
        rows, priority = self._coming[:now] - self._seen, self._their_priority[:now]
        self._coming, self._their_priority = self._coming[now:], self._their_priority[now:]
        return rows, priority

    def admit(self, priority: numpy.ndarray) -> tuple[numpy.ndarray, numpy.ndarray]:
        """Which rows of these priorities are among the highest, and whose places they take."""
        before = len(self._priority)
        if before + len(priority) <= self.capacity:
            self.priority = numpy.concatenate((self._priority, priority))
            return numpy.arange(len(priority)), numpy.arange(before, len(self._priority))
        if before == self.capacity and 8 * len(priority) <= self.capacity:
            found = self._admit_few(priority.tolist())
            if found is not None:
                return found
        ranks = numpy.concatenate((self._priority, priority))
        stays = numpy.ones(len(ranks), dtype=bool)
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
    """Draws from the words of a Philox generator: the same of every numpy.

    Torch's would let other threads run meanwhile: the one that puts rows down would keep the one that launches
    kernels waiting.
    """

    def __init__(self, seed: int):
        self._words = numpy.random.Philox(key=seed)  # has no state to be made of the seed, which takes most time

    def priorities(self, count: int) -> numpy.ndarray:
        """(count,) float32, uniform in [0, 1)."""
        return (self._words.random_raw(count) >> numpy.uint64(40)).astype(numpy.float32) * numpy.float32(2.0**-24)

    def successes(self, share: float, count: int) -> tuple[numpy.ndarray, numpy.ndarray]:
        """(count,) int64, the distances between rows whose priority is in the highest ``share`` of [0, 1); theirs."""
        uniform = ((self._words.random_raw(2 * count) >> numpy.uint64(11)) + numpy.uint64(1)) * 2.0**-53  # (0, 1]
        distances = (numpy.log(uniform[:count]) / math.log1p(-share)).astype(numpy.int64) + 1
        return distances, (1 - share * uniform[count:]).astype(numpy.float32)
