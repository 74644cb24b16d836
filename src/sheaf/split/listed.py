"""Which lists of modules are experts that replicas can deal out whole, found by running the model and watching calls.

A list is taken for experts where its modules are alike, each is called with one tensor of rows and returns one with as
many, and none is given what another of them computed, as the layers of a stack are.
"""

import random
from collections.abc import Callable, Collection, Iterator
from contextlib import ExitStack
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from sheaf.graph.facts import GLUE
from sheaf.graph.trace import SMALL_BYTES
from sheaf.plans.split import Cut, Move, Slice, SplitFacts
from sheaf.split.alone import Alone
from sheaf.split.common import Common
from sheaf.split.experts import Dealing
from sheaf.split.mode import leaves
from sheaf.split.rehearsal import Rehearses, Try, Units
from sheaf.task import Task

MOST_DIMS = 4
_OWNER = "\x1f"  # between a block's name and whose experts' work is counted
_ROW_BYTES = 8 * 12  # what a replica tells of one call


def candidates(
    model: nn.Module, wanted: Callable[[str], bool], left: Collection[str] = ()
) -> dict[str, dict[str, nn.Module]]:
    """Lists of modules that are alike and hold nothing that others hold, by name; the outermost that are not ``left``.

    >>> model = nn.ModuleDict({"experts": nn.ModuleList(nn.Linear(2, 2) for _ in range(3)), "head": nn.Linear(2, 2)})
    >>> {name: list(found) for name, found in candidates(model, lambda _name: True).items()}
    {'experts': ['experts.0', 'experts.1', 'experts.2']}
    """
    uses: dict[int, int] = {}
    for module in model.modules():
        for parameter in module._parameters.values():
            uses[id(parameter)] = uses.get(id(parameter), 0) + 1
    found: dict[str, dict[str, nn.Module]] = {}
    for name, module in model.named_modules():
        if not isinstance(module, nn.ModuleList | nn.ModuleDict) or name in left:
            continue
        if any(name.startswith(f"{one}.") for one in found):
            continue
        children = {f"{name}.{key}" if name else key: child for key, child in module.named_children()}
        looks = {
            (type(child), *((key, one.shape, one.dtype, one.requires_grad) for key, one in child.named_parameters()))
            for child in children.values()
        }
        held = [(f"{path}.{key}", one) for path, child in children.items() for key, one in child.named_parameters()]
        own = all(uses[id(one)] == 1 and one.ndim and wanted(path) for path, one in held)
        if len(children) > 1 and len(looks) == 1 and held and own:
            found[name] = children
    return found


class _Listing(Rehearses):
    """Watches what candidates are called with; ``left`` says of a list why it is none of experts."""

    def __init__(self, lists: dict[str, dict[str, nn.Module]], owners: dict[str, int], left: dict[str, str]) -> None:
        super().__init__(Alone(1), {})
        self.found, self.block = Try(), GLUE
        self.called: dict[str, dict[str, float]] = {}  # by list and block, the bytes of rows out and back
        self._left, self._owners = left, owners
        self._of = {
            id(one): name
            for name, modules in lists.items()
            for module in modules.values()
            for one in module.parameters()
        }
        self._made: dict[str, list[tuple[str, Any]]] = {name: [] for name in lists}
        self._inside = ""
        self._wrapped = [module for modules in lists.values() for module in modules.values()]
        for name, modules in lists.items():
            for path, module in modules.items():
                self._wrap(name, path, module)

    def unwrap(self) -> None:
        """Give the modules their own forward back."""
        for module in self._wrapped:
            module.__dict__.pop("forward", None)

    def _wrap(self, name: str, path: str, module: nn.Module) -> None:
        forward = module.forward

        def watched(*args: Any, **kwargs: Any) -> Any:
            if self._inside:
                return forward(*args, **kwargs)
            return self._call(name, path, module, forward, args, kwargs)

        module.forward = watched

    def _call(self, name: str, path: str, module: nn.Module, forward: Any, args: Any, kwargs: Any) -> Any:
        if torch._C._current_graph_task_id() != -1:
            self._left.setdefault(name, f"{path} runs again in backward (the model's own checkpointing does that)")
            return forward(*args, **kwargs)
        block, self.block, self._inside = self.block, f"{self.block}{_OWNER}{self._owners[path]}", name
        before = (_generators(), [one._version for one in module.buffers()])
        try:
            result = forward(*args, **kwargs)
        finally:
            self.block, self._inside = block, ""
        after = (_generators(), [one._version for one in module.buffers()])
        why = self._wrong(name, path, args, kwargs, result)
        if before[0] != after[0]:
            why = f"{path} draws numbers from Python's or numpy's generator"
        elif before[1] != after[1]:
            why = f"{path} changes a buffer (a batch norm does that)"
        if why:
            self._left.setdefault(name, why)
            return result
        by_block = self.called.setdefault(name, {})
        by_block[block] = by_block.get(block, 0.0) + args[0].nbytes + result.nbytes
        self._made[name].append((path, result.grad_fn))
        return result

    def _wrong(self, name: str, path: str, args: Any, kwargs: Any, result: Any) -> str:
        """Why a call is none of an expert's; nothing where it is."""
        if len(args) != 1 or kwargs or not isinstance(args[0], Tensor) or not args[0].is_floating_point():
            return f"{path} is called with other things than one tensor of rows"
        given = args[0]
        if not 1 <= given.ndim <= MOST_DIMS or not isinstance(result, Tensor) or result.shape[:-1] != given.shape[:-1]:
            return f"{path} does not return one tensor with a row for each row that it is given"
        chained = _first(given.grad_fn, {node: other for other, node in self._made[name] if other != path and node})
        return f"{path} is given what {chained} computed, so they are layers of a stack" if chained else ""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if not self._inside:
            for leaf in leaves(args, kwargs or {}):
                if id(leaf) in self._of and not getattr(func, "__name__", "").startswith("__get"):
                    self._left.setdefault(self._of[id(leaf)], "a parameter of its modules is used outside of them")
        return func(*args, **(kwargs or {}))


def _generators() -> tuple[Any, Any, Any]:
    state: Any = np.random.get_state(legacy=False)["state"]
    return random.getstate(), state["key"].tobytes(), state["pos"]


def _first(start: Any, wanted: dict[Any, str]) -> str:
    """The first of the wanted nodes that a history holds, by name."""
    met: set[Any] = set()
    stack = [start] if wanted else []
    while stack:
        node = stack.pop()
        if node is None or node in met:
            continue
        if node in wanted:
            return wanted[node]
        met.add(node)
        stack += [other for other, _ in node.next_functions]
    return ""


class _Lists(Dealing):
    """Takes lists of modules for experts."""

    def decide(self) -> SplitFacts:
        taken: dict[str, dict[str, nn.Module]] = {}
        tried, called = Try(), dict[str, dict[str, float]]()
        while lists := candidates(self.model, self._wanted, self.left):
            self.known.clear()
            tried, called = self.attempt({}, counted=True), self.last.called
            for name in lists:
                if name not in called:
                    self.left.setdefault(name, f"no module of {name} was called")
            taken = {name: modules for name, modules in lists.items() if name not in self.left}
            if len(taken) == len(lists):
                break
            taken = {}
        dealt = {path: owner for modules in taken.values() for path, owner in self._owners(modules).items()}
        slices: dict[str, Slice] = {}
        for path, owner in dealt.items():
            for key, one in self.model.get_submodule(path).named_parameters():
                sizes = tuple(one.shape[0] * (worker == owner) for worker in range(self.workers))
                slices[f"{path}.{key}"] = Slice(0, Cut(sizes))
        return SplitFacts(
            degree=self.workers,
            samples=self.samples,
            slices=slices,
            dealt=dealt,
            moves=tuple(_moves({name: called[name] for name in taken}, len(dealt) // max(len(taken), 1))),
            closed=dict(self.left),
            work=_shares(tried.flops, self.workers),
            activations=_shares(tried.saved, self.workers),
        )

    def _owners(self, modules: dict[str, nn.Module]) -> dict[str, int]:
        cut = Cut.even(len(modules), self.workers)
        dealt = [worker for worker, size in enumerate(cut.sizes) for _ in range(size)]
        return dict(zip(modules, dealt, strict=True))

    def _mode(self, units: dict[str, Units], workers: int) -> _Listing:  # noqa: ARG002 - experts have none
        lists = candidates(self.model, self._wanted, self.left)
        owners = {path: owner for modules in lists.values() for path, owner in self._owners(modules).items()}
        self.last = _Listing(lists, owners, self.left)
        return self.last

    def _enter(self, stack: ExitStack, mode: Rehearses, module: list[str]) -> None:
        super()._enter(stack, mode, module)
        assert isinstance(mode, _Listing)
        stack.callback(mode.unwrap)

    def _after(self, error: Exception, module: str, alone: bool) -> None:  # noqa: ARG002 - nothing is split
        limit = f"of at most {SMALL_BYTES // 2**30} GiB"
        found = f"experts that are modules of a list are found by values in models {limit}"
        self._with_values(error, module, remedy=f"; {found}: use tp in place of ep")


def _moves(called: dict[str, dict[str, float]], experts: int) -> Iterator[Move]:
    """Rows out and back, in one message each way for a list, and their gradients; before that, who sends how many."""
    for name, by_block in called.items():
        total = sum(by_block.values())
        for block, size in by_block.items():
            part = size / total if total else 0.0
            yield Move(block, "all_gather", round(part * _ROW_BYTES * experts), backward=False, why="who sends what")
            for backward in (False, True):
                yield Move(block, "all_to_all", round(size / 2), backward=backward, why=f"rows for {name}")
                yield Move(block, "all_to_all", round(size / 2), backward=backward, why=f"rows from {name}")


def _shares(counted: dict[str, float], workers: int) -> dict[str, float]:
    """By block, what the busiest worker has of it over what one has that computes its own microbatch alone.

    >>> _shares({"a": 6.0, f"a{_OWNER}0": 3.0, f"a{_OWNER}1": 1.0, "b": 5.0}, 2)
    {'a': 1.2, 'b': 1.0}
    """
    own: dict[str, float] = {}
    dealt: dict[str, dict[str, float]] = {}
    for key, value in counted.items():
        block, _, owner = key.partition(_OWNER)
        own.setdefault(block, 0.0)
        if owner:
            dealt.setdefault(block, {})[owner] = value
        else:
            own[block] = value
    shares: dict[str, float] = {}
    for block, value in own.items():
        alone = value + sum(dealt.get(block, {}).values())
        if alone:
            shares[block] = (value + workers * max(dealt.get(block, {}).values(), default=0.0)) / alone
    return shares


def listed(
    task: Task,
    workers: int,
    *,
    samples: int,
    wanted: Callable[[str], bool] = lambda _name: True,
    common: Common | None = None,
) -> SplitFacts:
    """Which modules in lists replicas can deal out, each to one of ``workers``, and what sending rows to them moves.

    ``wanted`` says of a parameter's name whether it may be an expert's; ``dealt`` who holds which module; ``closed`` of
    lists that are none of experts why. ``common`` is what other rehearsals of the task have found, and is added to.

    Raises PlanError when the model cannot be run so.
    """
    return _Lists(task, workers, samples, wanted, common).decide()
