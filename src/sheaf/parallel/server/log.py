"""What a run's shards and workers agree on, what a line of a shard's log holds, and who has sent what."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sheaf.parallel.server.frame import Kind
from sheaf.parallel.server.late import PLAIN
from sheaf.parallel.server.places import Arena

_KEPT_CLOCKS = 3  # finished clocks of which losses are still known
_MOST_CLOCKS = 1024  # that are known at all, where a worker is far behind the others
_TOLD = ("losses", "samples", "seconds")  # what others may ask for, of what comes with a push


@dataclass(frozen=True)
class Terms:
    """What all shards and workers of a run agree on.

    ``staleness`` in clocks, None: unbounded; ``late`` one of ``plans.server.LATE``; ``dropped_beyond`` updates a
    gradient is not applied; ``clip`` the largest global norm of a clock's gradient, at staleness 0; ``lease_seconds``
    without a sign of life end a worker's membership, and a silent seat's. A step's microbatches, ``lent`` at most, are
    lent to workers one by one, at staleness 0; 0: every worker has a share of its own. ``place``: these
    shards serve that place in replicas of several workers, each of which is one worker here (None: of one worker each).
    """

    workers: int
    shards: int
    staleness: int | None = 0
    late: str = PLAIN
    dropped_beyond: int | None = None
    clip: float | None = None
    lease_seconds: float = 10.0
    lent: int = 0
    place: int | None = None

    @property
    def exact(self) -> bool:
        """Whether each update is the sum over all workers."""
        return self.staleness == 0

    @property
    def sums(self) -> bool:
        """Whether a backup is given each clock's sum in place of every push: none of a clock counts alone."""
        return self.exact and not self.lent

    def forwards(self, kind: Kind) -> bool:
        """Whether a backup is given such a line of the log."""
        return not (self.sums and kind in (Kind.PUSH, Kind.COMMIT))

    @property
    def deals(self) -> bool:
        """Whether shard 0 says what each worker computes, that of the first place for all: they go by own clocks."""
        return not self.exact and not self.place

    @property
    def together(self) -> bool:
        """Whether a gradient is pushed at several places, by workers that go by clocks of their replica."""
        return not self.exact and self.place is not None


@dataclass(slots=True)
class Entry:
    """One line of the log; once there, nobody changes it. ``base`` is the version on which a gradient was computed."""

    kind: Kind
    worker: int = -1
    incarnation: int = 0
    sequence: int = 0
    clock: int = 0
    base: int = 0
    meta: dict[str, Any] = field(default_factory=dict[str, Any])
    arena: Arena | None = None


@dataclass
class Member:
    """What a shard knows of one worker: that nothing of it is applied twice is decided by this alone."""

    incarnation: int = 0
    fenced: int = 0  # incarnations up to this one are not heard any more
    committed: int = 0  # sequence of the last gradient that counts
    abandoned: int = 0  # that of the last one that is not to be applied
    staged: Entry | None = None
    history: dict[int, int] = field(default_factory=dict[int, int])  # committed, by earlier incarnations
    left: bool = False  # it has said good-bye, and will not come again


class Fenced(Exception):
    """The message is of an incarnation that was given up."""


def is_good_bye(leaving: Entry) -> bool:
    """Whether a worker leaves by itself, and was not given up."""
    return not leaving.meta.get("given_up")


def settles(entry: Entry) -> bool:
    """Whether shards agreed that a gradient counts whose worker was given up."""
    return entry.kind == Kind.COMMIT and bool(entry.meta.get("settled"))


def losses(told: Iterable[dict[str, Any]]) -> list[tuple[int, float, float]]:
    """All microbatches that were told of, in order, with their losses' sums and weights."""
    return sorted((index, total, weight) for each in told for index, total, weight in each.get("losses", ()))


def told_by(pushed: Entry) -> dict[str, Any]:
    """What a push told, for others to ask for; not which parameters it has, of which there may be many."""
    return {name: pushed.meta[name] for name in _TOLD if name in pushed.meta}


def forget(told: dict[int, Any], slowest: int) -> None:
    """Of what was told by clock, what all have long behind them; and the oldest, where one is far behind."""
    for clock in [clock for clock in told if clock < slowest - _KEPT_CLOCKS]:
        del told[clock]
    while len(told) > _MOST_CLOCKS:
        del told[next(iter(told))]


def used(entry: Entry) -> dict[str, Tensor]:
    """The gradients of parameters that had one."""
    assert entry.arena is not None
    names: Sequence[int] = entry.meta.get("used", ())
    pieces = entry.arena.form.pieces
    return {pieces[place].name: entry.arena.views[pieces[place].name] for place in names}
