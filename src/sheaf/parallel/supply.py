"""What workers compute until they next meet: steps as they come, and parts of steps that came back unused."""

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

from sheaf.plans.layout import apportion, in_turn
from sheaf.task import Microbatch, Order


class Part(NamedTuple):
    """What of a step one worker computes at once; parts are numbered from end to end of all steps."""

    number: int
    step: int
    microbatches: tuple[Microbatch, ...]

    @property
    def samples(self) -> int:
        """How many it has."""
        return sum(len(microbatch.samples) for microbatch in self.microbatches)


class Supply:
    """Deals parts, each once, and once more whenever it came back. Every worker keeps one and tells it the same.

    A step is cut into one part per worker, by ``weights``. Parts that come back wait; as soon as there is one for each
    worker they are dealt in place of a new step, those that wait longest to workers that were there last time. So a
    step is as large as it always is, what is new comes in the order of one process, and no sample is passed over.

    >>> supply = Supply(Order(8, 4, 1, 0, shuffle=False), (1, 1))
    >>> for _ in range(3):
    ...     dealt = supply.dealt(1)
    ...     print([(part.step, [one.samples for one in part.microbatches], taker) for part, taker in dealt])
    ...     supply.settle(dealt, [part.number for part, taker in dealt if taker == 0], present=[1])
    [(0, [(0,), (1,)], 0), (0, [(2,), (3,)], 1)]
    [(1, [(4,), (5,)], 0), (1, [(6,), (7,)], 1)]
    [(0, [(0,), (1,)], 1), (1, [(4,), (5,)], 0)]
    >>> supply.waiting
    [2]
    """

    def __init__(self, order: Order, weights: Sequence[int]) -> None:
        self._order, self._weights = order, tuple(weights)
        self.next_step = 0  # the first that was never dealt
        self.waiting: list[int] = []
        self.returned = 0  # samples that came back, as often as they did
        self.present: tuple[int, ...] = tuple(range(len(self._weights)))

    @property
    def waiting_samples(self) -> int:
        """How many samples wait to be dealt again."""
        return sum(self.part(number).samples for number in self.waiting)

    def part(self, number: int) -> Part:
        """The part of that number."""
        step, place = divmod(number, len(self._weights))
        microbatches = self._order.step(step)
        counts = apportion(len(microbatches), self._weights)
        start = sum(counts[:place])
        return Part(number, step, microbatches[start : start + counts[place]])

    def dealt(self, steps: int, seconds: Sequence[float] = ()) -> list[tuple[Part, int]]:
        """The parts of as many steps, each with its taker; by ``seconds`` for a part of each worker, where given."""
        workers, step, waiting = len(self._weights), self.next_step, list(self.waiting)
        found: list[tuple[Part, int]] = []
        for _ in range(steps):
            if len(waiting) >= workers:
                found += self._again(waiting[:workers])
                del waiting[:workers]
            else:
                found += [(self.part(step * workers + place), place) for place in range(workers)]
                step += 1
        if seconds:
            parts = [part for part, _ in found]
            return list(zip(parts, in_turn(len(parts), seconds), strict=True))
        return found

    def settle(self, dealt: Iterable[tuple[Part, int]], back: Collection[int], present: Iterable[int]) -> None:
        """What was dealt is done, but for the parts numbered ``back``, which nobody will use; who was there."""
        numbers = {part.number for part, _ in dealt}
        self.waiting = [number for number in self.waiting if number not in numbers]
        self.next_step = max(self.next_step, 1 + max(numbers) // len(self._weights))
        came = [part for part in map(self.part, sorted(back)) if part.microbatches]
        self.waiting += [part.number for part in came]
        self.returned += sum(part.samples for part in came)
        self.present = tuple(sorted(present))

    def kept(self) -> dict[str, object]:
        """All that ``restore`` needs, of what JSON knows."""
        return {
            "next_step": self.next_step,
            "waiting": list(self.waiting),
            "returned": self.returned,
            "present": list(self.present),
        }

    def restore(self, kept: dict[str, object]) -> None:
        """Go on as when that was ``kept``."""
        for name, value in kept.items():
            setattr(self, name, tuple(value) if name == "present" else value)  # pyright: ignore[reportArgumentType]

    def _again(self, numbers: Sequence[int]) -> list[tuple[Part, int]]:
        """Parts that wait, the first for those who were there last time; the larger for those with larger shares."""
        found: list[tuple[Part, int]] = []
        absent = [worker for worker in range(len(self._weights)) if worker not in self.present]
        rest = [self.part(number) for number in numbers]
        for workers in (list(self.present), absent):
            mine, rest = rest[: len(workers)], rest[len(workers) :]
            parts = sorted(mine, key=lambda part: -part.samples)
            found += zip(parts, sorted(workers, key=lambda worker: -self._weights[worker]), strict=True)
        return found
