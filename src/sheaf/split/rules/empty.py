"""Slices without elements, which some of torch's functions refuse: zeros stand in, and are cut off the result."""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def filled(tensor: Tensor, dim: int, length: int = 1) -> Tensor:
    """The tensor; where it has nothing along ``dim``, ``length`` zeros that stay in its graph.

    Every worker's backward must meet the same collectives, so an empty slice may not drop out of the graph.

    >>> filled(torch.ones(2, 0), 1, 3).shape, filled(torch.ones(2, 4), 1, 3).shape
    (torch.Size([2, 3]), torch.Size([2, 4]))
    """
    if tensor.shape[dim]:
        return tensor
    zeros = tensor.new_zeros((*tensor.shape[:dim], length, *tensor.shape[dim + 1 :]))
    return torch.cat((tensor, zeros), dim)


def without(compute: Callable[..., Any], tensors: Sequence[Tensor], dim: int, length: int = 1) -> Any:
    """``compute(*tensors)`` for a function that keeps ``dim`` apart, whatever the slices hold; tensors and tuples."""
    found = compute(*(filled(tensor, dim, length) for tensor in tensors))
    if tensors[0].shape[dim]:
        return found
    if isinstance(found, tuple):
        return tuple(one.narrow(dim, 0, 0) for one in found)
    return found.narrow(dim, 0, 0)
