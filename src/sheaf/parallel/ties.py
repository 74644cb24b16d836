"""Gradients of which several workers hold parts: they are added up before the update, so that copies stay alike."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sheaf.parallel.holding import AbstractHolding
from sheaf.parallel.portion import Portion
from sheaf.parallel.world import World
from sheaf.plans.layout import Piece


class Ties:
    """Parameters by name of which the workers of ``world`` hold parts of the gradients: stages that share one, or those
    that use a whole one in split work.

    ``gives``: whether this worker adds what it holds whole, as one of those that hold the same does. Of sharded state
    all give their pieces.
    """

    def __init__(
        self, names: Sequence[str], world: World, portion: Portion, holding: AbstractHolding, *, gives: bool
    ) -> None:
        self._world, self._portion, self._holding, self._gives = world, portion, holding, gives
        self._names = tuple(names)
        self._held = dict(holding.model.named_parameters())

    def meet(self, used: set[str]) -> None:
        """Make the gradient of each that was used the sum over the world (collective; one message per dtype)."""
        by_dtype: dict[torch.dtype, list[str]] = {}
        for name in self._names:
            if name in used:
                fake = self._portion.blueprint.parameters[name]
                by_dtype.setdefault(self._portion.dtype_of(fake), []).append(name)
        for dtype, names in by_dtype.items():
            sizes = [self._local_elements(name) for name in names]
            flat = torch.zeros(sum(sizes), dtype=dtype, device=self._world.device)
            parts = dict(zip(names, flat.split(sizes), strict=True))
            held = [name for name in names if self._portion.holds(name)]
            for name in held:
                self._put(name, parts[name])
            more = f" and {len(names) - 1} more" if len(names) > 1 else ""
            self._world.wait(self._world.all_reduce(flat, f"parts of the gradients of {names[0]}{more}"))
            for name in held:
                self._take(name, parts[name])

    def _put(self, name: str, whole: Tensor) -> None:
        held, piece = self._found(name)
        if held is None or held.grad is None:
            return
        if piece is not None:
            whole[piece.start : piece.stop] = held.grad
        elif self._gives:
            whole.copy_(held.grad.reshape(-1))

    def _take(self, name: str, whole: Tensor) -> None:
        held, piece = self._found(name)
        if held is None:
            return
        mine = whole if piece is None else whole[piece.start : piece.stop]
        if held.grad is None:
            held.grad = torch.zeros_like(held)
        held.grad.copy_(mine.view(held.shape))

    def _found(self, name: str) -> tuple[Tensor | None, Piece | None]:
        """What this worker's optimizer steps of a parameter: the parameter, or its piece of it, if it has one."""
        slices: dict[str, tuple[Tensor, Piece]] | None = getattr(self._holding, "slices", None)
        return (self._held[name], None) if slices is None else slices.get(name, (None, None))

    def _local_elements(self, name: str) -> int:
        fake, found = self._portion.blueprint.parameters[name], self._portion.slices.get(name)
        if found is None:
            return fake.numel()
        return math.prod(found.local_shape(tuple(fake.shape), self._portion.rank))
