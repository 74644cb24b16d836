"""Keeps copies of a parameter within a replica the same to the last bit, where each has met others of its own."""

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sheaf.parallel.portion import Portion
from sheaf.parallel.world import World


class Alike:
    """Parameters by name that workers of ``world`` hold alike: all take the bits of the one that ``gives`` each.

    What several groups of workers sum for themselves, each in an order of its own, is the same but for rounding; what
    each of them codes may be further apart.
    """

    def __init__(self, names: Sequence[str], world: World, portion: Portion, *, gives: bool) -> None:
        self._names, self._world, self._portion, self._gives = tuple(names), world, portion, gives

    def meet(self, held: Mapping[str, Tensor]) -> None:
        """Make them the same (collective); ``held`` are this worker's parameters."""
        by_dtype: dict[torch.dtype, list[str]] = {}
        for name in self._names:
            by_dtype.setdefault(self._portion.dtype_of(self._portion.blueprint.parameters[name]), []).append(name)
        for dtype, names in by_dtype.items():
            sizes = [self._elements(name) for name in names]
            flat = torch.zeros(sum(sizes), dtype=dtype, device=self._world.device)
            parts = dict(zip(names, flat.split(sizes), strict=True))
            for name, part in parts.items():
                if self._gives and self._portion.counts(name):
                    part.copy_(held[name].detach().reshape(-1))
            if flat.numel():  # as bytes: what all others have is zero
                self._world.wait(self._world.all_reduce(flat.view(torch.uint8), f"copies of {names[0]}"))
            for name, part in parts.items():
                if name in held:
                    held[name].detach().copy_(part.view(held[name].shape))

    def _elements(self, name: str) -> int:
        fake, found = self._portion.blueprint.parameters[name], self._portion.slices.get(name)
        if found is None:
            return fake.numel()
        return math.prod(found.local_shape(tuple(fake.shape), self._portion.rank))
