"""What fake tensors can be asked that torch does not tell: grouped products in any precision.

torch's own shape of ``_grouped_mm`` is that of its kernel for bfloat16, while the one for CPUs takes any dtype.
"""

from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_impls import op_implementations_dict, register_op_impl

_GROUPED = torch.ops.aten._grouped_mm.default


def _grouped(_mode: Any, _function: Any, left: Tensor, right: Tensor, *rest: Any, **named: Any) -> Tensor:
    given = dict(zip(("offs", "bias", "out_dtype"), rest, strict=False)) | named
    shape = (left.shape[-2], right.shape[-1])
    if left.ndim == right.ndim:
        groups = given["offs"].shape[0] if left.ndim == 2 else left.shape[0]
        shape = (groups, *shape)
    return left.new_empty(shape, dtype=given.get("out_dtype") or left.dtype)


if _GROUPED not in op_implementations_dict:
    register_op_impl(_GROUPED)(_grouped)
