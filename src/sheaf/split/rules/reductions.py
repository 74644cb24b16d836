"""Sums and other reductions, and functions normalised along dimensions."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sheaf.split.registry import FALLBACK, rule
from sheaf.split.rules.empty import filled
from sheaf.split.tensor import Split


@rule("sum", "mean", "nansum")
def total(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Over other dimensions the slices' own; over the cut one, the workers' sums added up."""
    given = dict(zip(("input", "dim", "keepdim"), args, strict=False)) | kwargs
    split = given["input"]
    if not isinstance(split, Split) or not set(given) <= {"input", "dim", "axis", "keepdim", "dtype"}:
        return FALLBACK
    dims = _dims(split, given.get("dim", given.get("axis")))
    keep = bool(given.get("keepdim", False))
    named = {"dtype": given["dtype"]} if given.get("dtype") is not None else {}
    if split.axis not in dims:
        local = function(split.local, dims, keepdim=keep, **named)
        return split.like(local, dim=split.axis - (0 if keep else sum(dim < split.axis for dim in dims)))
    count = 1
    for dim in dims:
        count *= split.shape[dim]
    partial = torch.sum(split.local, dims, keepdim=keep, **named) if function.__name__ != "nansum" else None
    if partial is None:
        return FALLBACK
    whole = mode.total(partial, function.__name__)
    return whole / count if function.__name__ == "mean" else whole


@rule(
    "amax", "amin", "argmax", "argmin", "max", "min", "prod", "var", "std", "var_mean", "std_mean", "logsumexp", "any"
)
@rule("all", "norm", "count_nonzero", "sort", "argsort", "topk", "median", "mode", "cummax", "cummin", "kthvalue")
def along_others(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Reductions and orders along dimensions that are not cut; several results where there are several."""
    split = args[0]
    if not isinstance(split, Split) or any(isinstance(value, Split) for value in args[1:]):
        return FALLBACK
    position = {"norm": 2, "topk": 2, "kthvalue": 2, "sort": 1, "argsort": 1}.get(function.__name__, 1)
    given = kwargs.get("dim", kwargs.get("axis", args[position] if len(args) > position else None))
    if function.__name__ in ("sort", "argsort", "topk", "kthvalue", "median", "mode") and given is None:
        given = -1
    if given is None or isinstance(given, bool | Tensor | float | str):
        return FALLBACK
    dims = _dims(split, given)
    if split.axis in dims:
        return FALLBACK
    found = function(filled(split.local, split.axis), *args[1:], **kwargs)
    first = found[0] if isinstance(found, tuple) else found
    place = split.axis - (sum(dim < split.axis for dim in dims) if first.ndim < split.ndim else 0)
    if isinstance(found, tuple):
        made = [split.like(_cut_off(one, place, split), dim=place) for one in found]
        return type(found)(made) if hasattr(found, "n_fields") else tuple(made)
    return split.like(_cut_off(found, place, split), dim=place)


def _cut_off(found: Tensor, place: int, split: Split) -> Tensor:
    return found if split.local.shape[split.axis] else found.narrow(place, 0, 0)


@rule("softmax", "log_softmax", "softmin", "normalize", F.softmax, F.log_softmax)
def normalised(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Along a dimension that is not cut."""
    split = args[0]
    name = function.__name__
    place = {"normalize": 2}.get(name, 1)
    default = 1 if name == "normalize" else None
    dim = kwargs.get("dim", args[place] if len(args) > place else default)
    if not isinstance(split, Split) or not isinstance(dim, int) or dim % split.ndim == split.axis:
        return FALLBACK
    if name == "normalize" and kwargs.get("out") is not None:
        return FALLBACK
    return split.like(function(split.local, *args[1:], **kwargs))


def _dims(split: Split, given: Any) -> list[int]:
    if given is None or (isinstance(given, list | tuple) and not given):
        return list(range(split.ndim))
    dims = given if isinstance(given, list | tuple) else [given]
    return [int(dim) % split.ndim for dim in dims]
