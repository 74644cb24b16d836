"""Who sits where and which links they share, worked out once for each number of workers and each mesh of a cluster."""

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np

from sheaf.cluster.cluster import Cluster
from sheaf.cost.communication import Fabric, Neighbourhood
from sheaf.cost.placement import Seat, kinds, last, seats
from sheaf.plans.mesh import Mesh


@dataclass(frozen=True, eq=False)
class Seating:
    """The seats of one cluster, and the links among them."""

    cluster: Cluster
    precision: str = "fp32"
    _known: dict[Any, Any] = field(default_factory=dict[Any, Any])

    def seats(self, workers: int) -> tuple[Seat, ...]:
        """One seat per rank; raises PlanError when the cluster has fewer."""
        if ("seats", workers) not in self._known:
            self._known["seats", workers] = self._seats(workers)
        return self._known["seats", workers]

    def kinds(self, workers: int) -> tuple[Seat, ...]:
        """Those of them that differ by more than their machine."""
        if ("kinds", workers) not in self._known:
            self._known["kinds", workers] = kinds(self.cluster, workers, self.precision)
        return self._known["kinds", workers]

    def alike(self, workers: int) -> bool:
        """Whether all of them are equally fast."""
        rates = {
            (seat.flops_per_second, seat.memory_bytes_per_second, seat.kernel_seconds, seat.speed)
            for seat in self.kinds(workers)
        }
        return len(rates) == 1

    def fabric(self, mesh: Mesh, kind: str, factor: float = 1.0) -> Fabric:
        """The links among the workers of one ``kind`` of group: ``dp``, ``tp``, ``pp``, or all of a ``stage``."""
        key = (kind, mesh, factor)
        if key not in self._known:
            self.seats(mesh.workers)  # refuses what the cluster has no room for
            ranks = np.arange(mesh.workers).reshape(mesh.pp, mesh.dp, mesh.tp)
            if kind == "stage":
                groups = ranks.reshape(mesh.pp, -1)
            else:
                axis = ("pp", "dp", "tp").index(kind)
                groups = np.moveaxis(ranks, axis, -1).reshape(-1, ranks.shape[axis])
            self._known[key] = self._linked(groups, factor)
        return self._known[key]

    def between(self, ranks: tuple[int, ...], factor: float = 1.0) -> Fabric:
        """The links among these ranks; the same fabric for all that are as near each other."""
        return self._linked(np.asarray(ranks)[None, :], factor)

    def passing(self, mesh: Mesh, factor: float = 1.0) -> tuple[tuple[Fabric, ...], ...]:
        """By replica, the links between each stage and the next, the last and the first."""
        key = ("passing", mesh, factor)
        if key not in self._known:
            near = self._near()
            ranks = np.arange(mesh.workers).reshape(mesh.pp, mesh.dp, mesh.tp)[:, :, 0].T
            levels = near.levels(np.concatenate((ranks, ranks[:, :1]), axis=1))
            rows: dict[bytes, tuple[Fabric, ...]] = {}
            for row in levels:
                if row.tobytes() not in rows:
                    rows[row.tobytes()] = tuple(self._joined(near, (level,), 2, factor) for level in row.tolist())
            self._known[key] = tuple(rows[row.tobytes()] for row in levels)
        return self._known[key]

    def _linked(self, groups: np.ndarray, factor: float) -> Fabric:
        near, size = self._near(), groups.shape[1]
        levels = tuple(np.unique(near.levels(groups)).tolist()) if size > 1 else (near.inside,)
        return self._joined(near, levels, size, factor)

    def _joined(self, near: Neighbourhood, levels: tuple[int, ...], size: int, factor: float) -> Fabric:
        """Groups with the same links share one fabric, and what it knows."""
        key = ("joined", levels, size, factor)
        if key not in self._known:
            self._known[key] = Fabric(tuple(near.links[level] for level in levels), size, factor, near.gloo)
        return self._known[key]

    def _near(self) -> Neighbourhood:
        if "near" not in self._known:
            self._known["near"] = Neighbourhood.of(self.cluster, self.seats(self.cluster.workers))
        return self._known["near"]

    def _seats(self, workers: int) -> tuple[Seat, ...]:
        """Those of the full hosts as in the whole cluster; on the last one, which may not be full, fewer are busy."""
        whole = self._known.get(("seats", self.cluster.workers))
        if whole is None or workers > len(whole):
            return seats(self.cluster, workers, self.precision)
        end = whole[workers - 1]
        on_it = next(
            count
            for count in range(1, workers + 1)
            if count == workers or whole[workers - count - 1].machine != end.machine
        )
        if on_it == end.busy:
            return whole[:workers]
        partly = replace(last(self.cluster, workers, self.precision), machine=end.machine)
        return (*whole[: workers - on_it], *[partly] * on_it)
