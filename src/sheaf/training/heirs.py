"""Files of a run that goes on without workers it lost: the first that lives writes them, and asks no dead."""

from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from torch import Tensor

from sheaf import checkpoint
from sheaf.checkpoint.save import Saveable
from sheaf.errors import WorkerFailed
from sheaf.plans import Plan
from sheaf.plans.mesh import Mesh
from sheaf.training.pipeline import Spans


@runtime_checkable
class Outliving(Saveable, Protocol):
    """A step that may go on without some of its workers; ``sheaf.parallel.server.step`` has it."""

    def heed(self, lost: Callable[[], Collection[int]]) -> None: ...

    @property
    def outlives_workers(self) -> bool: ...

    @property
    def gives_whole(self) -> bool: ...

    def once(self, name: str, do: Callable[[], Any]) -> Any: ...

    def states(self) -> list[tuple[dict[str, Tensor], dict[str, Any]]]: ...

    def full_state_alone(self) -> dict[str, Tensor]: ...

    def brought(self, name: str, mine: Any) -> dict[int, Any]: ...

    def stays(self, error: WorkerFailed) -> bool: ...


@runtime_checkable
class Settling(Protocol):
    """A step that may have gathered what no step has applied."""

    def settle(self) -> None: ...


@runtime_checkable
class Concluding(Protocol):
    """A step of workers that are between meetings when training ends."""

    def conclude(self) -> None: ...


@runtime_checkable
class Serving(Protocol):
    """A step of a worker that computes nothing; ``sheaf.parallel.server.serving`` has it."""

    @property
    def outlives_workers(self) -> bool: ...

    def serve(self, lost: Callable[[], Collection[int]]) -> None: ...


def goes_on(plan: Plan, rank: int) -> str:
    """What becomes of the others when a worker is lost.

    >>> goes_on(Plan.parse("dp=2,tp=2,server=1:async"), 3)
    'its replica (workers 2, 3) computes no more, the others go on'
    """
    mates = Mesh.of(plan).mates(rank) if rank < plan.computing > plan.dp else ()
    lost = f"its replica (workers {', '.join(map(str, mates))}) computes no more, " if mates else ""
    return f"{lost}the others go on"


class Heirs:
    """Who writes the record, checkpoints and the model: worker 0, and when it is lost the next that lives.

    ``lost`` says which workers are. One that only stands still keeps its office, and whoever saves waits for it.
    """

    def __init__(self, step: Outliving, lost: Callable[[], Collection[int]]) -> None:
        self._step, self._lost = step, lost
        self._known: set[int] = set()
        step.heed(lost)

    @property
    def writes(self) -> bool:
        """Whether it is this worker now."""
        return self._step.gives_whole

    def news(self) -> list[str]:
        """Who was lost since this was asked last."""
        new = sorted(set(self._lost()) - self._known)
        self._known |= set(new)
        return [f"worker {rank} was lost by step {self._step.index}; {goes_on(self._step.plan, rank)}" for rank in new]

    def stays(self, error: WorkerFailed) -> bool:
        """After what a step raised: whether the others went on without this worker, and are done."""
        return self._step.stays(error)

    def write_spans(self, spans: Spans, out: Path) -> None:
        """Leave what was measured of a pipeline's step, on the replica of the worker that writes."""
        if self._step.plan.pp > 1 and (brought := self._step.brought("spans", spans.kept())):  # to the first
            spans.write_of(brought, out)

    def once(self, name: str, do: Callable[[], Any]) -> Any:
        """What ``do`` gives on the worker that writes, on every worker."""
        return self._step.once(name, do)

    def save(self, directory: Path, *, keep: int, task_digest: str) -> Path:
        """Save what the shards have, for as many workers as the plan names."""
        return checkpoint.save_alone(self._step, self._step.states(), directory, keep=keep, task_digest=task_digest)

    def write_model(self, path: Path) -> None:
        """Leave the whole weights; every worker that lives calls this."""

        def write() -> None:
            checkpoint.write_model(path, self._step.full_state_alone())

        self.once("model", write)
