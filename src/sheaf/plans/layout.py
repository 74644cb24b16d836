"""Which slice of which tensor each worker holds: parameters laid end to end, cut into shards.

The executors move these slices, the memory estimate counts them, and checkpoints name them: one definition.
"""

import heapq
import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby


@dataclass(frozen=True)
class Held:
    """A parameter as far as layout cares: its name, how many numbers, of what dtype, and whether it is trained."""

    name: str
    num_elements: int
    dtype: str
    trained: bool = True


@dataclass(frozen=True)
class Piece:
    """Elements ``start`` to ``stop`` of a parameter, at ``offset`` within a worker's shard."""

    name: str
    start: int
    stop: int
    offset: int

    @property
    def num_elements(self) -> int:
        """How many numbers it holds."""
        return self.stop - self.start


@dataclass(frozen=True)
class Flat:
    """Parameters of one dtype laid end to end, and cut into one shard for each worker.

    Shards are of one length, which padding makes, or in proportion to ``weights`` (one per worker) that differ.
    """

    unit: str
    parameters: tuple[Held, ...]
    workers: int
    weights: tuple[int, ...] = ()

    @property
    def num_elements(self) -> int:
        """Numbers in it, without padding."""
        return sum(parameter.num_elements for parameter in self.parameters)

    @cached_property
    def sizes(self) -> tuple[int, ...]:
        """Numbers in each worker's shard, padding included.

        >>> held = (Held("a", 10, "float32"),)
        >>> Flat("block", held, 3).sizes, Flat("block", held, 3, (3, 1, 2)).sizes
        ((4, 4, 4), (5, 2, 3))
        """
        if len(set(self.weights)) > 1:
            return apportion(self.num_elements, self.weights)
        return (-(-self.num_elements // self.workers),) * self.workers

    @property
    def padded_elements(self) -> int:
        """Numbers in all shards together."""
        return sum(self.sizes)

    def start(self, worker: int) -> int:
        """Where a worker's shard begins."""
        return sum(self.sizes[:worker])

    @property
    def offsets(self) -> dict[str, int]:
        """Where each parameter begins."""
        offsets: dict[str, int] = {}
        position = 0
        for parameter in self.parameters:
            offsets[parameter.name] = position
            position += parameter.num_elements
        return offsets

    def pieces(self, worker: int) -> tuple[Piece, ...]:
        """What of which parameter lies in a worker's shard.

        >>> flat = Flat("block", (Held("a", 3, "float32"), Held("b", 4, "float32")), workers=2)
        >>> flat.pieces(0), flat.pieces(1)[0].start
        ((Piece(name='a', start=0, stop=3, offset=0), Piece(name='b', start=0, stop=1, offset=3)), 1)
        """
        low, high = self.start(worker), self.start(worker + 1)
        found: list[Piece] = []
        for name, begin in self.offsets.items():
            size = next(parameter.num_elements for parameter in self.parameters if parameter.name == name)
            start, stop = max(begin, low), min(begin + size, high)
            if start < stop:
                found.append(Piece(name, start - begin, stop - begin, start - low))
        return tuple(found)


def flats(units: Iterable[tuple[str, Sequence[Held]]], workers: int, weights: tuple[int, ...] = ()) -> tuple[Flat, ...]:
    """One flat per unit, dtype and trained or frozen; every parameter is in exactly one."""
    made: list[Flat] = []
    for unit, parameters in units:
        kinds = sorted({(parameter.dtype, parameter.trained) for parameter in parameters})
        for dtype, trained in kinds:
            chosen = tuple(held for held in parameters if (held.dtype, held.trained) == (dtype, trained))
            made.append(Flat(unit, chosen, workers, weights))
    return tuple(made)


def kept_whole(unit_bytes: int, bucket_bytes: int) -> bool:
    """Whether ZeRO-3 keeps a block's parameters whole for the step: under a 32nd of a bucket, latency is all there is.

    >>> kept_whole(100_000, 8 * 2**20), kept_whole(300_000, 8 * 2**20)
    (True, False)
    """
    return unit_bytes * 32 < bucket_bytes


def buckets(parameters: Sequence[Held], bytes_of: dict[str, int], bucket_bytes: int) -> tuple[tuple[Held, ...], ...]:
    """Trained parameters in reverse order (as backward makes their gradients), grouped to about ``bucket_bytes``.

    A bucket holds one dtype. The first is a quarter of the size, so that communication starts early.

    >>> held = [Held(name, 100, "float32") for name in "abcd"]
    >>> [[p.name for p in bucket] for bucket in buckets(held, {"float32": 4}, 800)]
    [['d'], ['c', 'b'], ['a']]
    """
    grouped: list[tuple[Held, ...]] = []
    reverse = [parameter for parameter in reversed(parameters) if parameter.trained]
    for dtype, same in groupby(reverse, key=lambda parameter: parameter.dtype):
        current: list[Held] = []
        size = 0
        for parameter in same:
            limit = bucket_bytes if grouped else bucket_bytes // 4
            grown = size + parameter.num_elements * bytes_of[dtype]
            if current and grown > limit:
                grouped.append(tuple(current))
                current, grown = [], parameter.num_elements * bytes_of[dtype]
            current.append(parameter)
            size = grown
        if current:
            grouped.append(tuple(current))
    return tuple(grouped)


def apportion(count: int, weights: Sequence[int | float]) -> tuple[int, ...]:
    """``count`` microbatches among workers in proportion to ``weights``, by largest remainder.

    >>> apportion(16, [11, 5]), apportion(7, [1, 1, 1]), apportion(2, [1, 1, 1])
    ((11, 5), (3, 2, 2), (1, 1, 0))
    """
    if len(set(weights)) == 1 and weights[0]:  # the same, much faster for many
        each, more = divmod(count, len(weights))
        return (each + 1,) * more + (each,) * (len(weights) - more)
    total = sum(weights)
    exact = [count * weight / total for weight in weights]
    shares = [math.floor(part + 1e-9) for part in exact]
    by_remainder = sorted(range(len(weights)), key=lambda worker: (shares[worker] - exact[worker], worker))
    for worker in by_remainder[: count - sum(shares)]:
        shares[worker] += 1
    return tuple(shares)


def soonest(count: int, seconds: Sequence[float], begins: Sequence[float] = ()) -> tuple[int, ...]:
    """``count`` microbatches among workers that need ``seconds`` for one, so that the last is done soonest.

    Each goes to the worker that would be done with it first, which is best for microbatches of one size. ``begins``:
    when each begins with its first, in seconds; together where not given.

    >>> soonest(16, (1.0, 2.2)), soonest(16, (1.0, 2.2), (0.5, 2.0)), soonest(4, (1.0, 9.0))
    ((11, 5), (12, 4), (4, 0))
    """
    counts = [0] * len(seconds)
    done = [(begin + each, rank) for rank, (begin, each) in enumerate(zip(begins or counts, seconds, strict=True))]
    heapq.heapify(done)
    for _ in range(count):
        when, rank = heapq.heappop(done)
        counts[rank] += 1
        heapq.heappush(done, (when + seconds[rank], rank))
    return tuple(counts)


def soonest_for_all(count: int, seconds: Sequence[float], begins: Sequence[float] = ()) -> tuple[int, ...]:
    """As ``soonest``, but nobody goes without while there are enough: one comes from those who have most.

    >>> soonest_for_all(4, (1.0, 9.0)), soonest_for_all(1, (1.0, 9.0))
    ((3, 1), (1, 0))
    """
    counts = soonest(count, seconds, begins)
    return lifted(counts, 1) if count >= len(seconds) else counts


def lifted(counts: Sequence[int], least: int) -> tuple[int, ...]:
    """The same sum, with at least so many for each: taken from those who have most.

    >>> lifted((7, 1, 0), 1)
    (6, 1, 1)
    """
    found = list(counts)
    for place, count in enumerate(found):
        for _ in range(least - count):
            found[found.index(max(found))] -= 1
            found[place] += 1
    return tuple(found)


def left_to_others(mine: float, everyone: Iterable[float]) -> int:
    """How many of the last microbatches a worker leaves to others, who are sooner done with them than it with one more.

    It needs so many seconds for ``mine``, each of ``everyone`` as many as given; one that is faster is on average
    half-way through what it has. The fastest leaves none.

    >>> everyone = (1.0, 1.4, 2.2, 4.0)
    >>> [left_to_others(mine, everyone) for mine in everyone]
    [0, 0, 2, 6]
    """
    return sum(max(0, math.ceil(mine / each - 0.5) - 1) for each in everyone if each < mine)


def in_turn(count: int, seconds: Sequence[float]) -> tuple[int, ...]:
    """Who takes each of ``count`` equal pieces of work in turn, when a worker needs ``seconds`` for one.

    Each goes to the worker that would be done with it first. Nobody goes without while there are enough.

    >>> in_turn(4, (1.0, 1.0)), in_turn(6, (1.0, 2.0)), in_turn(4, (1.0, 9.0))
    ((0, 1, 0, 1), (0, 0, 1, 0, 0, 1), (0, 0, 0, 1))
    """
    done = [(each, rank) for rank, each in enumerate(seconds)]
    heapq.heapify(done)
    taken: list[int] = []
    for _ in range(count):
        when, rank = heapq.heappop(done)
        taken.append(rank)
        heapq.heappush(done, (when + seconds[rank], rank))
    if count >= len(seconds):
        for idle in set(range(len(seconds))) - set(taken):
            busiest = max(taken, key=taken.count)
            taken[len(taken) - 1 - taken[::-1].index(busiest)] = idle
    return tuple(taken)


def fragments(parameters: Sequence[tuple[str, int, str]], count: int) -> tuple[tuple[str, ...], ...]:
    """Parameters (name, numbers, dtype) in order, cut into about ``count`` runs of one dtype and much the same size.

    >>> fragments([("a", 4, "f"), ("b", 4, "f"), ("c", 8, "f")], 2)
    (('a', 'b'), ('c',))
    """
    total = sum(size for _, size, _ in parameters)
    made: dict[tuple[str, int], list[str]] = {}
    before = 0
    for name, size, dtype in parameters:
        place = min(count - 1, (before + size // 2) * count // max(1, total))
        made.setdefault((dtype, place), []).append(name)
        before += size
    return tuple(tuple(names) for names in made.values())
