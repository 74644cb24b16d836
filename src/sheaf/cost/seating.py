"""Who sits where and which links they share, worked out once for each number of workers and each mesh of a cluster."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from sheaf.cluster.cluster import Cluster
from sheaf.cost.communication import Fabric, Neighbourhood
from sheaf.cost.offload import Stepping
from sheaf.cost.placement import Seat, Seats, kinds, seats
from sheaf.plans.mesh import Mesh


@dataclass(frozen=True, eq=False)
class Passing:
    """By replica, the links between each stage and the next, the last and the first; ``numbers`` say which of the kinds
    of replicas each is.
    """

    kinds: tuple[tuple[Fabric, ...], ...]
    numbers: Sequence[int]

    def __getitem__(self, replica: int) -> tuple[Fabric, ...]:
        return self.kinds[self.numbers[replica]]

    def unlike(self, replicas: range) -> list[int]:
        """Of these replicas the first of each kind, in order."""
        if len(self.kinds) == 1:
            return list(replicas[:1])
        first: dict[int, int] = {}
        for replica in replicas:
            first.setdefault(self.numbers[replica], replica)
        return list(first.values())


@dataclass(frozen=True, eq=False)
class Seating:
    """The seats of one cluster, and the links among them."""

    cluster: Cluster
    precision: str = "fp32"
    _known: dict[Any, Any] = field(default_factory=dict[Any, Any])

    def seats(self, workers: int) -> Seats:
        """One seat per rank; raises PlanError when the cluster has fewer."""
        if ("seats", workers) not in self._known:
            self._known["seats", workers] = seats(self.cluster, workers, self.precision)
        return self._known["seats", workers]

    def kinds(self, workers: int) -> tuple[Seat, ...]:
        """Those of them that differ."""
        if ("kinds", workers) not in self._known:
            self._known["kinds", workers] = kinds(self.cluster, workers, self.precision)
        return self._known["kinds", workers]

    def alike(self, workers: int, *, offloaded: bool = False) -> bool:
        """Whether all of them are equally fast; with ``offloaded``, no host steps slower than the first."""
        if ("alike", workers, offloaded) not in self._known:
            there = self.kinds(workers)
            rates = {
                (seat.flops_per_second, seat.memory_bytes_per_second, seat.kernel_seconds, seat.speed) for seat in there
            }
            first, *others = [Stepping.of(seat, 0.0, 0.0) for seat in there if offloaded] or [Stepping(0.0, 0.0)]
            slower = any(one.copying > first.copying or one.updating > first.updating for one in others)
            self._known["alike", workers, offloaded] = len(rates) == 1 and not slower
        return self._known["alike", workers, offloaded]

    def shared(self, workers: int) -> bool:
        """Whether their devices' memory is that of their hosts."""
        return any(seat.device_kind == "cpu" for seat in self.kinds(workers))

    def fabric(self, mesh: Mesh, kind: str, factor: float = 1.0) -> Fabric:
        """The links among the workers of one ``kind`` of group: ``dp``, ``tp``, ``pp``, or all of a ``stage``."""
        key = (kind, mesh, factor)
        if key not in self._known:
            self.seats(mesh.workers)  # refuses what the cluster has no room for
            each = mesh.dp * mesh.tp
            stride, run, size = {
                "tp": (1, mesh.tp, mesh.tp),
                "dp": (mesh.tp, each, mesh.dp),
                "pp": (each, mesh.workers, mesh.pp),
                "stage": (1, each, each),
            }[kind]
            levels = self._levels(stride, run, mesh.workers) if size > 1 else (self._near().inside,)
            self._known[key] = self._joined(levels, size, factor)
        return self._known[key]

    def between(self, ranks: tuple[int, ...], factor: float = 1.0) -> Fabric:
        """The links among these ranks; the same fabric for all that are as near each other."""
        near = self._near()
        there = near.levels(np.asarray(ranks)[None, :])
        used = tuple(level for level in range(len(near.links)) if (there == level).any())
        return self._joined(used or (near.inside,), len(ranks), factor)

    def passing(self, mesh: Mesh, factor: float = 1.0) -> Passing:
        """By replica, the links between each stage and the next, the last and the first."""
        key = ("passing", mesh, factor)
        if key not in self._known:
            apart = np.zeros((mesh.pp, mesh.dp), dtype=np.int8)
            for unit in self._near().units:
                there = unit[: mesh.workers].reshape(mesh.pp, mesh.dp, mesh.tp)[:, :, 0]
                apart += there != np.roll(there, -1, axis=0)
            if (apart == apart[:, :1]).all():
                rows, numbers = [apart[:, 0].tobytes()], [0] * mesh.dp
            else:
                known: dict[bytes, int] = {}
                each = np.ascontiguousarray(apart.T).view(f"V{mesh.pp}").ravel().tolist()
                numbers = [known.setdefault(row, len(known)) for row in each]
                rows = list(known)
            links = [tuple(self._joined((level,), 2, factor) for level in row) for row in rows]
            self._known[key] = Passing(tuple(links), numbers)
        return self._known[key]

    def _levels(self, stride: int, run: int, workers: int) -> tuple[int, ...]:
        """Over which links ranks reach those ``stride`` on that are in the same ``run`` of ranks, of so many workers.

        Worked out for the whole cluster: by link, the first run in which it is used.
        """
        key = ("levels", stride, run)
        if key not in self._known:
            if ("apart", stride) not in self._known:
                self._known["apart", stride] = self._near().apart(stride)
            apart = self._known["apart", stride]
            pairs = apart[: len(apart) // run * run].reshape(-1, run)[:, : run - stride]
            used = ((level, (pairs == level).any(axis=1)) for level in range(len(self._near().links)))
            self._known[key] = [(level, int(there.argmax())) for level, there in used if there.any()]
        return tuple(level for level, first in self._known[key] if first * run < workers)

    def _joined(self, levels: tuple[int, ...], size: int, factor: float) -> Fabric:
        """Groups with the same links share one fabric, and what it knows."""
        key = ("joined", levels, size, factor)
        if key not in self._known:
            near = self._near()
            self._known[key] = Fabric(tuple(near.links[level] for level in levels), size, factor, near.gloo)
        return self._known[key]

    def _near(self) -> Neighbourhood:
        if "near" not in self._known:
            self._known["near"] = Neighbourhood.of(self.cluster, self.seats(self.cluster.workers))
        return self._known["near"]
