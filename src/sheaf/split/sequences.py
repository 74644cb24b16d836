"""What splitting sequences among workers moves, and how much work and memory it leaves each: found in a rehearsal."""

from typing import Any

from sheaf.graph.facts import GLUE
from sheaf.plans.split import SplitFacts
from sheaf.split.alone import Alone
from sheaf.split.common import Common
from sheaf.split.lengthwise import Lengthwise
from sheaf.split.rehearsal import Rehearses, Stage, Try, Units
from sheaf.task import Task


class _Trying(Rehearses, Lengthwise):
    """Runs a forward as worker 0 does, and notes what it moves and computes."""

    def __init__(self, team: Alone, own: Any) -> None:
        super().__init__(team, own)
        self.found, self.block = Try(moves=team.moves), GLUE


class _Sequences(Stage):
    """Runs the rehearsals of one model."""

    def __init__(self, task: Task, workers: int, samples: int, common: Common | None) -> None:
        super().__init__(task, workers, samples, False, lambda _name: False, common)

    def decide(self) -> SplitFacts:
        found, alone = self.attempt({}, counted=True), self.alone({})
        return SplitFacts(
            degree=self.workers,
            samples=self.samples,
            slices={},
            moves=tuple(found.moves),
            work={name: found.flops.get(name, 0.0) / flops for name, flops in alone.flops.items() if flops},
            activations={name: found.saved.get(name, 0.0) / size for name, size in alone.saved.items() if size},
        )

    def _mode(self, units: dict[str, Units], workers: int) -> Any:
        if workers == 1:
            return super()._mode(units, workers)
        return _Trying(Alone(workers), self.model.parameters())

    def _given(self, mode: Any) -> tuple[Any, Any]:
        given = super()._given(mode)
        return mode.inputs(given) if isinstance(mode, _Trying) else given

    def _after(self, error: Exception, module: str, alone: bool) -> None:
        how = f" with its sequences split{' (not even alone)' if alone else ''}"
        self._with_values(error, module, how, "; use dp or tp in place of cp")


def sequences(task: Task, workers: int, *, samples: int, common: Common | None = None) -> SplitFacts:
    """What it does to split the sequences of ``samples`` samples among ``workers``; parameters stay whole.

    ``work`` and ``activations`` are worker 0's share of each block's. ``common`` is what other rehearsals of the task
    have found, and is added to. Raises PlanError when the model cannot be run so.
    """
    return _Sequences(task, workers, samples, common).decide()
