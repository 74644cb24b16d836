"""One way through the units of a stage (or of the whole model) and back, in the order that all replicas keep.

No deadlock: every worker starts the collectives of a step in one and the same order, and waits for such only as it
has started itself. So of the workers that stand still, take one that has started the fewest: what it waits for, all
have started, and it goes on. The order of a round is: the forward gathers, turn by turn (turns that a worker skips it
visits all the same); then the backward gathers, turn by turn, where the reductions of a unit come directly after the
gather of the turn that follows the unit's last. Two rules make it so whatever a backward does: the launch of a
reduction visits that turn first, if need be; and before a turn is visited, all reductions that lie before it are
started, with zeros for gradients that have not come (blocks that this worker skipped). A gradient that comes later
still is a PlanError.

In a pipeline each forward and each backward of a stage walks that stage's turns alone, and leaves nothing gathered; all
replicas of a stage go through one list of actions, idle where they have no microbatch, so the same argument holds.
"""

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
