"""A model whose parameters are whole and whose inputs are split along the sequence: context parallelism.

Each worker computes its part of every sequence; attention gathers keys and values (the all-gather form of Llama 3's
context parallelism, arXiv:2407.21783, section 3.3.2; ring attention, arXiv:2310.01889, moves the same bytes in steps).
What a worker finds of a parameter's gradient is its part of the sum over all, which meets once per step, as those of
replicas do. Where a parameter is used on tensors that are whole on every worker, each takes an equal share.
"""

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.utils._pytree import tree_iter, tree_map

import sheaf.split.rules  # noqa: F401  # pyright: ignore[reportUnusedImport] - gives the rules to the registry
from sheaf.plans.split import Cut
from sheaf.split.mode import LENGTH_DIM, Splitting
from sheaf.split.moves import Team, sliced
from sheaf.split.rules.elementwise import bring_along
from sheaf.split.tensor import Split


class Lengthwise(Splitting):
    """Runs a forward on this worker's part of each sequence; ``own`` are the model's parameters, whole everywhere."""

    def __init__(self, team: Team, own: Iterable[Tensor]) -> None:
        super().__init__(team, {}, partial=own)
        self._heads: set[tuple[int, ...]] = set()  # batch x length of inputs that are split

    def inputs(self, given: Any) -> Any:
        """The model's arguments, with every tensor of two or more dimensions split along the second.

        The first is the batch, as long as that of the first such tensor.
        """
        leaves = [leaf for leaf in tree_iter(given) if isinstance(leaf, Tensor) and leaf.ndim > LENGTH_DIM]
        heads = [tuple(leaf.shape[: LENGTH_DIM + 1]) for leaf in leaves]
        self._heads = {head for head in heads if head[0] == heads[0][0] and head[LENGTH_DIM] >= self.team.workers}

        def part(leaf: Any) -> Any:
            cut = self._cut(leaf) if isinstance(leaf, Tensor) else None
            if cut is None:
                return leaf
            return Split(sliced(leaf, LENGTH_DIM, cut, self.team.rank).contiguous(), LENGTH_DIM, cut)

        return tree_map(part, given)

    def leaving(self, tensor: Tensor, why: str) -> Tensor:
        """This worker's part of what is as long as the sequence, and all of anything else."""
        cut = self._cut(tensor)
        if cut is None:
            return super().leaving(tensor, why)
        return bring_along(self, tensor, LENGTH_DIM - tensor.ndim, cut, why)

    def arriving(self, whole: Tensor) -> Tensor:
        """The same, at the other end."""
        cut = self._cut(whole)
        return whole if cut is None else sliced(whole, LENGTH_DIM, cut, self.team.rank)

    def arrived(self, found: Tensor, whole: Tensor) -> Tensor:
        """A split sequence."""
        cut = self._cut(whole)
        return found if cut is None else Split(found, LENGTH_DIM, cut)

    def _cut(self, tensor: Tensor) -> Cut | None:
        """How a tensor of batch x length x anything is split; None for one of another shape."""
        if tuple(tensor.shape[: LENGTH_DIM + 1]) not in self._heads:
            return None
        return Cut.even(tensor.shape[LENGTH_DIM], self.team.workers)
