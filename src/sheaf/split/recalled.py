"""What operators give on fake tensors, remembered by how what they are given looks: torch's own memory takes longer.

Below autograd, what comes of an operator that reads no values is told by the shapes, strides, types and numbers that it
is given. Whatever is not plainly so is torch's to answer each time.
"""

from collections.abc import Iterable
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

Known = dict[tuple[Any, ...], "_Found | None"]  # by operator and what it is given; None: ask torch each time

_DEVICE = torch.ops.prim.device.default
_UNSAFE_VIEW = torch.ops.aten._unsafe_view.default  # a view, though its schema does not say so
_SAID_BY_VALUES = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
_PLAIN = frozenset(
    {int, float, bool, str, type(None), torch.dtype, torch.device, torch.layout, torch.memory_format},
)


class _Look(NamedTuple):
    """How a fake tensor lies in memory."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device

    @classmethod
    def of(cls, fake: FakeTensor) -> "_Look":
        return cls(tuple(fake.shape), fake.stride(), int(fake.storage_offset()), fake.dtype, fake.fake_device)


class _Found(NamedTuple):
    """What an operator gives: one tensor, or a ``kind`` (tuple or list) of them; views of argument ``viewed``."""

    looks: tuple[_Look | None, ...]
    kind: type | None
    viewed: int | None


class Recalled(TorchDispatchMode):
    """Answers for ``fakes``, inside of which it is entered, what it knows; ``known`` is what it has learnt so far."""

    def __init__(self, fakes: FakeTensorMode, known: Known) -> None:
        super().__init__()
        self._fakes, self._known = fakes, known

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # nothing here is compiled, and to say so each time takes longer than all else

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is _DEVICE and type(args[0]) is FakeTensor:
            return args[0].fake_device
        kwargs = kwargs or {}
        key = self._key(func, args, kwargs) if FakeTensor in types and _is_told_by_looks(func) else None
        if key is None:
            return func(*args, **kwargs)
        if key not in self._known:
            result = func(*args, **kwargs)
            self._known[key] = self._found(func, args, kwargs, result)
            return result
        found = self._known[key]
        if found is None:
            return func(*args, **kwargs)
        base = None if found.viewed is None else args[found.viewed]
        made = [None if look is None else self._made(look, base) for look in found.looks]
        return made[0] if found.kind is None else found.kind(made)

    def _key(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...] | None:
        """What tells the result; None where that cannot be said."""
        key: list[Any] = [func, torch.get_default_dtype()]
        if torch.is_inference_mode_enabled() or not self._add(key, args):
            return None
        for name, value in kwargs.items():
            key.append(name)
            if not self._add(key, (value,)):
                return None
        return tuple(key)

    def _add(self, key: list[Any], values: Iterable[Any]) -> bool:
        """Put down what is given; False where it is neither a plain value nor a plain fake tensor."""
        for value in values:
            kind = type(value)
            if kind is FakeTensor:
                if not self._is_plain(value) or value.is_inference():
                    return False
                key += (*_Look.of(value), value.requires_grad, value.untyped_storage().nbytes())
            elif kind is tuple or kind is list:
                key += (kind, len(value))
                if not self._add(key, value):
                    return False
            elif kind in _PLAIN:
                key += (kind, value)
            else:
                return False
        return True

    def _is_plain(self, fake: FakeTensor) -> bool:
        is_ours = fake.fake_mode is self._fakes and fake.constant is None
        return is_ours and fake.layout is torch.strided and not fake.is_conj() and not fake.is_neg()

    def _found(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> _Found | None:
        """What is to be known of a result; None where one like it cannot be made."""
        given = [index for index, value in enumerate(args) if isinstance(value, Tensor)]
        is_view = func.is_view or func is _UNSAFE_VIEW
        if is_view and len(given) != 1:
            return None
        viewed = given[0] if is_view else None
        kind = type(result) if type(result) in (tuple, list) else None
        results = [result] if kind is None else list(result)
        ids = {id(value) for value in (*args, *kwargs.values())}
        found = [one for one in results if one is not None]
        if not found or len({id(one) for one in found}) < len(found):  # nothing, or one tensor in several places
            return None
        for one in found:
            if type(one) is not FakeTensor or not self._is_plain(one) or one.requires_grad or id(one) in ids:
                return None
            look = _Look.of(one)
            like = self._made(look, None if viewed is None else args[viewed])
            if _Look.of(like) != look or torch._C._dispatch_key_set(like) != torch._C._dispatch_key_set(one):
                return None
        return _Found(tuple(None if one is None else _Look.of(one) for one in results), kind, viewed)

    def _made(self, look: _Look, base: FakeTensor | None) -> FakeTensor:
        with torch._C._DisableTorchDispatch():
            empty = torch.empty_strided(look.shape, look.strides, dtype=look.dtype, device="meta")
            if base is not None:
                empty.set_(base.untyped_storage(), look.offset, look.shape, look.strides)  # pyright: ignore[reportArgumentType, reportCallIssue]
        return FakeTensor(self._fakes, empty, look.device)


@cache
def _is_told_by_looks(func: Any) -> bool:
    """Whether an operator of torch's own changes nothing and reads no values."""
    if not isinstance(func, OpOverload) or func.namespace != "aten" or func._schema.is_mutable:
        return False
    if any(tag in func.tags for tag in _SAID_BY_VALUES) or func in FakeTensorMode.lift_fns:
        return False
    composite = torch._C.DispatchKey.CompositeImplicitAutograd
    return not torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), composite)
