"""A worker's side where shares are stolen: it borrows microbatches, and pushes what it found with what it covers."""

import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from sheaf.parallel.server.client import Client, Seen
from sheaf.parallel.server.frame import Kind
from sheaf.parallel.server.log import Fenced
from sheaf.parallel.server.points import reached
from sheaf.parallel.shares import AbstractDealer
from sheaf.task import Microbatch


class Borrower(Client):
    """A client that borrows. No step waits for it: one that the others finished without it is skipped."""

    waited_seconds = 0.0  # for answers, all that were asked for
    watched = False  # somebody looks on, who is not to see a microbatch computed twice

    def take(self, clock: int, count: int, held: Sequence[int], *, wait: bool, stop: bool) -> int | None:
        """A microbatch of the step's ``count``, or None: there is none now; with ``wait``: the step is closed."""
        meta = {"count": count, "held": list(held), "wait": wait, "stop": stop, "watched": self.watched}
        told = self._again(lambda: self._links[0].ask(self._head(Kind.TAKE, clock=clock), meta)[1])
        return None if told is None else told.get("microbatch")

    def cover(self, clock: int, count: int, metas: Sequence[dict[str, Any]]) -> bool:
        """Push what is in ``out``; whether it counts. Where it does not, some of it was covered by others before."""
        return bool(self._again(lambda: self._covered(clock, count, metas)))

    def catch_up(self, clock: int) -> Seen:
        """Read the values of ``clock`` when they are there, or those of the step at which the others are."""
        while (seen := self._again(lambda: self._caught_up(clock))) is None:
            continue
        return seen

    def _covered(self, clock: int, count: int, metas: Sequence[dict[str, Any]]) -> bool:
        self._sequence += 1
        for link, arena, meta in zip(self._links, self.out, metas, strict=True):
            reached("worker.before_push")
            link.start(self._head(Kind.PUSH, clock=clock), meta, arena.raw)
        reached("worker.after_push")
        self._finish()
        reached("worker.before_claim")
        claim = self._head(Kind.CLAIM, clock=clock)
        counts = bool(self._links[0].ask(claim, {"count": count, "stop": bool(metas[0].get("stop"))})[1]["counts"])
        reached("worker.after_claim")
        return counts

    def _caught_up(self, clock: int) -> Seen:
        wanted = clock
        while True:
            for link in self._links:
                link.start(self._head(Kind.PULL, clock=wanted))
            reached("worker.during_pull")
            answers = self._finish(into=True)
            found = {int(told["applied"]) for _, told in answers}
            if found == {wanted}:
                break
            wanted = max(found)  # others went on without this worker, perhaps while it read
        told = answers[0][1]
        return Seen(finished=wanted, told=told, stop=told["stop_at"] is not None and wanted >= int(told["stop_at"]))

    def _again(self, ask: Callable[[], Any]) -> Any:
        """What is answered; None after this worker was given up: as its next incarnation it has nothing."""
        start = time.perf_counter()
        try:
            return ask()
        except Fenced:
            self.rejoined += 1
            self._rejoin(0)
            return None
        finally:
            self.waited_seconds += time.perf_counter() - start


class Lent(AbstractDealer):
    """Microbatches as the server lends them: all there are at first; then, after a push, one at a time.

    ``held`` are those that this worker has and has not pushed.
    """

    client: Borrower

    def __init__(self) -> None:
        self.held: list[int] = []
        self.stops: Callable[[], bool] = bool
        self._first = True

    def begin(self) -> None:
        """A step begins."""
        self.held, self._first = [], True

    def deal(self, step: int, microbatches: Sequence[Microbatch]) -> Iterator[tuple[Microbatch, Callable[[], bool]]]:
        """Microbatches as they are lent; none when the step is closed."""
        self.held = []
        while (found := self._next(step, len(microbatches))) is not None:
            self.held.append(found)
            yield microbatches[found], bool
            if not self._first:
                return
        self._first = False

    def finished(self) -> None:
        """Nothing: shard 0 knows."""

    def _next(self, step: int, count: int) -> int | None:
        if self._first and not self.held:
            found = self.client.take(step, count, (), wait=False, stop=self.stops())
            return found if found is not None else self.client.take(step, count, (), wait=True, stop=self.stops())
        return self.client.take(step, count, self.held, wait=not self._first, stop=self.stops())
