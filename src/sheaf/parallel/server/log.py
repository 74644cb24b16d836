"""What a run's shards and workers agree on, what a line of a shard's log holds, and who has sent what."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sheaf.parallel.server.clock import Clocks
from sheaf.parallel.server.frame import Kind
from sheaf.parallel.server.late import PLAIN
from sheaf.parallel.server.places import Arena


@dataclass(frozen=True)
class Terms:
    """What all shards and workers of a run agree on.

    ``staleness`` in clocks, None: unbounded; ``late`` one of ``plans.server.LATE``; ``dropped_beyond`` updates a
    gradient is not applied; ``clip`` the largest global norm of a clock's gradient, at staleness 0; ``lease_seconds``
    without a sign of life end a worker's membership, and a silent seat's. A step's microbatches, ``lent`` at most, are
    lent to workers one by one, at staleness 0; 0: every worker has a share of its own. ``needed``: a worker is one
    of several that are a replica, and when it is given up the run ends, whatever the staleness.
    """

    workers: int
    shards: int
    staleness: int | None = 0
    late: str = PLAIN
    dropped_beyond: int | None = None
    clip: float | None = None
    lease_seconds: float = 10.0
    lent: int = 0
    needed: bool = False

    @property
    def exact(self) -> bool:
        """Whether each update is the sum over all workers."""
        return self.staleness == 0

    @property
    def deals(self) -> bool:
        """Whether shard 0 says what each worker computes: they go by their own clocks, and nobody needs another."""
        return not self.exact and not self.needed


@dataclass(slots=True)
class Entry:
    """One line of the log; nobody changes it. ``base`` is the version on which a gradient was computed."""

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


def missed(terms: Terms, left: Entry, clocks: Clocks) -> dict[str, Any] | None:
    """Why nobody goes on, when a worker leaves that was given up and that the others need; else None."""
    if terms.needed and left.meta.get("given_up") and left.worker in clocks.workers:
        return {"why": "worker", "worker": left.worker, "clock": clocks.of(left.worker)}
    return None


def is_good_bye(leaving: Entry) -> bool:
    """Whether a worker leaves by itself, and was not given up."""
    return not leaving.meta.get("given_up")


def settles(entry: Entry) -> bool:
    """Whether shards agreed that a gradient counts whose worker was given up."""
    return entry.kind == Kind.COMMIT and bool(entry.meta.get("settled"))


def losses(told: Iterable[dict[str, Any]]) -> list[tuple[int, float, float]]:
    """All microbatches that were told of, in order, with their losses' sums and weights."""
    return sorted((index, total, weight) for each in told for index, total, weight in each.get("losses", ()))


def used(entry: Entry) -> dict[str, Tensor]:
    """The gradients of parameters that had one."""
    assert entry.arena is not None
    names: Sequence[int] = entry.meta.get("used", ())
    pieces = entry.arena.form.pieces
    return {pieces[place].name: entry.arena.views[pieces[place].name] for place in names}
