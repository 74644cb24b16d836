"""Building without memory: every tensor operation of a constructor is recorded on fake tensors, and replayed on demand.

The idea of deferred initialisation is torchdistx's (Meta, 2022, ``deferred_init``); here each random operation draws
from a generator keyed by the name of the tensor it ends up in, so that a value depends on nothing else.
"""

from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from sheaf.task.streams import key

_ANSWERED = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)


@dataclass(frozen=True, eq=False)
class _Operation:
    function: OpOverload
    arguments: tuple[Any, ...]
    keywords: dict[str, Any]
    results: tuple[Tensor, ...]  # fakes
    reads: frozenset[int]  # storages of tensor arguments
    writes: frozenset[int]  # storages of results, and of arguments changed in place

    @property
    def draws(self) -> bool:
        return torch.Tag.nondeterministic_seeded in self.function.tags


class Recorder(TorchDispatchMode):
    """Records what happens to fake tensors, and computes any of them for real, alone, whenever asked."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.mode = FakeTensorMode(allow_non_fake_inputs=True)
        # The mode keeps weak references to the storages of constants; in torch 2.13 a collection of garbage that frees
        # both together ends the process. They only serve to forget constants, which nothing here reads.
        self.mode.fake_tensor_converter.add_constant_storage_mapping = _no_mapping
        self._seed = seed
        self._operations: list[_Operation] = []
        self._writers: dict[int, list[int]] = defaultdict(list)
        self._stream_of: dict[int, int] = {}  # operation -> seed
        self._reads = _Reads(self.compute)

    def __enter__(self) -> "Recorder":  # noqa: PYI034 - beartype cannot check Self
        self.mode.__enter__()
        super().__enter__()
        self._reads.__enter__()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._reads.__exit__(kind, error, trace)
        super().__exit__(kind, error, trace)
        self.mode.__exit__(kind, error, trace)

    def __torch_dispatch__(
        self, function: OpOverload, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        keywords = keywords or {}
        if function in _ANSWERED:
            real = tree_map(lambda leaf: self.compute(leaf) if isinstance(leaf, FakeTensor) else leaf, arguments)
            with _disable_current_modes():
                return function(*real, **keywords)
        result = function(*arguments, **keywords)
        fakes = tuple(leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor))
        if fakes:
            self._record(function, arguments, keywords, fakes)
        return result

    def name_storages(self, names: dict[str, Tensor]) -> None:
        """Give every random operation its stream: that of the first named tensor which depends on it."""
        for name, tensor in names.items():
            drawn = 0
            for index in self._needed(tensor):
                if self._operations[index].draws and index not in self._stream_of:
                    self._stream_of[index] = key(self._seed, "init", name, drawn)
                    drawn += 1

    def compute(self, fake: Tensor) -> Tensor:
        """The real value of a recorded fake tensor, on the CPU; only what it depends on is computed."""
        if not isinstance(fake, FakeTensor):
            return fake
        real: dict[int, Tensor] = {}

        def lookup(leaf: Any) -> Any:
            if isinstance(leaf, FakeTensor):
                if id(leaf) not in real:
                    raise RuntimeError("a tensor made outside the recording was used in it")
                return real[id(leaf)]
            return leaf

        with _disable_current_modes(), torch.no_grad():
            outer = torch.default_generator.get_state()
            try:
                for index in self._needed(fake):
                    operation = self._operations[index]
                    keywords = dict(operation.keywords)
                    if operation.draws:
                        self._seed_for(index, keywords)
                    outputs = operation.function(*tree_map(lookup, operation.arguments), **tree_map(lookup, keywords))
                    flat = [leaf for leaf in tree_flatten(outputs)[0] if isinstance(leaf, Tensor)]
                    real.update({id(made): value for made, value in zip(operation.results, flat, strict=True)})
            finally:
                torch.default_generator.set_state(outer)
        return real[id(fake)]

    def _record(
        self, function: OpOverload, arguments: tuple[Any, ...], keywords: dict[str, Any], fakes: tuple[Tensor, ...]
    ) -> None:
        inputs = [leaf for leaf in tree_flatten((arguments, keywords))[0] if isinstance(leaf, FakeTensor)]
        changed = _changed(function, arguments, keywords)
        operation = _Operation(function, arguments, keywords, fakes, _storages(inputs), _storages([*fakes, *changed]))
        for storage in operation.writes:
            self._writers[storage].append(len(self._operations))
        self._operations.append(operation)

    def _needed(self, fake: Tensor) -> list[int]:
        pending, seen, needed = list(_storages([fake])), set[int](), set[int]()
        while pending:
            storage = pending.pop()
            if storage in seen:
                continue
            seen.add(storage)
            for index in self._writers[storage]:
                if index not in needed:
                    needed.add(index)
                    pending.extend(self._operations[index].reads | self._operations[index].writes)
        return sorted(needed)

    def _seed_for(self, index: int, keywords: dict[str, Any]) -> None:
        stream = self._stream_of.get(index, key(self._seed, "init", "", index))
        given = keywords.get("generator")
        if given is not None:
            keywords["generator"] = torch.Generator().manual_seed(key(stream, given.initial_seed()))
        torch.default_generator.manual_seed(stream)


class _Reads(TorchFunctionMode):
    """Answers a constructor that reads a fake tensor's memory, which has none: numpy would read address 0."""

    _NAMES = ("numpy", "tolist", "__array__")

    def __init__(self, compute: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self._compute = compute

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        if getattr(function, "__name__", "") in self._NAMES and isinstance(arguments[0], FakeTensor):
            arguments = (self._compute(arguments[0]).detach(), *arguments[1:])
            with _disable_current_modes():
                return function(*arguments, **(keywords or {}))
        return function(*arguments, **(keywords or {}))


def _no_mapping(_fake: Tensor) -> None:
    """Keep no weak reference."""


def _storages(tensors: list[Any]) -> frozenset[int]:
    return frozenset(torch._C._storage_id(tensor) for tensor in tensors)


def _changed(function: OpOverload, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> list[Tensor]:
    changed: list[Tensor] = []
    for position, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = arguments[position] if position < len(arguments) else keywords.get(argument.name)
            changed.extend(leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, FakeTensor))
    return changed


def replace_tensors(value: Any, swap: Callable[[Tensor], Tensor]) -> Any:
    """A nest of lists, tuples and dicts with every tensor swapped; the same object when it holds none."""
    if isinstance(value, Tensor):
        return swap(value)
    if isinstance(value, dict):
        changed = {name: replace_tensors(item, swap) for name, item in value.items()}
        return changed if any(changed[name] is not item for name, item in value.items()) else value
    if isinstance(value, list | tuple) and not hasattr(value, "_fields"):
        items = [replace_tensors(item, swap) for item in value]
        return type(value)(items) if any(a is not b for a, b in zip(items, value, strict=True)) else value
    return value
