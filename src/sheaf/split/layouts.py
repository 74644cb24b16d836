"""How a whole tensor lies in memory, where slices of one element or none cannot tell.

A random mask is drawn in the order of memory, so it depends on the order of a tensor's dimensions there. A slice lies
as the whole does, and shows it, unless some worker has one element or none of the cut dimension. For such slices what
happens to them is done again to shadows of the whole, without memory, from where they first lie in another order than
that of their dimensions.
"""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_iter, tree_map

from sheaf.split.moves import laid_out, unset
from sheaf.split.tensor import Split


def follow(func: Callable[..., Any], args: Any, kwargs: Any, result: Any) -> None:
    """Give the slices in the result that need one a shadow; a function that cannot be run so gives none."""
    made = [leaf for leaf in tree_iter(result) if isinstance(leaf, Split)]
    if not any(_narrow(split) and split.ndim > 1 for split in made):
        return
    given = [leaf for leaf in tree_iter((args, kwargs)) if isinstance(leaf, Tensor)]
    if any(split is one for split in made for one in given):  # changed in place: it lies as before
        return
    if not any(map(_is_turned, (*given, *made))):
        return
    try:
        with torch.no_grad():
            found = func(*tree_map(_shadow, args), **tree_map(_shadow, kwargs))
    except Exception:  # noqa: BLE001 - what depends on values has no shadow
        return
    shadows = [leaf for leaf in tree_iter(found) if isinstance(leaf, Tensor)]
    leaves = [leaf for leaf in tree_iter(result) if isinstance(leaf, Tensor)]
    for leaf, shadow in zip(leaves, shadows, strict=False):
        if isinstance(leaf, Split) and shadow.shape == leaf.shape and not shadow.is_contiguous():
            leaf.shadow = shadow


def whole_like(split: Split) -> Tensor:
    """An unset tensor of the whole's shape, whose elements lie in memory in the whole's order."""
    like = split.local if split.shadow is None else split.shadow
    return unset(split.shape, like, device=split.local.device)


def as_shadow(whole: Tensor, split: Split) -> Tensor:
    """A slice that was gathered, in the order in which the whole would lie."""
    return whole if split.shadow is None else laid_out(whole, split.shadow)


def _narrow(split: Split) -> bool:
    return min(split.cut.sizes) <= 1


def _is_turned(tensor: Tensor) -> bool:
    """Whether a tensor lies in another order than that of its dimensions, those of one element counted."""
    if isinstance(tensor, Split) and tensor.shadow is not None:
        return True
    shown = tensor.local if isinstance(tensor, Split) else tensor
    if isinstance(shown, FakeTensor):  # a rehearsal draws nothing
        return False
    return shown.stride() != torch.empty(shown.shape, device="meta").stride()


def _shadow(value: Any) -> Any:
    if isinstance(value, Split):
        if value.shadow is not None:
            return value.shadow
        if _narrow(value):
            return torch.empty(value.shape, dtype=value.dtype, device="meta")
        return unset(value.shape, value.local, device=torch.device("meta"))
    if isinstance(value, Tensor):
        return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")
    return value
