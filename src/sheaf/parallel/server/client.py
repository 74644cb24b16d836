"""A worker's side of the parameter server: its gradient goes to every shard, and the values come back."""

import contextlib
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from sheaf.errors import WorkerFailed
from sheaf.parallel.server.frame import Head, Kind
from sheaf.parallel.server.greeting import WORKER, Guest
from sheaf.parallel.server.link import Address, Failed, Keys, Link, first_heard
from sheaf.parallel.server.log import Fenced, Terms
from sheaf.parallel.server.places import Form
from sheaf.parallel.server.points import reached
from sheaf.parallel.server.reading import PIECE_BYTES
from sheaf.parallel.server.restore import unpacked
from sheaf.parallel.server.threads import Threads


@dataclass
class Seen:
    """What a worker saw of one exchange."""

    finished: int = 0  # clocks that this worker has behind it now; after it was given up, as many as the slowest has
    dropped: bool = False  # the gradient was not applied: too old, its samples to be used again; or another has them
    delay: int = 0  # updates between pull and push, at most over shards
    staleness: int = 0  # clocks between this worker and the slowest, when it read
    stop: bool = False  # a worker was asked to stop, and this is the step after which everyone does
    waited_seconds: float = 0.0
    told: dict[str, Any] = field(default_factory=dict[str, Any])  # of the first shard


_NONE = 2**62  # no gradient is as late: it was not taken, as the replica was given up


class GivenUp(WorkerFailed):
    """The others go on without this worker's replica."""


class Client:
    """Worker ``worker``'s lines to all shards; ``addresses`` by shard, those of its seats.

    ``out`` is where gradients are put before ``exchange``, ``values`` what was read last, by shard. One exchange sends
    the gradient everywhere (each shard keeps it), and then tells every shard to apply it and give its values when the
    clock allows: so it counts on all shards or on none, whoever dies in between. Raises WorkerFailed and Failed.

    Where replicas are several workers, ``agreed`` gives the largest of their numbers (collective in the replica): they
    are one incarnation, and no shard of any place is told to apply before those of all places have the gradient.
    """

    def __init__(
        self,
        worker: int,
        addresses: Sequence[list[Address]],
        forms: Sequence[Form],
        keys: Keys,
        terms: Terms,
        agreed: Callable[[int], int] = int,
    ) -> None:
        self.worker, self.terms = worker, terms
        self.out = [form.arena() for form in forms]
        self.values = [form.arena() for form in forms]
        self.agreed = agreed
        self.incarnation = agreed(time.time_ns() // 1000)
        self._places = list(zip(addresses, forms, strict=True))
        self._keys = keys
        self._links = self._lines()
        # each worker turns to another shard first, so that not all of them are at one while the others stand idle
        self._turns = [(worker + turn) % len(self._links) for turn in range(len(self._links))]
        self._sequence = 0
        self._versions = [0] * len(self._links)
        self._ended, self._beats = threading.Event(), list[Link]()
        self._threads = Threads(f"sheaf-worker-{worker}-beats")
        self._begun = False
        self.rejoined = 0
        self.part: int | None = None  # what shard 0 deals this worker next, where workers go by their own clocks

    @property
    def sent_bytes(self) -> int:
        """What was written to shards so far, heartbeats apart."""
        return sum(link.sent_bytes for link in self._links)

    @property
    def reconnected(self) -> int:
        """How often a connection to a shard was lost and made anew."""
        return sum(link.reconnected for link in self._links)

    def join(self, clock: int) -> None:
        """Begin at ``clock``, and beat from now on; again after a checkpoint was loaded, as a next incarnation."""
        begun, self._sequence = self._begun, 0
        if begun:
            self._next_incarnation()
            self._versions = [0] * len(self._links)
        self._join(clock)
        if self.terms.together:
            self.part = self.agreed(-1 if self.part is None else self.part)
        if begun:
            return
        self._begun = True
        self._beats = self._lines()
        for link in self._beats:
            self._threads.start(self._beat, link)

    def exchange(self, clock: int, metas: Sequence[dict[str, Any]]) -> Seen:
        """Push what is in ``out`` as the gradient of ``clock`` and read the values for the next; ``metas`` by shard.

        A worker that was given up comes back, where the others are. Whether its gradient had counted by then is known;
        where not, and its part has gone to another, the gradient is dropped.
        """
        start, part = time.perf_counter(), self.part
        counted = dropped = False
        while True:
            try:
                seen = self.pull(clock) if counted or dropped else self._exchange(clock, metas)
            except Fenced:
                applied, clock = self._come_back(clock, self._sequence)
                counted = counted or (applied and not dropped)
                dropped = not counted and (dropped or self.part != part)
                continue
            seen.dropped = seen.dropped or dropped
            seen.waited_seconds = time.perf_counter() - start
            return seen

    def pull(self, clock: int, *, commit: bool = False) -> Seen:
        """Read the values as of ``clock``."""
        for shard in self._turns:
            self._links[shard].start(self._pulling(clock, commit=commit))
            reached("worker.between_commits")
        return self._pulled(clock)

    def _pulling(self, clock: int, *, commit: bool) -> Head:
        return self._head(Kind.PULL, clock=clock)._replace(sequence=self._sequence if commit else 0)

    def _at_once(self, clock: int, metas: Sequence[dict[str, Any]]) -> Seen:
        """Push and pull in one go: there is no other shard to wait for between, or lock-step ends with any worker."""
        for shard in self._turns:
            head = self._head(Kind.PUSH, clock=clock)._replace(base=self._versions[shard])
            reached("worker.before_push")
            pulling = self._pulling(clock + 1, commit=True)
            self._links[shard].start(head, metas[shard], self.out[shard].raw, then=pulling)
        seen = self._pulled(clock + 1)
        seen.delay = 0 if self.terms.exact else self._links[0].first.base
        return seen

    def _pulled(self, clock: int) -> Seen:
        reached("worker.during_pull")
        answers = self._finish(into=True)
        self._versions = [answer.base for answer, _ in answers]
        slowest = min(int(told["slowest"]) for _, told in answers)
        told = answers[0][1]
        self.part = told.get("part")
        stop = told["stop_at"] is not None and clock >= int(told["stop_at"])
        return Seen(finished=clock, told=told, staleness=max(0, clock - slowest), stop=stop)

    def read(self, clock: int) -> None:
        """Read the values when every worker has come to ``clock``."""
        for link in self._links:
            link.start(self._head(Kind.READ, clock=clock))
        self._finish(into=True)

    def gradients(self) -> list[dict[str, Any]]:
        """Read the last summed gradient into ``values``; what each shard tells of it."""
        for link in self._links:
            link.start(self._head(Kind.GRADIENT))
        return [told for _, told in self._finish(into=True)]

    def drain(self, clock: int) -> None:
        """Have every shard apply what it has gathered, when nobody will push any more; this worker is at ``clock``."""
        while True:
            for link in self._links:
                link.start(self._head(Kind.DRAIN))
            try:
                self._finish()
            except Fenced:
                self._come_back(clock, 0)
                continue
            return

    def states(self) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
        """By shard, all that a later run needs of it, as it is now; nobody may push meanwhile."""
        return [unpacked(self._state(link)) for link in self._links]

    def _state(self, link: Link) -> bytes:
        head = self._head(Kind.STATE)
        while True:
            made = memoryview(bytearray(int(link.ask(head)[1]["total"])))
            for start in range(0, len(made), PIECE_BYTES):
                part = made[start : start + PIECE_BYTES]
                if link.ask(head, {"start": start, "size": len(part)}, part)[0].kind != Kind.VALUES:
                    break  # another seat has taken over, and begins anew
            else:
                return bytes(made)

    def leave(self) -> None:
        """Say good-bye, so that nobody waits for this worker, and hang up."""
        self._ended.set()
        try:
            for link in self._links:
                with contextlib.suppress(WorkerFailed, Fenced, Failed):
                    link.ask(self._head(Kind.LEAVE))
                link.close()  # at once: shards wait for those that hang up, and the next may not answer for long
        finally:
            self.close()

    def close(self) -> None:
        """Stop beating and hang up, without a word."""
        self._ended.set()
        for link in self._links:
            link.close()
        for link in self._beats:
            link.end()
        self._threads.join()

    def _exchange(self, clock: int, metas: Sequence[dict[str, Any]]) -> Seen:
        self._sequence += 1
        alone = len(self._links) == 1 and self.terms.dropped_beyond is None and not self.terms.together
        if self.terms.exact or alone:
            return self._at_once(clock, metas)
        for shard in self._turns:
            head = self._head(Kind.PUSH, clock=clock)._replace(base=self._versions[shard])
            reached("worker.before_push")
            self._links[shard].start(head, metas[shard], self.out[shard].raw)
        try:
            delay = max(answer.base for answer, _ in self._finish())
        except Fenced:
            if not self.terms.together:
                raise
            delay = _NONE  # the replica's other workers may have been answered, and wait for this one
        reached("worker.after_push")
        bound = self.terms.dropped_beyond
        if bound is not None or self.terms.together:
            delay = self.agreed(delay)
        if delay == _NONE:
            raise Fenced
        if bound is not None and delay > bound:
            for link in self._links:
                link.start(self._head(Kind.ABANDON))
            self._finish()
            seen = self.pull(clock)
            seen.dropped = True
        else:
            reached("worker.before_commit")
            seen = self.pull(clock + 1, commit=True)
        seen.delay = delay
        return seen

    def _come_back(self, clock: int, sequence: int) -> tuple[bool, int]:
        """Join again, ``clock`` steps behind it; whether the push of that number before was applied, and how many steps
        it has behind it now: its own, that one too, or all but the one that the slowest did last.
        """
        if self.terms.exact:
            raise WorkerFailed(
                f"worker {self.worker} was silent for more than {self.terms.lease_seconds:g} s, and the others went on "
                "without it: with staleness=0 no step can; look for what stopped it"
            )
        if self.terms.together:
            raise GivenUp(
                f"replica {self.worker} was given up: one of its workers died, or was silent for more than "
                f"{self.terms.lease_seconds:g} s; look for what stopped it"
            )
        self.rejoined += 1
        answers = self._rejoin(clock, self.incarnation)
        applied = any(int(told["committed"]) >= sequence > 0 for told in answers)
        clock = max(clock, *(int(told["clock"]) for told in answers))
        if applied:  # shards are to know that it has that step behind it: nobody else would tell them after the last
            answers = self._rejoin(clock + 1)
            clock = max(clock + 1, *(int(told["clock"]) for told in answers))
        return applied, clock

    def _rejoin(self, clock: int, last: int = 0) -> list[dict[str, Any]]:
        """Join as the next incarnation that is not given up on the way; what each shard told."""
        self._sequence = 0
        while True:
            self._next_incarnation()
            with contextlib.suppress(Fenced):
                return self._join(clock, last)

    def _next_incarnation(self) -> None:
        self.incarnation = self.agreed(max(self.incarnation + 1, time.time_ns() // 1000))
        for link in self._links:
            link.close()
            link.guest = Guest(WORKER, self.worker, self.incarnation)

    def _join(self, clock: int, last: int = 0) -> list[dict[str, Any]]:
        for link in self._links:
            link.start(self._head(Kind.JOIN, clock=clock), {"last": last})
        answers = [told for _, told in self._finish()]
        self.part = answers[0].get("part")
        return answers

    def _finish(self, *, into: bool = False) -> list[tuple[Head, dict[str, Any]]]:
        """Everyone's answer; of several that refuse, the first is raised once all have answered."""
        answers: dict[int, tuple[Head, dict[str, Any]]] = {}
        raised: dict[int, Exception] = {}
        waiting = {self._links[shard]: shard for shard in self._turns}
        while waiting:
            link = first_heard(list(waiting)) if len(waiting) > 1 else next(iter(waiting))
            shard = waiting[link]
            try:
                answer = link.heard(self.values[shard].raw if into else None)
            except (Fenced, Failed) as error:
                raised[shard] = error
                del waiting[link]
                continue
            if answer is not None:
                answers[shard] = answer
                del waiting[link]
        if raised:
            raise raised[min(raised)]
        return [answers[shard] for shard in range(len(self._links))]

    def _head(self, kind: Kind, clock: int = 0) -> Head:
        return Head(kind, self.worker, self.incarnation, self._sequence, clock=clock)

    def _lines(self) -> list[Link]:
        guest, lease = Guest(WORKER, self.worker, self.incarnation), self.terms.lease_seconds
        return [
            Link(shard, seats, guest, self._keys, max(form.size_bytes, PIECE_BYTES), lease)
            for shard, (seats, form) in enumerate(self._places)
        ]

    def _beat(self, link: Link) -> None:
        """Tell a shard, on a line of its own, that this worker lives."""
        while not self._ended.wait(self.terms.lease_seconds / 5):
            try:
                link.ask(Head(Kind.BEAT, self.worker, self.incarnation))
            except Exception:  # noqa: BLE001, S112 - the worker's own lines will tell
                continue
        link.close()
