"""What a slice says of itself: that it is the whole."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from sheaf.split.registry import getter, rule
from sheaf.split.rules.elementwise import elementwise
from sheaf.split.tensor import Split

_ABOUT = [
    "shape",
    "dtype",
    "device",
    "layout",
    "ndim",
    "is_cuda",
    "is_cpu",
    "is_meta",
    "is_mps",
    "is_xpu",
    "is_sparse",
    "is_quantized",
    "is_nested",
    "itemsize",
    "is_sparse_csr",
    "is_mkldnn",
    "names",
]


@rule(*(getter(name) for name in _ABOUT if hasattr(Tensor, name)))
@rule("size", "dim", "numel", "nelement", "ndimension", "is_floating_point", "is_complex", "element_size", "get_device")
@rule(Tensor.__len__)
def about(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What is true of the whole."""
    return function(*args, **kwargs)


@rule(getter("requires_grad"), getter("grad_fn"), getter("is_leaf"), "is_contiguous", "stride", "is_inference")
def about_local(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What is true of the slice that autograd knows."""
    split = args[0]
    return function(split.local if isinstance(split, Split) else split, *args[1:], **kwargs)


@rule("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor")
def new(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A fresh tensor of the same kind."""
    first = args[0].local if isinstance(args[0], Split) else args[0]
    return function(first, *args[1:], **kwargs)


@rule(getter("data"))
def data(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The slice without its history."""
    return elementwise(mode, Tensor.detach, args, {})
