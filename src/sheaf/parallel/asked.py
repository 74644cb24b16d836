"""A call of an expert that another replica holds: what is told of it, and how its rows and their gradients travel."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd import Function

from sheaf.parallel.due import Due
from sheaf.split.listed import MOST_DIMS
from sheaf.split.sent import AbstractTrip, Swapping

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


class Asked(NamedTuple):
    """What replicas tell each other of a call: which module, the shape of its rows (padded with -1), width and dtype of
    what comes back, its modes, and the random stream under way; all whole numbers.
    """

    module: int
    shape: tuple[int, ...]
    dtype: int
    width: int
    made: int
    graph: int
    needs: int  # whether the rows have a gradient
    autocast: int  # 0, or 1 + dtype
    stream: int

    def packed(self) -> list[int]:
        """In one row."""
        return [self.module, *self.shape, *[-1] * (MOST_DIMS - len(self.shape)), *self[2:]]

    @classmethod
    def unpacked(cls, row: Sequence[int]) -> "Asked":
        """What ``packed`` gave."""
        shape = tuple(size for size in row[1 : 1 + MOST_DIMS] if size >= 0)
        return cls(row[0], shape, *row[1 + MOST_DIMS :])

    @property
    def elements(self) -> int:
        """Of the rows."""
        return torch.Size(self.shape).numel()

    @property
    def elements_made(self) -> int:
        """Of what comes back."""
        return torch.Size((*self.shape[:-1], self.width)).numel()


@dataclass
class Call:
    """A call of this microbatch; ``used`` says whether its replica's loss depends on it."""

    asked: Asked
    rows: Tensor | None = None
    due: Due | None = None
    node: Any = None
    used: bool = True


@dataclass
class Flat(AbstractTrip):
    """Elements in a row, by replica: how many this one sends to each, and gets of each."""

    team: Swapping
    gives: tuple[int, ...]
    gets: tuple[int, ...]
    outward: bool
    wanted: bool
    why: str
    used: bool = field(default=True)

    def move(self, tensor: Tensor, *, outward: bool) -> Tensor:
        """Forward in the trip's own direction, backward in the other."""
        gives, gets = (self.gives, self.gets) if outward == self.outward else (self.gets, self.gives)
        pieces = [piece.contiguous() for piece in tensor.split(gives)]
        return torch.cat(self.team.swap(pieces, [(count,) for count in gets], self.why))


class Gate(Function):
    """The same tensor; no gradient where the caller's loss does not depend on the call."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor, call: Call) -> Tensor:
        ctx.call = call
        ctx.set_materialize_grads(False)
        return tensor.view_as(tensor)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] if ctx.call.used else None, None
