"""Who computes which microbatch of a step. A sum does not care who added what, so every deal is exact."""

import operator
import statistics
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

from sheaf.plans import Plan
from sheaf.plans.layout import apportion, left_to_others, soonest_for_all
from sheaf.task import Microbatch

REMEMBERED = 5  # steps


@runtime_checkable
class Counter(Protocol):
    """A number shared by all workers, such as a key of torch's TCPStore."""

    def add(self, key: str, amount: int, /) -> int:
        """Add to the number of that key and return the new value."""
        ...

    def delete_key(self, key: str, /) -> bool:
        """Forget that number."""
        ...


class AbstractDealer(ABC):
    """Hands a worker its microbatches of a step, each with a way to ask before backward if it is the last."""

    @abstractmethod
    def deal(self, step: int, microbatches: Sequence[Microbatch]) -> Iterator[tuple[Microbatch, Callable[[], bool]]]:
        """This worker's microbatches in turn."""

    @abstractmethod
    def finished(self) -> None:
        """Every worker has had all of the deal under way."""

    def learn(  # noqa: B027 - most know all they need
        self, seconds: Sequence[float], counts: Sequence[int], updates: Sequence[float] = ()
    ) -> None:
        """How long each replica computed in the step, and how many microbatches; the same on every worker.

        ``updates``: how long its own update took it before, where the others went on without it; 0 if there was none.
        """


class Dealt(AbstractDealer):
    """Contiguous shares in proportion to weights, fixed before the step."""

    def __init__(self, weights: Sequence[int], worker: int) -> None:
        self._weights, self._worker = tuple(weights), worker

    def counts(self, microbatches: int) -> tuple[int, ...]:
        """How many of a step's microbatches each worker has."""
        return apportion(microbatches, self._weights)

    def rounds(self, microbatches: Sequence[Microbatch]) -> int:
        """The most microbatches any worker has: how many rounds workers in lockstep take."""
        return max(self.counts(len(microbatches)))

    def deal(
        self,
        step: int,  # noqa: ARG002 - the same deal every step
        microbatches: Sequence[Microbatch],
    ) -> Iterator[tuple[Microbatch, Callable[[], bool]]]:
        """This worker's contiguous run."""
        shares = self.counts(len(microbatches))
        start = sum(shares[: self._worker])
        mine = microbatches[start : start + shares[self._worker]]
        for microbatch in mine:
            yield microbatch, partial(operator.is_, microbatch, mine[-1])

    def finished(self) -> None:
        """Nothing: nothing is shared."""


class Paces:
    """How long each replica takes for a microbatch, and for its update: the median of its last steps."""

    def __init__(self, replicas: int) -> None:
        self._seen = [deque[float](maxlen=REMEMBERED) for _ in range(replicas)]
        self._updates = [deque[float](maxlen=REMEMBERED) for _ in range(replicas)]

    @property
    def seconds(self) -> tuple[float, ...] | None:
        """Of each replica; None until all were seen."""
        return tuple(map(statistics.median, self._seen)) if all(self._seen) else None

    @property
    def least_seconds(self) -> tuple[float, ...] | None:
        """As ``seconds``, of each replica's best step: what it takes where nothing holds it up."""
        return tuple(map(min, self._seen)) if all(self._seen) else None

    @property
    def updates(self) -> tuple[float, ...]:
        """What each spent on its update before a step, where the others did not wait for that; empty if unknown."""
        return tuple(map(statistics.median, self._updates)) if all(self._updates) else ()

    def learn(self, seconds: Sequence[float], counts: Sequence[int], updates: Sequence[float] = ()) -> None:
        """How long each computed in a step, and how many microbatches; who had none is as it was."""
        for seen, spent, count in zip(self._seen, seconds, counts, strict=True):
            if count and spent > 0:
                seen.append(spent / count)
        if any(updates):  # there is none before the first step
            for update, spent in zip(self._updates, updates, strict=True):
                update.append(spent)


class Balanced(Dealt):
    """Contiguous shares by the pace of each replica. Equal in the first step.

    Nobody goes without while there are enough, or it would never be seen to have become faster.
    """

    def __init__(self, replicas: int, worker: int) -> None:
        super().__init__((1,) * replicas, worker)
        self._paces = Paces(replicas)

    def counts(self, microbatches: int) -> tuple[int, ...]:
        seconds = self._paces.seconds
        if seconds is None:
            return super().counts(microbatches)
        return soonest_for_all(microbatches, seconds, self._paces.updates)

    def learn(self, seconds: Sequence[float], counts: Sequence[int], updates: Sequence[float] = ()) -> None:
        self._paces.learn(seconds, counts, updates)


class Stolen(AbstractDealer):
    """The next microbatch from a shared counter, until none is left.

    A worker takes its next one after the current one, so that nothing else waits with it when it stands still. When
    fewer are left than there are ``replicas``, it does so before backward: it then knows which is its last, and sends
    gradients while that one still runs. After its first, it leaves the last ones to replicas that would be done with
    them before it with one more, by the best pace of the last steps: one that stalls now and then is not slow. All know
    the same paces, and the fastest leaves none.

    Each deal has a counter of its own, also where a step is dealt again (after ``load``, or after a refused step); the
    ``worker`` 0 deletes it afterwards.
    """

    def __init__(self, counter: Counter, name: str, replicas: int, worker: int) -> None:
        self._counter, self._name, self._replicas, self._worker = counter, name, replicas, worker
        self._paces = Paces(replicas)
        self._leaves = 0
        self._deals = 0

    def deal(
        self,
        step: int,  # noqa: ARG002 - deals are numbered for themselves
        microbatches: Sequence[Microbatch],
    ) -> Iterator[tuple[Microbatch, Callable[[], bool]]]:
        """Microbatches as they are won."""
        self._deals += 1
        count = len(microbatches)
        tickets = [self._ticket()]

        def last() -> bool:
            left = count - self._drawn()
            if left >= self._replicas:
                return False
            tickets.append(count if left <= self._leaves else self._ticket())
            return tickets[-1] >= count

        while (ticket := tickets.pop()) < count:
            yield microbatches[ticket], last
            if not tickets:
                leaves = self._leaves and count - self._drawn() <= self._leaves
                tickets.append(count if leaves else self._ticket())

    def finished(self) -> None:
        """Delete the counter: every worker has drawn its last ticket."""
        if self._worker == 0:
            self._counter.delete_key(f"{self._name}/{self._deals}")

    def learn(self, seconds: Sequence[float], counts: Sequence[int], updates: Sequence[float] = ()) -> None:  # noqa: ARG002
        self._paces.learn(seconds, counts)
        if (paces := self._paces.least_seconds) is not None:
            self._leaves = left_to_others(paces[self._worker], paces)

    def _ticket(self) -> int:
        return self._counter.add(f"{self._name}/{self._deals}", 1) - 1

    def _drawn(self) -> int:
        return self._counter.add(f"{self._name}/{self._deals}", 0)


def dealer(plan: Plan, worker: int, counter: Counter | None, name: str = "stolen") -> AbstractDealer:
    """The dealer that a plan asks for; stolen shares need a ``counter`` shared by all workers."""
    if plan.stolen:
        assert counter is not None
        return Stolen(counter, name, plan.dp, worker)
    if plan.balanced:
        return Balanced(plan.dp, worker)
    return Dealt(plan.weights, worker)
