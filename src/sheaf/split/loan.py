"""Tensors that are whole only while something computes with them: between forward and backward, each worker has slices.

The keys and values of every layer, gathered and kept until backward, would take as much memory as all workers saved
by splitting the sequence. They are let go after forward, and gathered again when backward comes to them.
"""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch._C._autograd as autograd_internals
from torch import Tensor
from torch.autograd import Function
from torch.autograd.graph import saved_tensors_hooks

from sheaf.plans.split import Cut
from sheaf.split.moves import Team, joined, sliced
from sheaf.split.tensor import Split


class Loan:
    """Whole tensors from slices, for a while: ``wholes = loan.take()``, compute ``with loan.using():``, then
    ``loan.give_back(result)``. The gradients of the wholes are summed over the workers, and sliced.

    With ``keep`` the wholes stay until backward, as autograd does by itself.
    """

    def __init__(self, splits: Sequence[Split], team: Team, why: str, *, keep: bool = False) -> None:
        self._splits, self.team, self.why = list(splits), team, why
        first = self._splits[0]
        self.together = all(  # then they travel in one message
            (one.axis, one.cut, one.dtype, one.local.shape) == (first.axis, first.cut, first.dtype, first.local.shape)
            for one in self._splits
        )
        self.places = [(one.axis, one.cut) for one in self._splits]
        self._held: list[Tensor] = []
        self._lends = not keep and torch.is_grad_enabled()
        self._outer: Any = autograd_internals._top_saved_tensors_default_hooks(True)

    def take(self) -> tuple[Tensor, ...]:
        """The whole tensors."""
        return _Lend.apply(self, *(one.local for one in self._splits))

    def using(self) -> AbstractContextManager[object]:
        """While this runs, autograd keeps nothing whole."""
        return saved_tensors_hooks(self._pack, self._unpack) if self._lends else nullcontext()

    def give_back(self, result: Tensor) -> Tensor:
        """What was computed; its backward takes the wholes again."""
        self.close()
        return _Return.apply(self, result, *(one.local for one in self._splits)) if self._lends else result

    def open(self, locals_: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Gather."""
        if not self.together:
            wholes = tuple(self._gathered(one, *place) for one, place in zip(locals_, self.places, strict=True))
            self._held = list(wholes)
            return wholes
        dim, cut = self.places[0]
        whole = self._gathered(torch.stack(list(locals_)), dim + 1, cut)
        self._held = [whole]
        return whole.unbind(0)

    def close(self) -> None:
        """Let go."""
        self._held = []

    def sums(self, gradients: Sequence[Tensor]) -> list[Tensor]:
        """This worker's slices of the gradients, summed over all."""
        if not self.together:
            return [self._summed(one, *place) for one, place in zip(gradients, self.places, strict=True)]
        dim, cut = self.places[0]
        return list(self._summed(torch.stack(list(gradients)), dim + 1, cut).unbind(0))

    def _gathered(self, local: Tensor, dim: int, cut: Cut) -> Tensor:
        shape, workers = local.shape, range(self.team.workers)
        shapes = [(*shape[:dim], cut.local_length(worker), *shape[dim + 1 :]) for worker in workers]
        return joined(self.team.collect(local.contiguous(), shapes, self.why), dim, cut)

    def _summed(self, gradient: Tensor, dim: int, cut: Cut) -> Tensor:
        pieces = [sliced(gradient, dim, cut, worker).contiguous() for worker in range(self.team.workers)]
        return self.team.swap_sum(pieces, self.why)

    def _pack(self, tensor: Tensor) -> Any:
        storage = tensor.untyped_storage()._cdata
        for place, whole in enumerate(self._held):
            if whole.untyped_storage()._cdata == storage:
                return place, tuple(tensor.shape), tensor.stride(), tensor.storage_offset()
        return [self._outer[0](tensor) if self._outer else tensor]

    def _unpack(self, packed: Any) -> Tensor:
        if isinstance(packed, list):
            return self._outer[1](packed[0]) if self._outer else packed[0]
        place, size, stride, offset = packed
        return self._held[place].as_strided(size, stride, offset)


class _Lend(Function):
    @staticmethod
    def forward(ctx: Any, loan: Loan, *locals_: Tensor) -> tuple[Tensor, ...]:
        ctx.loan = loan
        return loan.open(locals_)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        ctx.loan.close()  # all that computed with them has run backward
        return None, *ctx.loan.sums(gradients)


class _Return(Function):
    @staticmethod
    def forward(ctx: Any, loan: Loan, result: Tensor, *locals_: Tensor) -> Tensor:
        ctx.loan = loan
        ctx.save_for_backward(*locals_)
        return result.view_as(result)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        locals_ = ctx.saved_tensors
        ctx.loan.open(locals_)
        return None, gradients[0], *(None for _ in locals_)
