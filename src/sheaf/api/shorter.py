"""A stack of layers that do the same is rehearsed as three of them; what was found holds for all."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, TypeVar

from torch import nn

from sheaf.graph import ModelFacts
from sheaf.plans.split import SplitFacts
from sheaf.plans.stages import placed
from sheaf.task import Task

KEPT = 3  # layers: the first, one for all in the middle, the last
WORTH_IT = 6  # layers; of fewer all are rehearsed
T = TypeVar("T")


@dataclass(frozen=True)
class Shorter:
    """A task whose stack of ``layers`` layers at ``stack`` is cut down to three."""

    task: Task
    stack: str
    layers: int

    @classmethod
    def of(cls, task: Task, facts: ModelFacts) -> "Shorter | None":
        """The task made shorter; None where no run of six blocks or more is known to do the same work."""
        if isinstance(task.model, nn.Module) or task.weights is not None:
            return None
        run = _longest(facts)
        if run is None:
            return None
        stack, layers = run

        def model() -> nn.Module:
            made = task.model()
            cut_down(made, stack, layers)
            return made

        return cls(replace(task, model=model), stack, layers)

    def lengthened(self, found: SplitFacts) -> SplitFacts:
        """What was found of the three, for all of them."""
        return replace(
            found,
            slices=self._each(found.slices),
            moves=tuple(replace(move, block=name) for move in found.moves for name in self._names(move.block)),
            closed=self._each(found.closed),
            work=self._each(found.work),
            activations=self._each(found.activations),
            dealt=self._each(found.dealt),
            partial=tuple(name for one in found.partial for name in self._names(one)),
        )

    def _each(self, values: dict[str, T]) -> dict[str, T]:
        return {each: value for name, value in values.items() for each in self._names(name)}

    def _names(self, name: str) -> list[str]:
        """The names for which one of the shorter model stands."""
        if not name.startswith(f"{self.stack}."):
            return [name]
        number, dot, rest = name[len(self.stack) + 1 :].partition(".")
        alike = {"0": range(1), "1": range(1, self.layers - 1), "2": range(self.layers - 1, self.layers)}
        return [f"{self.stack}.{place}{dot}{rest}" for place in alike[number]]


def cut_down(model: nn.Module, stack: str, layers: int) -> None:
    """Leave three of the ``layers`` at ``stack`` of a model. Raises TypeError where they are no such list."""
    held = model.get_submodule(stack)
    if not isinstance(held, nn.ModuleList | nn.Sequential) or len(held) != layers:
        raise TypeError(f"{stack} is no list of {layers} layers")
    del held[KEPT:]


@contextmanager
def shortened(model: nn.Module, stack: str, layers: int) -> Iterator[None]:
    """Cut a model down for a while, as ``cut_down`` does."""
    held = model.get_submodule(stack)
    before = dict(held._modules)
    cut_down(model, stack, layers)
    try:
        yield
    finally:
        held._modules = before


def _longest(facts: ModelFacts) -> tuple[str, int] | None:
    """The stack with most layers in a row that do the same, numbered from 0, and how many; None with too few."""
    stacks: dict[str, list[Any]] = {}
    for block in placed(facts):
        stack, _, number = block.name.rpartition(".")
        if stack and number.isdigit():
            stacks.setdefault(stack, []).append((int(number), block.signature, len(block.parameters)))
    shared = {alias for one in facts.parameters for alias in one.aliases}
    fine = [
        (len(found), stack)
        for stack, found in stacks.items()
        if [number for number, *_ in found] == list(range(len(found)))
        and len({(signature, count) for _, signature, count in found}) == 1
        and not any(name.startswith(f"{stack}.") for name in shared)
    ]
    most, stack = max(fine, default=(0, ""))
    return (stack, most) if most >= WORTH_IT else None
