"""Normalisations: cut along other dimensions they are each worker's own; along their own, sums are shared."""

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sheaf.split.moves import sliced
from sheaf.split.registry import FALLBACK, rule
from sheaf.split.rules.empty import filled, without
from sheaf.split.tensor import Split


@rule("layer_norm", "rms_norm")
def over_last(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Layer normalisation (Ba et al., 2016) and that by root mean square (Zhang and Sennrich, 2019)."""
    why, is_rms = function.__name__, function.__name__ == "rms_norm"
    names = ("input", "normalized_shape", "weight", "eps" if is_rms else "bias", "eps")
    given = dict(zip(names[: 4 if is_rms else 5], args, strict=False)) | kwargs
    split, shape = given["input"], list(given["normalized_shape"])
    weight, bias, eps = given.get("weight"), given.get("bias"), given.get("eps", None if is_rms else 1e-5)
    plain = F.rms_norm if is_rms else F.layer_norm
    if not isinstance(split, Split) or not shape or list(split.shape[-len(shape) :]) != shape:
        return FALLBACK
    first = split.ndim - len(shape)
    if split.axis < first:
        scaled = _entered(mode, [weight] if is_rms else [weight, bias], why)
        return split.like(plain(split.local, shape, *scaled, eps=eps))
    return _shared(mode, split, first, weight, bias, eps, why)


def _shared(mode: Any, split: Split, first: int, weight: Any, bias: Any, eps: float | None, why: str) -> Split:
    """Normalised along dimensions of which one is cut: mean and variance are of all workers' elements."""
    is_rms, dims, count = why == "rms_norm", list(range(first, split.ndim)), math.prod(split.shape[first:])
    plain = F.rms_norm if is_rms else F.layer_norm
    dtype = plain(split.local.new_ones(1), [1]).dtype  # as autocast has it
    values = split.local.float() if split.dtype.itemsize < 4 else split.local

    def mean(local: Tensor) -> Tensor:
        """A whole tensor, of which every worker uses all in its own part: its gradient is summed."""
        return mode.enter(mode.total(local.sum(dims, keepdim=True), why) / count, why)

    if not is_rms:
        values = values - mean(values)
    square = mean(values.square())
    values = values * (square + (torch.finfo(values.dtype).eps if eps is None else eps)).rsqrt()
    place = split.axis - first
    if weight is not None:
        values = values * mode.part(weight, place, split.cut, why)
    if bias is not None:
        values = values + mode.part(bias, place, split.cut, why)
    return split.like(values.to(dtype))


@rule("group_norm")
def over_groups(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Group normalisation (Wu and He, 2018), where each worker has whole groups, or whole samples."""
    given = dict(zip(("input", "num_groups", "weight", "bias", "eps"), args, strict=False)) | kwargs
    split, groups, eps = given["input"], given["num_groups"], given.get("eps", 1e-5)
    if not isinstance(split, Split) or split.axis > 1 or split.shape[1] % groups:
        return FALLBACK
    scaled = [given.get("weight"), given.get("bias")]
    if split.axis == 0:
        weight, bias = _entered(mode, scaled, "group_norm")
        return split.like(F.group_norm(split.local, groups, weight, bias, eps))
    unit = split.shape[1] // groups
    if any(size % unit for size in split.cut.sizes):
        if split.cut.run % unit == 0:
            mode.refine(split, 1, unit)
        return FALLBACK
    local, (weight, bias) = _filled(mode, split, scaled, "group_norm", unit)
    made = F.group_norm(local, local.shape[1] // unit, weight, bias, eps)
    return split.like(made if split.local.shape[1] else made.narrow(1, 0, 0))


@rule(F.batch_norm)
def over_batch(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Batch normalisation (Ioffe and Szegedy, 2015)."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "training", "momentum", "eps")
    given = dict(zip(names, args, strict=False)) | kwargs
    return _channelwise(mode, F.batch_norm, given, bool(given.get("training", False)), mixes_samples=True)


@rule(F.instance_norm)
def over_planes(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Instance normalisation (Ulyanov et al., 2016)."""
    names = ("input", "running_mean", "running_var", "weight", "bias", "use_input_stats", "momentum", "eps")
    given = dict(zip(names, args, strict=False)) | kwargs
    fresh = bool(given.get("use_input_stats", True))
    keeps = given.get("running_mean") is not None or given.get("running_var") is not None
    return _channelwise(mode, F.instance_norm, given, fresh, mixes_samples=keeps)


def _channelwise(
    mode: Any, function: Callable[..., Any], given: dict[str, Any], fresh: bool, *, mixes_samples: bool
) -> Any:
    """Statistics for each channel, in dimension 1: ``fresh`` ones, which move the running ones, or the running ones.

    Running statistics are whole on every worker, so every worker gets all channels' new ones, before forward ends.
    """
    split, why = given.pop("input"), function.__name__
    running = {key: given.pop(key, None) for key in ("running_mean", "running_var")}
    scaled = [given.pop("weight", None), given.pop("bias", None)]
    if not isinstance(split, Split) or any(isinstance(one, Split) for one in running.values()):
        return FALLBACK
    if split.axis != 1:
        if fresh and (mixes_samples or split.axis > 1):
            return FALLBACK
        weight, bias = _entered(mode, scaled, why)
        settings = {**running, "weight": weight, "bias": bias, **given}
        return split.like(without(lambda local: function(local, **settings), [split.local], split.axis))
    local, (weight, bias) = _filled(mode, split, scaled, why, 1)
    kept = {key: whole for key, whole in running.items() if whole is not None}
    parts = {key: filled(sliced(whole, 0, split.cut, mode.team.rank).clone(), 0) for key, whole in kept.items()}
    own = {key: parts.get(key) for key in running}
    made = function(local, **own, weight=weight, bias=bias, **given)
    channels = split.local.shape[1]
    if fresh:
        for key, whole in kept.items():
            mode.later(whole, parts[key][:channels], split.cut, f"running statistics of {why}")
    return split.like(made if channels else made.narrow(1, 0, 0))


def _entered(mode: Any, tensors: list[Any], why: str) -> list[Any]:
    return [None if tensor is None else mode.enter(tensor, why) for tensor in tensors]


def _filled(mode: Any, split: Split, scaled: list[Any], why: str, unit: int) -> tuple[Tensor, list[Any]]:
    """The slice and those of weight and bias; where it has no channels, ``unit`` of them that are zero."""
    parts = [None if one is None else filled(mode.part(one, 0, split.cut, why), 0, unit) for one in scaled]
    return filled(split.local, 1, unit), parts


@rule(F.local_response_norm)
def over_neighbours(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Local response normalisation (Krizhevsky et al., 2012), over neighbouring channels, where they are all here."""
    split = args[0] if args else kwargs["input"]
    if not isinstance(split, Split) or split.axis == 1:
        return FALLBACK
    named = {key: value for key, value in kwargs.items() if key != "input"}
    return split.like(function(split.local, *args[1:], **named))
