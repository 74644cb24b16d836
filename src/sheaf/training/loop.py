"""The loop that every worker runs: step, record, save, until the last step or until somebody asks to stop."""

import math
import sys
import time
from collections import deque
from collections.abc import Callable, Collection, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

import torch
from torch import Tensor

from sheaf import checkpoint
from sheaf.checkpoint import barrier, from_first
from sheaf.checkpoint.save import Saveable
from sheaf.errors import RunError, SheafError, WorkerFailed
from sheaf.plans import Plan
from sheaf.record import Record, StepReport
from sheaf.task import Task
from sheaf.training.description import describe
from sheaf.training.directory import MODEL, RECORD, claimed, keep_plan, prepare
from sheaf.training.heirs import Concluding, Heirs, Outliving, Serving, Settling
from sheaf.training.pipeline import Span, Spans
from sheaf.training.stop import stopping

Observer = Callable[[StepReport], object]
ObserverFactory = Callable[[int], Observer]  # given the step at which this run starts


@runtime_checkable
class TrainingStep(Saveable, Protocol):
    """What the loop asks of a step; ``sheaf.parallel.build`` makes them."""

    def __call__(self) -> StepReport: ...

    @property
    def spans(self) -> list[Span]: ...

    def full_state(self) -> dict[str, Tensor]: ...

    def request_stop(self) -> None: ...

    def close(self) -> None: ...


@dataclass(frozen=True)
class Outcome:
    """How a run ended on every worker: ``steps`` are done in all, ``first`` was done first this time."""

    first: int
    steps: int
    stopped: bool


def train_rank(
    task: Task,
    plan: Plan,
    steps: int,
    out: Path,
    *,
    resume: bool = False,
    save_every: int | None = None,
    keep: int = 2,
    observers: Sequence[ObserverFactory] = (),
    values: dict[str, Any] | None = None,
    events: dict[str, dict[str, Any]] | None = None,
    device: torch.device | None = None,
    build: Callable[..., TrainingStep] | None = None,
    lost: Callable[[], Collection[int]] = frozenset,
) -> Outcome:
    """Train until ``steps`` steps are done in all; every worker calls this, and the files are worker 0's to write.

    ``save_every``: steps between checkpoints (0: only at the end; None: after the first step, and then as often as
    saving takes less than a twentieth of the time).
    ``values`` is ``describe(task, plan)`` where the caller has it; ``events`` are more lines for the record, by kind.
    ``lost`` says which workers are gone: where the step outlives them, the first that lives writes the files.
    ``observers`` make what worker 0 calls with each report; one that raises is dropped and the run goes on.

    Raises RunError for a directory in use and a checkpoint that does not fit, and what the step raises: NonFiniteLoss,
    DataError. What was saved before stays, and the record tells what happened.
    """
    if steps < 1:
        raise RunError(f"steps={steps}: at least one step is needed")
    with ExitStack() as stack:

        def begin() -> str:
            made = prepare(out, values or describe(task, plan), plan, resume=resume)
            stack.enter_context(claimed(out))
            return made

        digest: str = from_first(begin)
        step = (build or _build)(task, plan, device=device)
        stack.callback(step.close)
        book = stack.enter_context(_Book.opened(out, step.rank))
        if resume:
            _resume(step, out, book)
            if step.rank == 0:
                keep_plan(out, plan)
        if isinstance(step, Serving) and step.outlives_workers:
            stack.enter_context(stopping(step.request_stop, alone=False))
            step.serve(lost)
            return Outcome(step.index, steps, stopped=False)
        heirs = Heirs(step, lost) if isinstance(step, Outliving) and step.outlives_workers else None
        first = step.index
        saver = _Saver(step, out, keep, digest, book, save_every, heirs)
        book.begin(step, steps, events or {}, observers)
        stack.enter_context(stopping(step.request_stop, alone=step.workers == 1))
        try:
            stopped = _carry_out(step, steps, out, book, saver, heirs)
        except WorkerFailed as error:  # what this worker was needed for, the others may do without
            if heirs is None or not heirs.stays(error):
                raise
            return Outcome(first, step.index, stopped=False)
        book.event("end", step=step.index, stopped=stopped)
        return Outcome(first, step.index, stopped)


def _carry_out(step: TrainingStep, steps: int, out: Path, book: "_Book", saver: "_Saver", heirs: Heirs | None) -> bool:
    """Step until ``steps`` are done or somebody asks to stop, and leave what training found; whether it was stopped."""
    spans, stopped = Spans(step), False
    while step.index < steps and not stopped:
        report = step()
        stopped = report.stop
        if heirs is not None and heirs.writes:
            book.inherit(out)
        for line in heirs.news() if heirs is not None else ():
            book.warn(line)
        book.report(report)
        spans.after(report)
        saver.after(report)
    if isinstance(step, Settling):
        step.settle()
    saver.save()
    if isinstance(step, Concluding):
        step.conclude()
    if heirs is not None:
        heirs.write_spans(spans, out)
        heirs.write_model(out / MODEL)
    else:
        spans.write(out)
        weights = step.full_state()
        if step.rank == 0:
            checkpoint.write_model(out / MODEL, weights)
        barrier()
    return stopped


def _build(task: Task, plan: Plan, *, device: torch.device | None) -> TrainingStep:
    from sheaf.parallel import build

    return cast("TrainingStep", build(task, plan, device=device))


def _resume(step: TrainingStep, out: Path, book: "_Book") -> None:
    def newest() -> str | None:
        found = checkpoint.latest(out)
        for line in found.skipped:
            book.warn(line)
        if found.skipped and found.path is None:
            book.warn(f"no checkpoint in {out} is whole: the run starts anew")
        return None if found.path is None else str(found.path)

    path: str | None = from_first(newest)
    if path is not None:
        checkpoint.load(step, Path(path))
        book.event("resume", step=step.index, checkpoint=Path(path).name)


class _Saver:
    """Saves now and then; which steps are saved is the same on every worker."""

    def __init__(
        self,
        step: TrainingStep,
        out: Path,
        keep: int,
        digest: str,
        book: "_Book",
        save_every: int | None,
        heirs: Heirs | None = None,
    ) -> None:
        self._step, self._out, self._keep, self._digest, self._book = step, out, keep, digest, book
        self._every, self._heirs = save_every, heirs
        self._next = step.index + 1 if save_every is None else _multiple(save_every, step.index)
        self._saved = -1
        self._seconds: deque[float] = deque(maxlen=20)

    def after(self, report: StepReport) -> None:
        """Save if it is time to."""
        self._seconds.append(report.seconds)
        if self._step.index == self._next:
            self.save()
        while self._heirs is not None and 0 < self._next < self._step.index:  # the others saved without this worker
            self._save_as_heir(self._heirs, self._next)

    def save(self) -> None:
        """Save, unless this step is saved."""
        if self._saved == self._step.index:
            return
        if self._heirs is not None:
            self._save_as_heir(self._heirs, self._step.index)
            return
        began = time.perf_counter()
        path = checkpoint.save(self._step, self._out, keep=self._keep, task_digest=self._digest)
        self._saved = self._step.index
        seconds = time.perf_counter() - began
        self._book.event("checkpoint", step=self._saved, checkpoint=path.name, seconds=seconds)
        if self._every is not None:
            self._next = _multiple(self._every, self._saved)
        elif self._seconds:
            self._next = self._saved + from_first(lambda: math.ceil(20 * seconds / max(1e-6, min(self._seconds))))

    def _save_as_heir(self, heirs: Heirs, index: int) -> None:
        """Save without those that are lost: the first that lives does it, and says when it is done again."""

        def save() -> int:
            began = time.perf_counter()
            path = heirs.save(self._out, keep=self._keep, task_digest=self._digest)
            seconds = time.perf_counter() - began
            self._book.event("checkpoint", step=self._step.index, checkpoint=path.name, seconds=seconds)
            return self._after(index, seconds)

        self._next, self._saved = heirs.once(f"save/{index}", save), index

    def _after(self, index: int, seconds: float) -> int:
        """The next step that is saved."""
        if self._every is not None:
            return _multiple(self._every, index)
        return index + math.ceil(20 * seconds / max(1e-6, min(self._seconds))) if self._seconds else self._next


def _multiple(every: int, index: int) -> int:
    return index - index % every + every if every else -1


class _Book:
    """Worker 0's record and observers; silent on the others."""

    def __init__(self, record: Record | None, claims: ExitStack) -> None:
        self._record, self._claims = record, claims
        self._observers: list[Observer] = []

    @classmethod
    @contextmanager
    def opened(cls, out: Path, rank: int) -> "Iterator[_Book]":
        record = Record(out / RECORD) if rank == 0 else None
        claims = ExitStack()
        book = cls(record, claims)
        try:
            yield book
        except SheafError as error:
            book.event("failed", error=type(error).__name__, message=str(error))
            raise
        finally:
            for observer in book._observers:
                book._close(observer)
            if book._record is not None:
                book._record.close()
            claims.close()

    def begin(
        self,
        step: TrainingStep,
        steps: int,
        events: dict[str, dict[str, Any]],
        observers: Sequence[ObserverFactory],
    ) -> None:
        """Write down what starts, and make the observers."""
        self.event("start", step=step.index, steps=steps, plan=str(step.plan), workers=step.workers)
        for kind, values in events.items():
            self.event(kind, **values)
        if self._record is not None:
            for make in observers:
                self._guarded(make, lambda make=make: self._observers.append(make(step.index)))

    def inherit(self, out: Path) -> None:
        """Write from here on: whoever did is lost, and so is the claim to the directory."""
        if self._record is None:
            with suppress(RunError):  # whoever did is about to be gone
                self._claims.enter_context(claimed(out))
            self._record = Record(out / RECORD)

    def report(self, report: StepReport) -> None:
        """Write down a step and show it."""
        if self._record is not None:
            self._record.step(report)
        for observer in list(self._observers):
            if not self._guarded(observer, lambda observer=observer: observer(report)):
                self._observers.remove(observer)

    def event(self, kind: str, **values: Any) -> None:
        """Write down something else."""
        if self._record is not None:
            self._record.event(kind, **values)

    def warn(self, text: str) -> None:
        """Say what the user should know, on stderr and in the record."""
        if self._record is not None:
            print(f"sheaf: {text}", file=sys.stderr)
            self.event("warning", message=text)

    def _close(self, observer: Observer) -> None:
        close = getattr(observer, "close", None)
        if close is not None:
            self._guarded(observer, close)

    def _guarded(self, who: object, call: Callable[[], object]) -> bool:
        try:
            call()
        except Exception as error:  # noqa: BLE001  watching never stops a run
            self.warn(
                f"{getattr(who, '__name__', type(who).__name__)} raised {type(error).__name__}: {error}; left out"
            )
            return False
        return True
