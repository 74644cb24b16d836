"""The side that is judged: a plan's own executor, watched on every worker."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from sheaf.errors import RunError
from sheaf.parallel import build
from sheaf.parity.arithmetic import steady
from sheaf.parity.observation import START, Observation, Print, PrintKey, Prints, Store, added
from sheaf.plans import Plan
from sheaf.record import StepReport
from sheaf.task import Task


def observe_rank(task: Task, plan: Plan, steps: int, directory: Path) -> None:
    """Train ``steps`` steps under the plan and leave the observations in ``directory``; called on every worker.

    Worker 0 writes gradients, weights and buffers, every worker the losses that it answers for and prints of what it
    computed: of a split tensor its slice's part, of one that several have alike one of them. ``Planned`` reads them as
    one.
    """
    step = build(task, plan)
    gradients: dict[int, dict[str, Tensor]] = {}
    step.observe(_Observer(gradients if step.rank == 0 else None))
    prints = Prints(step.model, lambda: _microbatch(step), runs=step.runs, leads=lambda: step.leads, part=step.part)
    store = Store(directory) if step.rank == 0 else None
    try:
        _write(store, Observation(step=START), step.full_state())
        for index in range(steps):
            with steady():
                report: StepReport = step()
            state = step.full_state()
            local = {"losses": step.losses, "prints": list(prints.take().items())}
            _local(directory, step.rank, index).write_text(json.dumps(local), encoding="utf-8")
            held = {} if report.skipped else gradients.pop(index, {})
            gradients.clear()
            observation = Observation(step=index, loss=report.loss, skipped=report.skipped, gradients=held)
            _write(store, observation, state)
    finally:
        prints.close()
        step.close()


class Planned:
    """Reads what ``observe_rank`` left, as if one process had written it.

    A microbatch that two workers computed counts twice, as it did in the gradient; prints of slices add up.
    """

    def __init__(self, directory: Path, workers: int, parameters: frozenset[str], aliases: frozenset[str]) -> None:
        self.directory, self.workers = directory, workers
        self._store, self._parameters, self._aliases = Store(directory), parameters, aliases

    def read(self, step: int) -> Observation:
        """One step. Raises RunError when a worker ended before it."""
        written = self._store.read(step)
        state = {name: tensor for name, tensor in written.weights.items() if name not in self._aliases}
        losses: dict[int, tuple[float, float]] = {}
        prints: dict[PrintKey, Print] = {}
        for rank in range(self.workers if step != START else 0):
            local = self._local(rank, step)
            for microbatch, total, weight in local["losses"]:
                earlier = losses.get(microbatch, (0.0, 0.0))
                losses[microbatch] = earlier[0] + total, earlier[1] + weight
            for key, print_ in local["prints"]:
                prints[tuple(key)] = added(prints.get(tuple(key)), print_)
        return replace(
            written,
            losses=dict(sorted(losses.items())),
            prints=prints,
            weights={name: tensor for name, tensor in state.items() if name in self._parameters},
            buffers={name: tensor for name, tensor in state.items() if name not in self._parameters},
        )

    def _local(self, rank: int, step: int) -> dict[str, Any]:
        path = _local(self.directory, rank, step)
        if not path.is_file():
            raise RunError(f"{path} does not exist: worker {rank} ended before step {step}")
        return json.loads(path.read_text(encoding="utf-8"))


def _microbatch(step: Any) -> int | None:
    """The microbatch under way, or None."""
    position = step.position
    return None if position is None else position[1]


class _Observer:
    """What ``step.observe`` calls."""

    def __init__(self, held: dict[int, dict[str, Tensor]] | None) -> None:
        self._held = held

    def gradients(self, step: int, gradients: dict[str, Tensor]) -> None:
        """Keep a step's gradients until it is written; None keeps nothing."""
        if self._held is not None:
            self._held[step] = {name: tensor.detach().to_dense().cpu().clone() for name, tensor in gradients.items()}


def _write(store: Store | None, observation: Observation, state: dict[str, Tensor]) -> None:
    if store is not None:
        store.write(replace(observation, weights=state))


def _local(directory: Path, rank: int, step: int) -> Path:
    return directory / f"worker_{rank}_step_{step:05d}.json"
