"""What every worker must get whole before forward ends, and nothing in forward waits for: one message for all of it."""

from collections.abc import Callable, Sequence
from itertools import groupby

import torch
from torch import Tensor

from sheaf.plans.split import Cut
from sheaf.split.moves import Team, joined


class Late:
    """Slices of small whole tensors, such as a norm's running statistics, until they are brought together."""

    def __init__(self, team: Team) -> None:
        self._team = team
        self._waiting: list[tuple[Tensor, Tensor, Cut, str]] = []
        self._ids: set[int] = set()

    def add(self, whole: Tensor, part: Tensor, cut: Cut, why: str) -> None:
        """``part`` is this worker's slice of what ``whole``, one-dimensional and on every worker, is to become."""
        self._waiting.append((whole, part.detach().clone(), cut, why))
        self._ids.add(id(whole))

    @property
    def is_waiting(self) -> bool:
        """Whether anything is to be brought."""
        return bool(self._waiting)

    def holds(self, value: object) -> bool:
        """Whether a tensor waits for what the others have of it."""
        return id(value) in self._ids

    def forget(self) -> None:
        """A forward that failed has left it."""
        self._waiting.clear()
        self._ids.clear()

    @torch.no_grad()
    def bring(self, place: str) -> None:
        """Everything that waits, on every worker; one message for each type of number (collective)."""
        waiting, workers = self._waiting, range(self._team.workers)
        self._waiting = []
        self._ids.clear()
        kind: Callable[[tuple[Tensor, Tensor, Cut, str]], str] = lambda one: f"{one[1].dtype} {one[1].device}"  # noqa: E731
        for _, same in groupby(sorted(waiting, key=kind), key=kind):
            group = list(same)
            sizes = [[cut.local_length(worker) for _, _, cut, _ in group] for worker in workers]
            own = torch.cat([part for _, part, _, _ in group])
            come = self._team.collect(own, [(sum(each),) for each in sizes], f"{group[0][3]}{place}")
            pieces: list[Sequence[Tensor]] = [one.split(each) for one, each in zip(come, sizes, strict=True)]
            for number, (whole, _, cut, _) in enumerate(group):
                whole.copy_(joined([piece[number] for piece in pieces], 0, cut))
