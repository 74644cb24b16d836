"""Where rows of tokens are while they are at experts: as many for each expert of a stack, or sorted by expert."""

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import accumulate
from typing import ClassVar

import torch
from torch import Tensor

from sheaf.plans.split import Cut


class AbstractPlaces(ABC):
    """How a microbatch's own rows look to the model, and how those of all replicas lie at their experts.

    ``kind`` tells the ways apart, ``own`` says how many rows this replica's microbatch has. A ``cut`` deals experts out
    over workers, and ``worker`` is this one.
    """

    kind: ClassVar[int]

    @property
    @abstractmethod
    def num_experts(self) -> int:
        """Of the stack."""

    @property
    @abstractmethod
    def own(self) -> tuple[int, ...]:
        """What a replica tells of its rows."""

    @abstractmethod
    def settled(self, told: Sequence[tuple[int, ...]]) -> "AbstractPlaces":
        """The same, with what every replica told."""

    @abstractmethod
    def shape(self, width: int) -> tuple[int, ...]:
        """What the model sees of rows of this width."""

    @abstractmethod
    def rows(self, tensor: Tensor) -> Tensor:
        """A tensor that the model sees, as its rows."""

    @abstractmethod
    def none(self, rows: Tensor) -> Tensor:
        """No rows at all, of the same kind."""

    @abstractmethod
    def seen(self, rows: Tensor) -> Tensor:
        """Rows that came home, as the model sees them."""

    @abstractmethod
    def leaving(self, rows: Tensor, cut: Cut, worker: int) -> list[Tensor]:
        """What of this worker's own rows goes to each worker."""

    @abstractmethod
    def arriving(self, cut: Cut, worker: int, width: int) -> list[tuple[int, ...]]:
        """The shapes of what comes to this worker's experts from each worker."""

    @abstractmethod
    def laid(self, received: Sequence[Tensor], cut: Cut, worker: int) -> Tensor:
        """What came from each worker, as it lies at this worker's experts."""

    @abstractmethod
    def returning(self, local: Tensor, cut: Cut, worker: int) -> list[Tensor]:
        """What of this worker's experts' rows goes back to each worker."""

    @abstractmethod
    def returned(self, cut: Cut, worker: int, width: int) -> list[tuple[int, ...]]:
        """The shapes of what comes back from each worker, own rows in order."""


@dataclass(frozen=True)
class Stacked(AbstractPlaces):
    """Looks like (experts, *middle, width), and lies as (own experts, rows of every replica, width).

    ``counts[r]`` are the rows per expert from replica *r*, in rank order.

    >>> places = Stacked(3, (2, 5))
    >>> places.rows(torch.zeros(3, 2, 5, 4)).shape, Stacked(3, ()).rows(torch.zeros(3, 4)).shape
    (torch.Size([3, 10, 4]), torch.Size([3, 1, 4]))
    """

    experts: int
    middle: tuple[int, ...]
    counts: tuple[int, ...] = ()
    kind = 1

    @property
    def num_experts(self) -> int:
        """The first dimension."""
        return self.experts

    @property
    def own(self) -> tuple[int, ...]:
        """Rows per expert."""
        return (math.prod(self.middle),)

    def settled(self, told: Sequence[tuple[int, ...]]) -> "Stacked":
        """With everyone's."""
        return replace(self, counts=tuple(count for (count,) in told))

    def shape(self, width: int) -> tuple[int, ...]:
        """Of the microbatch's own."""
        return (self.experts, *self.middle, width)

    def rows(self, tensor: Tensor) -> Tensor:
        """(experts, *middle, width) as (experts, rows, width)."""
        return tensor.reshape(self.experts, math.prod(self.middle), tensor.shape[-1])

    def none(self, rows: Tensor) -> Tensor:
        """(experts, 0, width)."""
        return rows[:, :0]

    def seen(self, rows: Tensor) -> Tensor:
        """(experts, rows, width) as (experts, *middle, width)."""
        return rows.reshape(self.shape(rows.shape[-1]))

    def leaving(self, rows: Tensor, cut: Cut, worker: int) -> list[Tensor]:  # noqa: ARG002 - all rows are its own
        """Those of each worker's experts."""
        return list(rows.split(cut.sizes))

    def arriving(self, cut: Cut, worker: int, width: int) -> list[tuple[int, ...]]:
        """(own experts, a replica's rows, width)."""
        return [(cut.sizes[worker], count, width) for count in self.counts]

    def laid(self, received: Sequence[Tensor], cut: Cut, worker: int) -> Tensor:  # noqa: ARG002 - in rank order
        """(own experts, all rows, width)."""
        return torch.cat(list(received), 1)

    def returning(self, local: Tensor, cut: Cut, worker: int) -> list[Tensor]:  # noqa: ARG002 - all are its experts'
        """Each replica's."""
        return list(local.split(self.counts, 1))

    def returned(self, cut: Cut, worker: int, width: int) -> list[tuple[int, ...]]:
        """(a worker's experts, own rows, width)."""
        return [(size, self.counts[worker], width) for size in cut.sizes]


@dataclass(frozen=True)
class Sorted(AbstractPlaces):
    """Looks like (length, width), the first expert's rows first, and lies as (rows of own experts, width), so too.

    ``mine`` are the rows of each expert in the microbatch under way, ``counts[r]`` those that replica *r* sends. What
    is beyond the last expert's rows is nobody's, and zero.
    """

    length: int
    mine: tuple[int, ...]
    counts: tuple[tuple[int, ...], ...] = ()
    kind = 2

    @property
    def num_experts(self) -> int:
        """As many as have a number of rows."""
        return len(self.mine)

    @property
    def own(self) -> tuple[int, ...]:
        """Rows of each expert."""
        return self.mine

    def settled(self, told: Sequence[tuple[int, ...]]) -> "Sorted":
        """With everyone's."""
        return replace(self, counts=tuple(told))

    def shape(self, width: int) -> tuple[int, ...]:
        """Of the microbatch's own."""
        return (self.length, width)

    def rows(self, tensor: Tensor) -> Tensor:
        """Those that are some expert's."""
        return tensor[: sum(self.mine)]

    def none(self, rows: Tensor) -> Tensor:
        """(0, width)."""
        return rows[:0]

    def seen(self, rows: Tensor) -> Tensor:
        """With zeros for those that are no expert's."""
        beyond = self.length - len(rows)
        return torch.cat([rows, rows.new_zeros(beyond, rows.shape[-1])]) if beyond else rows

    def leaving(self, rows: Tensor, cut: Cut, worker: int) -> list[Tensor]:
        """Those of each worker's experts."""
        return list(rows.split([sum(self._of(cut, worker, owner)) for owner in range(len(cut.sizes))]))

    def arriving(self, cut: Cut, worker: int, width: int) -> list[tuple[int, ...]]:
        """(a replica's rows for own experts, width)."""
        return [(sum(self._of(cut, replica, worker)), width) for replica in range(len(self.counts))]

    def laid(self, received: Sequence[Tensor], cut: Cut, worker: int) -> Tensor:
        """All replicas' rows of the first own expert, then of the next."""
        pieces = [one.split(self._of(cut, replica, worker)) for replica, one in enumerate(received)]
        return self._joined(list(zip(*pieces, strict=True)), received[0])

    def returning(self, local: Tensor, cut: Cut, worker: int) -> list[Tensor]:
        """Each replica's."""
        replicas = range(len(self.counts))
        sizes = [self._of(cut, replica, worker) for replica in replicas]
        own = range(cut.sizes[worker])
        pieces = local.split([sizes[replica][expert] for expert in own for replica in replicas])
        step = len(self.counts)
        return [self._joined([pieces[replica::step]], local) for replica in replicas]

    def returned(self, cut: Cut, worker: int, width: int) -> list[tuple[int, ...]]:
        """(own rows of a worker's experts, width)."""
        return [(sum(self._of(cut, worker, owner)), width) for owner in range(len(cut.sizes))]

    def ends(self, cut: Cut, worker: int) -> list[int]:
        """Where the rows of each of this worker's experts end, as they lie there.

        >>> Sorted(5, (2, 0, 3), ((2, 0, 3), (1, 1, 0))).ends(Cut((2, 1)), 0)
        [3, 4]
        """
        held = [self._of(cut, replica, worker) for replica in range(len(self.counts))]
        return list(accumulate(map(sum, zip(*held, strict=True))))

    def _of(self, cut: Cut, replica: int, owner: int) -> list[int]:
        """A replica's rows for each of a worker's experts."""
        first = cut.offset(owner)
        return list(self.counts[replica][first : first + cut.sizes[owner]])

    def _joined(self, groups: Sequence[Sequence[Tensor]], like: Tensor) -> Tensor:
        pieces = [piece for group in groups for piece in group]
        return torch.cat(pieces) if pieces else like[:0]
