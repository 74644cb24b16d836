"""What workers tell each other when their backwards have run: which parameters were used, who was busy how long."""

from collections.abc import Collection, Sequence

import torch

from sheaf.parallel.world import World


class Agreement:
    """Started when it is made, on every worker alike (collective); ``wait`` gives what all told, as often as asked.

    ``names`` are all parameters that are trained, ``touched`` those that this worker's microbatches used. ``rows`` and
    ``row``: how many replicas have gradients of their own, and which of them this worker is of. ``spent``: for how many
    seconds this worker did what, as many of each.
    """

    def __init__(
        self,
        world: World,
        names: Sequence[str],
        touched: Collection[str],
        spent: Sequence[float],
        *,
        rows: int,
        row: int,
    ) -> None:
        self._world, self._names, self._rows, self._row = world, names, rows, row
        self._found: tuple[set[str], set[str], list[list[float]]] | None = None
        if world.workers == 1:
            self._found = set(touched), set(touched), [[one] for one in spent]
        else:
            told = torch.zeros(rows * len(names) + len(spent) * world.workers)
            told[row * len(names) : (row + 1) * len(names)] = torch.tensor([float(name in touched) for name in names])
            told[rows * len(names) + world.rank :: world.workers] = torch.tensor(spent)
            self._told = told.to(world.device)
            self._pending = world.all_reduce(self._told, "parameters used")

    def wait(self) -> tuple[set[str], set[str], list[list[float]]]:
        """Which parameters any worker's microbatches used, and whose gradient is the same as this worker's; and of all
        that is ``spent``, in that order, the seconds of each worker.
        """
        if self._found is not None:
            return self._found
        self._world.wait(self._pending)
        told, rows, names = self._told.cpu(), self._rows, self._names
        table = told[: rows * len(names)].view(rows, len(names))
        used, own = (
            {name for name, count in zip(names, row.tolist(), strict=True) if count > 0}
            for row in (table.sum(0), table[self._row])
        )
        self._found = used, own, told[rows * len(names) :].view(-1, self._world.workers).tolist()
        return self._found
