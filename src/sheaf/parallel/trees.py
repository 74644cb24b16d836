"""The tensors in what a module is given or returns: in containers that torch knows, and in dataclasses."""

import copy
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from operator import is_
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_flatten, tree_iter, tree_unflatten

PLAIN = frozenset((int, float, bool, str, type(None)))  # types of what holds no tensor
_NOT_THE_MODEL = (str(Path(torch.__file__).parent), str(Path(__file__).parents[1]))


def tensors(value: Any) -> Iterator[Tensor]:
    """Every tensor, in one order."""
    found: list[Tensor] = []
    _find(value, found)
    return iter(found)


def _find(value: Any, found: list[Tensor]) -> None:
    if isinstance(value, Tensor):
        found.append(value)
        return
    kind = type(value)
    if kind in PLAIN:
        return
    if kind is tuple or kind is list:
        for inner in value:
            if isinstance(inner, Tensor):  # as above, without a call: this runs for each function and block of a model
                found.append(inner)
            elif type(inner) not in PLAIN:
                _find(inner, found)
    elif kind is dict:
        for inner in value.values():
            _find(inner, found)
    else:
        _find_in_leaves(value, found)


def _find_in_leaves(value: Any, found: list[Tensor]) -> None:
    for leaf in tree_iter(value):
        if isinstance(leaf, Tensor):
            found.append(leaf)
        elif _is_opened(leaf):
            for inner in _attributes(leaf).values():
                _find(inner, found)


def mapped(function: Callable[[Tensor], Any], value: Any) -> Any:
    """The value with ``function`` of each tensor; the very same object where nothing is changed, since who is given a
    list or a cache may write into it.

    >>> given = [1, [2]]
    >>> mapped(lambda tensor: tensor, given) is given
    True
    """
    if isinstance(value, Tensor):
        return function(value)
    kind = type(value)
    if kind in PLAIN or (kind is dict and not value):
        return value
    if kind is tuple or kind is list:
        items = [function(inner) if isinstance(inner, Tensor) else mapped(function, inner) for inner in value]
        return value if all(map(is_, items, value)) else kind(items)
    if kind is dict:
        named = {key: mapped(function, inner) for key, inner in value.items()}
        return value if all(named[key] is value[key] for key in value) else named
    leaves, spec = tree_flatten(value)
    made = [_mapped(function, leaf) for leaf in leaves]
    if all(new is old for new, old in zip(made, leaves, strict=True)):
        return value
    return tree_unflatten(made, spec)


def detached(value: Any) -> Any:
    """The same tensors with copies of all else, so that nobody sees what is written into an object; objects that
    cannot be copied stay.
    """
    leaves, spec = tree_flatten(value)
    return tree_unflatten([leaf if isinstance(leaf, Tensor) else _copied(leaf) for leaf in leaves], spec)


def _copied(leaf: Any) -> Any:
    try:
        return copy.deepcopy(leaf)
    except Exception:  # noqa: BLE001 - any object's own way to refuse
        return leaf


def line_of_model() -> str:
    """The innermost line under way that is neither torch's nor Sheaf's: the model's, or the loss's."""
    frame = sys._getframe(1)
    while frame is not None:
        path = frame.f_code.co_filename
        if not path.startswith((*_NOT_THE_MODEL, "<")) and "/jaxtyping/" not in path:
            return f"{path}:{frame.f_lineno}"
        frame = frame.f_back
    return "an unknown line"


def _mapped(function: Callable[[Tensor], Any], leaf: Any) -> Any:
    if isinstance(leaf, Tensor):
        return function(leaf)
    if not _is_opened(leaf):
        return leaf
    before = _attributes(leaf)
    after = {key: mapped(function, inner) for key, inner in before.items()}
    if all(after[key] is before[key] for key in before):
        return leaf
    made = copy.copy(leaf)
    for key, inner in after.items():
        object.__setattr__(made, key, inner)
    return made


def _is_opened(leaf: Any) -> bool:
    return (is_dataclass(leaf) and not isinstance(leaf, type)) or isinstance(leaf, SimpleNamespace)


def _attributes(leaf: Any) -> dict[str, Any]:
    if isinstance(leaf, SimpleNamespace):
        return dict(vars(leaf))
    return {field.name: getattr(leaf, field.name) for field in fields(leaf) if hasattr(leaf, field.name)}
