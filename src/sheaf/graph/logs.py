"""What one block did, function by function, with names in place of its tensors: others are compared with it."""

from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from sheaf.graph.lent import Look

_PLAIN = frozenset(
    {int, float, bool, str, bytes, complex, type(None), type(...), torch.dtype, torch.device, torch.layout}
    | {torch.memory_format}
)


@dataclass
class Call:
    """One function that a block called: ``given`` and ``result`` with names in place of tensors."""

    function: Callable[..., Any]
    given: Any
    state: Any
    result: Any


class Names:
    """Names of the tensors that one block has seen, and values with names in place of tensors."""

    def __init__(self, module: nn.Module) -> None:
        self.known: dict[int, tuple[Any, ...]] = {}
        self.held: dict[tuple[Any, ...], Tensor] = {}
        self.outside: dict[int, Tensor] = {}
        self.objects: list[Any] = []
        self.is_plain = True
        for kind, named in (("parameter", module.named_parameters()), ("buffer", module.named_buffers())):
            for name, tensor in named:
                self.add((kind, name), tensor)

    def forget(self) -> None:
        """Let go of the block's own tensors: those whose history leads back to the names would keep each other."""
        self.known.clear()
        self.held.clear()

    def add(self, name: tuple[Any, ...], tensor: Tensor) -> None:
        """Call a tensor so; it is kept."""
        self.known[id(tensor)] = name
        self.held[name] = tensor

    def signed(self, value: Any) -> Any:  # noqa: PLR0911 - one for each kind of value
        """The value with names in place of tensors, to be compared; an object that is no plain value is itself."""
        if isinstance(value, Tensor):
            name = self.known.get(id(value))
            if name is None:
                self.outside[id(value)] = self.held["outside", id(value)] = value
                return "outside", id(value)
            return name
        kind = type(value)
        if kind in _PLAIN:
            return kind, value
        if isinstance(value, tuple | list):
            return kind, tuple([self.signed(item) for item in value])
        if kind is dict:
            return kind, tuple([(self.signed(key), self.signed(item)) for key, item in value.items()])
        if kind is slice:
            return kind, (self.signed(value.start), self.signed(value.stop), self.signed(value.step))
        self.is_plain = False
        self.objects.append(value)  # so that no other gets its id
        return "object", id(value)

    def built(self, signed: Any) -> Any:
        """The value of which that is the signed form."""
        kind, *rest = signed
        if isinstance(kind, str):
            return self.held[signed]
        if kind in _PLAIN:
            return rest[0]
        items = rest[0]
        if kind is dict:
            return {self.built(key): self.built(item) for key, item in items}
        made = [self.built(item) for item in items]
        return kind(*made) if hasattr(kind, "_fields") else slice(*made) if kind is slice else kind(made)


@dataclass(eq=False)
class Log:
    """What one block did, for others to follow. ``unfit`` says why none can; ``peers`` did the same, itself first."""

    block: str
    names: Names
    shared: dict[int, int]  # storages that are not its own -> bytes
    calls: list[Call] = field(default_factory=list[Call])
    looks: dict[Any, Look] = field(default_factory=dict[Any, Look])
    packed: dict[int, int] = field(default_factory=dict[int, int])
    used: set[int] = field(default_factory=set[int])  # storages that operators took
    follow: tuple[bool, ...] = ()  # which outputs follow from what is trained
    draws: dict[str, None] = field(default_factory=dict[str, None])
    batch_dependent: dict[str, None] = field(default_factory=dict[str, None])
    output: Any = None
    outputs: tuple[Any, ...] = ()  # names of tensors that it made
    output_storages: tuple[tuple[int, int], ...] = ()  # with their bytes
    given: dict[int, int] = field(default_factory=dict[int, int])  # storages of inputs -> input
    unfit: str = ""
    peers: list["Log"] = field(default_factory=list["Log"])
    came: dict[Any, Look] = field(default_factory=dict[Any, Look])  # gradients of outputs
    went: dict[int, Look] = field(default_factory=dict[int, Look])  # gradients of inputs
    is_mixed: bool = False  # some of its backward was counted elsewhere

    def is_as_made(self, tensor: Tensor) -> bool:
        """Whether a tensor that it made looks as it did then; changed in place, or by what is not seen, it may not."""
        look = self.looks.get(self.names.known.get(id(tensor)))
        return look is None or look == Look.of(tensor)

    def alike(self, other: "Log") -> bool:
        """Whether another block did the same."""
        return (
            not other.unfit
            and [(one.function, one.given, one.state, one.result) for one in self.calls]
            == [(one.function, one.given, one.state, one.result) for one in other.calls]
            and (self.looks, self.output, self.outputs) == (other.looks, other.output, other.outputs)
        )


@dataclass(eq=False)
class Follower:
    """A block that is being compared with a log."""

    block: str
    log: Log
    names: Names
    at: int = 0
    shown: Log | None = None  # whose backward is its own


def tensors_in(value: Any) -> list[Tensor]:
    """Every tensor in nested lists, tuples and dicts, in order."""
    if isinstance(value, Tensor):
        return [value]
    if isinstance(value, dict):
        value = list(value.values())
    if isinstance(value, list | tuple):
        return [tensor for item in value for tensor in tensors_in(item)]
    return []


def swapped_in(value: Any, swapped: dict[int, Tensor]) -> Any:
    """The value with some tensors, by their ids, replaced by others."""
    if isinstance(value, Tensor):
        return swapped.get(id(value), value)
    if type(value) is dict:
        return {key: swapped_in(item, swapped) for key, item in value.items()}
    if isinstance(value, list | tuple) and tensors_in(value):
        made = [swapped_in(item, swapped) for item in value]
        return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
    return value


def names_in(signed: Any) -> Iterator[tuple[Any, ...]]:
    """The names in a signed value, in order."""
    kind, *rest = signed
    if isinstance(kind, str):
        yield signed
    elif kind is dict:
        for pair in rest[0]:
            for one in pair:
                yield from names_in(one)
    elif kind not in _PLAIN:
        for one in rest[0]:
            yield from names_in(one)


def holds_objects(signed: Any) -> bool:
    """Whether there is anything in a signed value that is neither a tensor nor plain."""
    return any(name[0] == "object" for name in names_in(signed))
