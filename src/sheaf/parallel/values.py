"""Plain values as JSON and back: keys, tuples and small tensors come back as what they were."""

from collections import Counter, OrderedDict
from typing import Any

import numpy as np
import torch
from torch import Tensor

from sheaf.errors import TaskError

_KIND = "sheaf_kind"
_SEQUENCES: dict[str, type] = {kind.__name__: kind for kind in (tuple, set, frozenset)}
_MAPPINGS: dict[str, type] = {kind.__name__: kind for kind in (dict, Counter, OrderedDict)}


def encoded(value: Any, where: str, *, tensors: bool = True) -> Any:
    """A snapshot of ``value`` that JSON keeps; ``where`` names it in errors.

    Knows numbers, text, None, lists, tuples, sets, dicts with any such keys, Counter, OrderedDict, torch.dtype and,
    with ``tensors``, real tensors. Raises TaskError for anything else, naming it.

    >>> encoded({"milestones": {3: 1}, "betas": (0.9, 0.99)}, "the scheduler")["betas"]
    {'sheaf_kind': 'tuple', 'items': [0.9, 0.99]}
    """
    if isinstance(value, np.generic):
        value = value.item()
    if value is None or isinstance(value, bool):
        return value
    for kind in (int, float, str):
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, torch.dtype):
        return {_KIND: "dtype", "name": _name(value)}
    if tensors and isinstance(value, Tensor) and not value.is_complex() and value.layout is torch.strided:
        flat = value.detach().flatten().tolist()
        return {_KIND: "tensor", "dtype": _name(value.dtype), "shape": list(value.shape), "items": flat}
    return _nest(value, where, tensors=tensors)


def _nest(value: Any, where: str, *, tensors: bool) -> Any:
    kind: str = type(value).__name__
    if type(value) is list or type(value) in _SEQUENCES.values():
        items = [encoded(item, f"{where}[{index}]", tensors=tensors) for index, item in enumerate(value)]
        return items if type(value) is list else {_KIND: kind, "items": items}
    if type(value) in _MAPPINGS.values():
        pairs = [
            [encoded(key, f"a key of {where}", tensors=False), encoded(item, f"{where}[{key!r}]", tensors=tensors)]
            for key, item in dict(value).items()
        ]
        as_it_is = type(value) is dict and _KIND not in value and all(type(key) is str for key in value)
        return dict(pairs) if as_it_is else {_KIND: kind, "items": pairs}
    raise TaskError(
        f"{where} is a {kind}, which a checkpoint cannot hold: keep numbers, text, lists, tuples or dicts there"
    )


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def decoded(value: Any) -> Any:
    """What ``encoded`` was given, also after JSON; tensors are on the CPU.

    >>> decoded(encoded({3: (1, 2)}, "it"))
    {3: (1, 2)}
    """
    if isinstance(value, list):
        return [decoded(item) for item in value]
    if isinstance(value, dict):
        return {key: decoded(item) for key, item in value.items()} if _KIND not in value else _special(value)
    return value


def _special(value: dict[str, Any]) -> Any:
    kind = value[_KIND]
    if kind == "dtype":
        return getattr(torch, value["name"])
    if kind == "tensor":
        return torch.tensor(value["items"], dtype=getattr(torch, value["dtype"])).reshape(value["shape"])
    if kind in _SEQUENCES:
        return _SEQUENCES[kind](decoded(item) for item in value["items"])
    return _MAPPINGS[kind]({decoded(key): decoded(item) for key, item in value["items"]})
