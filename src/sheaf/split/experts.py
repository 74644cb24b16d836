"""Which parameters are stacks of experts that replicas can deal out, found by running the model without memory."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor

from sheaf.errors import first_line
from sheaf.graph.facts import GLUE
from sheaf.plans.split import Cut, Move, Slice, SplitFacts
from sheaf.split.alone import Alone
from sheaf.split.common import Common
from sheaf.split.mode import leaves
from sheaf.split.moves import sliced
from sheaf.split.rehearsal import Rehearses, Stage, Try, Units
from sheaf.split.sending import HEAD, Sending
from sheaf.split.sent import Unsendable
from sheaf.split.tensor import Split
from sheaf.task import Task


class Choosing(Sending, Rehearses):
    """Takes parameters that may be experts for such, until one is used as none can be; ``left`` says then why.

    Worker 0 is here, and what others would send is zeros.
    """

    def __init__(
        self, team: Alone, named: Mapping[str, Tensor], shared: Iterable[Tensor], left: dict[str, str]
    ) -> None:
        sizes = {name: tensor.shape[0] for name, tensor in named.items()}
        cuts = {name: Slice(0, Cut.even(size, team.workers)) for name, size in sizes.items()}
        super().__init__(team, {id(tensor): (name, cuts[name]) for name, tensor in named.items()}, shared)
        self.found, self.block = Try(moves=team.moves), GLUE
        self._left, self._places = left, {name: id(tensor) for name, tensor in named.items()}
        self._used: set[str] = set()
        self._running = False

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if self._running:
            return super().__torch_function__(func, types, args, kwargs)
        self._running = True
        try:
            result = self._tried(func, types, args, kwargs or {})
        finally:
            self._running = False
        if isinstance(result, Tensor):
            self._used.update(
                self._parameters[id(leaf)][0] for leaf in leaves(args, kwargs or {}) if id(leaf) in self._parameters
            )
        return result

    def _tried(self, func: Callable[..., Any], types: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """With every parameter whole that turns out to be no expert, unless it has been used for one before."""
        while True:
            try:
                return super().__torch_function__(func, types, args, kwargs)
            except Unsendable as error:
                place = self._places.get(error.name)
                if place not in self._parameters or error.name in self._used:
                    raise
                self._left[error.name] = str(error)
                self._held.pop(place, None)
                self._parameters.pop(place)
                self.found.slices.pop(error.name, None)

    def _parameter(self, local: Tensor) -> Split:
        held = self._held.get(id(local))
        if held is None:
            name, found = self._parameters[id(local)]
            self.found.slices[name] = found
            part = sliced(local, found.dim, found.cut, 0)
            held = self._held[id(local)] = (local, Split(part, found.dim, found.cut, origin=name, held=True))
        return held[1]

    def counted(self, ends: Tensor, rows: int) -> tuple[int, ...]:
        """Where values are not known, each expert has as many rows as any other."""
        if isinstance(ends, FakeTensor):
            return Cut.even(rows, ends.shape[0]).sizes
        return super().counted(ends, rows)

    def _agree(
        self,
        kind: int,  # noqa: ARG002 - everyone agrees
        what: str,
        device: torch.device,  # noqa: ARG002
        alike: Sequence[int],  # noqa: ARG002
        *own: int,
    ) -> list[tuple[int, ...]]:
        """All are as this one."""
        workers = self.team.workers
        told_bytes = 8 * (HEAD + len(own)) * workers
        self.found.moves.append(Move(self.block, "all_gather", told_bytes, backward=False, why=what))
        return [tuple(own)] * workers


class Dealing(Stage):
    """Runs the rehearsals of one model; ``left`` says of what was taken for experts why it is none."""

    def __init__(
        self, task: Task, workers: int, samples: int, wanted: Callable[[str], bool], common: Common | None
    ) -> None:
        self.left: dict[str, str] = {}
        self._wanted = wanted
        super().__init__(task, workers, samples, False, lambda _name: False, common)


class _Experts(Dealing):
    """Takes parameters for stacks of experts."""

    def decide(self) -> SplitFacts:
        self.attempt({})  # leaves out what is no expert; what is done twice for that is not counted
        best = self.attempt({}, counted=True)
        alone = self.attempt({}, workers=1, counted=True) if best.slices else best
        return SplitFacts(
            degree=self.workers,
            samples=self.samples,
            slices=best.slices,
            moves=tuple(best.moves) if best.slices else (),
            closed={name: why for name, why in self.left.items() if self.model.get_parameter(name).ndim > 2},
            work={name: best.flops.get(name, 0.0) / flops for name, flops in alone.flops.items() if flops},
            activations={name: best.saved.get(name, 0.0) / size for name, size in alone.saved.items() if size},
        )

    def _mode(self, units: dict[str, Units], workers: int) -> Choosing:  # noqa: ARG002 - experts have none
        named = dict(self.model.named_parameters())
        chosen = {
            name: tensor
            for name, tensor in named.items()
            if workers > 1 and tensor.ndim > 0 and tensor.shape[0] > 1 and name not in self.left and self._wanted(name)
        }
        shared = [tensor for name, tensor in named.items() if name not in chosen]
        return Choosing(Alone(workers), chosen, [*shared, *self.model.buffers()], self.left)

    def _after(self, error: Exception, module: str, alone: bool) -> None:
        """Leave the parameter out that was no expert; else go on with real values, or give up."""
        if isinstance(error, Unsendable) and error.name and error.name not in self.left:
            self.left[error.name] = first_line(error)
            return
        self._with_values(error, module, f" with tokens sent to experts{' (not even alone)' if alone else ''}")


def experts(
    task: Task,
    workers: int,
    *,
    samples: int,
    wanted: Callable[[str], bool] = lambda _name: True,
    common: Common | None = None,
) -> SplitFacts:
    """Which parameters replicas can deal out by expert, and what sending tokens moves for ``samples`` samples.

    ``wanted`` says of a parameter's name whether it may be one. ``closed`` says of stacks of matrices that are none
    why. Moves are one replica's: its own microbatch's rows out and back. ``common`` is what other rehearsals of the
    task have found, and is added to.

    Raises PlanError when the model cannot be run so.
    """
    return _Experts(task, workers, samples, wanted, common).decide()
