"""Losses, and what is normalised along a cut dimension: logits cut by class are never gathered.

Of each worker's logits only a few numbers a row move: the logarithm of their summed exponentials, and the target's.
"""

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.nn import functional as F

from sheaf.plans.split import Cut
from sheaf.split.moves import sliced
from sheaf.split.registry import FALLBACK, rule
from sheaf.split.rules import reductions
from sheaf.split.rules.elementwise import elementwise, leader
from sheaf.split.tensor import Split


class Scores(Function):
    """Numbers of each row of a slice of logits, one after the other along a new first dimension.

    They are the logarithm of the summed exponentials; with ``own``, the logit at that index, or 0 where ``inside`` is
    False; with ``weights``, the sum weighted by them. In float32 at least.
    """

    @staticmethod
    def forward(
        ctx: Any, local: Tensor, dim: int, own: Tensor | None, inside: Tensor | None, weights: Tensor | None
    ) -> Tensor:
        wide = _wide(local)
        if local.shape[dim]:
            top = wide.amax(dim, keepdim=True)
            top = top.masked_fill(top.isinf(), 0.0)
            logarithm = (wide - top).exp_().sum(dim).log_() + top.squeeze(dim)
        else:
            logarithm = wide.sum(dim).fill_(-torch.inf)
        found = [logarithm]
        if own is not None and inside is not None:
            at = wide.gather(dim, own.unsqueeze(dim)).squeeze(dim) if local.shape[dim] else wide.sum(dim)
            found.append(at.masked_fill_(~inside, 0.0))
        if weights is not None:
            found.append((wide * _along(weights, dim, wide.ndim)).sum(dim))
        ctx.dim, ctx.picks = dim, own is not None
        ctx.save_for_backward(local, logarithm, own, inside, weights)
        return torch.stack(found)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        local, logarithm, own, inside, weights = ctx.saved_tensors
        gradient = gradients[0]
        finite = logarithm.masked_fill(logarithm == -torch.inf, 0.0)
        made = (_wide(local) - finite.unsqueeze(ctx.dim)).exp_().mul_(gradient[0].unsqueeze(ctx.dim))
        if ctx.picks and local.shape[ctx.dim]:
            made.scatter_add_(ctx.dim, own.unsqueeze(ctx.dim), gradient[1].masked_fill(~inside, 0.0).unsqueeze(ctx.dim))
        if weights is not None:
            made.addcmul_(gradient[-1].unsqueeze(ctx.dim), _along(weights, ctx.dim, made.ndim))
        return made.to(local.dtype), None, None, None, None


def _wide(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.dtype in (torch.float16, torch.bfloat16) else tensor


def _along(vector: Tensor, dim: int, ndim: int) -> Tensor:
    return vector.view(-1, *[1] * (ndim - dim - 1))


def _of_all(mode: Any, own: Tensor, why: str) -> Tensor:
    """Every worker's tensor of one shape, along a new first dimension, whole."""
    return mode.gather(Split(own.unsqueeze(0), 0, Cut((1,) * mode.team.workers)), why)


def _logsumexp(mode: Any, split: Split, why: str) -> Tensor:
    """Over the cut dimension, which is gone; whole, in float32 at least."""
    own = Scores.apply(split.local, split.axis, None, None, None)[0]
    return torch.logsumexp(_of_all(mode, own, why), 0)


# Along one dimension ------------------------------------------------------------------------------------------------


@rule("softmax", "log_softmax")
def normalised(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Also along the cut dimension."""
    split = args[0] if args else kwargs.get("input")
    dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
    if not isinstance(split, Split) or not isinstance(dim, int) or dim % split.ndim != split.axis:
        return reductions.normalised(mode, function, args, kwargs) if args else FALLBACK
    if kwargs.get("out") is not None:
        return FALLBACK
    given = kwargs.get("dtype") or next((value for value in args[2:] if isinstance(value, torch.dtype)), None)
    dtype = given or function(split.local.new_zeros(1), dim=0).dtype  # autocast may want another
    if given is not None:
        split = split.like(split.local.to(given))
    whole = mode.enter(_logsumexp(mode, split, function.__name__), function.__name__)
    local = _wide(split.local) - whole.unsqueeze(split.axis)
    made = (local if function.__name__ == "log_softmax" else local.exp()).to(dtype)
    return split.like(made.contiguous())  # as torch's own, in which order a mask may be drawn next


@rule("logsumexp")
def logsumexp(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Also along the cut dimension alone."""
    given = dict(zip(("input", "dim", "keepdim"), args, strict=False)) | kwargs
    split, dim = given.get("input"), given.get("dim")
    dim = dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim
    if not isinstance(split, Split) or not isinstance(dim, int) or dim % split.ndim != split.axis or "out" in given:
        return reductions.along_others(mode, function, args, kwargs) if args else FALLBACK
    found = _logsumexp(mode, split, "logsumexp").to(split.dtype)
    return found.unsqueeze(split.axis) if given.get("keepdim") else found


@rule("argmax", "argmin")
def argmax(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Also along the cut dimension; the first of equals, and NaN before all, as torch has it."""
    given = dict(zip(("input", "dim", "keepdim"), args, strict=False)) | kwargs
    split, dim = given.get("input"), given.get("dim")
    if not isinstance(split, Split) or not isinstance(dim, int) or dim % split.ndim != split.axis or "out" in given:
        return reductions.along_others(mode, function, args, kwargs) if args else FALLBACK
    local, why = split.local.detach(), function.__name__
    numbers = sliced(torch.arange(split.shape[split.axis], device=local.device), 0, split.cut, mode.team.rank)
    if len(numbers):
        at = function(local, split.axis, True)
        own, index = local.gather(split.axis, at), numbers[at]
    else:  # not looked at below
        shape = (*local.shape[: split.axis], 1, *local.shape[split.axis + 1 :])
        own, index = local.new_zeros(shape), numbers.new_zeros(shape)
    present = [worker for worker, size in enumerate(split.cut.sizes) if size]
    values, indices = _of_all(mode, own, why)[present], _of_all(mode, index, why)[present]
    best = values.amax(0) if why == "argmax" else values.amin(0)
    found = indices.masked_fill((values != best) & ~values.isnan(), split.shape[split.axis]).amin(0)
    return found if given.get("keepdim") else found.squeeze(split.axis)


# Of classes ---------------------------------------------------------------------------------------------------------


@rule(F.cross_entropy)
def cross_entropy(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Of logits of batch x classes x anything: cut by class, or elsewhere."""
    given = _bound(function, args, kwargs)
    logits, target, smoothing = given["input"], given["target"], given["label_smoothing"]
    likely = target.is_floating_point()
    if not _fits(given) or (likely and given["ignore_index"] >= 0):
        return FALLBACK
    weight, classes = given["weight"], _class_dim(logits)
    if logits.axis != classes:
        return _elsewhere(mode, function, given, likely)
    if likely:
        if smoothing:
            target = elementwise(mode, torch.mul, (target, 1.0 - smoothing), {})
            target = elementwise(mode, torch.add, (target, smoothing / logits.shape[classes]), {})
        logarithms = normalised(mode, torch.log_softmax, (logits, classes), {})
        found = elementwise(mode, torch.mul, (logarithms, target), {})
        if weight is not None:
            found = elementwise(mode, torch.mul, (found, _along(weight, classes, logits.ndim)), {})
        each = -reductions.total(mode, torch.sum, (found, classes), {})
        return _reduced(each, given["reduction"], each.numel())
    cut, valid = logits.cut, target != given["ignore_index"]
    own, inside, target = _places(mode, logits, target, valid)
    sums = None
    if smoothing:
        whole = logits.local.new_ones(cut.length) if weight is None else weight
        sums = sliced(whole, 0, cut, mode.team.rank).to(_wide(logits.local).dtype)
    parts = _of_all(mode, Scores.apply(logits.local, classes, own, inside, sums), "cross_entropy")
    logarithm = torch.logsumexp(parts[:, 0], 0)
    share = None if weight is None else weight[target].masked_fill(~valid, 0.0)
    each = logarithm - parts[:, 1].sum(0)
    each = each if share is None else each * share
    if smoothing:
        total = cut.length if weight is None else weight.sum()
        each = (1.0 - smoothing) * each + smoothing / cut.length * (logarithm * total - parts[:, 2].sum(0))
    each = each.masked_fill(~valid, 0.0)
    dtype = function(logits.local.new_zeros(1, 1), target.new_zeros(1)).dtype  # autocast may want another
    return _reduced(each, given["reduction"], (valid if share is None else share).sum()).to(dtype)


@rule(F.nll_loss)
def nll_loss(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Of logarithms of probabilities that are cut by class, or elsewhere."""
    given = _bound(function, args, kwargs)
    if not _fits(given):
        return FALLBACK
    logits, target, weight = given["input"], given["target"], given["weight"]
    classes, local = _class_dim(logits), logits.local
    if logits.axis != classes:
        return _elsewhere(mode, function, given, False)
    valid = target != given["ignore_index"]
    own, inside, target = _places(mode, logits, target, valid)
    if local.shape[classes]:
        found = local.gather(classes, own.unsqueeze(classes)).squeeze(classes).masked_fill(~inside, 0.0)
    else:
        found = local.sum(classes)
    each = -mode.total(found, "nll_loss")
    share = None if weight is None else weight[target].masked_fill(~valid, 0.0)
    each = each if share is None else each * share
    each = each.masked_fill(~valid, 0.0)
    return _reduced(each, given["reduction"], (valid if share is None else share).sum())


def _fits(given: dict[str, Any]) -> bool:
    """Whether the arguments are of the kind that is worked out here; torch itself tells what is wrong with others."""
    logits, target, weight = given["input"], given["target"], given["weight"]
    if not isinstance(logits, Split) or logits.cut.length < 2 or isinstance(weight, Split):
        return False
    if given["size_average"] is not None or given["reduce"] is not None:
        return False
    if weight is not None and (weight.requires_grad or weight.shape != (logits.shape[_class_dim(logits)],)):
        return False
    rows = [size for dim, size in enumerate(logits.shape) if dim != _class_dim(logits)]
    if target.is_floating_point():
        return target.shape == logits.shape
    return not isinstance(target, Split) and list(target.shape) == rows


def _class_dim(logits: Tensor) -> int:
    return min(1, logits.ndim - 1)


def _places(mode: Any, logits: Split, target: Tensor, valid: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Of each target: its index in this worker's slice, whether it has one, and the target where valid, else 0."""
    cut, size = logits.cut, logits.cut.sizes[mode.team.rank]
    target = target.long().masked_fill(~valid, 0)
    known = ((target >= 0) & (target < cut.length)).all()
    torch._assert_async(known, f"a target is out of bounds: classes are 0 to {cut.length - 1}")
    place = target % cut.run - cut.offset(mode.team.rank)
    inside = (place >= 0) & (place < size) & valid
    return (target // cut.run * size + place).masked_fill(~inside, 0), inside, target


def _elsewhere(mode: Any, function: Callable[..., Any], given: dict[str, Any], likely: bool) -> Any:
    """Of logits whose classes are all here, for some of the rows."""
    logits, target, classes = given["input"], given["target"], _class_dim(given["input"])
    place = logits.axis - (logits.axis > classes)
    local = mode.part(target, logits.axis if likely else place, logits.cut, function.__name__)
    named = {key: given[key] for key in ("weight", "ignore_index", "label_smoothing") if key in given}
    each = logits.like(function(logits.local, local, reduction="none", **named), dim=place)
    if given["reduction"] != "mean":
        return _reduced(each, given["reduction"], 0, mode)
    if likely:
        return _reduced(each, "mean", each.numel(), mode)
    valid = local != given["ignore_index"]
    weight = given["weight"]
    share = valid if weight is None else weight[local.masked_fill(~valid, 0)].masked_fill(~valid, 0.0)
    both = mode.total(torch.stack((each.local.sum(), share.sum().to(each.dtype))), function.__name__)
    return both[0] / both[1]


def _reduced(each: Any, reduction: str, count: Any, mode: Any = None) -> Any:
    if reduction == "none":
        return each
    whole = reductions.total(mode, torch.sum, (each,), {}) if isinstance(each, Split) else each.sum()
    return whole / count if reduction == "mean" else whole


@functools.cache
def _signature(function: Callable[..., Any]) -> inspect.Signature:
    return inspect.signature(function)


def _bound(function: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any]) -> dict[str, Any]:
    bound = _signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    return dict(bound.arguments)


# Of single elements -------------------------------------------------------------------------------------------------


@rule(F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy, F.kl_div, F.gaussian_nll_loss)
@rule(F.binary_cross_entropy_with_logits, F.poisson_nll_loss, F.soft_margin_loss, F.hinge_embedding_loss)
def each_element(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What each element loses, then reduced."""
    given = _bound(function, args, kwargs)
    reduction, weight = given.pop("reduction"), given.get("weight")
    old = given.pop("size_average", None) is not None or given.pop("reduce", None) is not None
    known = reduction in ("none", "mean", "sum") or (function is F.kl_div and reduction == "batchmean")
    if old or not known or leader(mode, [value for value in given.values() if isinstance(value, Tensor)]) is None:
        return FALLBACK
    if isinstance(given.get("var"), Tensor) and given["var"].shape == given["input"].shape[:-1] != given["input"].shape:
        given["var"] = mode.whole(given["var"], function.__name__).unsqueeze(-1)
    each = elementwise(mode, function, (), {**given, "reduction": "none"})
    if reduction == "none":
        return each
    if reduction == "mean" and weight is not None and function in (F.mse_loss, F.l1_loss):
        shares = reductions.total(mode, torch.sum, (weight,), {}) if isinstance(weight, Split) else weight.sum()
        return reductions.total(mode, torch.sum, (each,), {}) / shares
    if reduction == "batchmean":
        return reductions.total(mode, torch.sum, (each,), {}) / given["input"].shape[0]
    return reductions.total(mode, torch.mean if reduction == "mean" else torch.sum, (each,), {})
