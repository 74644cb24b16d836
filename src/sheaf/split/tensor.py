"""A tensor of which each worker holds a slice: to the model it looks whole."""

from typing import Any

import torch
from torch import Tensor

from sheaf.errors import PlanError
from sheaf.plans.split import Cut


class Split(Tensor):
    """A tensor cut along dimension ``axis``; ``local`` is this worker's slice, and the one that autograd knows.

    Shape, dtype and device are those of the whole. Every function that meets one goes through the ``Splitting`` mode;
    nothing can be computed with one outside of it. ``origin`` names the parameter whose output dimension gave the cut,
    and one element along ``axis`` stands for ``scale`` elements of that parameter's dimension.
    """

    local: Tensor
    axis: int
    cut: Cut
    origin: str | None
    scale: int
    held: bool
    shadow: Tensor | None = None  # lies in memory as the whole would, where the slice cannot tell: see layouts

    def __new__(  # noqa: PYI034 - Self is no runtime type
        cls,
        local: Tensor,
        dim: int,
        cut: Cut,
        *,
        origin: str | None = None,  # noqa: ARG004 - __init__ keeps these
        scale: int = 1,  # noqa: ARG004
        held: bool = False,  # noqa: ARG004
    ) -> "Split":
        """A tensor without memory, of the whole's shape."""
        sizes = (*local.shape[:dim], cut.length, *local.shape[dim + 1 :])
        return torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls, sizes, dtype=local.dtype, device=local.device, layout=local.layout, requires_grad=False
        )

    def __init__(
        self, local: Tensor, dim: int, cut: Cut, *, origin: str | None = None, scale: int = 1, held: bool = False
    ) -> None:
        """Wrap a slice; ``held`` marks a parameter."""
        super().__init__()
        self.local, self.axis, self.cut = local, dim, cut
        self.origin, self.scale, self.held = origin, scale, held

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Raises PlanError: a function got here that the mode did not see, such as a custom autograd function."""
        raise PlanError(
            f"{func} reached a tensor that is split among workers unseen (a custom autograd.Function or a compiled "
            "extension does that): keep the module whole, with NAME=whole in the plan"
        )

    def __repr__(self, *, tensor_contents: object = None) -> str:
        return f"Split(axis={self.axis}, {self.cut}, local={tuple(self.local.shape)})"

    def like(
        self, local: Tensor, *, dim: int | None = None, cut: Cut | None = None, scale: int | None = None
    ) -> "Split":
        """Another tensor with the same history, cut in the same or another place."""
        return Split(
            local,
            self.axis if dim is None else dim,
            self.cut if cut is None else cut,
            origin=self.origin,
            scale=self.scale if scale is None else scale,
        )
