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
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes
from torch.utils._pytree import tree_flatten, tree_map

from sheaf.task.fakes import Fakes
from sheaf.task.reach import replace_tensors
from sheaf.task.storage import storage_id
from sheaf.task.streams import key

__all__ = ["Recorder", "replace_tensors"]

_ANSWERED = (torch.ops.aten._local_scalar_dense.default, torch.ops.aten.equal.default)
_Geometry = tuple[int, int, torch.Size, tuple[int, ...], torch.dtype]


@dataclass(frozen=True, eq=False)
class _Operation:
    function: Callable[..., Any]
    arguments: tuple[Any, ...]  # fakes, and copies of the real tensors that were given
    keywords: dict[str, Any]
    results: tuple[Tensor, ...]  # fakes
    reads: frozenset[int]  # storages of tensor arguments
    writes: frozenset[int]  # storages of results, and of arguments changed in place

    @property
    def draws(self) -> bool:
        return torch.Tag.nondeterministic_seeded in getattr(self.function, "tags", ())


class Recorder(TorchDispatchMode):
    """Records what happens to fake tensors, and computes any of them for real, alone, whenever asked.

    ``unseen`` says what happened that replaying the recording would not bring back, None when nothing did.
    """

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.mode = Fakes(allow_non_fake_inputs=True)
        # The mode keeps weak references to the storages of constants; in torch 2.13 a collection of garbage that frees
        # both together ends the process. They only serve to forget constants, which nothing here reads.
        setattr(self.mode.fake_tensor_converter, "add_constant_storage_mapping", _no_mapping)  # noqa: B010
        self._seed = seed
        self._operations: list[_Operation] = []
        self._writers: dict[int, list[int]] = defaultdict(list)
        self._stream_of: dict[int, int] = {}  # operation -> seed
        self._geometry: dict[int, _Geometry] = {}  # id of a fake -> where in memory the recording left it
        self._borrowed: list[tuple[Tensor, Tensor]] = []  # a real tensor that a fake is a view of, and its copy
        self._borrowing: set[int] = set()  # storages of such fakes
        self.unseen: str | None = None
        self._reads = _Reads(self)

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
        self._look(function, arguments, keywords)
        given = tree_map(_copied, (arguments, keywords))
        result = function(*arguments, **keywords)
        fakes = tuple(leaf for leaf in tree_flatten(result)[0] if isinstance(leaf, Tensor))
        if fakes:
            self._note_views(function, (arguments, keywords), given, fakes)
            self._record(function, given[0], given[1], fakes)
        return result

    def give(self, fakes: list[Tensor], reals: list[Tensor]) -> None:
        """Let these fakes have the values of these real tensors, whose memory they share with each other or not."""
        storages = _storages(list(fakes))
        self._append(_Operation(_together, (_Reals(reals),), {}, tuple(fakes), frozenset(), storages))

    def assign(self, target: Tensor, value: Tensor, assignment: Callable[[], Any]) -> None:
        """Record ``target.data = value``, which is no operation of torch's."""
        before = target.data  # recorded, and so keeps the old storage, whose id stands for it
        assignment()
        storages = _storages([before, target, value])
        self._append(_Operation(_assign, (target, value), {}, (target,), storages, storages))

    def check(self, fakes: list[Tensor]) -> str | None:
        """Why replaying would not give these tensors as they are now; None when it would."""
        for fake in fakes:
            self._check_geometry(fake)
        with _disable_current_modes():
            if any(not _equal(real, copy) for real, copy in self._borrowed):
                self.unseen = self.unseen or "memory that a tensor shares with numpy was changed after it was made"
        return self.unseen

    def name_storages(self, names: dict[str, Tensor]) -> None:
        """Give every random operation its stream: that of the first named tensor which depends on it."""
        for name, tensor in names.items():
            drawn = 0
            for index in self._needed([tensor]):
                if self._operations[index].draws and index not in self._stream_of:
                    self._stream_of[index] = key(self._seed, "init", name, drawn)
                    drawn += 1

    def compute(self, fake: Tensor) -> Tensor:
        """The real value of a recorded fake tensor, on the CPU, in memory of its own; nothing more is computed."""
        return self.compute_all([fake])[0]

    def compute_all(self, fakes: list[Tensor]) -> list[Tensor]:
        """The real values of fake tensors, computed together: those that share memory share it here too."""
        real: dict[int, Tensor] = {}

        def lookup(leaf: Any) -> Any:
            if isinstance(leaf, FakeTensor):
                if id(leaf) not in real:
                    raise RuntimeError("a tensor made outside the recording was used in it")
                return real[id(leaf)]
            return _copied(leaf)

        with _disable_current_modes(), torch.no_grad():
            outer = torch.default_generator.get_state()
            try:
                for index in self._needed([fake for fake in fakes if isinstance(fake, FakeTensor)]):
                    operation = self._operations[index]
                    keywords = dict(operation.keywords)
                    if operation.draws:
                        self._seed_for(index, keywords)
                    outputs = operation.function(*tree_map(lookup, operation.arguments), **tree_map(lookup, keywords))
                    flat = [leaf for leaf in tree_flatten(outputs)[0] if isinstance(leaf, Tensor)]
                    real.update({id(made): value for made, value in zip(operation.results, flat, strict=True)})
            finally:
                torch.default_generator.set_state(outer)
            return [lookup(fake) for fake in fakes]

    def _look(self, function: OpOverload, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> None:
        """Notice what replaying will not see: tensors that moved by themselves, and changes of real memory."""
        for leaf in tree_flatten((arguments, keywords))[0]:
            if isinstance(leaf, FakeTensor):
                self._check_geometry(leaf)
        for leaf in _changed(function, arguments, keywords):
            if not isinstance(leaf, FakeTensor) or _storage(leaf) in self._borrowing:
                self.unseen = self.unseen or f"{function} changes a tensor that was not made by torch, as from_numpy's"

    def _check_geometry(self, fake: Tensor) -> None:
        if self._geometry.get(id(fake)) != _geometry(fake):
            self.unseen = self.unseen or "a tensor was given other memory without an operation of torch's"

    def _note_views(self, function: OpOverload, actual: Any, given: Any, fakes: tuple[Tensor, ...]) -> None:
        views = any(argument.alias_info is not None for argument in function._schema.arguments)
        if views:
            pairs = zip(tree_flatten(actual)[0], tree_flatten(given)[0], strict=True)
            borrowed = [(real, copy) for real, copy in pairs if real is not copy and not _fresh(function, real)]
            if borrowed:
                self._borrowed.extend(borrowed)
                self._borrowing |= _storages(list(fakes))

    def _record(
        self, function: OpOverload, arguments: tuple[Any, ...], keywords: dict[str, Any], fakes: tuple[Tensor, ...]
    ) -> None:
        inputs = [leaf for leaf in tree_flatten((arguments, keywords))[0] if isinstance(leaf, FakeTensor)]
        changed = [leaf for leaf in _changed(function, arguments, keywords) if isinstance(leaf, FakeTensor)]
        writes = _storages([*fakes, *changed])
        if any(fake.layout is not torch.strided for fake in (*inputs, *fakes)):
            self.unseen = self.unseen or "a sparse tensor is made, whose memory cannot be followed"
        self._append(_Operation(function, arguments, keywords, fakes, _storages(inputs), writes))

    def _append(self, operation: _Operation) -> None:
        for storage in operation.writes:
            self._writers[storage].append(len(self._operations))
        self._operations.append(operation)
        self._geometry.update({id(fake): _geometry(fake) for fake in operation.results})

    def _needed(self, fakes: list[Tensor]) -> list[int]:
        pending, seen, needed = list(_storages(list(fakes))), set[int](), set[int]()
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
        # kept from here on: what a constructor was told of a draw must stay true
        stream = self._stream_of.setdefault(index, key(self._seed, "init", "", index))
        given = keywords.get("generator")
        if given is not None:
            keywords["generator"] = torch.Generator().manual_seed(key(stream, given.initial_seed()))
        torch.default_generator.manual_seed(stream)


class _Reads(TorchFunctionMode):
    """What a constructor does to fakes that is no operation: reading memory they do not have, and ``.data =``."""

    def __init__(self, recorder: Recorder) -> None:
        super().__init__()
        self._recorder = recorder

    def __torch_function__(
        self, function: Any, types: Any, arguments: tuple[Any, ...] = (), keywords: dict[str, Any] | None = None
    ) -> Any:
        if arguments and isinstance(arguments[0], FakeTensor):
            name = getattr(function, "__name__", "")
            if function == _SET_DATA:
                return self._recorder.assign(arguments[0], arguments[1], lambda: function(*arguments))
            if name in ("numpy", "__array__"):  # numpy would read and write address 0
                raise RuntimeError("numpy is given a tensor's memory, which could then be changed unseen")
            if name == "tolist":
                real = self._recorder.compute(arguments[0])
                with _disable_current_modes():
                    return real.tolist()
        return function(*arguments, **(keywords or {}))


_SET_DATA = torch.Tensor.data.__set__  # pyright: ignore[reportAttributeAccessIssue]


class _Reals:
    """Real tensors as one argument, which copying an operation's tensors one by one leaves alone."""

    def __init__(self, tensors: list[Tensor]) -> None:
        self.tensors = tensors


def _together(reals: _Reals) -> list[Tensor]:
    """Copies that share memory with each other as their originals do."""
    copies: dict[int, torch.UntypedStorage] = {}
    made: list[Tensor] = []
    for real in reals.tensors:
        if real.layout is not torch.strided or real.is_meta:
            made.append(real.detach().clone())
            continue
        storage = storage_id(real)
        if storage not in copies:
            copies[storage] = real.untyped_storage().clone()
        made.append(real.detach().new_empty(0).set_(copies[storage], real.storage_offset(), real.shape, real.stride()))
    return made


def _assign(target: Tensor, value: Tensor) -> Tensor:
    target.data = value
    return target


def _copied(leaf: Any) -> Any:
    """A real tensor's copy; anything else as it is."""
    if not isinstance(leaf, Tensor) or isinstance(leaf, FakeTensor):
        return leaf
    with _disable_current_modes():
        return leaf.detach().clone()


def _fresh(function: OpOverload, real: Tensor) -> bool:
    """Whether the real tensor is one that torch made for itself, as in torch.tensor([1.0]), and not numpy's memory."""
    return function is torch.ops.aten.lift_fresh.default and real.untyped_storage().resizable()


def _equal(first: Tensor, second: Tensor) -> bool:
    """Bitwise enough: NaN where NaN is."""
    if first.shape != second.shape or first.dtype != second.dtype:
        return False
    return bool(((first == second) | (first.isnan() & second.isnan())).all())


def _geometry(tensor: Tensor) -> _Geometry:
    if tensor.layout is not torch.strided:
        return id(tensor), 0, tensor.shape, (), tensor.dtype
    return _storage(tensor), int(tensor.storage_offset()), tensor.shape, tuple(tensor.stride()), tensor.dtype


def _no_mapping(_fake: Tensor) -> None:
    """Keep no weak reference."""


def _storages(tensors: list[Any]) -> frozenset[int]:
    return frozenset(_storage(tensor) for tensor in tensors)


def _storage(tensor: Tensor) -> int:
    return storage_id(tensor) if tensor.layout is torch.strided else id(tensor)


def _changed(function: OpOverload, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> list[Tensor]:
    changed: list[Tensor] = []
    for position, argument in enumerate(function._schema.arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = arguments[position] if position < len(arguments) else keywords.get(argument.name)
            changed.extend(leaf for leaf in tree_flatten(value)[0] if isinstance(leaf, Tensor))
    return changed
