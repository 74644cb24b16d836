"""Where a model keeps tensors: in places that can be given other tensors, and in places that cannot."""

import copy
import gc
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

_REGISTRIES = ("_parameters", "_buffers", "_modules")
_CLOSED = (
    str, bytes, int, float, complex, type, types.ModuleType, types.BuiltinFunctionType, types.CodeType,
    types.FrameType, torch.dtype, torch.device, torch.Generator,
)  # fmt: skip


def replace_tensors(value: Any, swap: Callable[[Tensor], Tensor], memo: dict[int, Any] | None = None) -> Any:
    """A nest of lists, tuples, sets and dicts with every tensor swapped; the same object when none is.

    Types are kept. A ``memo`` kept over several calls keeps containers that are shared between them shared.
    """
    if isinstance(value, Tensor):
        return swap(value)
    if not isinstance(value, dict | list | tuple | set | frozenset):
        return value
    memo = {} if memo is None else memo
    if id(value) in memo:
        return memo[id(value)][1]
    memo[id(value)] = value, value
    if isinstance(value, dict):
        items: dict[Any, Any] = {name: replace_tensors(item, swap, memo) for name, item in value.items()}
        made: Any = value
        if any(items[name] is not item for name, item in value.items()):
            made = copy.copy(value)
            made.update(items)
    else:
        changed = [replace_tensors(item, swap, memo) for item in value]
        same = all(new is old for new, old in zip(changed, value, strict=True))
        made = value if same else type(value)(*changed) if hasattr(value, "_fields") else type(value)(changed)
    memo[id(value)] = value, made
    return made


def swap_all(model: nn.Module, swap: Callable[[Tensor], Tensor]) -> None:
    """Give every parameter, buffer and plain attribute of the model (also in nests of containers) to ``swap``."""
    memo: dict[int, Any] = {}
    for module in model.modules():
        registries: list[Any] = [module._parameters, module._buffers]
        for registry in registries:
            for name, tensor in registry.items():
                if tensor is not None:
                    registry[name] = swap(tensor)
        for name, value in list(module.__dict__.items()):
            if name not in _REGISTRIES:
                changed = replace_tensors(value, swap, memo)
                if changed is not value:
                    module.__dict__[name] = changed


def hidden_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that ``swap_all`` does not reach, with the attribute behind which they are.

    They are found in plain objects, closures, partials, and modules that are no submodules.
    """
    own = {id(module) for module in model.modules()}
    seen: set[int] = set()
    for path, module in model.named_modules():
        for name, value in module.__dict__.items():
            if name not in _REGISTRIES:
                for tensor in _below(_outside(value, set()), own, seen):
                    yield f"{path}.{name}".lstrip("."), tensor


def tensors_in(value: Any) -> Iterator[Tensor]:
    """Every tensor that an object holds, however deep."""
    yield from _below(iter([value]), set(), set())


def _outside(value: Any, within: set[int]) -> Iterator[Any]:
    """The leaves of a nest of containers that are no tensors."""
    if isinstance(value, dict | list | tuple | set | frozenset):
        if id(value) not in within:
            within.add(id(value))
            if isinstance(value, dict):
                yield from value
            for item in value.values() if isinstance(value, dict) else value:
                yield from _outside(item, within)
            if type(value) not in (dict, list, tuple, set, frozenset):
                yield from getattr(value, "__dict__", {}).values()
    elif not isinstance(value, Tensor):
        yield value


def _below(roots: Iterator[Any], own: set[int], seen: set[int]) -> Iterator[Tensor]:
    pending = list(roots)
    while pending:
        one = pending.pop()
        if one is None or isinstance(one, _CLOSED) or id(one) in own or id(one) in seen:
            continue
        seen.add(id(one))
        if isinstance(one, Tensor):
            yield one
        elif isinstance(one, types.FunctionType):
            pending.extend((one.__closure__, one.__defaults__, one.__kwdefaults__, one.__dict__))
        else:
            pending.extend(gc.get_referents(one))
