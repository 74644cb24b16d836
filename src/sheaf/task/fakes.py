"""Sheaf's own fake tensors, which can be asked what torch's cannot: grouped products in any precision.

torch's own shape of ``_grouped_mm`` is that of its kernel for bfloat16, while the one for CPUs takes any dtype. Fake
tensors of others beside Sheaf's, those of torch.compile among them, keep torch's own.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode

_GROUPED = torch.ops.aten._grouped_mm.default


class Fakes(FakeTensorMode):
    """The mode in which tensors hold no memory; a model is built, traced and rehearsed in it."""

    def dispatch(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """What one operator gives. Results of grouped products stay out of the cache, which all modes share."""
        if func is _GROUPED:
            with self:
                return _grouped(*args, **(kwargs or {}))
        return super().dispatch(func, types, args, kwargs or {})


def _grouped(left: Tensor, right: Tensor, *rest: Any, **named: Any) -> Tensor:
    given = dict(zip(("offs", "bias", "out_dtype"), rest, strict=False)) | named
    shape = (left.shape[-2], right.shape[-1])
    if left.ndim == right.ndim:
        groups = given["offs"].shape[0] if left.ndim == 2 else left.shape[0]
        shape = (groups, *shape)
    return left.new_empty(shape, dtype=given.get("out_dtype") or left.dtype)
