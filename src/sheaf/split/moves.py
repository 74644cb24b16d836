"""What moves between workers that split a layer, with its gradient: the conjugate pairs of Megatron-LM, for any cut.

Shoeybi et al., 2019 (arXiv:1909.08053), section 3, and Korthikanti et al., 2022 (arXiv:2205.05198) for the sequence.
A plain tensor is whole, and the same on every worker, in value and in gradient; every function here keeps it so.
"""

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor
from torch.autograd import Function

from sheaf.plans.split import Cut


@runtime_checkable
class Team(Protocol):
    """The workers that split layers together, as far as moving tensors goes."""

    @property
    def rank(self) -> int:
        """Which of them this one is."""
        ...

    @property
    def workers(self) -> int:
        """How many there are."""
        ...

    def total(self, tensor: Tensor, why: str) -> Tensor:
        """The sum of every worker's tensor, in memory of its own."""
        ...

    def collect(self, own: Tensor, shapes: Sequence[Sequence[int]], why: str) -> list[Tensor]:
        """Every worker's tensor, in rank order; ``shapes`` are theirs."""
        ...

    def swap_sum(self, pieces: list[Tensor], why: str) -> Tensor:
        """The sum of what every worker has for this one; ``pieces`` go to the workers in rank order."""
        ...

    def trade(self, own: Tensor, other: int, shape: Sequence[int], why: str) -> Tensor:
        """What worker ``other`` gives for ``own``, of this ``shape``; itself for nobody else's."""
        ...


def sliced(whole: Tensor, dim: int, cut: Cut, worker: int) -> Tensor:
    """A worker's slice of a whole tensor.

    >>> sliced(torch.arange(12), 0, Cut.even(12, 2, outer=3), 1).tolist()
    [2, 3, 6, 7, 10, 11]
    """
    if cut.outer == 1:
        return whole.narrow(dim, cut.offset(worker), cut.sizes[worker])
    runs = whole.unflatten(dim, (cut.outer, cut.run)).narrow(dim + 1, cut.offset(worker), cut.sizes[worker])
    return runs.flatten(dim, dim + 1)


def joined(parts: Sequence[Tensor], dim: int, cut: Cut) -> Tensor:
    """The whole tensor from every worker's slice."""
    if cut.outer == 1:
        return torch.cat(list(parts), dim)
    runs = [part.unflatten(dim, (cut.outer, size)) for part, size in zip(parts, cut.sizes, strict=True)]
    return torch.cat(runs, dim + 1).flatten(dim, dim + 1)


def laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """The tensor, in memory in the order of another's dimensions: in that order random masks are drawn.

    >>> laid_out(torch.zeros(2, 3), torch.zeros(5, 4).t()).stride()
    (1, 2)
    """
    made = unset(tensor.shape, like, dtype=tensor.dtype, device=tensor.device)
    return tensor if made.stride() == tensor.stride() else made.copy_(tensor)


def unset(
    shape: Sequence[int], like: Tensor, *, dtype: torch.dtype | None = None, device: torch.device | None = None
) -> Tensor:
    """A tensor without values whose elements lie in memory in the order of another's dimensions."""
    order = list(range(like.ndim))
    if not like.is_contiguous():
        order.sort(key=lambda dim: (-like.stride(dim), like.shape[dim] <= 1, dim))
    made = torch.empty([shape[dim] for dim in order], dtype=dtype or like.dtype, device=device or like.device)
    return made.permute([order.index(dim) for dim in range(like.ndim)])


def _shapes(local: Tensor, dim: int, cut: Cut) -> list[tuple[int, ...]]:
    shape = tuple(local.shape)
    return [(*shape[:dim], cut.local_length(worker), *shape[dim + 1 :]) for worker in range(len(cut.sizes))]


def _collected(local: Tensor, dim: int, cut: Cut, team: Team, why: str) -> Tensor:
    whole = joined(team.collect(local.contiguous(), _shapes(local, dim, cut), why), dim, cut)
    # of a slice one element wide nobody can tell where the dimension lies, and all workers must decide alike
    return laid_out(whole, local) if min(cut.sizes) > 1 else whole


def _swapped(whole: Tensor, dim: int, cut: Cut, team: Team, why: str) -> Tensor:
    pieces = [sliced(whole, dim, cut, worker).contiguous() for worker in range(team.workers)]
    return team.swap_sum(pieces, why)


class Enter(Function):
    """A whole tensor goes into split work: nothing forward, the sum of gradients backward."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, team: Team, why: str) -> Tensor:
        ctx.team, ctx.why = team, why
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ctx.team.total(gradients[0], ctx.why), None, None


class Total(Function):
    """Partial sums become a whole tensor: the sum forward, nothing backward."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, team: Team, why: str) -> Tensor:  # noqa: ARG004 - nothing to keep
        return team.total(tensor, why)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:  # noqa: ARG004
        return gradients[0], None, None


class Gather(Function):
    """Slices become a whole tensor; its gradient is the same everywhere, and each worker takes its slice."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, dim: int, cut: Cut, team: Team, why: str) -> Tensor:
        ctx.dim, ctx.cut, ctx.rank = dim, cut, team.rank
        return _collected(local, dim, cut, team, why)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return sliced(gradients[0], ctx.dim, ctx.cut, ctx.rank), None, None, None, None


class GatherEnter(Function):
    """Slices become a whole tensor that goes into split work: gathered forward, summed and sliced backward."""

    @staticmethod
    def forward(ctx: Any, local: Tensor, dim: int, cut: Cut, team: Team, why: str) -> Tensor:
        ctx.dim, ctx.cut, ctx.team, ctx.why = dim, cut, team, why
        return _collected(local, dim, cut, team, why)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _swapped(gradients[0], ctx.dim, ctx.cut, ctx.team, ctx.why), None, None, None, None


class Part(Function):
    """A worker's slice of a whole tensor; the gradient is gathered."""

    @staticmethod
    def forward(ctx: Any, whole: Tensor, dim: int, cut: Cut, team: Team, why: str) -> Tensor:
        ctx.dim, ctx.cut, ctx.team, ctx.why = dim, cut, team, why
        return laid_out(sliced(whole, dim, cut, team.rank).clone(), whole)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _collected(gradients[0], ctx.dim, ctx.cut, ctx.team, ctx.why), None, None, None, None


class TotalPart(Function):
    """Partial sums become slices of the whole: summed and sliced forward, gathered backward."""

    @staticmethod
    def forward(ctx: Any, partial: Tensor, dim: int, cut: Cut, team: Team, why: str) -> Tensor:
        ctx.dim, ctx.cut, ctx.team, ctx.why = dim, cut, team, why
        return _swapped(partial, dim, cut, team, why)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return _collected(gradients[0], ctx.dim, ctx.cut, ctx.team, ctx.why), None, None, None, None


class Trade(Function):
    """A tensor for that of another worker, who takes this one's; gradients are traded back."""

    @staticmethod
    def forward(ctx: Any, own: Tensor, other: int, shape: Sequence[int], team: Team, why: str) -> Tensor:
        ctx.other, ctx.shape, ctx.team, ctx.why = other, tuple(own.shape), team, why
        return team.trade(own.contiguous(), other, shape, why)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return ctx.team.trade(gradients[0].contiguous(), ctx.other, ctx.shape, ctx.why), None, None, None, None


class Share(Function):
    """A parameter in work that every worker does alike: its gradient counts once in their sum."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, workers: int) -> Tensor:
        ctx.workers = workers
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] / ctx.workers, None
