"""Which parameters are split, and how: found by running the model on tensors without memory, with nobody to talk to.

A parameter is cut when a function first meets it, by the rule of that function. Where a later view would need other
units (heads of an attention, queries and keys and values in one matrix), the units are tried and those kept that move
the fewest bytes; layers that differ by numbers in their names are decided together.
"""

from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import sheaf.split.rules  # noqa: F401  # pyright: ignore[reportUnusedImport] - gives the rules to the registry
from sheaf.errors import PlanError, first_line
from sheaf.graph import cut as blocks_of
from sheaf.graph.example import example, global_streams_kept, precision
from sheaf.graph.facts import GLUE, LOSS
from sheaf.graph.trace import SMALL_BYTES, quiet, widen
from sheaf.plans.split import Cut, Move, Slice, SplitFacts, pattern
from sheaf.split.alone import AT, Alone
from sheaf.split.closing import close
from sheaf.split.common import Common
from sheaf.split.counting import Counted, Saved
from sheaf.split.mode import Splitting
from sheaf.split.moves import sliced
from sheaf.split.recalled import Recalled
from sheaf.split.tensor import Split
from sheaf.task import Task, arguments, as_loss
from sheaf.task.blueprint import Blueprint

MOST_RUNS = 80
MESSAGE_BYTES = 64 * 1024  # what a message costs beside its bytes, in bytes
Kept = Callable[[str], bool]  # whether the parameter of a name is to be kept whole


@dataclass(frozen=True)
class Units:
    """How a parameter is to be cut: in each of ``outer`` runs, between units of ``unit`` elements."""

    outer: int = 1
    unit: int = 1


@dataclass
class Try:
    """One rehearsal: what was decided, asked for and moved."""

    slices: dict[str, Slice] = field(default_factory=dict[str, Slice])
    asked: dict[str, list[Units]] = field(default_factory=dict[str, list[Units]])
    moves: list[Move] = field(default_factory=list[Move])
    foreseen: list[Move] = field(default_factory=list[Move])  # in a backward that is not run
    flops: dict[str, float] = field(default_factory=dict[str, float])
    saved: dict[str, float] = field(default_factory=dict[str, float])
    partial: set[str] = field(default_factory=set[str])

    @property
    def cost_bytes(self) -> float:
        """What is moved, counting an all-reduce twice and each message for a few bytes more."""
        moves = (*self.moves, *self.foreseen)
        return sum(MESSAGE_BYTES + move.size_bytes * (1 + (move.operation == "all_reduce")) for move in moves)


class Rehearses(Splitting):
    """A mode that looks at what would happen: ``found`` so far, ``block`` the one that runs."""

    found: Try
    block: str

    @property
    def place(self) -> str:
        """The block that runs."""
        return AT + self.block


class Rehearsing(Rehearses):
    """Decides as it goes; parameters are whole fakes, their slices cut off them."""

    def __init__(
        self,
        team: Alone,
        names: dict[int, str],
        units: dict[str, Units],
        whole: Callable[[str], bool],
        small: Collection[str],
        *,
        sequence: bool,
    ) -> None:
        super().__init__(team, {}, sequence=sequence)
        self.names, self.found, self.block = names, Try(moves=team.moves), GLUE
        self._units, self._whole, self._small = units, whole, small

    def propose(self, tensor: Tensor, dim: int, cut: Cut | None = None) -> Split | None:
        """Cut a parameter that is not cut yet, if it may be."""
        name = self.names.get(id(tensor))
        if name is None or id(tensor) in self._parameters or self._whole(name):
            return None
        if tensor.shape[dim] < 2 or (cut is None and tensor.ndim == 2 and name in self._small):
            return None
        if cut is None:
            units = self._units.get(pattern(name), Units())
            if tensor.shape[dim] % (units.outer * units.unit):
                units = Units()
            cut = Cut.even(tensor.shape[dim], self.team.workers, outer=units.outer, unit=units.unit)
        self.found.slices[name] = Slice(dim, cut)
        self._parameters[id(tensor)] = (name, Slice(dim, cut))
        return self._parameter(tensor)

    def enter(self, tensor: Tensor, why: str) -> Tensor:
        """Backward will add up its gradient; a parameter's, once per step."""
        if self._note_partial(tensor):
            return tensor
        place = -id(tensor) if isinstance(tensor, Split) else id(tensor)  # one that is gone may have had the same
        before = self._entered.get(place)
        entered = super().enter(tensor, why)
        if self._entered.get(place) is not before and entered.requires_grad:
            self._foresee("reduce_scatter" if isinstance(tensor, Split) else "all_reduce", entered, why)
        return entered

    def part(self, tensor: Tensor, dim: int, cut: Cut, why: str) -> Tensor:
        """Backward will gather the gradient of what is cut off."""
        if id(tensor) not in self._parameters and self.propose(tensor, dim, cut) is None and self._note_partial(tensor):
            return sliced(tensor, dim, cut, self.team.rank)
        part = super().part(tensor, dim, cut, why)
        if type(tensor) is not Split and id(tensor) not in self._parameters and part.requires_grad:
            self._foresee("all_gather", tensor, why)
        return part

    def _note_partial(self, tensor: Tensor) -> bool:
        """Whether it is a parameter that stays whole."""
        name = None if id(tensor) in self._parameters else self.names.get(id(tensor))
        if name is not None:
            self.found.partial.add(name)
        return name is not None

    def _foresee(self, operation: str, whole: Tensor, why: str) -> None:
        self.found.foreseen.append(Move(self.block, operation, whole.nbytes, backward=True, why=why))

    def refine(self, split: Split, outer: int, unit: int) -> None:
        """Note what would help; the units are put in the parameter's own elements."""
        if split.origin is None or split.scale < 1 or split.origin not in self.found.slices:
            return
        held = self.found.slices[split.origin].cut
        wanted = Units(held.outer * outer, unit * split.scale)
        if held.length % (wanted.outer * wanted.unit) or held.length // (wanted.outer * wanted.unit) < 2:
            return
        if wanted != Units(held.outer) and wanted not in self.found.asked.get(split.origin, []):
            self.found.asked.setdefault(split.origin, []).append(wanted)

    def _concerns(self, value: Any) -> bool:
        return super()._concerns(value) or (isinstance(value, Tensor) and id(value) in self.names)

    def _parameter(self, local: Tensor) -> Split:
        held = self._held.get(id(local))
        if held is None:
            name, found = self._parameters[id(local)]
            part = sliced(local, found.dim, found.cut, 0)
            held = self._held[id(local)] = (
                local,
                Split(part, found.dim, found.cut, origin=name, held=True),
            )
        return held[1]


def rehearse(
    task: Task,
    workers: int,
    *,
    samples: int,
    sequence: bool = False,
    whole: Kept = lambda _name: False,
    common: Common | None = None,
) -> SplitFacts:
    """How the task's layers are split among ``workers`` workers, and what that moves for ``samples`` samples.

    ``whole`` says of a parameter's name that it is to be kept whole. Modules in which splitting fails are kept whole,
    and named in ``closed``. A model whose path depends on values is rehearsed with real ones when it is small.
    ``common`` is what other rehearsals of the task have found, and is added to.

    Raises PlanError when the model cannot be run so.
    """
    return Stage(task, workers, samples, sequence, whole, common).decide()


class Stage:
    """Runs the rehearsals of one model."""

    def __init__(
        self, task: Task, workers: int, samples: int, sequence: bool, whole: Kept, common: Common | None = None
    ) -> None:
        self.task, self.workers, self.samples, self.sequence, self.kept = task, workers, samples, sequence, whole
        self.common = common or Common(Blueprint(task))
        self.closed: dict[str, str] = {}
        self.runs = 0
        self.known: dict[tuple[tuple[str, Units], ...], Try] = {}
        self._set(real=False)

    def decide(self) -> SplitFacts:
        units: dict[str, Units] = {}
        best = self.attempt(units)
        settled: set[str] = set()
        while self.runs < MOST_RUNS:
            open_groups = [group for group in _groups(best.asked) if group not in settled]
            if not open_groups:
                break
            group = open_groups[0]
            settled.add(group)
            units, best = self._settle(group, units, best, depth=3)
        best = self.attempt(units, counted=True)
        alone = self.alone(units)
        return SplitFacts(
            degree=self.workers,
            samples=self.samples,
            slices=best.slices,
            moves=tuple(best.moves),
            partial=tuple(sorted(best.partial - best.slices.keys())),
            closed=dict(self.closed),
            work={name: best.flops.get(name, 0.0) / flops for name, flops in alone.flops.items() if flops},
            activations={name: best.saved.get(name, 0.0) / size for name, size in alone.saved.items() if size},
        )

    def alone(self, units: dict[str, Units]) -> Try:
        """What one worker computes and keeps: the same for all numbers of workers that keep the same modules whole."""
        key = (self.samples, self.real, *sorted(self.closed))
        if key not in self.common.alone:
            self.common.alone[key] = self.attempt(units, workers=1, counted=True)
        return self.common.alone[key]

    def _settle(self, group: str, units: dict[str, Units], best: Try, depth: int) -> tuple[dict[str, Units], Try]:
        """The cheapest units for the parameters of one group of layers."""
        asked = _groups(best.asked).get(group, {})
        for index in range(max((len(options) for options in asked.values()), default=0)):
            if self.runs >= MOST_RUNS:
                break
            changed = units | {name: options[min(index, len(options) - 1)] for name, options in asked.items()}
            if changed == units:
                continue
            found = self.attempt(changed)
            if depth > 1 and group in _groups(found.asked):
                changed, found = self._settle(group, changed, found, depth - 1)
            if found.cost_bytes < best.cost_bytes:
                units, best = changed, found
        return units, best

    def attempt(self, units: dict[str, Units], workers: int | None = None, *, counted: bool = False) -> Try:
        """One forward, and where it is ``counted`` backward; what cannot be split is closed, and all run again.

        Without backward, what it would move is foreseen.
        """
        key = (("", Units(workers or self.workers, int(counted))), *sorted(units.items(), key=str))
        if key in self.known:
            return self.known[key]
        while True:
            self.runs += 1
            mode = self._mode(units, workers or self.workers)
            module = [""]
            try:
                with ExitStack() as stack:
                    self._enter(stack, mode, module)
                    self._run(mode, counted=counted)
            except Exception as error:  # noqa: BLE001 - whatever it is, it may come of splitting
                self._after(error, module[0], workers == 1)
                continue
            finally:
                self.model.zero_grad(set_to_none=True)
            if counted:
                mode.found.foreseen.clear()
            self.known[key] = mode.found
            return mode.found

    def _set(self, *, real: bool) -> None:
        self.real = real
        self.blueprint = Blueprint(self.task) if real else self.common.blueprint
        self.model, self.mode = self.blueprint.model, self.blueprint.mode
        self.weight_bytes = sum(one.numel() * one.element_size() for one in self.model.parameters())
        if real:
            self.model = self.blueprint.fill(torch.device("cpu"))
        elif self.task.precision == "fp64":
            widen(self.model, self.mode)
        self.batch = example(self.task, self.samples) if real else self.common.batch(self.task, self.samples)
        self.model.train()
        self.names = {id(parameter): name for name, parameter in self.model.named_parameters()}
        self.small = small(self.names.values(), [parameter.numel() for parameter in self.model.parameters()])

    def _mode(self, units: dict[str, Units], workers: int) -> Rehearses:
        def whole(name: str) -> bool:
            return workers == 1 or self.kept(name) or any(_inside(name, module) for module in self.closed)

        return Rehearsing(Alone(workers), self.names, units, whole, self.small, sequence=self.sequence and workers > 1)

    def _enter(self, stack: ExitStack, mode: Rehearses, module: list[str]) -> None:
        stack.enter_context(global_streams_kept())
        stack.enter_context(_followed(self.model, mode, module))
        for handle in close(self.model, self.closed, mode):
            stack.callback(handle.remove)
        if not self.real:
            stack.enter_context(quiet())
            stack.enter_context(self.mode)
            stack.enter_context(Recalled(self.mode, self.common.known))

    def _given(self, mode: Any) -> tuple[Any, Any]:  # noqa: ARG002 - sequences are split by it
        """What the model is called with."""
        return arguments(self.task, self.batch)

    def _run(self, mode: Rehearses, *, counted: bool) -> None:
        positional, named = self._given(mode)
        with ExitStack() as stack:
            stack.enter_context(precision(self.task, torch.device("cpu")))
            if counted:
                pack = Saved(mode, self.model).pack
                stack.enter_context(torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor))
                stack.enter_context(Counted(mode))
            stack.enter_context(mode)
            output = self.model(*positional, **named)
            mode.block = LOSS
            loss = as_loss(self.task.loss(output, self.batch), self.samples)
        assert not isinstance(loss.sum, Split)  # one number has no dimension to be cut along
        if counted and loss.sum.requires_grad:
            loss.sum.backward()

    def _after(self, error: Exception, module: str, alone: bool) -> None:
        """Close the module that failed; where splitting is not to blame, go on with real values, or give up."""
        plain = alone or any(_inside(module, closed) for closed in self.closed)
        if not plain:
            self.closed[module] = f"{type(error).__name__}: {first_line(error)}"
            for name in [name for name in self.closed if name != module and _inside(name, module)]:
                del self.closed[name]
            return
        self._with_values(error, module)

    def _with_values(self, error: Exception, module: str, how: str = "", remedy: str = "") -> None:
        """Go on with real values, or give up."""
        if not self.real and self.weight_bytes <= SMALL_BYTES:
            self.closed.clear()
            self.known.clear()
            self._set(real=True)
            return
        raise PlanError(
            f"{module or 'the model'} cannot be rehearsed{how}: {type(error).__name__}: {first_line(error)}{remedy}"
        ) from error


def small(names: Iterable[str], elements: Iterable[int]) -> frozenset[str]:
    """Parameters of which splitting saves little: all alike, in every layer together, have less than a hundredth.

    >>> sorted(small(["tokens", "gate", "h.0.keys", "h.1.keys"], [970, 4, 8, 8]))
    ['gate']
    """
    sizes = dict(zip(names, elements, strict=True))
    alike: dict[str, int] = {}
    for name, size in sizes.items():
        alike[pattern(name)] = alike.get(pattern(name), 0) + size
    return frozenset(name for name in sizes if alike[pattern(name)] < sum(sizes.values()) // 100)


def _groups(asked: dict[str, list[Units]]) -> dict[str, dict[str, list[Units]]]:
    """Requests by the module that holds the layers that ask, then by parameter, both with open numbers."""
    grouped: dict[str, dict[str, list[Units]]] = {}
    for name, options in asked.items():
        path = pattern(name).split(".")
        known = grouped.setdefault(".".join(path[:-2]), {}).setdefault(".".join(path), [])
        known.extend(option for option in options if option not in known)
    return grouped


def _inside(name: str, module: str) -> bool:
    return not module or name == module or name.startswith(f"{module}.")


@contextmanager
def _followed(model: nn.Module, mode: Rehearses, module: list[str]) -> Iterator[None]:
    """Keep the names of the block and of the innermost module that run."""
    blocks = {id(block): name for name, block in blocks_of(model).items()}
    stack: list[tuple[str, str]] = []

    def enter(name: str, inner: nn.Module) -> Callable[..., None]:
        def before(*_: Any) -> None:
            stack.append((mode.block, module[0]))
            mode.block, module[0] = blocks.get(id(inner), mode.block), name

        return before

    def leave(*_: Any) -> None:
        mode.block, module[0] = stack.pop()

    handles = [
        inner.register_forward_pre_hook(enter(name, inner), prepend=True) for name, inner in model.named_modules()
    ]
    handles += [inner.register_forward_hook(leave) for inner in model.modules()]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
