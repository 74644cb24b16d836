"""Parameters that several stages hold: their gradients are added up, so that every copy is updated alike."""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from sheaf.parallel.holding import AbstractHolding
from sheaf.parallel.portion import Portion
from sheaf.parallel.spread import Spread
from sheaf.plans.layout import Piece


class Ties:
    """The shared parameters of a pipeline, by name; ``holding`` is this worker's."""

    def __init__(self, names: Sequence[str], spread: Spread, portion: Portion, holding: AbstractHolding) -> None:
        self.names, self._spread, self._portion, self._holding = tuple(names), spread, portion, holding

    def meet(self, used: set[str]) -> None:
        """Make the gradient of each shared parameter that was used the sum over the stages (collective)."""
        for name in self.names:
            if name not in used:
                continue
            whole = torch.zeros(self._local_elements(name), dtype=self._dtype(name), device=self._spread.world.device)
            if self._portion.holds(name):
                self._put(name, whole)
            world = self._spread.copies
            world.wait(world.all_reduce(whole, f"gradient of {name}, which stages share"))
            if self._portion.holds(name):
                self._take(name, whole)

    def _put(self, name: str, whole: Tensor) -> None:
        held, piece = self._found(name)
        if held is None or held.grad is None:
            return
        if piece is not None:
            whole[piece.start : piece.stop] = held.grad
        elif self._spread.place.dp == 0:
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
        if slices is None:
            return dict(self._holding.model.named_parameters())[name], None
        return slices.get(name, (None, None))

    def _local_elements(self, name: str) -> int:
        fake, found = self._portion.blueprint.parameters[name], self._portion.slices.get(name)
        if found is None:
            return fake.numel()
        return math.prod(found.local_shape(tuple(fake.shape), self._spread.place.tp))

    def _dtype(self, name: str) -> torch.dtype:
        return self._portion.dtype_of(self._portion.blueprint.parameters[name])
