"""Kinds of torch functions, as far as a pipeline must tell them apart."""

from collections.abc import Mapping, Sequence
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor

from sheaf.split.registry import getter

_ATTRIBUTES = (
    "shape dtype device layout ndim is_cuda is_cpu is_meta is_sparse is_quantized is_nested itemsize requires_grad "
    "is_leaf grad_fn is_mkldnn names"
)
_METHODS = (
    "size dim numel nelement ndimension is_floating_point is_complex element_size get_device stride is_contiguous"
)
_READS = (
    "item tolist __bool__ __int__ __float__ __index__ __complex__ __contains__ __format__ equal allclose is_nonzero "
    "numpy __array__"
)


def _functions(names: str) -> set[Any]:
    spaces = (torch, Tensor)
    return {getattr(space, name) for name in names.split() for space in spaces if hasattr(space, name)}


_GETTERS = {getter(name) for name in _ATTRIBUTES.split() if hasattr(Tensor, name)}
ABOUT = (
    _GETTERS | _functions(_METHODS) | {Tensor.__len__, Tensor.__hash__}
)  # what is known of a tensor without its values
READS = _functions(_READS)  # a value that Python gets to see
ARRAYS = {Tensor.numpy, Tensor.__array__}  # of those, what gives arrays
PICKS = {Tensor.__getitem__, torch.masked_select, Tensor.masked_select}  # elements by an index or a mask
FACTORIES = frozenset(
    ["rand", "randn", "randint", "randperm", "bernoulli", "multinomial", "normal", "uniform_", "random_"]
)
_COUNTS = frozenset(["nonzero", "argwhere", "unique", "_unique2", "unique_consecutive", "unique_dim", "bincount"])


def may_differ(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], *, picks: bool) -> bool:
    """Whether Python sees a value of a batch, or how many places have one, or whether something is drawn: so that the
    forward may take another path, or pass other shapes, for the next batch of the same shapes. ``picks``: so it may
    where elements are picked by a mask.
    """
    name = getattr(func, "__name__", "")
    counts = _counts(name, (*args, *kwargs.values())) or (picks and is_pick(func, args, kwargs))
    return counts or func in READS or name in FACTORIES


def _counts(name: str, given: Sequence[Any]) -> bool:
    """Whether the values of what a function is given decide how large its result is."""
    if name == "where":
        return len(given) == 1
    if name == "one_hot":  # as many as the highest, unless it is said how many
        return not any(isinstance(one, int) and one >= 0 for one in given)
    if name in ("repeat_interleave", "tensor_split"):
        return len(given) == 1 or sum(isinstance(one, Tensor) for one in given) > 1
    return name in _COUNTS or name == "_pack_padded_sequence"


def is_pick(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any] = MappingProxyType({})) -> bool:
    """Whether a function picks elements by the values of its second argument, or of a ``mask``."""
    return func in PICKS and has_mask(args[1] if len(args) > 1 else kwargs.get("mask"))


def has_mask(index: Any) -> bool:
    """Whether an index picks elements by their values."""
    keys = index if isinstance(index, tuple) else (index,)
    return any(isinstance(key, Tensor) and key.dtype in (torch.bool, torch.uint8) for key in keys)
