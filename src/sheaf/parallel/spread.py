"""Where this worker stands among stages, replicas and split layers, and the groups in which it talks to the others."""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sheaf.parallel.portion import Portion
from sheaf.parallel.world import World
from sheaf.plans import Plan
from sheaf.plans.mesh import Mesh
from sheaf.split.team import GroupTeam


class Spread:
    """The worlds of one worker: ``world`` of all, ``computing`` without those that only serve, ``replicas`` that hold
    the same, ``layers`` that split a layer together, ``stages`` that pass microbatches on, ``replica`` of those that
    are one replica (where replicas step alone). Making it is collective. One that only serves is alone in all but
    ``world``.
    """

    def __init__(self, plan: Plan, device: torch.device) -> None:
        self.mesh = Mesh.of(plan)
        self.world = World(device)
        known = self.world.workers == plan.workers
        groups = self.mesh if known else Mesh(1, self.world.workers, 1)
        self.serves = self.world.rank >= groups.workers
        self.place = self.mesh.place(self.world.rank) if known and not self.serves else Mesh(1, 1, 1).place(0)
        servers = [(rank,) for rank in range(groups.workers, self.world.workers)]

        def among(ranks: Sequence[Sequence[int]], *, gathers_apart: bool = False) -> World:
            return World(device, gathers_apart=gathers_apart, among=[*ranks, *servers])

        self.computing = among([range(groups.workers)]) if servers else self.world
        self.lengthwise = plan.cp > 1
        # gradients found on parts of a sequence add up as those of parts of a batch do
        alike = groups.stage_groups if self.lengthwise else groups.dp_groups
        self.replicas = among(alike, gathers_apart=plan.zero == 3)
        # what each of them has of what ZeRO shards
        weights = (plan.shard_weights[self.mesh.place(rank).dp] for rank in self.replicas.ranks)
        self.weights = tuple(weights) if plan.zero and known else ()
        self._layers = among(groups.tp_groups)
        self.stages = among(groups.pp_groups)
        # among whom parts of the gradients of whole parameters are summed: where state is sharded, with replicas
        self.parted = among(groups.stage_groups) if plan.tp > 1 and plan.zero else self._layers
        # all that hold the same slice of a parameter in any stage; of one replica, where replicas step alone
        self.apart = bool(plan.local or plan.server)
        columns = groups.pp_groups if self.apart else _columns(groups, self.lengthwise)
        single = [[rank] for rank in range(groups.workers)]
        self.copies = among(columns if groups.pp > 1 else single)
        self.replica = among(groups.replica_groups if self.apart else single)
        self.layers = GroupTeam(self._layers.group, self._layers.explained) if known and self.mesh.tp > 1 else None
        self.by_parts = plan.by_parts
        if known and plan.split_parts:
            self.layers = GroupTeam(self.world.group, self.world.explained)
        # tokens travel while gradients are summed, in no order that all keep: over a group of their own
        self._tokens = World(device, gathers_apart=plan.expert_parts)
        self.experts = GroupTeam(self._tokens.apart, self._tokens.explained) if known and plan.expert_parts else None

    @property
    def leads(self) -> bool:
        """Whether this worker speaks for those that split layers with it."""
        return self.place.tp == 0

    @property
    def alone(self) -> bool:
        """Whether each worker holds the whole model, or shards of it among replicas only."""
        return self.mesh.pp == 1 and (self.lengthwise or self.mesh.tp == 1) and not self.by_parts

    @property
    def part(self) -> int:
        """Which slice of a split layer this worker holds."""
        return self.world.rank if self.by_parts else self.place.tp

    def speaks(self, *, sliced: bool, sharded: bool = False) -> bool:
        """Whether this worker gives the whole its part of a parameter: of those that hold it alike, one does."""
        if self.by_parts:
            return sliced or sharded or self.world.rank == 0
        if sharded and self.lengthwise:
            return True
        return (sharded or self.place.dp == 0) and (sliced or self.leads)

    @property
    def waited_seconds(self) -> float:
        """How long this worker stood still for others."""
        teams = (self.layers, self.experts)
        return sum(one.waited_seconds for one in self._worlds) + sum(team.waited_seconds for team in teams if team)

    def close(self) -> None:
        """Give the groups back (collective)."""
        self._tokens.close()
        for one in self._worlds:
            one.close()

    @property
    def _worlds(self) -> list[World]:
        worlds = (self.replicas, self._layers, self.stages, self.copies, self.parted, self.replica, self.computing)
        return list(dict.fromkeys((*worlds, self.world)))

    def assembled(
        self, local: Mapping[str, Tensor], portion: Portion, names: list[str], *, own: bool = False
    ) -> dict[str, Tensor]:
        """Whole tensors under the given parameter names, from every worker's own (collective).

        ``own``: of this worker's replica, from its own workers (where replicas step alone).
        ``local`` has what this worker holds. What several workers hold alike is taken from the first of them.
        """
        if self.alone:
            return {name: local[name] for name in names if name in local}
        whole: dict[str, Tensor] = {}
        among = self.replica if own else self.world
        for name in names:
            fake, found = portion.blueprint.parameters[name], portion.slices.get(name)
            made = torch.zeros(tuple(fake.shape), dtype=portion.dtype_of(fake), device=self.world.device)
            sliced = found is not None
            gives = (sliced or self.leads) if own else self.speaks(sliced=sliced)
            if name in local and portion.counts(name) and gives:
                if found is not None:
                    put_slice(made, local[name], found.dim, found.cut.ranges(self.part))
                else:
                    made.copy_(local[name])
            if made.numel():
                # as bytes: what all others have is zero, so the sum is one worker's bits, signs of zeros too
                flat = made.view(-1) if made.ndim else made.reshape(1)
                among.wait(among.all_reduce(flat.view(torch.uint8), f"all of {name}"))
            whole[name] = made
        return whole

    def by_replica(
        self, computed: Sequence[float], counts: tuple[int, ...], updated: Sequence[float]
    ) -> tuple[list[float], list[int], list[float]]:
        """How long the busiest worker of each replica computed, how many microbatches the replica had, and how long its
        slowest worker updated.
        """
        return self._slowest(computed), self.dealt(counts), self._slowest(updated)

    def _slowest(self, seconds: Sequence[float]) -> list[float]:
        found = [0.0] * self.mesh.dp
        for rank, spent in enumerate(seconds):
            replica = self.mesh.place(rank).dp
            found[replica] = max(found[replica], spent)
        return found

    def dealt(self, counts: tuple[int, ...]) -> list[int]:
        """By replica, how many microbatches it had, from those that each worker has told."""
        found = [0] * self.mesh.dp
        for rank, count in enumerate(counts):
            found[self.mesh.place(rank).dp] += count
        return found

    def shared(self, counts: tuple[int, ...]) -> tuple[int, ...]:
        """By worker, the microbatches of its replica, from those that each worker has told."""
        if self.mesh.tp == 1 and self.mesh.pp == 1:
            return counts
        by_replica = self.dealt(counts)
        return tuple(by_replica[self.mesh.place(rank).dp] for rank in range(len(counts)))


def _columns(mesh: Mesh, whole: bool) -> list[list[int]]:
    """All workers that hold the same slice of a parameter; of ``whole`` layers, all workers."""
    if whole:
        return [list(range(mesh.workers))]
    return [[rank for rank in range(mesh.workers) if mesh.place(rank).tp == part] for part in range(mesh.tp)]


def put_slice(whole: Tensor, local: Tensor, dim: int, ranges: tuple[tuple[int, int], ...]) -> None:
    """Put a slice back where it was cut from: these ranges of ``dim``."""
    start = 0
    for low, high in ranges:
        whole.narrow(dim, low, high - low).copy_(local.narrow(dim, start, high - low))
        start += high - low
