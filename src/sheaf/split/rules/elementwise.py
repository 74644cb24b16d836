"""Functions that treat each element for itself, with broadcasting, and those that draw at random for each."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from sheaf.plans.split import Cut
from sheaf.split.layouts import whole_like
from sheaf.split.moves import sliced
from sheaf.split.registry import FALLBACK, is_inplace, rule
from sheaf.split.tensor import Split

_NAMES = """
    abs add sub mul div true_divide floor_divide remainder fmod pow rsub neg negative positive reciprocal square sqrt
    rsqrt exp exp2 expm1 log log2 log10 log1p sin cos tan asin acos atan atan2 sinh cosh tanh sigmoid logit erf erfc
    erfinv ceil floor round trunc frac sign sgn clamp clip clamp_min clamp_max maximum minimum fmax fmin where
    masked_fill lerp addcmul addcdiv eq ne lt le gt ge isnan isinf isfinite logical_and logical_or logical_not
    logical_xor bitwise_and bitwise_or bitwise_not bitwise_xor nan_to_num hypot heaviside xlogy special_entr
    relu relu6 gelu silu mish elu selu celu leaky_relu hardtanh hardsigmoid hardswish softplus softsign tanhshrink
    hardshrink softshrink threshold logsigmoid
    clone contiguous detach float double half bfloat16 long int bool zeros_like ones_like full_like empty_like
    requires_grad_ fill_ zero_
    add_ sub_ mul_ div_ pow_ neg_ abs_ exp_ log_ sqrt_ rsqrt_ sigmoid_ tanh_ relu_ clamp_ clamp_min_ clamp_max_
    masked_fill_ addcmul_ addcdiv_ lerp_ copy_ leaky_relu_ elu_ hardtanh_ relu6_ silu_ threshold_
    __add__ __radd__ __iadd__ __sub__ __rsub__ __isub__ __mul__ __rmul__ __imul__ __truediv__ __rtruediv__
    __itruediv__ __div__ __rdiv__ __idiv__ __pow__ __rpow__ __neg__ __pos__ __abs__ __invert__ __eq__ __ne__ __lt__
    __le__ __gt__ __ge__ __and__ __or__ __xor__ __mod__ __rmod__ __floordiv__ __rfloordiv__
""".split()  # noqa: SIM905 - words
_KNOWN = [
    name for name in _NAMES if any(callable(getattr(s, name, None)) for s in (torch, Tensor, torch.nn.functional))
]


@rule(*_KNOWN)
def elementwise(  # noqa: PLR0911 - one for each kind of case
    mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    """Every tensor is brought to the slice of the first split one; broadcast ones are whole."""
    if kwargs.get("out") is not None or (function is torch.where and len(args) + len(kwargs) == 1):
        return FALLBACK
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    chosen = leader(mode, tensors)
    if chosen is None:
        return mode.fallback(function, args, kwargs)
    if is_inplace(function) and not isinstance(args[0], Split):
        return FALLBACK
    ndim = max(tensor.ndim for tensor in tensors)
    back = chosen.axis - chosen.ndim  # counted from the end, as broadcasting does
    if is_inplace(function) and args[0] is not chosen:
        first = args[0]
        if (first.axis - first.ndim, first.cut) != (back, chosen.cut):
            return FALLBACK
    why = function.__name__.strip("_")

    def bring(value: Any) -> Any:
        return bring_along(mode, value, back, chosen.cut, why) if isinstance(value, Tensor) else value

    result = function(*(bring(value) for value in args), **{key: bring(value) for key, value in kwargs.items()})
    if not isinstance(result, Tensor):  # compared with None
        return result
    if is_inplace(function):
        return args[0]
    inplace = kwargs.get("inplace", False) or (result is chosen.local)
    if inplace and result is chosen.local and chosen.ndim == ndim:
        return chosen
    return chosen.like(result, dim=ndim + back)


def leader(mode: Any, tensors: list[Tensor]) -> Split | None:
    """The slice that the others follow; None without any. One that is broadcast along its cut cannot lead."""
    splits = [tensor for tensor in tensors if isinstance(tensor, Split) and not _is_broadcast(tensor, tensors)]
    if not splits:
        return None
    first = splits[0]
    for other in splits[1:]:
        if (other.axis - other.ndim) == (first.axis - first.ndim) and other.cut != first.cut:
            ask_alike(mode, first, other)
    return first


def _is_broadcast(split: Split, tensors: list[Tensor]) -> bool:
    back = split.axis - split.ndim
    return split.cut.length == 1 and any(tensor.ndim >= -back and tensor.shape[back] != 1 for tensor in tensors)


def ask_alike(mode: Any, one: Split, other: Split) -> None:
    """Two slices of one length that are cut in other places: each may follow the other's units."""
    for mine, yours in ((one, other), (other, one)):
        unit = unit_of(yours.cut)
        if unit > 1 and mine.cut.run % unit == 0:
            mode.refine(mine, mine.cut.outer if yours.cut.outer == mine.cut.outer else 1, unit)


def unit_of(cut: Cut) -> int:
    """The largest unit of which every worker's share is a multiple."""
    return math.gcd(*cut.sizes)


def bring_along(mode: Any, tensor: Tensor, back: int, cut: Cut, why: str) -> Tensor:
    """This worker's part of an argument that is broadcast against a slice at dimension ``back`` from the end."""
    if isinstance(tensor, Split):
        if (tensor.axis - tensor.ndim, tensor.cut) == (back, cut):
            return tensor.local
        tensor = mode.gather(tensor, why)
    if tensor.ndim < -back or tensor.shape[back] == 1:
        return mode.enter(tensor, why)
    return mode.part(tensor, tensor.ndim + back, cut, why)


@rule("prelu")
def prelu(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One slope for all, or one for each channel, in dimension 1."""
    given = dict(zip(("input", "weight"), args, strict=False)) | kwargs
    split, slopes = given["input"], given["weight"]
    if not isinstance(split, Split):
        return FALLBACK
    if split.axis != 1 or slopes.numel() == 1:
        return split.like(function(split.local, mode.enter(slopes, "prelu")))
    own = mode.part(slopes, 0, split.cut, "prelu").reshape(-1, *[1] * (split.ndim - 2))
    return split.like(torch.where(split.local >= 0, split.local, own * split.local))


@rule("to", "type_as", "type")
def converted(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Of another dtype or device; only the first argument's elements matter."""
    first, *rest = args
    if isinstance(first, Split):
        others = [value.local if isinstance(value, Split) else value for value in rest]
        result = function(first.local, *others, **kwargs)
        return first if result is first.local else (first.like(result) if isinstance(result, Tensor) else result)
    return function(first, *(value.local if isinstance(value, Split) else value for value in rest), **kwargs)


@rule("dropout", "dropout1d", "dropout2d", "dropout3d", "feature_dropout", "dropout_", "rand_like", "randn_like")
def drawn(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A slice of what would be drawn for the whole, in the whole's own order in memory."""
    first = args[0] if args else kwargs.get("input")
    if not isinstance(first, Split) or kwargs.get("out") is not None:
        return FALLBACK
    name, local = function.__name__, first.local
    rest = tuple(args[1:])
    named = {key: value for key, value in kwargs.items() if key not in ("input", "inplace")}
    if "like" in name:
        return first.like(sliced(function(whole_like(first), *rest, **named), first.axis, first.cut, mode.team.rank))
    p = named.get("p", rest[0] if rest else 0.5)
    training = named.get("training", named.get("train", rest[1] if len(rest) > 1 else True))
    if not training or p == 0.0:
        return first
    if len(rest) > 2:
        rest = rest[:2]
    plain = function if not name.endswith("_") else torch.nn.functional.dropout
    keep = plain(whole_like(first).fill_(1.0), *rest, **named)
    return first.like(local * sliced(keep, first.axis, first.cut, mode.team.rank).to(local.dtype))
