"""Views and other ways to lay the same elements out: a cut follows its dimension through splits and merges of it."""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sheaf.plans.split import Cut
from sheaf.split.registry import FALLBACK, getter, rule
from sheaf.split.tensor import Split


def sizes_of(args: Sequence[Any]) -> list[int]:
    """Sizes given as numbers or as one sequence."""
    given = args[0] if len(args) == 1 and isinstance(args[0], list | tuple) else args
    return [int(size) for size in given]


def viewed(mode: Any, split: Split, shape: Sequence[int], lay: Callable[[Tensor, list[int]], Tensor]) -> Any:
    """The slice of a whole that is given another shape; FALLBACK where no dimension of it is one cut."""
    wanted = list(shape)
    if -1 in wanted:
        rest = math.prod(size for size in wanted if size != -1)
        wanted[wanted.index(-1)] = split.numel() // rest if rest else 0
    if math.prod(wanted) != split.numel():
        return FALLBACK  # which raises torch's own error
    found = _place(mode, split, wanted)
    if found is None:
        return FALLBACK
    dim, cut, unit = found
    local = list(wanted)
    local[dim] = cut.local_length(mode.team.rank)
    return split.like(lay(split.local, local), dim=dim, cut=cut, scale=split.scale * unit if unit > 0 else -1)


def _place(mode: Any, split: Split, wanted: list[int]) -> tuple[int, Cut, int] | None:
    """In the new shape: the cut dimension, its cut, and how many old elements one new one stands for."""
    old = list(split.shape)
    # the smallest groups of old and of new dimensions, around the cut one, that hold the same elements
    left_old, left_new = _common(old, wanted, split.axis)
    right_old, right_new = _common(old[::-1], wanted[::-1], len(old) - 1 - split.axis)
    group = old[left_old : len(old) - right_old]
    fresh = wanted[left_new : len(wanted) - right_new]
    place = split.axis - left_old
    outer = math.prod(group[:place]) * split.cut.outer
    inner = math.prod(group[place + 1 :])
    merged = Cut(tuple(size * inner for size in split.cut.sizes), outer)
    ahead, found = 1, None
    for index, size in enumerate(fresh):
        after = math.prod(fresh[index + 1 :])
        holds_runs = size > 1 and outer % ahead == 0 and (ahead * size) % outer == 0 and outer // ahead <= size
        if holds_runs and all(part % after == 0 for part in merged.sizes):  # the last that fits has the fewest runs
            cut = Cut(tuple(part // after for part in merged.sizes), outer // ahead)
            found = left_new + index, cut, after // inner if after % inner == 0 else -1
        ahead *= size
    _ask(mode, split, outer, inner, fresh)  # another dimension may do better, even where one does
    return found


def _common(old: Sequence[int], new: Sequence[int], stop: int) -> tuple[int, int]:
    """How many leading dimensions of both hold the same elements, short of old dimension ``stop``."""
    best, done_old, done_new, at = (0, 0), 1, 1, 0
    for index in range(stop):
        done_old *= old[index]
        while at < len(new) and done_new * new[at] <= done_old and done_new != done_old:
            done_new *= new[at]
            at += 1
        if done_new == done_old:
            best = (index + 1, at)
    return best


def _ask(mode: Any, split: Split, outer: int, inner: int, fresh: list[int]) -> None:
    """Ask for cuts that would follow through this view: between units of what comes after a new dimension."""
    if split.scale < 1:
        return
    ahead = 1
    for index, size in enumerate(fresh):
        after = math.prod(fresh[index + 1 :])
        if size > 1 and ahead % outer == 0 and after % inner == 0:
            mode.refine(split, ahead // outer, after // inner)
        ahead *= size


@rule("view", "reshape")
def reshape(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Another shape; also another dtype of the same width."""
    split = args[0]
    if not isinstance(split, Split):
        return FALLBACK
    given = kwargs.get("shape", kwargs.get("size"))
    rest = (given,) if given is not None else args[1:]
    if rest and isinstance(rest[0], torch.dtype):
        return FALLBACK
    return viewed(mode, split, sizes_of(rest), torch.reshape)


@rule("flatten")
def flatten(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Several dimensions as one."""
    given = dict(zip(("input", "start_dim", "end_dim"), args, strict=False)) | kwargs
    split = given["input"]
    if not isinstance(split, Split):
        return FALLBACK
    start, end = given.get("start_dim", 0) % split.ndim, given.get("end_dim", -1) % split.ndim
    shape = list(split.shape)
    return viewed(mode, split, [*shape[:start], math.prod(shape[start : end + 1]), *shape[end + 1 :]], torch.reshape)


@rule("unflatten")
def unflatten(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One dimension as several."""
    given = dict(zip(("input", "dim", "sizes"), args, strict=False)) | kwargs
    split = given["input"]
    if not isinstance(split, Split):
        return FALLBACK
    dim, sizes = given["dim"] % split.ndim, list(given["sizes"])
    if -1 in sizes:
        sizes[sizes.index(-1)] = split.shape[dim] // -math.prod(sizes)
    shape = list(split.shape)
    return viewed(mode, split, [*shape[:dim], *sizes, *shape[dim + 1 :]], torch.reshape)


@rule("view_as", "reshape_as")
def reshape_as(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The shape of another."""
    if not isinstance(args[0], Split):
        return function(args[0], mode.whole(args[1], "reshape_as"))
    return viewed(mode, args[0], list(args[1].shape), torch.reshape)


def permuted(split: Split, order: Sequence[int]) -> Split:
    """Dimensions in another order."""
    order = [dim % split.ndim for dim in order]
    made = split.like(split.local.permute(order), dim=order.index(split.axis))
    made.held = split.held
    return made


@rule("permute")
def permute(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Dimensions in the order given."""
    rest = (kwargs["dims"],) if "dims" in kwargs else args[1:]
    return permuted(args[0], sizes_of(rest)) if isinstance(args[0], Split) else FALLBACK


@rule("transpose", "swapaxes", "swapdims")
def transpose(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Two dimensions change places."""
    given = dict(zip(("input", "dim0", "dim1"), args, strict=False)) | kwargs
    split = given["input"]
    if not isinstance(split, Split):
        return FALLBACK
    order = list(range(split.ndim))
    one, other = given["dim0"] % split.ndim, given["dim1"] % split.ndim
    order[one], order[other] = order[other], order[one]
    return permuted(split, order)


@rule("t", getter("T"), getter("mT"), getter("H"), getter("mH"), "movedim", "moveaxis", "adjoint")
def turned(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Dimensions in an order that torch finds: seen on a tensor without elements' worth of memory."""
    split = args[0]
    if not isinstance(split, Split) or split.is_complex():
        return FALLBACK
    marks = torch.empty(list(range(2, 2 + split.ndim)), device="meta")
    return permuted(split, [size - 2 for size in function(marks, *args[1:], **kwargs).shape])


@rule("unsqueeze")
def unsqueeze(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A dimension of size 1 more."""
    given = dict(zip(("input", "dim"), args, strict=False)) | kwargs
    split, dim = given["input"], given["dim"]
    if not isinstance(split, Split):
        return FALLBACK
    dim %= split.ndim + 1
    return split.like(split.local.unsqueeze(dim), dim=split.axis + (dim <= split.axis))


@rule("squeeze")
def squeeze(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Without dimensions of size 1."""
    given = dict(zip(("input", "dim"), args, strict=False)) | kwargs
    split = given["input"]
    if not isinstance(split, Split) or split.cut.length == 1:
        return FALLBACK
    dims = given.get("dim", tuple(range(split.ndim)))
    chosen = {dim % split.ndim for dim in (dims if isinstance(dims, list | tuple) else (dims,))}
    gone = sorted(dim for dim in chosen if split.shape[dim] == 1)
    local = split.local.squeeze(tuple(gone)) if gone else split.local
    return split.like(local, dim=split.axis - sum(dim < split.axis for dim in gone))


@rule("expand", "broadcast_to", "expand_as")
def expand(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Sizes of 1 repeated without memory."""
    split = args[0]
    if not isinstance(split, Split) or split.cut.length == 1:
        return FALLBACK
    rest = (kwargs.get("size", kwargs.get("shape")),) if kwargs else args[1:]
    sizes = list(rest[0].shape) if isinstance(rest[0], Tensor) else sizes_of(rest)
    dim = split.axis + len(sizes) - split.ndim
    if sizes[dim] not in (-1, split.shape[split.axis]):
        return FALLBACK
    sizes[dim] = split.local.shape[split.axis]
    return split.like(split.local.expand(sizes), dim=dim)


@rule("chunk", "split", "split_with_sizes", "tensor_split")
def chunk(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Pieces along a dimension: along the cut one, if each is one of the runs in which workers hold slices alike."""
    split = args[0]
    if not isinstance(split, Split):
        return FALLBACK
    dim = kwargs.get("dim", args[2] if len(args) > 2 else 0) % split.ndim
    if dim != split.axis:
        return tuple(split.like(piece) for piece in function(split.local, *args[1:], **kwargs))
    marks = torch.empty(split.shape[dim], device="meta")
    rest = args[1:2]
    named = {key: value for key, value in kwargs.items() if key != "dim"}
    lengths = [len(piece) for piece in function(marks, *rest, **named)]
    if any(length % split.cut.run for length in lengths):
        common = math.gcd(*lengths)
        if common and split.scale > 0 and split.cut.run % common == 0:
            mode.refine(split, split.cut.run // common, 1)
        return FALLBACK
    own = split.local.shape[dim] // split.cut.outer
    pieces = split.local.split([length // split.cut.run * own for length in lengths], dim)
    return tuple(
        split.like(piece, cut=Cut(split.cut.sizes, length // split.cut.run))
        for piece, length in zip(pieces, lengths, strict=True)
    )


@rule("glu")
def glu(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Half of a dimension, gated by the other half."""
    given = dict(zip(("input", "dim"), args, strict=False)) | kwargs
    dim = given.get("dim", -1)
    if not isinstance(given["input"], Split) or given["input"].shape[dim] % 2:
        return FALLBACK
    halves = chunk(mode, torch.chunk, (given["input"], 2, dim), {})
    if halves is FALLBACK:
        return FALLBACK
    return halves[0].like(halves[0].local * halves[1].local.sigmoid())


@rule("unbind")
def unbind(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One tensor per index of a dimension that is not cut."""
    given = dict(zip(("input", "dim"), args, strict=False)) | kwargs
    split = given["input"]
    dim = given.get("dim", 0)
    if not isinstance(split, Split) or dim % split.ndim == split.axis:
        return FALLBACK
    place = split.axis - (dim % split.ndim < split.axis)
    return tuple(split.like(one, dim=place) for one in split.local.unbind(dim))


@rule(Tensor.__iter__)
def iterate(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """As unbind along the first dimension."""
    found = unbind(mode, torch.unbind, (args[0], 0), {})
    return FALLBACK if found is FALLBACK else iter(found)


@rule("narrow", "select", "index_select")
def narrow(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Part of a dimension that is not cut."""
    if kwargs or not isinstance(args[0], Split) or any(isinstance(value, Split) for value in args[1:]):
        return FALLBACK
    split, dim = args[0], args[1] % args[0].ndim
    if dim == split.axis:
        return FALLBACK
    gone = function.__name__ == "select" and dim < split.axis
    return split.like(function(split.local, *args[1:]), dim=split.axis - gone)


@rule(Tensor.__getitem__)
def getitem(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Numbers, slices, None and ellipsis, and one mask or list of indices, on dimensions that are not cut."""
    split, index = args
    if not isinstance(split, Split):
        return FALLBACK
    keys = list(index) if isinstance(index, tuple) else [index]
    if any(isinstance(key, Split) for key in keys):
        return FALLBACK
    consumed = sum(_consumed(key) for key in keys)
    if Ellipsis in [key for key in keys if not isinstance(key, Tensor)]:
        spot = next(place for place, key in enumerate(keys) if key is Ellipsis)
        keys[spot : spot + 1] = [slice(None)] * (split.ndim - consumed)
    dim, made, advanced = 0, 0, 0
    place: int | None = None
    for key in keys:
        uses = _consumed(key)
        if dim <= split.axis < dim + uses:
            size = split.shape[split.axis]
            if not (isinstance(key, slice) and _plain(key) and key.indices(size) == (0, size, 1)):
                return FALLBACK
            place = made
        dim += uses
        if isinstance(key, Tensor | list):
            advanced += 1
            made += 1 if not isinstance(key, Tensor) or key.dtype == torch.bool else key.ndim
        else:
            made += 0 if isinstance(key, int) else 1
    if advanced > 1 or (advanced and any(isinstance(key, int) for key in keys)):
        return FALLBACK
    if place is None:
        place = made + split.axis - dim
    return split.like(split.local[tuple(keys)], dim=place)


def _plain(key: slice) -> bool:
    return all(bound is None or isinstance(bound, int) for bound in (key.start, key.stop, key.step))


def _consumed(key: Any) -> int:
    """How many dimensions of the indexed tensor a key is for."""
    if key is None or key is Ellipsis or isinstance(key, bool):
        return 0
    return key.ndim if isinstance(key, Tensor) and key.dtype == torch.bool else 1


@rule("cat", "concat", "concatenate", "stack")
def cat(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Several tensors as one, along a dimension that is not cut, or one that all have cut alike and as evenly."""
    given = dict(zip(("tensors", "dim"), args, strict=False)) | kwargs
    stacked = function.__name__ == "stack"
    # torch leaves out such as torch.tensor([]), with which caches begin
    tensors = [one for one in given["tensors"] if stacked or tuple(one.shape) != (0,)]
    dim = given.get("dim", 0)
    lead = next((one for one in tensors if isinstance(one, Split)), None)
    if lead is None or "out" in kwargs:
        return FALLBACK
    if len(tensors) == 1 and not stacked:
        return lead.like(lead.local.clone())
    dim %= lead.ndim + stacked
    if not stacked and dim == lead.axis:
        if all(isinstance(one, Split) and (one.axis, one.cut) == (lead.axis, lead.cut) for one in tensors):
            whole = Cut(lead.cut.sizes, lead.cut.outer * len(tensors))
            return lead.like(torch.cat([one.local for one in tensors], dim), cut=whole)
        return FALLBACK
    if any(one.ndim != lead.ndim for one in tensors):
        return FALLBACK
    local = [mode.part(one, lead.axis, lead.cut, "cat") for one in tensors]
    return lead.like(function(local, dim), dim=lead.axis + (stacked and dim <= lead.axis))


@rule("repeat", "tile")
def repeat(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Copies side by side; along the cut dimension they are further runs of it."""
    if kwargs or not isinstance(args[0], Split):
        return FALLBACK
    split, times = args[0], sizes_of(args[1:])
    times = [1] * (split.ndim - len(times)) + times
    dim = split.axis + len(times) - split.ndim
    return split.like(split.local.repeat(times), dim=dim, cut=Cut(split.cut.sizes, split.cut.outer * times[dim]))


@rule("repeat_interleave")
def repeat_interleave(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Each element several times in a row."""
    given = dict(zip(("input", "repeats", "dim"), args, strict=False)) | kwargs
    split, times, dim = given["input"], given["repeats"], given.get("dim")
    if not isinstance(split, Split) or not isinstance(times, int) or dim is None:
        return FALLBACK
    local = split.local.repeat_interleave(times, dim)
    if dim % split.ndim != split.axis:
        return split.like(local)
    cut = Cut(tuple(size * times for size in split.cut.sizes), split.cut.outer)
    return split.like(local, cut=cut, scale=-1)


@rule("flip", "roll", "tril", "triu", "cumsum", "cumprod", "logcumsumexp")
def along(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Functions that keep the shape and mix elements along some dimensions."""
    split = args[0]
    if not isinstance(split, Split):
        return FALLBACK
    name = function.__name__
    if name in ("tril", "triu"):
        dims = [split.ndim - 2, split.ndim - 1]
    else:
        given = kwargs.get("dim", kwargs.get("dims", args[-1] if len(args) > 1 else None))
        if name == "flip" and len(args) > 2:
            given = args[1:]
        if given is None or (name == "roll" and "dims" not in kwargs and len(args) < 3):
            return FALLBACK
        dims = [dim % split.ndim for dim in (given if isinstance(given, list | tuple) else [given])]
    if split.axis in dims:
        return FALLBACK
    return split.like(function(split.local, *args[1:], **kwargs))
