"""What stands in for tensors of a block that is not run: they look right, and nothing can be computed with them."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function


class Unlike(Exception):
    """A block does not do what the one before it did, or it cannot be told."""


class Look(NamedTuple):
    """How a tensor lies in memory, and whether autograd follows it."""

    shape: tuple[int, ...]
    strides: tuple[int, ...]
    offset: int
    dtype: torch.dtype
    device: torch.device
    requires_grad: bool

    @classmethod
    def of(cls, tensor: Tensor) -> "Look":
        """Raises Unlike for a tensor that is not strided."""
        if tensor.layout is not torch.strided:
            raise Unlike("a tensor is not strided")
        return cls(
            tuple(tensor.shape),
            tuple(tensor.stride()),
            int(tensor.storage_offset()),
            tensor.dtype,
            tensor.device,
            tensor.requires_grad,
        )

    def empty(self) -> Tensor:
        """A tensor that looks so, but for what autograd knows of it."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)


class Lent(Tensor):
    """A tensor that a block would have made: only the mode that lends it knows what to do with it."""

    def __new__(cls, look: Look) -> "Lent":  # noqa: PYI034 - Self is no runtime type
        """A tensor without memory."""
        return torch.Tensor._make_wrapper_subclass(  # pyright: ignore[reportAttributeAccessIssue]
            cls,
            look.shape,
            strides=look.strides,
            storage_offset=look.offset,
            dtype=look.dtype,
            device=look.device,
            requires_grad=look.requires_grad,
        )

    __torch_function__ = torch._C._disabled_torch_function_impl  # pyright: ignore[reportAssignmentType]

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Raises Unlike: the tensor got out of its block, or something new is done with it."""
        raise Unlike(f"{func} is given what was never computed")


class Seam(Function):
    """The same tensor: a place in backward where a block's work ends. ``told`` hears of the gradient."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, told: Any) -> Tensor:
        ctx.told = told
        ctx.set_materialize_grads(False)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.told(gradients[0])
        return gradients[0], None


class Stand(Function):
    """One node in place of a block's: ``looks`` of the outputs; ``asked`` tells gradients' looks by those it is given.

    What it is given beside these are tensors whose gradients are asked for, and one more that lets outputs have any.
    """

    @staticmethod
    def forward(ctx: Any, looks: Any, asked: Any, *_given: Tensor) -> Any:
        ctx.asked = asked
        ctx.set_materialize_grads(False)
        made = tuple(look.empty() for look in looks)
        ctx.mark_non_differentiable(
            *(tensor for tensor, look in zip(made, looks, strict=True) if not look.requires_grad)
        )
        return made

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        wanted = ctx.asked([None if one is None else Look.of(one) for one in gradients])
        return None, None, *(None if look is None else look.empty() for look in wanted), None
