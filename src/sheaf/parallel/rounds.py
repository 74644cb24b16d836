"""One way through the units of a stage (or of the whole model) and back, in the order that all replicas keep."""

from collections.abc import Callable, Mapping, Sequence

from sheaf.cluster.primitives import Pending
from sheaf.graph.facts import GLUE
from sheaf.parallel.flat import FlatTensors
from sheaf.parallel.turns import Turns
from sheaf.parallel.turnstile import Turnstile


class Unit:
    """The flats of one block, and whether its parameters are there, on their way, or freed."""

    def __init__(self, name: str, parts: list[FlatTensors]) -> None:
        self.name, self.parts = name, parts
        self.gathers: list[Pending] | None = None  # None: freed
        self.open_reductions = 0
        self.running = False


class Round:
    """Forward gathers by ``forward``; backward gathers by ``backward``, and reductions by ``turnstile``.

    ``order`` are units as forward comes to them, ``parts`` the flats of each unit. ``visit(unit)`` starts a gather,
    ``launch(round, index)`` the reduction of ``trained[index]``. With ``first_held`` the last unit of forward is still
    there when backward begins.
    """

    def __init__(
        self,
        order: Sequence[str],
        parts: Mapping[str, Sequence[FlatTensors]],
        visit: Callable[[str], object],
        launch: "Callable[[Round, int], object]",
        *,
        first_held: bool,
    ) -> None:
        # a unit that runs more than once is complete when backward comes to its first run
        self.units = [*reversed(dict.fromkeys(order)), *([GLUE] if GLUE in parts else [])]
        self.trained = [flat for name in self.units for flat in parts[name] if flat.trained]
        backward = order[::-1]
        self.last_turn = dict.fromkeys(self.units, len(backward))  # GLUE's is after all others
        self.last_turn.update({name: turn for turn, name in enumerate(backward)})
        places = [self.last_turn[flat.flat.unit] + 1 for flat in self.trained]
        due = [sum(place < turn for place in places) for turn in range(len(backward))]
        self.forward = Turns(order, visit)
        self.turnstile = Turnstile([flat.names for flat in self.trained], lambda index: launch(self, index))
        self.backward = Turns(
            backward,
            visit,
            first_held=first_held,
            before=lambda turn: self.turnstile.let_through(due[turn]),
        )
