"""A step beside a parameter server whose replicas are several workers each: they agree, and are one worker to it.

Within a replica workers wait for each other in every step anyway, so none of them may decide anything for itself:
which losses the replica found, whether its gradient came too late, after which step it stops.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from sheaf.errors import WorkerFailed
from sheaf.parallel.portion import Portion
from sheaf.parallel.runner import AbstractRunner
from sheaf.parallel.server.addresses import told_all
from sheaf.parallel.server.assemble import forms_of, refuse_served, terms_of
from sheaf.parallel.server.client import Client, Seen
from sheaf.parallel.server.link import Address, Failed, Keys
from sheaf.parallel.server.part import PartBeside
from sheaf.parallel.server.seating import Seating, take_seats
from sheaf.parallel.server.step import Found, ServedStep
from sheaf.parallel.spread import Spread
from sheaf.parallel.ties import Ties
from sheaf.parallel.world import World
from sheaf.plans import Plan
from sheaf.task import Task

_KEY_BYTES = 32


def held_in_part(task: Task, plan: Plan, spread: Spread, portion: Portion, tied: Sequence[str]) -> PartBeside:
    """What this worker holds; raises PlanError where the plan cannot serve the task."""
    refuse_served(task, plan, portion.blueprint)
    return PartBeside(portion, spread, tied)


def serve_replicas(plan: Plan, portion: Portion, runner: AbstractRunner, ties: Sequence[Ties]) -> "ReplicaStep":
    """Start this worker's shards and make its step; called on every worker (collective)."""
    parts = runner.parts
    task, spread, holding = parts.task, parts.spread, parts.holding
    assert isinstance(holding, PartBeside)
    forms = forms_of(holding.model, holding.served, plan.serves.shards)
    terms = terms_of(task, plan, needed=True)
    place = spread.replicas
    seating = take_seats(task, plan, place, portion, holding.parameters, forms, terms, holding.parameters.__getitem__)
    try:
        _introduce(spread, seating)
        client = Client(place.rank, seating.addresses, forms, seating.keys, terms)
        client.join(0)
    except BaseException:
        seating.close()
        raise
    holding.client = client
    return ReplicaStep(plan, portion, runner, client, seating, ties)


def _introduce(spread: Spread, seating: Seating) -> None:
    """Tell this place's shards where those of the others are, for norms (collective)."""
    mine: list[Address] = [address for seats in seating.addresses for address in seats]
    at = told_all(spread.world, mine)
    secret = torch.zeros(spread.world.workers, 2 * _KEY_BYTES, dtype=torch.int64)
    secret[spread.world.rank] = torch.tensor(list(seating.keys.token + seating.keys.digest))
    secrets = [bytes(row) for row in spread.world.summed(secret, "keys of the parameter server").tolist()]
    each = len(seating.addresses[0])
    for number, ranks in enumerate(spread.mesh.dp_groups):
        first = ranks[0]
        if spread.world.rank in ranks:
            for one in (*seating.hosts, *seating.spares):
                one.peers.place = number
            continue
        addresses = [at[first][start : start + each] for start in range(0, len(mine), each)]
        keys = Keys(secrets[first][:_KEY_BYTES], secrets[first][_KEY_BYTES:])
        for one in (*seating.hosts, *seating.spares):
            one.peers.elsewhere[number] = addresses, keys
    spread.world.barrier()


class ReplicaStep(ServedStep):
    """One global step in lock-step; otherwise one of this worker's replica."""

    def __init__(
        self,
        plan: Plan,
        portion: Portion,
        runner: AbstractRunner,
        client: Client,
        seating: Seating,
        ties: Sequence[Ties],
    ) -> None:
        super().__init__(plan, portion, runner, client, seating.hosts, seating.spares)
        self._ties = ties
        self._replica = self._spread.replica
        client.agreed = lambda delay: int(max(self._of_all(delay)))

    def settle(self) -> None:
        """No step follows: what late gradients were gathered are applied (collective)."""
        if self.plan.serves.gathers:
            if self._spread.place.dp == 0:
                self.client.read(self.index)
                self.client.drain()
            self._world.barrier()

    def _found(self, microbatches: int) -> Found:
        """What the replica found, the same on each of its workers; gradients of what several hold are whole then."""
        names, mine = self._trained, self._exchange.mine
        told = torch.zeros(len(names) + 3 * microbatches + 1, dtype=torch.float64)
        used, sums, weights, counts, stop = told.split([len(names), *[microbatches] * 3, 1])
        used += torch.tensor([float(name in self._holding.touched) for name in names])
        for index, total, weight in mine:
            sums[index], weights[index], counts[index] = total, weight, 1
        stop += float(self._exchange.stop)
        told = self._replica.summed(told, "what a replica found")
        used, sums, weights, counts, stop = told.split([len(names), *[microbatches] * 3, 1])
        if int(counts.max()) > 1:
            raise WorkerFailed("two workers of a replica computed the same microbatch: build the step on each alike")
        touched = {name for name, count in zip(names, used.tolist(), strict=True) if count}
        for ties in self._ties:
            ties.meet(touched)
        numbers = zip(sums.tolist(), weights.tolist(), counts.tolist(), strict=True)
        losses = [(index, total, weight) for index, (total, weight, count) in enumerate(numbers) if count]
        return Found(losses, is_used=bool(touched), stop=bool(stop))

    def _settled(self, seen: Seen) -> None:
        """After which step to stop is what the first place's server says, who was told by all; lateness the largest."""
        if self.plan.exact:
            return  # every place's server was told the same
        first = self._replica.rank == 0
        told = self._of_all(float(seen.stop and first), seen.delay, seen.staleness)
        stops, delays, stalenesses = told[0::3], told[1::3], told[2::3]
        seen.stop, seen.delay, seen.staleness = any(stops), int(max(delays)), int(max(stalenesses))

    def _of_all(self, *mine: float) -> list[float]:
        """These numbers of every worker of the replica, one worker after the other (collective in the replica)."""
        table = torch.zeros(self._replica.workers, len(mine), dtype=torch.float64)
        table[self._replica.rank] = torch.tensor(mine, dtype=torch.float64)
        return self._replica.summed(table, "what a replica saw").flatten().tolist()

    def _gradients(self) -> dict[str, Tensor]:
        """The step's gradient: of all workers in lock-step, else the replica's own, as it was pushed."""
        if not self.plan.exact:
            held = {name: value for name, value in self._beside.held().items() if name in self._beside.served}
            return self._whole(held, own=True)
        return self._whole(self._applied(self._beside.served), own=False)

    def _whole(self, held: dict[str, Tensor], *, own: bool) -> dict[str, Tensor]:
        """Whole gradients of those that any has, from every place (collective; ``own``: in the replica)."""
        among = self._replica if own else self._world
        told = torch.tensor([float(name in held) for name in self._trained])
        told = among.summed(told, "parameters used")
        names = [name for name, count in zip(self._trained, told.tolist(), strict=True) if count]
        return self._spread.assembled(held, self._portion, names, own=own)

    @property
    def _together(self) -> World:
        """The workers of this place, in every replica."""
        return self._spread.replicas

    def _explained(self, failed: Failed) -> Exception:
        if failed.meta.get("why") != "worker":
            return super()._explained(failed)
        self._is_over = True
        mesh, place, replica = self._spread.mesh, self._spread.place, int(failed.meta["worker"])
        gone = mesh.rank(pp=place.pp, dp=replica, tp=place.tp)
        others = [str(rank) for rank in range(mesh.workers) if mesh.place(rank).dp == replica and rank != gone]
        return WorkerFailed(
            f"worker {gone} is gone at step {failed.meta.get('clock', self.index)}, and with it its replica, which "
            f"workers {', '.join(others)} are of too: look at its output; start again from the last checkpoint"
        )
