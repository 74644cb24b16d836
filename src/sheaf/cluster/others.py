"""What other programs take of the cores on which workers measure: what is measured meanwhile is of a busy machine."""

import os
import time
from dataclasses import dataclass

import psutil

from sheaf.cluster.assemble import BUSY_CORES
from sheaf.cluster.machine import host_name
from sheaf.cluster.measuring import from_everyone

GLANCE_SECONDS = 0.2


@dataclass(frozen=True)
class Moment:
    """Seconds so far: on the wall, of each core while it was busy, of this process on all cores."""

    wall_seconds: float
    busy_seconds: dict[int, float]
    own_seconds: float

    def to(self, later: "Moment") -> "Moment":
        """What passed until another moment."""
        busy = {core: seconds - self.busy_seconds.get(core, seconds) for core, seconds in later.busy_seconds.items()}
        return Moment(later.wall_seconds - self.wall_seconds, busy, later.own_seconds - self.own_seconds)


def now() -> Moment:
    """This moment, with the cores that this process may use."""
    times = dict(enumerate(psutil.cpu_times(percpu=True)))
    mine = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else times.keys()
    # Interrupts are left out: messages between workers make them. What a hypervisor gives to others is not.
    kinds = ("user", "nice", "system", "steal")
    busy = {core: sum(getattr(times[core], kind, 0.0) for kind in kinds) for core in times.keys() & mine}
    return Moment(time.perf_counter(), busy, time.process_time())


def taken(spans: list[Moment], threads: int) -> float:
    """Cores that other programs took, of those that the workers of one host wanted, each so many.

    ``spans`` is what passed while the workers measured, as each of them saw it.

    >>> alone = [Moment(2.0, {0: 1.5, 1: 2.0}, 3.0)]
    >>> taken(alone, 2), taken(alone, 1)
    (0.25, 0.0)
    >>> taken([Moment(2.0, {0: 2.0, 1: 2.0}, 1.5), Moment(2.0, {0: 2.0, 1: 2.0}, 1.5)], 1)
    0.5
    """
    busy: dict[int, float] = {}
    for span in spans:
        for core, seconds in span.busy_seconds.items():
            busy[core] = max(busy.get(core, 0.0), seconds / span.wall_seconds if span.wall_seconds else 0.0)
    own = sum(span.own_seconds / span.wall_seconds for span in spans if span.wall_seconds)
    free = max(0, len(busy) - len(spans) * threads)
    return max(0.0, sum(busy.values()) - own - free)


def taken_since(start: Moment, threads: int) -> float:
    """Cores that other programs took since then, of those that the workers of this host wanted (collective)."""
    span = start.to(now())
    told = {
        "host": host_name(),
        "wall": span.wall_seconds,
        "own": span.own_seconds,
        "busy": [*span.busy_seconds.items()],
    }
    spans = [
        Moment(one["wall"], {int(core): seconds for core, seconds in one["busy"]}, one["own"])
        for one in from_everyone(told)
        if one["host"] == host_name()
    ]
    return taken(spans, threads)


def disturbed(cores: float) -> bool:
    """Whether what was measured while others took so many cores says more of them than of the machine."""
    return cores > BUSY_CORES


def quiet() -> bool:
    """Whether the cores that this process may use are quiet just now, so that measuring again is worth it."""
    start = now()
    time.sleep(GLANCE_SECONDS)
    span = start.to(now())
    return not disturbed(taken([span], len(span.busy_seconds)))
