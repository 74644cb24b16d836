"""A tensor that is due: what an expert of another replica will make of rows, and what is to be done with it then.

The experts of a list are called one after the other, on rows that are independent of each other. Sent one by one, all
replicas would wait for one expert at a time. So a call gives a tensor without values; multiplying it and adding it to
some output are put off, and only when anything else looks at either do all calls go out, at once.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sheaf.errors import PlanError
from sheaf.parallel.functions import ABOUT
from sheaf.split.registry import getter, is_inplace

SHAPES = frozenset(ABOUT) - {getter(name) for name in ("requires_grad", "is_leaf", "grad_fn")}  # known before its value
_LATER: frozenset[Any] = frozenset(
    function
    for name in [
        "mul",
        "multiply",
        "div",
        "divide",
        "true_divide",
        "add",
        "sub",
        "__mul__",
        "__rmul__",
        "__truediv__",
        "__add__",
        "__radd__",
        "__sub__",
        "to",
        "type_as",
        "float",
    ]
    for function in (getattr(torch, name, None), getattr(Tensor, name, None))
    if function is not None
)  # what makes a new tensor of one that is due, element by element
_INTO: frozenset[Any] = frozenset(
    getattr(Tensor, name) for name in ["index_add_", "index_put_", "__setitem__", "__iadd__", "add_", "scatter_add_"]
)  # what writes a tensor that is due into another


class Due(Tensor):
    """Looks like the tensor that it is to be. ``value`` is that, once it is there."""

    value: Tensor | None

    @staticmethod
    def __new__(cls: "type[Due]", shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> "Due":  # noqa: PYI034 - Self is no runtime type
        """A tensor without memory."""
        made: Due = torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, shape, dtype=dtype, device=device, requires_grad=False
        )
        made.value = None
        return made

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Raises PlanError: a function got here that the mode did not see."""
        raise PlanError(
            f"{func} reached rows that are at their experts unseen (a compiled extension does that): leave the module "
            "out of the plan's =ep parts"
        )

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Due({tuple(self.shape)})"


@dataclass
class _Step:
    """Something put off: ``function`` of ``args``, in the modes of the place where it was called."""

    function: Callable[..., Any]
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    result: Due | None
    graph: bool
    autocast: tuple[bool, torch.dtype]


class PutOff:
    """What was put off, in order, and which memory it reads and writes."""

    def __init__(self) -> None:
        self._steps: list[_Step] = []
        self._read: set[int] = set()
        self._written: set[int] = set()

    def put(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What stands for the result of a function that is given something due; None where it cannot wait."""
        given = list(_tensors(args, kwargs))
        plain = [tensor for tensor in given if type(tensor) is not Due]
        if function in _INTO:
            target, rest = args[0], [tensor for tensor in plain if tensor is not args[0]]
            if type(target) is Due or any(_storage(tensor) in self._written for tensor in rest):
                return None
            self._read.update(map(_storage, rest))
            self._written.add(_storage(target))
            self._add(function, args, kwargs, None, target.device.type)
            return target
        if function not in _LATER or any(_storage(tensor) in self._written for tensor in plain):
            return None
        if "out" in kwargs or any(isinstance(one, str | torch.device) for one in (*args, *kwargs.values())):
            return None
        lead = next(tensor for tensor in given if type(tensor) is Due)
        with torch._C.DisableTorchFunction():
            look = function(*(_blank(one) for one in args), **{key: _blank(one) for key, one in kwargs.items()})
        made = Due(tuple(look.shape), look.dtype, lead.device)
        self._read.update(map(_storage, plain))
        self._add(function, args, kwargs, made, lead.device.type)
        return made

    def _add(self, function: Any, args: Any, kwargs: Any, result: Due | None, kind: str) -> None:
        autocast = torch.is_autocast_enabled(kind), torch.get_autocast_dtype(kind)
        self._steps.append(_Step(function, args, kwargs, result, torch.is_grad_enabled(), autocast))

    def reads(self, tensor: Tensor) -> None:
        """What is due will be made of a tensor as it is now."""
        self._read.add(_storage(tensor))

    def concerns(self, function: Callable[..., Any], given: Iterable[Any]) -> bool:
        """Whether a function would see, or spoil, what something that was put off writes or reads."""
        if not (self._read or self._written) or function in SHAPES:
            return False
        tensors = [leaf for leaf in given if isinstance(leaf, Tensor)]
        if any(_storage(tensor) in self._written for tensor in tensors):
            return True
        return is_inplace(function) and any(_storage(tensor) in self._read for tensor in tensors)

    def catch_up(self) -> None:
        """Do it: everything that was due has its value."""
        steps = self._steps
        self.forget()
        for step in steps:
            enabled, dtype = step.autocast
            kind = next(iter(_tensors(step.args, step.kwargs))).device.type
            with torch.set_grad_enabled(step.graph), torch.autocast(kind, dtype, enabled):
                found = step.function(*map(valued, step.args), **{key: valued(one) for key, one in step.kwargs.items()})
            if step.result is not None:
                step.result.value = found

    def forget(self) -> None:
        """Nothing is put off."""
        self._steps = []
        self._read.clear()
        self._written.clear()


def valued(value: Any) -> Any:
    """The same with the values of what was due, in lists and tuples too."""
    if type(value) is Due:
        assert value.value is not None, "what is due has not come"
        return value.value
    if type(value) in (list, tuple):
        return type(value)(valued(one) for one in value)
    return value


def _tensors(args: Any, kwargs: dict[str, Any]) -> Iterable[Tensor]:
    for value in (*args, *kwargs.values()):
        if isinstance(value, Tensor):
            yield value
        elif type(value) in (list, tuple):
            yield from _tensors(value, {})


def _blank(value: Any) -> Any:
    return torch.empty(value.shape, dtype=value.dtype, device="meta") if isinstance(value, Tensor) else value


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata if tensor.layout is torch.strided else id(tensor)
