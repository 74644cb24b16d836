"""Which parameters are tables of rows, what uses them, and how many different rows microbatches look up.

The model runs on fake tensors while its batch stays real: indices are computed from the batch, so lookups see the very
rows that training will ask for, and nothing else is computed.
"""

import copy
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sheaf.graph.facts import TableFact
from sheaf.task import Blueprint, Microbatch, Order, Task, arguments, as_loss, fetch, key, moved

LOOKUPS: tuple[Callable[..., Any], ...] = (F.embedding, F.embedding_bag, torch.embedding)
_SAME = ("dtype", "device", "requires_grad", "layout", "is_leaf", "is_sparse", "is_cuda", "is_cpu", "is_meta", "grad")
# what tells the same of a block of a table as of the whole
ABOUT = frozenset({getattr(Tensor, name).__get__ for name in _SAME} | {Tensor.is_floating_point, Tensor.element_size})
SHAPES = frozenset(
    {getattr(Tensor, name).__get__ for name in ("shape", "ndim")}
    | {Tensor.size, Tensor.dim, Tensor.numel, Tensor.__len__}
)
_SAMPLED = 8  # microbatches


class Uses(TorchFunctionMode):
    """Notes the functions that take each parameter of a model on fake tensors, and the rows that they look up.

    ``ids`` by parameter name: of each lookup; None where its indices are not known without computing.
    """

    def __init__(self, blueprint: Blueprint, *, most: int | None = None) -> None:
        super().__init__()
        self._names = {id(fake): name for name, fake in blueprint.model.named_parameters()}
        self._most = most
        self.functions: dict[str, set[Callable[..., Any]]] = {}
        self.ids: dict[str, list[Tensor | None]] = {}
        self.count = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func not in ABOUT and func not in SHAPES:
            for leaf in _leaves((*args, *kwargs.values())):
                name = self._names.get(id(leaf))
                if name is not None:
                    self._note(name, func, args, kwargs)
        return func(*args, **kwargs)

    def _note(self, name: str, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.functions.setdefault(name, set()).add(func)
        if func not in LOOKUPS:
            return
        wanted = kwargs.get("input", args[0] if args and id(args[0]) not in self._names else None)
        if func is torch.embedding:
            wanted = kwargs.get("indices", args[1] if len(args) > 1 else None)
        known = wanted if isinstance(wanted, Tensor) and not isinstance(wanted, FakeTensor) else None
        self.ids.setdefault(name, []).append(None if known is None else known.detach().reshape(-1).unique())
        self.count += 1
        if self.count == self._most:
            raise _Enough


class _Enough(Exception):
    """All lookups have been seen."""


def noted(task: Task, blueprint: Blueprint, step: int, microbatch: Microbatch, *, most: int | None = None) -> Uses:
    """A forward and its loss on the blueprint's model, until its end, ``most`` lookups, or control flow on values."""
    seen = Uses(blueprint, most=most)
    with torch.random.fork_rng(devices=[]), put_back(blueprint.model):
        batch = fetch(task, microbatch.samples, key(task.seed, "data", step, microbatch.index))
        batch = moved(batch, torch.device("cpu"), torch.float64 if task.precision == "fp64" else None)
        with suppress(Exception), torch.no_grad(), seen:  # what is truly wrong, the real forward will raise
            positional, named = arguments(task, batch)
            as_loss(task.loss(blueprint.model(*positional, **named), batch), len(microbatch.samples))
    return seen


def uses(task: Task, blueprint: Blueprint) -> dict[str, set[Callable[..., Any]]]:
    """The torch functions that take each parameter in the first forward and its loss, by canonical name.

    ``blueprint.task`` has its microbatch decided. What comes after control flow on values is not seen.
    """
    return noted(task, blueprint, 0, _order(task, task.microbatch or task.batch).step(0)[0]).functions


def tables(task: Task, samples: int, blueprint: Blueprint | None = None) -> tuple[TableFact, ...]:
    """The tables of the task's model, with rows counted in microbatches of ``samples`` samples; none without any.

    Where the task leaves the microbatch open they are counted in eighths of a batch. ``blueprint`` is the task's, as it
    was built.
    """
    blueprint = blueprint or Blueprint(task)
    if not any(isinstance(module, nn.Embedding | nn.EmbeddingBag) for module in blueprint.model.modules()):
        return ()
    samples = samples if task.microbatch else max(1, min(samples, task.batch // _SAMPLED))
    found = [(step, one) for step, one in _sampled(task, samples) if len(one.samples) == min(samples, task.num_samples)]
    first = noted(task, blueprint, *found[0])
    looked_up = [name for name, ids in first.ids.items() if ids and all(one is not None for one in ids)]
    ids = {name: [_together(first.ids[name])] for name in looked_up}
    for step, microbatch in found[1:] if looked_up else ():
        seen = noted(task, blueprint, step, microbatch, most=first.count).ids
        for name in looked_up:
            ids[name].append(_together(seen.get(name, [])))
    return tuple(_fact(blueprint, name, first.functions[name], ids[name], samples) for name in looked_up)


def _fact(
    blueprint: Blueprint, name: str, functions: set[Callable[..., Any]], ids: Sequence[Tensor], samples: int
) -> TableFact:
    fake = blueprint.parameters[name]
    means: list[float] = []
    for count in range(1, len(ids) + 1):
        runs = [ids[start : start + count] for start in range(0, len(ids) - count + 1, count)]
        means.append(sum(torch.cat(list(run)).unique().numel() for run in runs) / len(runs))
    return TableFact(
        name=name,
        rows=fake.shape[0],
        row_bytes=fake[0].numel() * blueprint.dtype_of(fake).itemsize,
        samples=samples,
        distinct=tuple(means),
        whole=bool(functions - set(LOOKUPS)),
    )


def _together(ids: Sequence[Tensor | None]) -> Tensor:
    known = [one for one in ids if one is not None]
    return torch.cat(known).unique() if known else torch.empty(0, dtype=torch.int64)


def _sampled(task: Task, samples: int) -> list[tuple[int, Microbatch]]:
    """Microbatches of the first steps, spread over as many as it takes."""
    order = _order(task, samples)
    found: list[tuple[int, Microbatch]] = []
    for step in range(min(_SAMPLED, order.steps_per_epoch)):
        found += [(step, microbatch) for microbatch in order.step(step)]
        if len(found) >= _SAMPLED:
            break
    return found[:_SAMPLED]


def _order(task: Task, samples: int) -> Order:
    return Order(task.num_samples, task.batch, samples, task.seed, shuffle=task.shuffle)


def _leaves(values: Sequence[Any]) -> Iterator[Any]:
    for value in values:
        if type(value) in (list, tuple):
            yield from _leaves(value)
        else:
            yield value


def _copied(value: Any) -> Any:
    return value.copy() if type(value) in (dict, OrderedDict, list, set) else copy.copy(value)


@contextmanager
def put_back(model: nn.Module) -> Iterator[None]:
    """Give modules back what a forward changed in them."""
    modules = [(module, dict(module.__dict__)) for module in model.modules()]
    plain = [
        (value, _copied(value) if value else ())
        for _, attributes in modules
        for value in attributes.values()
        if isinstance(value, dict | list | set)
    ]
    try:
        yield
    finally:
        for module, attributes in modules:
            module.__dict__.clear()
            module.__dict__.update(attributes)
        for value, before in plain:
            if not value and not before:
                continue
            if isinstance(value, list):
                value[:] = before
            else:
                value.clear()
                value.update(before)
