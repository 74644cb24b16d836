"""The order in which blocks of a model take turns, the same on every worker, and where a worker is in it."""

from collections.abc import Callable, Sequence

from sheaf.errors import PlanError


class Turns:
    """Walks a fixed sequence of units (a unit may have several turns); every worker walks all of it, in order.

    ``visit(unit)`` starts what a turn needs, exactly once per turn on every worker whatever it runs itself, since
    collectives match by order. A turn directly after one of the same unit needs nothing new, nor does the first of
    all with ``first_held``. ``before(turn)`` is called before each visit with the turn's index.
    """

    def __init__(
        self,
        sequence: Sequence[str],
        visit: Callable[[str], object],
        *,
        first_held: bool = False,
        before: Callable[[int], object] | None = None,
    ) -> None:
        self.sequence, self._visit, self._first_held = tuple(sequence), visit, first_held
        self._before = before
        self._taken = self._visited = len(self.sequence)

    def begin(self) -> None:
        """Start from the beginning."""
        self._taken = self._visited = 0

    def take(self, unit: str) -> None:
        """Come to this unit's next turn, visiting what lies before it too. A unit out of turn is a PlanError."""
        try:
            turn = self.sequence.index(unit, self._taken)
        except ValueError:
            raise PlanError(
                f"block {unit} runs in another order or more often than when the model was traced, so ZeRO-3 cannot "
                "gather its parameters in step with the other workers: use zero=2"
            ) from None
        self._taken = turn + 1
        self._visit_until(self._taken)

    def pass_by(self, unit: str) -> None:
        """Come to this unit's next turn if it has one left; nothing otherwise."""
        if unit in self.sequence[self._taken :]:
            self.take(unit)

    def reach(self, turn: int) -> None:
        """Visit all up to and including a turn, taking none."""
        self._visit_until(turn + 1)

    def look_ahead(self) -> None:
        """Visit the next turn before it is taken."""
        self._visit_until(self._taken + 1)

    def repeats(self) -> bool:
        """Whether the next turn is of the unit that has just had one."""
        return 0 < self._taken < len(self.sequence) and self.sequence[self._taken] == self.sequence[self._taken - 1]

    def finish(self) -> None:
        """Visit all that is left."""
        self._taken = len(self.sequence)
        self._visit_until(self._taken)

    @property
    def done(self) -> bool:
        """Whether every turn was taken."""
        return self._taken == len(self.sequence)

    def _visit_until(self, stop: int) -> None:
        while self._visited < min(stop, len(self.sequence)):
            turn, self._visited = self._visited, self._visited + 1
            held = self._first_held if turn == 0 else self.sequence[turn] == self.sequence[turn - 1]
            if not held:
                if self._before is not None:
                    self._before(turn)
                self._visit(self.sequence[turn])
