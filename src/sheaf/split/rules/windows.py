"""Functions over windows and planes: pools, padding, resizing; and those that trade channels for pixels."""

from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.nn import functional as F

from sheaf.plans.split import Cut
from sheaf.split.registry import FALLBACK, rule
from sheaf.split.rules.empty import without
from sheaf.split.tensor import Split

_POOLS = """
    max_pool{0}d max_pool{0}d_with_indices max_unpool{0}d avg_pool{0}d lp_pool{0}d adaptive_max_pool{0}d
    adaptive_max_pool{0}d_with_indices adaptive_avg_pool{0}d
""".split()  # noqa: SIM905 - words


@rule(*(function for name in _POOLS for n in (1, 2, 3) if (function := getattr(F, name.format(n), None))))
@rule(
    *(name.format(n) for name in ("max_pool{0}d", "adaptive_avg_pool{0}d", "adaptive_max_pool{0}d") for n in (1, 2, 3))
)
def pool(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Over windows of the last dimensions, as many as the name says; channels and samples stay apart."""
    planes = next(int(letter) for letter in function.__name__ if letter.isdigit())
    return apart(mode, function, args, kwargs, planes)


@rule("interpolate", "upsample", "upsample_nearest", "upsample_bilinear")
def resize(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Of all dimensions after samples and channels."""
    first = args[0] if args else kwargs["input"]
    return apart(mode, function, args, kwargs, first.ndim - 2)


@rule("pad", "constant_pad_nd")
def pad(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Of the last dimensions, two numbers for each, from the last on."""
    first = args[0] if args else kwargs["input"]
    widths = list(kwargs.get("pad", args[1] if len(args) > 1 else ()))
    while (
        widths and not any(widths[-2:]) and kwargs.get("mode", args[2] if len(args) > 2 else "constant") == "constant"
    ):
        del widths[-2:]  # a dimension that is named, and left as it is
    if isinstance(first, Split) and first.axis >= first.ndim - len(widths) // 2:
        return FALLBACK
    named = {**kwargs, "pad": widths} if "pad" in kwargs else kwargs
    return apart(mode, function, (*args[:1], widths, *args[2:]) if len(args) > 1 else args, named, len(widths) // 2)


@rule("pixel_shuffle", "pixel_unshuffle")
def trade(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Channels for pixels: factor squared channels, one after the other, are one channel of a larger plane."""
    shuffles = function.__name__ == "pixel_shuffle"
    named = dict(zip(("input", "factor"), args, strict=False)) | kwargs
    split = named["input"]
    factor = next((value for key, value in named.items() if key.endswith("factor")), 1)
    if not isinstance(split, Split) or split.axis > split.ndim - 3:
        return FALLBACK
    unit, sizes = factor * factor, split.cut.sizes
    if split.axis < split.ndim - 3:
        return split.like(without(lambda local: function(local, factor), [split.local], split.axis))
    if shuffles and any(size % unit for size in sizes):
        if split.cut.run % unit == 0:
            mode.refine(split, 1, unit)
        return FALLBACK
    cut = Cut(tuple(size // unit if shuffles else size * unit for size in sizes), split.cut.outer)
    scale = split.scale * unit if shuffles else split.scale // unit if split.scale % unit == 0 else -1
    return split.like(
        without(lambda local: function(local, factor), [split.local], split.axis, unit), cut=cut, scale=scale
    )


def apart(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], planes: int) -> Any:
    """A function of the last ``planes`` dimensions, of which none is cut, on the slice; other tensors are cut alike."""
    split = args[0] if args else kwargs["input"]
    if not isinstance(split, Split) or split.axis >= split.ndim - planes or kwargs.get("out") is not None:
        return FALLBACK
    rest, named = args[1:], {key: value for key, value in kwargs.items() if key != "input"}
    others = [value for value in rest if isinstance(value, Tensor)]
    if any(isinstance(value, Tensor) for value in named.values()) or any(one.shape != split.shape for one in others):
        return FALLBACK
    brought = [mode.part(one, split.axis, split.cut, function.__name__) for one in others]
    settings = [value for value in rest if not isinstance(value, Tensor)]  # tensors come first
    found = without(lambda *local: function(*local, *settings, **named), [split.local, *brought], split.axis)
    return tuple(split.like(one) for one in found) if isinstance(found, tuple) else split.like(found)
