"""How much stolen shares could gain beside a worker that stalls, were nothing else to cost time.

``python -m bench.stall_limits`` plays the stalls of ``bench.unequal`` (the same moments) against two workers that only
compute, and prints how many times faster than equal halves a step is, for each length of a step: with microbatches as
they are, each drawn when the one before is done, and with work that can be cut at will. Both must be awake when a step
ends.
"""

import random
import statistics
from collections.abc import Iterator
from itertools import islice

from bench.stalls import BETWEEN_SECONDS, STALL_SECONDS

STEPS = 4  # of a round
STEP_SECONDS = 1.0  # what half of a step's microbatches take, of the shorter steps
Stalls = list[tuple[float, float]]


def drawn(seed: int, count: int = 100) -> Stalls:
    """When a round's stalls begin and end."""

    def each() -> Iterator[tuple[float, float]]:
        moments, now = random.Random(seed), 0.0
        while True:
            now += moments.uniform(0, 2 * BETWEEN_SECONDS)
            yield now, now + STALL_SECONDS
            now += STALL_SECONDS

    return list(islice(each(), count))


def done(begin: float, seconds: float, stalls: Stalls) -> float:
    """When a worker that stalls has computed for so long; for no time: when it is awake."""
    for start, end in stalls:
        if end <= begin:
            continue
        if start > begin:
            if begin + seconds <= start:
                break
            seconds -= start - begin
        begin = end
    return begin + seconds


def equal(begin: float, microbatches: int, each: float, stalls: Stalls) -> float:
    """The end of a step of equal halves."""
    half = microbatches / 2 * each
    return max(begin + half, done(begin, half, stalls))


def stolen(begin: float, microbatches: int, each: float, stalls: Stalls) -> float:
    """The end of a step in which each worker draws a microbatch when it is done with the one before."""
    free = [begin, done(begin, 0.0, stalls)]
    for _ in range(microbatches):
        if free[0] <= free[1]:
            free[0] += each
        else:
            free[1] = done(free[1], each, stalls)
    return done(max(free), 0.0, stalls)


def limits(
    seeds: range, per_worker: int, step_seconds: float = STEP_SECONDS, *, finer: int = 50
) -> tuple[float, float]:
    """Medians over rounds of how many times faster stolen shares are: with whole microbatches, and with fine ones."""
    count = 2 * per_worker
    each = step_seconds / per_worker
    whole: list[float] = []
    fine: list[float] = []
    for seed in seeds:
        stalls = drawn(seed)
        ends = [0.0, 0.0, 0.0]
        for _ in range(STEPS):
            ends = [
                equal(ends[0], count, each, stalls),
                stolen(ends[1], count, each, stalls),
                stolen(ends[2], count * finer, each / finer, stalls),
            ]
        whole.append(ends[0] / ends[1])
        fine.append(ends[0] / ends[2])
    return statistics.median(whole), statistics.median(fine)


if __name__ == "__main__":
    from bench.unequal import LONGER, PER_WORKER, ROUNDS

    for longer, count in ((1, ROUNDS), (LONGER, ROUNDS // 4)):
        per_worker = longer * PER_WORKER
        for what, seeds in (("the rounds of the benchmark", range(1, count + 1)), ("200 others", range(100, 300))):
            whole, fine = limits(seeds, per_worker, longer * STEP_SECONDS)
            where = f"halves of {longer * STEP_SECONDS:g} s, {what}"
            print(f"{where}: {whole:.2f} with {2 * per_worker} microbatches, {fine:.2f} with work cut at will")
