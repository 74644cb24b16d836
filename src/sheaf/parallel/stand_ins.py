"""What blocks and functions of other stages would return, without values: from a run on fake tensors."""

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten, tree_iter

from sheaf.errors import SheafError
from sheaf.parallel.remote import Remote, no_leaf
from sheaf.parallel.trees import PLAIN, mapped, tensors
from sheaf.split.moves import unset
from sheaf.split.tensor import Split

MOST_CALLS = 10_000  # of functions that are kept: a number that is another in each step makes each call a new one
_SAID = PLAIN | {torch.dtype, torch.device, torch.layout, torch.memory_format}  # what a value says all about
_HOST = torch.device("cpu")
_OWN = ("_parameters", "_forward_pre_hooks", "_forward_hooks")  # what is put back


@dataclass(frozen=True)
class Original:
    """A block as its class has it: its own forward, its parameters without values, and no hooks but the model's."""

    block: nn.Module
    forward: Callable[..., Any]
    held: tuple[tuple[nn.Module, dict[str, Any]], ...]

    @contextmanager
    def there(self, like: Callable[[Tensor], Tensor]) -> Iterator[None]:
        """Put it back, with fakes for the buffers, which are real in every stage and must stay as they are."""
        before = [(module, {key: module.__dict__[key] for key in (*_OWN, "_buffers")}) for module, _ in self.held]
        for module, own in self.held:
            buffers = {key: None if buffer is None else like(buffer) for key, buffer in module._buffers.items()}
            module.__dict__.update(own, _buffers=buffers)
        try:
            yield
        finally:
            for module, now in before:
                module.__dict__.update(now)


def originals(
    blocks: Mapping[str, nn.Module],
    dtype_of: Callable[[Tensor], torch.dtype],
    mode: FakeTensorMode,
    device: torch.device = _HOST,
) -> dict[str, Original]:
    """Every block of a model that nothing has been put on yet; parameters get the dtype in which they are held, and the
    device.
    """
    made: dict[int, Tensor] = {}

    def wide(fake: Tensor | None) -> Tensor | None:
        if fake is None or (dtype_of(fake) == fake.dtype and fake.device.type == device.type):
            return fake
        if id(fake) not in made:
            with mode:
                there = fake.detach().to(device, dtype_of(fake))
                made[id(fake)] = nn.Parameter(there, requires_grad=fake.requires_grad)
        return made[id(fake)]

    def own(module: nn.Module) -> dict[str, Any]:
        kept: dict[str, Any] = {key: module.__dict__[key].copy() for key in _OWN}
        kept["_parameters"] = {key: wide(fake) for key, fake in module._parameters.items()}
        return kept

    return {
        name: Original(block, block.forward, tuple((module, own(module)) for module in block.modules()))
        for name, block in blocks.items()
    }


@dataclass(frozen=True)
class Outline:
    """What something returned on fakes. ``changed`` are the places, among the tensors it was given, of those it changed
    in place, and whether they have a gradient now; ``passed``, by tensor returned, the place of the given one that it
    is, or -1. ``common``: the output is kept for the next time, and nobody may change it.
    """

    output: Any
    changed: tuple[tuple[int, bool], ...] = ()
    passed: tuple[int, ...] = ()
    draws: bool = False
    common: bool = False


class StandIns:
    """Runs blocks and functions on fake tensors of ``mode``.

    What comes by data (a branch on a value, a shape that depends on values) cannot be run so, and gives None.
    """

    def __init__(self, mode: FakeTensorMode, blocks: Mapping[str, Original]) -> None:
        mode.allow_non_fake_inputs = True  # what is computed from the batch alone is real in every stage
        self.mode, self._blocks = mode, blocks
        self._known: dict[Any, Outline] = {}
        self._called: dict[Any, Outline] = {}
        self._after: dict[Any, tuple[Tensor, Outline]] = {}  # by block and looks of its only input
        self.why = ""

    def block(self, name: str, given: Any, faked: Callable[[], Any]) -> Outline | None:
        """A block's, kept by what its arguments ``given`` look like; ``faked`` gives them as fakes of their own."""
        looks = _only(given)
        quick = (name, id(looks), *_modes())
        if looks is not None and quick in self._after:
            return self._after[quick][1]
        key = (name, *_modes(), signature(given, strides=True))
        known = self._known.get(key)
        if known is not None:
            if looks is not None and len(self._after) < MOST_CALLS:
                self._after[quick] = looks, known
            return known
        original = self._blocks[name]
        args, kwargs = faked()
        with original.there(self.like):
            made = self._run(original.forward, args, kwargs)
        if made is None:
            return None
        made = replace(made, output=mapped(cut_off, made.output))
        if all(type(leaf) in PLAIN or isinstance(leaf, Tensor) for leaf in tree_iter(made.output)):
            made = self._known[key] = replace(made, common=True)
        return made

    def function(self, function: Callable[..., Any], given: Any, faked: Callable[[], Any]) -> Outline | None:
        """A function's: as ``block``, where it only makes new tensors of tensors and plain values."""
        plain = all(type(leaf) in _SAID or isinstance(leaf, Tensor) for leaf in tree_iter(given))
        key = (function, *_modes(), signature(given, strides=True)) if plain else None
        known = self._called.get(key) if plain else None
        if known is not None:
            return known
        args, kwargs = faked()
        made = self._run(function, args, kwargs)
        if made is not None and plain and not made.changed and not made.draws and _is_new(made.output, (args, kwargs)):
            self._called = self._called if len(self._called) < MOST_CALLS else {}
            self._called[key] = replace(made, output=mapped(self.like, made.output), common=True)
        return made

    def like(self, tensor: Tensor) -> Tensor:
        """A fake of the same shape, type and device."""
        shown = tensor.local if isinstance(tensor, Split) else tensor
        with self.mode:
            if isinstance(tensor, FakeTensor) and tensor.layout is torch.strided:
                made = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
            else:
                made = unset(tuple(tensor.shape), shown)
            return cut_off(made, requires_grad=shown.requires_grad)

    def of(self, shape: list[int], dtype: str, *, requires_grad: bool, device: torch.device) -> Tensor:
        """A fake from a description."""
        with self.mode:
            made = torch.empty(shape, dtype=getattr(torch, dtype), device=device)
            return cut_off(made, requires_grad=requires_grad)

    def _run(self, function: Callable[..., Any], args: Any, kwargs: Any) -> Outline | None:
        given = list(tensors((args, kwargs)))
        before = [tensor._version for tensor in given]
        watch = _Draws()
        try:
            with torch._C.DisableTorchFunction(), self.mode, watch:
                output = function(*args, **kwargs)
        except SheafError:
            raise
        except Exception as error:  # noqa: BLE001 - what is truly wrong, the stage that has the values will raise
            self.why = f"{type(error).__name__}: {error}".splitlines()[0]
            return None
        changed = tuple(
            (place, tensor.requires_grad) for place, tensor in enumerate(given) if tensor._version != before[place]
        )
        places = {id(tensor): place for place, tensor in enumerate(given)}
        return Outline(output, changed, tuple(places.get(id(leaf), -1) for leaf in tensors(output)), watch.seen)


class _Draws(TorchDispatchMode):
    """Notes whether anything draws random numbers."""

    seen = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.seen = self.seen or torch.Tag.nondeterministic_seeded in func.tags
        return func(*args, **(kwargs or {}))


def _only(given: Any) -> Tensor | None:
    """What stands for the only argument, where it is a tensor of another stage that nobody has changed."""
    args, kwargs = given
    return args[0].entry.looks if len(args) == 1 and not kwargs and type(args[0]) is Remote else None


def cut_off(leaf: Tensor, *, requires_grad: bool | None = None) -> Tensor:
    """A tensor without its history, that still says whether it has a gradient."""
    wanted = leaf.requires_grad if requires_grad is None else requires_grad
    return no_leaf(leaf.detach().requires_grad_()) if wanted else leaf.detach()


def blanks(value: Any) -> Any:
    """Zeros for every tensor."""
    return mapped(lambda leaf: torch.zeros(leaf.shape, dtype=leaf.dtype, device=leaf.device), value)


def signature(value: Any, *, strides: bool = False) -> Any:
    """What output shapes depend on: the shapes of tensors, and plain values; with ``strides`` how they lie in memory,
    too, which may differ between stages.
    """
    if isinstance(value, Tensor):
        shown = value.entry.shown if isinstance(value, Remote) else value
        shown = shown.local if isinstance(shown, Split) else shown
        laid = shown.stride() if strides and shown.layout is torch.strided else ()
        return tuple(value.shape), value.dtype, shown.requires_grad, laid
    kind = type(value)
    if kind in _SAID:
        return kind, value
    if kind is tuple or kind is list:
        return kind, *(signature(inner, strides=strides) for inner in value)
    if kind is dict:
        return kind, *((key, signature(inner, strides=strides)) for key, inner in value.items())
    leaves, spec = tree_flatten(value)
    if len(leaves) == 1 and leaves[0] is value:
        return kind.__qualname__, *(signature(tensor, strides=strides) for tensor in tensors(value))
    return str(spec), *(signature(leaf, strides=strides) for leaf in leaves)


def kinds(value: Any) -> Any:
    """What tells calls of one function apart that need values from those that do not: types, without sizes."""
    leaves, spec = tree_flatten(value)
    return str(spec), tuple(leaf.dtype if isinstance(leaf, Tensor) else type(leaf) for leaf in leaves)


def _modes() -> tuple[bool, bool]:
    return torch.is_grad_enabled(), torch._C._is_any_autocast_enabled()


def _is_new(output: Any, given: Any) -> bool:
    """Whether the output is tensors that share no memory, with what was given or each other, and plain values."""
    if not all(type(leaf) in PLAIN or isinstance(leaf, Tensor) for leaf in tree_iter(output)):
        return False
    old = {tensor.untyped_storage()._cdata for tensor in tensors(given)}
    new = [tensor.untyped_storage()._cdata for tensor in tensors(output)]
    return len(set(new)) == len(new) and not old & set(new)
