"""A team for rehearsals, of which one worker is here."""

from collections.abc import Sequence

import torch
from torch import Tensor

from sheaf.graph.facts import GLUE
from sheaf.plans.split import Move

AT = " @ "  # between why something moves and the block that moves it


class Alone:
    """A team of which only worker 0 is here; what the others would send is zeros. Notes what would move."""

    rank = 0

    def __init__(self, workers: int) -> None:
        self.workers = workers
        self.moves: list[Move] = []

    def total(self, tensor: Tensor, why: str) -> Tensor:
        """Nothing is added."""
        self._note("all_reduce", tensor.nbytes, why)
        return tensor.clone()

    def collect(self, own: Tensor, shapes: Sequence[Sequence[int]], why: str) -> list[Tensor]:
        """Zeros from the others."""
        zeros = {shape: own.new_zeros(shape) for shape in dict.fromkeys(map(tuple, shapes[1:]))}
        parts = [own, *(zeros[tuple(shape)] for shape in shapes[1:])]
        self._note("all_gather", sum(part.nbytes for part in parts), why)
        return parts

    def swap_sum(self, pieces: list[Tensor], why: str) -> Tensor:
        """This worker's own."""
        self._note("reduce_scatter", sum(piece.nbytes for piece in pieces), why)
        return pieces[0].clone()

    def trade(self, own: Tensor, other: int, shape: Sequence[int], why: str) -> Tensor:
        """Zeros from the other."""
        if other:
            self._note("trade", own.nbytes, why)
        return own.new_zeros(tuple(shape)) if other else own.clone()

    def swap(self, pieces: Sequence[Tensor], shapes: Sequence[Sequence[int]], why: str) -> list[Tensor]:
        """Zeros from the others."""
        self._note("all_to_all", sum(piece.nbytes for piece in pieces), why)
        return [pieces[0], *(pieces[0].new_zeros(tuple(shape)) for shape in shapes[1:])]

    def _note(self, operation: str, size_bytes: int, why: str) -> None:
        what, _, block = why.partition(AT)
        backward = torch._C._current_graph_task_id() != -1
        self.moves.append(Move(block or GLUE, operation, size_bytes, backward, what))
