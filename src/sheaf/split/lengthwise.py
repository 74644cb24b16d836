"""A model whose parameters are whole and whose inputs are split along the sequence: context parallelism.

Each worker computes its part of every sequence; attention gathers keys and values (the all-gather form of Llama 3's
context parallelism, arXiv:2407.21783, section 3.3.2; ring attention, arXiv:2310.01889, moves the same bytes in steps).
What a worker finds of a parameter's gradient is its part of the sum over all, which meets once per step, as those of
replicas do. Where a parameter is used on tensors that are whole on every worker, each takes an equal share.
"""

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor
from torch.autograd import Function
from torch.utils._pytree import tree_iter, tree_map

import sheaf.split.rules  # noqa: F401  # pyright: ignore[reportUnusedImport] - gives the rules to the registry
from sheaf.plans.split import Cut
from sheaf.split.mode import LENGTH_DIM, Splitting
from sheaf.split.moves import Team, sliced
from sheaf.split.tensor import Split


class Share(Function):
    """A parameter in work that every worker does alike: its gradient counts once in their sum."""

    @staticmethod
    def forward(ctx: Any, parameter: Tensor, workers: int) -> Tensor:
        ctx.workers = workers
        return parameter.view_as(parameter)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] / ctx.workers, None


class Lengthwise(Splitting):
    """Runs a forward on this worker's part of each sequence; ``own`` are the model's parameters, whole everywhere."""

    def __init__(self, team: Team, own: Iterable[Tensor]) -> None:
        super().__init__(team, {})
        self._own = {id(parameter) for parameter in own}
        self._parameter_of: dict[int, tuple[Tensor, Tensor]] = {}

    def inputs(self, given: Any) -> Any:
        """The model's arguments with every tensor split that is as long as the first of two or more dimensions."""
        leaves = [leaf for leaf in tree_iter(given) if isinstance(leaf, Tensor) and leaf.ndim > LENGTH_DIM]
        if not leaves:
            return given
        head = leaves[0].shape[: LENGTH_DIM + 1]
        if head[LENGTH_DIM] < self.team.workers:
            return given
        cut = Cut.even(head[LENGTH_DIM], self.team.workers)

        def part(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor) or leaf.shape[: LENGTH_DIM + 1] != head:
                return leaf
            return Split(sliced(leaf, LENGTH_DIM, cut, self.team.rank).contiguous(), LENGTH_DIM, cut)

        return tree_map(part, given)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if any(id(leaf) in self._own for leaf in tree_iter((args, kwargs))):
            args, kwargs = tree_map(self._shared, (args, kwargs))
        return super().__torch_function__(func, types, args, kwargs)

    def __exit__(self, *raised: object) -> None:
        """Forward ends."""
        super().__exit__(*raised)
        if not self._depth:
            self._parameter_of.clear()

    def enter(self, tensor: Tensor, why: str) -> Tensor:
        """A parameter as it is: each worker finds a part of its gradient, and the parts meet at the end."""
        known = self._parameter_of.get(id(tensor))
        return known[1] if known is not None else super().enter(tensor, why)

    def part(self, tensor: Tensor, dim: int, cut: Cut, why: str) -> Tensor:
        """A slice of a parameter, whose gradient is zero elsewhere."""
        known = self._parameter_of.get(id(tensor))
        return sliced(known[1], dim, cut, self.team.rank) if known is not None else super().part(tensor, dim, cut, why)

    def _shared(self, leaf: Any) -> Any:
        """What stands for a parameter in a rule: used as it is, every worker does the same with it."""
        if id(leaf) not in self._own or not leaf.requires_grad:
            return leaf
        alias = Share.apply(leaf, self.team.workers)
        self._parameter_of[id(alias)] = (alias, leaf)
        return alias
