"""Which rule a torch function has when it meets a split tensor."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

FALLBACK = object()  # what a rule returns when it has no way but to gather

_NN: Any = torch._C._nn  # pyright: ignore[reportAttributeAccessIssue]
_SPACES: tuple[Any, ...] = (torch, Tensor, F, _NN, torch.special)


# (mode, function, args, kwargs): the Splitting mode; arguments may hold Split tensors. Returns FALLBACK to give up.
Rule = Callable[[Any, Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]

RULES: dict[Any, Rule] = {}
SENT: dict[Any, Rule] = {}  # of tensors that are sent to experts


def rule(*functions: Any, into: dict[Any, Rule] = RULES) -> Callable[[Rule], Rule]:
    """Give functions a rule: function objects, or names that stand for all of torch.NAME, Tensor.NAME, F.NAME."""

    def register(given: Rule) -> Rule:
        for function in functions:
            for found in _found(function) if isinstance(function, str) else (function,):
                into[found] = given
        return given

    return register


def getter(name: str) -> Any:
    """The function by which torch asks for an attribute of a tensor."""
    return getattr(Tensor, name).__get__


def is_inplace(function: Callable[..., Any]) -> bool:
    """Whether a function changes its first argument, by its name."""
    name = getattr(function, "__name__", "")
    if name.startswith("__"):
        return name == "__setitem__" or (
            name.startswith("__i") and name not in ("__invert__", "__int__", "__index__", "__iter__", "__init__")
        )
    return name.endswith("_")


def _found(name: str) -> list[Any]:
    found = [getattr(space, name) for space in _SPACES if callable(getattr(space, name, None))]
    if not found:
        raise KeyError(f"torch has no function {name}")
    return found
