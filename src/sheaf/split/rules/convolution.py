"""Convolutions and transposed ones: cut by output channels, by input channels, or between groups.

The weight of a convolution is outputs x inputs per group x kernel, that of a transposed one is inputs x outputs per
group x kernel. Cut by outputs, each worker finds some output channels of the whole input (columns). Cut by inputs, each
finds partial sums of all output channels (rows). Cut between groups, each does some groups from input to output.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from sheaf.plans.split import Cut
from sheaf.split.registry import FALLBACK, rule
from sheaf.split.rules.empty import filled
from sheaf.split.tensor import Split

_NAMES = ("input", "weight", "bias", "stride", "padding", "dilation", "groups")
_NAMES_TRANSPOSED = ("input", "weight", "bias", "stride", "padding", "output_padding", "groups", "dilation")


@dataclass(frozen=True)
class _Way:
    """How a convolution is shared: the cut of the weight along ``dim``, of input channels and of output channels.

    No cut of input channels means that the whole input is needed; none of output channels, that partial sums come out.
    ``lead`` is the tensor whose cut the others follow; ``scale`` is how many of its origin's elements an output channel
    stands for. ``groups`` are those that each worker has.
    """

    lead: Split
    dim: int
    weight: Cut
    channels: Cut | None
    outputs: Cut | None
    scale: int
    groups: tuple[int, ...]


@dataclass(frozen=True)
class _Shape:
    """What a way depends on: where channels are in the input, how many groups, which way round the weight is."""

    channel: int
    groups: int
    transposed: bool
    inputs: int  # per group
    outputs: int  # per group


@rule("conv1d", "conv2d", "conv3d", "conv_transpose1d", "conv_transpose2d", "conv_transpose3d")
def convolution(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """By the cut of the weight; else by that of the input; else the weight is cut by outputs or between groups."""
    why, transposed = function.__name__, "transpose" in function.__name__
    given = dict(zip(_NAMES_TRANSPOSED if transposed else _NAMES, args, strict=False)) | kwargs
    tensor, weight, bias = given.pop("input"), given.pop("weight"), given.pop("bias", None)
    groups = given.pop("groups", 1)
    channel = tensor.ndim - weight.ndim + 1
    if channel not in (0, 1) or groups < 1 or weight.shape[0] % groups:
        return FALLBACK  # which raises torch's own error
    if isinstance(tensor, Split) and tensor.axis < channel and not isinstance(weight, Split):
        entered = [None if one is None else mode.enter(one, why) for one in (weight, bias)]
        return tensor.like(function(tensor.local, *entered, groups=groups, **given))
    outer, inner = weight.shape[0] // groups, weight.shape[1]
    shape = _Shape(channel, groups, transposed, *((outer, inner) if transposed else (inner, outer)))
    way = _way(mode, tensor, weight, shape)
    if way is None:
        return FALLBACK
    local = mode.enter(tensor, why) if way.channels is None else mode.part(tensor, channel, way.channels, why)
    kernel = mode.part(weight, way.dim, way.weight, why)
    shift = None if bias is None or way.outputs is None else mode.part(bias, 0, way.outputs, why)
    made = _convolved(function, local, kernel, shift, given, shape, way.groups[mode.team.rank])
    if way.outputs is not None:
        return way.lead.like(made, dim=channel, cut=way.outputs, scale=way.scale)
    made = mode.total(made, why)
    return made if bias is None else made + mode.whole(bias, why).reshape(-1, *[1] * (weight.ndim - 2))


def _way(mode: Any, tensor: Tensor, weight: Tensor, shape: _Shape) -> _Way | None:
    cut_input = tensor if isinstance(tensor, Split) and tensor.axis == shape.channel else None
    if cut_input is not None and not isinstance(weight, Split):
        return _after_input(mode, cut_input, shape)
    held = weight if isinstance(weight, Split) else _proposed(mode, weight, shape)
    return None if held is None or held.axis > 1 else _after_weight(mode, cut_input, held, shape)


def _after_weight(mode: Any, tensor: Split | None, weight: Split, shape: _Shape) -> _Way | None:
    """By the cut of the weight: whole groups, or its outputs or inputs within every group alike."""
    cut, per_group = weight.cut, weight.shape[0] // shape.groups
    if weight.axis == 0 and shape.groups > 1 and not any(size % per_group for size in cut.sizes):
        shares = tuple(size // per_group for size in cut.sizes)
        way = _between_groups(weight, per_group, shares, cut.outer, shape)
        if tensor is not None and tensor.cut == way.channels:  # what comes later asks the one that came first
            return _between_groups(tensor, shape.inputs, shares, cut.outer, shape)
        return way
    if weight.axis == 0 and cut.outer % shape.groups:
        _ask(mode, weight, per_group)
        return None
    channels = cut if weight.axis == 0 else Cut(cut.sizes, cut.outer * shape.groups)
    is_columns = weight.axis == (1 if shape.transposed else 0)
    inputs, outputs = (None, channels) if is_columns else (channels, None)
    return _Way(weight, weight.axis, cut, inputs, outputs, weight.scale, (shape.groups,) * len(cut.sizes))


def _proposed(mode: Any, weight: Tensor, shape: _Shape) -> Split | None:
    """Cut by outputs, or between groups."""
    if shape.groups == 1:
        return mode.propose(weight, 1 if shape.transposed else 0)
    per_group = weight.shape[0] // shape.groups
    if per_group == 1:
        return mode.propose(weight, 0)
    return mode.propose(weight, 0, Cut.even(weight.shape[0], mode.team.workers, unit=per_group))


def _after_input(mode: Any, tensor: Split, shape: _Shape) -> _Way | None:
    """By the cut of the input channels: whole groups, or within every group alike."""
    cut, groups = tensor.cut, shape.groups
    if groups > 1 and not any(size % shape.inputs for size in cut.sizes):
        shares = tuple(size // shape.inputs for size in cut.sizes)
        return _between_groups(tensor, shape.inputs, shares, cut.outer, shape)
    if cut.outer % groups:
        _ask(mode, tensor, shape.inputs)
        return None
    dim, along = (0, cut) if shape.transposed else (1, Cut(cut.sizes, cut.outer // groups))
    return _Way(tensor, dim, along, cut, None, -1, (groups,) * len(cut.sizes))


def _between_groups(lead: Split, lead_unit: int, shares: tuple[int, ...], outer: int, shape: _Shape) -> _Way:
    def cut(unit: int) -> Cut:
        return Cut(tuple(share * unit for share in shares), outer)

    scale, rest = divmod(lead.scale * lead_unit, shape.outputs)
    return _Way(
        lead=lead,
        dim=0,
        weight=cut(shape.inputs if shape.transposed else shape.outputs),
        channels=cut(shape.inputs),
        outputs=cut(shape.outputs),
        scale=-1 if rest else scale,
        groups=tuple(share * outer for share in shares),
    )


def _ask(mode: Any, split: Split, unit: int) -> None:
    if unit and split.cut.run % unit == 0:
        mode.refine(split, 1, unit)


def _convolved(
    function: Callable[..., Any],
    tensor: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    given: dict[str, Any],
    shape: _Shape,
    groups: int,
) -> Tensor:
    """A worker's convolution; one that has no channels works on zeros instead, and cuts the channels off again."""
    if tensor.shape[shape.channel] and weight.shape[0] and weight.shape[1]:
        return function(tensor, weight, bias, groups=groups, **given)
    share = max(groups, 1)  # no groups: as if it had one
    inputs = shape.inputs if not groups else 1
    outputs = shape.outputs if not groups else 1
    local = filled(tensor, shape.channel, share * inputs)
    kernel = filled(filled(weight, 1), 0, share * (inputs if shape.transposed else outputs))
    shift = None if bias is None else filled(bias, 0, share * outputs)
    made = function(local, kernel, shift, groups=share, **given)
    has_none = not groups or not weight.shape[1 if shape.transposed else 0]
    return made.narrow(shape.channel, 0, 0) if has_none else made
