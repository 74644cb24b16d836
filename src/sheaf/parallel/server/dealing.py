"""Who computes what where each worker goes by its own clock: its share of step after step, and what others left.

A part is one worker's share of one step, numbered as ``supply.Supply`` numbers them. It is used when a gradient of it
is applied, which all shards do or none. Until then it is its worker's, and goes back when that one is given up.
"""

from bisect import insort
from collections.abc import Collection
from typing import Any


class Dealing:
    """Deals parts one by one, each once, and once more whenever it came back. Of the state of shard 0.

    Each worker has a place, whose part of step after step it is dealt. What came back goes to whoever is next, when it
    is of no later step than what that one would be dealt; so do parts of places whose workers are away, of earlier
    steps.

    >>> dealing = Dealing(2)
    >>> dealing.deal(0, present=[0, 1]), dealing.deal(1, present=[0, 1]), dealing.deal(0, present=[0, 1], used=True)
    (0, 1, 2)
    >>> dealing.give_back(1, lost=True)
    >>> [dealing.deal(0, present=[0], used=True) for _ in range(4)]
    [1, 3, 4, 5]
    >>> dealing.deal(1, present=[0, 1]), dealing.returned
    (7, 1)
    """

    def __init__(self, workers: int, start: int = 0) -> None:
        self.next = [start] * workers  # by place, the step whose part is to be dealt next
        self.back: list[int] = []  # parts of earlier steps that came back, in order
        self.dealt: dict[int, int] = {}  # worker -> the part that it has
        self.returned = 0  # parts that came back from workers that were given up, as often as they did

    def deal(self, worker: int, present: Collection[int], *, used: bool = False) -> int:
        """The part that a worker has: a next one where it has none, or what it had is ``used``.

        ``present`` are the workers that count.
        """
        if used or worker not in self.dealt:
            self.dealt[worker] = self._next(worker, present)
        return self.dealt[worker]

    def give_back(self, worker: int, *, lost: bool) -> None:
        """Others may have what a worker had; ``lost``: it was given up, and did not say good-bye."""
        number = self.dealt.pop(worker, None)
        if number is None:
            return
        self.returned += lost
        step, place = divmod(number, len(self.next))
        if self.next[place] == step + 1:
            self.next[place] = step
        else:
            insort(self.back, number)

    def told(self, worker: int) -> dict[str, Any]:
        """What a worker is told with the values: its part, and how many came back so far."""
        return {"part": self.dealt.get(worker), "back": self.returned}

    def moved(self) -> dict[str, Any]:
        """All that there is, of what JSON knows."""
        dealt = [[worker, number] for worker, number in self.dealt.items()]
        return {"next": list(self.next), "back": list(self.back), "dealt": dealt, "returned": self.returned}

    def kept(self) -> dict[str, Any]:
        """The same for a later run, in which nobody has anything yet."""
        other = Dealing(len(self.next))
        other.restore(self.moved())
        for worker in self.dealt:
            other.give_back(worker, lost=False)
        return other.moved()

    def restore(self, told: dict[str, Any]) -> None:
        """Go on from there."""
        self.next, self.back, self.returned = list(told["next"]), list(told["back"]), int(told["returned"])
        self.dealt = {int(worker): int(number) for worker, number in told["dealt"]}

    def _next(self, worker: int, present: Collection[int]) -> int:
        workers, place = len(self.next), worker
        for other in range(workers) if len(present) < workers else ():
            if other not in present and self.next[other] < self.next[place]:
                place = other
        step = self.next[place]
        if self.back and self.back[0] // workers <= step:
            return self.back.pop(0)
        self.next[place] += 1
        return step * workers + place
