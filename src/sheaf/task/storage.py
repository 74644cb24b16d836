"""Which memory a tensor views, as a number."""

import torch
from torch import Tensor


def storage_id(tensor: Tensor) -> int:
    """Equal for tensors that view the same memory, fake ones too.

    Not ``untyped_storage()``: that makes a Python object per storage, which the ones of fake tensors do not survive
    when garbage is collected (torch 2.13).
    """
    return torch._C._storage_id(tensor)  # pyright: ignore[reportAttributeAccessIssue]
