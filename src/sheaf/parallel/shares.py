"""Who computes which microbatch of a step. A sum does not care who added what, so every deal is exact."""

import operator
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Protocol, runtime_checkable

from sheaf.plans import Plan
from sheaf.plans.layout import apportion
from sheaf.task import Microbatch


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


class Dealt(AbstractDealer):
    """Contiguous shares in proportion to weights, fixed before the step."""

    def __init__(self, weights: Sequence[int], worker: int) -> None:
        self._weights, self._worker = tuple(weights), worker

    def rounds(self, microbatches: Sequence[Microbatch]) -> int:
        """The most microbatches any worker has: how many rounds workers in lockstep take."""
        return max(apportion(len(microbatches), self._weights))

    def deal(
        self,
        step: int,  # noqa: ARG002 - the same deal every step
        microbatches: Sequence[Microbatch],
    ) -> Iterator[tuple[Microbatch, Callable[[], bool]]]:
        """This worker's contiguous run."""
        shares = apportion(len(microbatches), self._weights)
        start = sum(shares[: self._worker])
        mine = microbatches[start : start + shares[self._worker]]
        for microbatch in mine:
            yield microbatch, partial(operator.is_, microbatch, mine[-1])

    def finished(self) -> None:
        """Nothing: nothing is shared."""


class Stolen(AbstractDealer):
    """The next microbatch from a shared counter, until none is left.

    A worker takes its next one between forward and backward of the current one: late enough to leave work to others,
    and early enough to know which is its last and send gradients while that one still runs. Each deal has a counter
    of its own, also where a step is dealt again (after ``load``, or after a refused step); the worker that ``sweeps``
    deletes it afterwards.
    """

    def __init__(self, counter: Counter, name: str, *, sweeps: bool = True) -> None:
        self._counter, self._name, self._sweeps = counter, name, sweeps
        self._deals = 0

    def deal(
        self,
        step: int,  # noqa: ARG002 - deals are numbered for themselves
        microbatches: Sequence[Microbatch],
    ) -> Iterator[tuple[Microbatch, Callable[[], bool]]]:
        """Microbatches as they are won."""
        self._deals += 1
        tickets = [self._ticket()]

        def last() -> bool:
            tickets.append(self._ticket())
            return tickets[-1] >= len(microbatches)

        while tickets[-1] < len(microbatches):
            yield microbatches[tickets[-1]], last

    def finished(self) -> None:
        """Delete the counter: every worker has drawn its last ticket."""
        if self._sweeps:
            self._counter.delete_key(f"{self._name}/{self._deals}")

    def _ticket(self) -> int:
        return self._counter.add(f"{self._name}/{self._deals}", 1) - 1


def dealer(plan: Plan, worker: int, counter: Counter | None, name: str = "stolen") -> AbstractDealer:
    """The dealer that a plan asks for; stolen shares need a ``counter`` shared by all workers."""
    if plan.stolen:
        assert counter is not None
        return Stolen(counter, name, sweeps=worker == 0)
    return Dealt(plan.weights, worker)
