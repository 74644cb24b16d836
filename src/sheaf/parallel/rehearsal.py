"""A forward on fake tensors before the first real one: in which order blocks run, and who uses whose parameters."""

from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map

from sheaf.graph.facts import GLUE
from sheaf.graph.lookups import put_back
from sheaf.parallel.portion import Portion
from sheaf.parallel.trees import line_of_model
from sheaf.plans.layout import Held, kept_whole
from sheaf.task import Order, arguments, fetch, key, moved


@dataclass(frozen=True)
class Rehearsal:
    """``order``: the blocks as forward calls them, each as often as it is called; ``outside``: parameters that are
    used while none of the blocks they live in is running, by canonical name; ``complete``: whether it reached the
    end, so that no control flow depends on data; ``free``: of each call, whether what it is given comes of the batch
    alone, and of no parameter. ``leaks``: (block that made a tensor and did not return it, block that uses it or "",
    line of the model that does).
    """

    order: tuple[str, ...]
    outside: frozenset[str]
    complete: bool
    free: tuple[bool, ...] = ()
    leaks: tuple[tuple[str, str, str], ...] = ()


def rehearse(portion: Portion, blocks: Mapping[str, nn.Module]) -> Rehearsal:
    """Run the portion's fake model on the first microbatch of the first step.

    Where control flow needs real values the rehearsal ends there: blocks that it did not reach follow in the order of
    definition. The same on every worker. What the forward changed in the modules (a tensor that it cached, a counter)
    is put back.
    """
    task = portion.task
    order: list[str] = []
    running: list[str] = []
    outside: set[str] = set()
    homes = homes_of(portion, blocks)
    names = {fake.untyped_storage()._cdata: name for name, fake in portion.parameters.items()}
    computed: dict[int, Tensor] = {}
    free: list[bool] = []

    made: dict[int, tuple[str, Tensor]] = {}  # by storage, what blocks that run keep to themselves; kept alive
    leaks: list[tuple[str, str, str]] = []

    def uses(tensor: Tensor) -> None:
        maker = made.get(tensor.untyped_storage()._cdata, ("", tensor))[0]
        if maker and maker not in running:
            leaks.append((maker, running[-1] if running else "", line_of_model()))
        name = names.get(tensor.untyped_storage()._cdata)
        if name is not None and not homes[name] & set(running):
            outside.add(name)

    first = Order(task.num_samples, task.batch, task.microbatch or task.batch, task.seed, shuffle=task.shuffle).step(0)
    held = (fake.dtype for fake in portion.parameters.values() if fake.is_floating_point())
    batch = moved(fetch(task, first[0].samples, key(task.seed, "data", 0, 0)), torch.device("cpu"), next(held, None))
    positional, named = tree_map(
        lambda leaf: portion.mode.from_tensor(leaf) if isinstance(leaf, Tensor) else leaf, arguments(task, batch)
    )
    complete = True

    def note(args: Any) -> None:
        free.append(not any(id(leaf) in computed for leaf in tree_iter(args) if isinstance(leaf, Tensor)))

    def returned(output: Any) -> None:
        for leaf in tensors_in(output):
            made.pop(leaf.untyped_storage()._cdata, None)

    def follow(given: Any, result: Any) -> None:
        held = {leaf.untyped_storage()._cdata for leaf in tree_iter(given) if isinstance(leaf, Tensor)}
        for leaf in tree_iter(result):
            if running and isinstance(leaf, Tensor) and leaf.untyped_storage()._cdata not in held:
                made[leaf.untyped_storage()._cdata] = running[-1], leaf
        leaves = [leaf for leaf in tree_iter(given) if isinstance(leaf, Tensor)]
        if any(id(leaf) in computed or leaf.untyped_storage()._cdata in names for leaf in leaves):
            computed.update({id(leaf): leaf for leaf in tree_iter(result) if isinstance(leaf, Tensor)})

    with put_back(portion.model), _running(blocks, order, running, note, returned):
        try:
            with portion.mode, _Arguments(uses, follow):
                portion.model(*positional, **named)
        except Exception:  # noqa: BLE001 - control flow on values; what is truly wrong, the real forward will raise
            complete = False
            known = dict(reversed([*zip(order, free, strict=False)]))
            order = list(dict.fromkeys(order)) + [name for name in blocks if name not in order]
            free = [known.get(name, False) for name in order]
    return Rehearsal(tuple(order), frozenset(outside), complete, tuple(free), tuple(leaks))


class _Arguments(TorchDispatchMode):
    """Shows every tensor that an operation is given."""

    def __init__(self, show: Callable[[Tensor], object], follow: Callable[[Any, Any], object] | None = None) -> None:
        super().__init__()
        self._show, self._follow = show, follow

    def __torch_dispatch__(
        self, function: OpOverload, types: Any, arguments: Any = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        for leaf in tree_iter((arguments, keywords or {})):
            if isinstance(leaf, Tensor):
                self._show(leaf)
        result = function(*arguments, **(keywords or {}))
        if self._follow is not None:
            self._follow((arguments, keywords or {}), result)
        return result


def tensors_in(output: Any) -> Iterator[Tensor]:
    """The tensors in what a module returned: in containers, and in the attributes of other objects."""
    for leaf in tree_iter(output):
        if isinstance(leaf, Tensor):
            yield leaf
        elif hasattr(leaf, "__dict__") and not isinstance(leaf, type | nn.Module):
            yield from (value for value in tree_iter(dict(vars(leaf))) if isinstance(value, Tensor))


def watching(show: Callable[[Tensor], object]) -> TorchDispatchMode:
    """A context in which ``show`` sees every tensor before an operation reads it."""
    return _Arguments(show)


@contextmanager
def _running(
    blocks: Mapping[str, nn.Module],
    order: list[str],
    running: list[str],
    note: Callable[[Any], object],
    returned: Callable[[Any], object],
) -> Iterator[None]:
    def enter(name: str) -> Callable[..., None]:
        return lambda _module, args, kwargs: (order.append(name), running.append(name), note((args, kwargs)), None)[-1]

    handles = [block.register_forward_pre_hook(enter(name), with_kwargs=True) for name, block in blocks.items()]
    handles += [
        block.register_forward_hook(lambda _module, _arguments, output: (running.pop(), returned(output), None)[-1])
        for block in blocks.values()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def homes_of(portion: Portion, blocks: Mapping[str, nn.Module]) -> dict[str, set[str]]:
    """The blocks in which each parameter lives, by canonical name."""
    canonical = {alias: name for name, aliases in portion.names.items() for alias in (name, *aliases)}
    homes: dict[str, set[str]] = {name: set() for name in portion.names}
    for block_name, block in blocks.items():
        for name, _ in block.named_parameters(remove_duplicate=False):
            homes[canonical[f"{block_name}.{name}" if block_name else name]].add(block_name)
    return homes


def home(portion: Portion, blocks: Mapping[str, nn.Module], rehearsal: Rehearsal) -> dict[str, str | None]:
    """The one block that alone uses a parameter, by canonical name; None where there is none such."""
    homes = homes_of(portion, blocks)
    return {
        name: next(iter(found)) if len(found) == 1 and name not in rehearsal.outside else None
        for name, found in homes.items()
    }


def unit_members(
    portion: Portion, blocks: dict[str, nn.Module], rehearsal: Rehearsal, bucket_bytes: int
) -> dict[str, list[Held]]:
    """Which parameters each unit holds: a block those that only it uses, GLUE all others, whole for the whole step.

    Blocks that are too small to be worth a collective are left to GLUE too.
    """
    members: dict[str, list[Held]] = {}
    homes = home(portion, blocks, rehearsal)
    sizes: dict[str | None, int] = {}
    for name, block in homes.items():
        if not portion.holds(name):
            continue
        fake = portion.parameters[name]
        sizes[block] = sizes.get(block, 0) + fake.numel() * portion.dtype_of(fake).itemsize
    for name, block in homes.items():
        if not portion.holds(name):
            continue
        fake = portion.parameters[name]
        dtype = str(portion.dtype_of(fake)).removeprefix("torch.")
        unit = GLUE if block is None or kept_whole(sizes[block], bucket_bytes) else block
        members.setdefault(unit, []).append(Held(name, fake.numel(), dtype, fake.requires_grad))
    return members


def orders_of(
    order: Sequence[str], units: Collection[str], calls: Mapping[str, tuple[int, ...]] | None, stages: Sequence[int]
) -> dict[int, list[str]]:
    """By stage, the units as its forward comes to them; those that no forward comes to are with the first stage.

    ``calls`` are the stages of each block's calls; None where there is one stage.

    >>> orders_of(["a", "b", "a"], ["a", "b"], {"a": (0, 2), "b": (1,)}, (0, 2))
    {0: ['a', 'b'], 2: ['a']}
    """
    made: dict[int, list[str]] = {stage: [] for stage in stages}
    count: dict[str, int] = {}
    for name in order:
        number = count[name] = count.get(name, -1) + 1
        stage = stages[0] if calls is None else calls.get(name, (-1,))[min(number, len(calls.get(name, (-1,))) - 1)]
        if name in units and stage in made:
            made[stage].append(name)
    met = {name for names in made.values() for name in names}
    made[stages[0]] += [name for name in units if name not in met and name != GLUE]
    return made
