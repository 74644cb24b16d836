"""A step beside a parameter server whose replicas are several workers each: they agree, and are one worker to it.

Within a replica workers wait for each other in every step anyway, so none of them may decide anything for itself:
which losses the replica found, whether its gradient came too late, after which step it stops.
"""

from collections.abc import Collection, Sequence
from functools import partial

import torch
from torch import Tensor

from sheaf.errors import WorkerFailed
from sheaf.parallel.portion import Portion
from sheaf.parallel.runner import AbstractRunner
from sheaf.parallel.server.assemble import forms_of, refuse_served, terms_of
from sheaf.parallel.server.client import Client, Seen
from sheaf.parallel.server.everywhere import Everywhere, Place, introduced
from sheaf.parallel.server.link import Failed
from sheaf.parallel.server.part import PartBeside
from sheaf.parallel.server.places import Form
from sheaf.parallel.server.relaying import State
from sheaf.parallel.server.seating import Seating, take_seats
from sheaf.parallel.server.step import Found, ServedStep
from sheaf.parallel.server.wake import Wake
from sheaf.parallel.spread import Spread
from sheaf.parallel.ties import Ties
from sheaf.parallel.world import World
from sheaf.plans import Plan
from sheaf.task import Task


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
    place = spread.replicas
    number = next(number for number, ranks in enumerate(spread.mesh.dp_groups) if spread.world.rank in ranks)
    terms = terms_of(task, plan, place=number)
    seating = take_seats(task, plan, place, portion, holding.parameters, forms, terms, holding.parameters.__getitem__)
    try:
        places = _introduce(spread, seating, forms)
        agreed = partial(_largest, spread.replica)
        client = Client(place.rank, seating.addresses, forms, seating.keys, terms, agreed)
        client.join(0)
    except BaseException:
        seating.close()
        raise
    holding.client = client
    everywhere = Everywhere(places, place.rank, terms, lambda: client.incarnation)
    return ReplicaStep(plan, portion, runner, client, seating, ties, everywhere)


def _largest(replica: World, mine: int) -> int:
    """The largest of its workers' numbers (collective in the replica)."""
    table = torch.zeros(replica.workers, dtype=torch.int64)
    table[replica.rank] = mine
    return int(replica.summed(table, "what a replica agrees on").max())


def _introduce(spread: Spread, seating: Seating, forms: Sequence[Form]) -> list[Place]:
    """All places' servers; this place's shards are told where those of the others are (collective)."""
    places = introduced(spread, seating, forms)
    for number, place in enumerate(places):
        for one in (*seating.hosts, *seating.spares):
            if spread.world.rank in place.ranks:
                one.peers.place = number
            else:
                one.peers.elsewhere[number] = place.addresses, place.keys
    spread.world.barrier()
    return places


class ReplicaStep(ServedStep):
    """One global step in lock-step; otherwise one of this worker's replica, without which the others can do.

    A replica that has lost a worker computes no more: its other workers stay, and serve the shards that they hold.
    """

    def __init__(
        self,
        plan: Plan,
        portion: Portion,
        runner: AbstractRunner,
        client: Client,
        seating: Seating,
        ties: Sequence[Ties],
        everywhere: Everywhere,
    ) -> None:
        super().__init__(plan, portion, runner, client, seating)
        self._ties, self._everywhere = ties, everywhere
        self._replica = self._spread.replica
        self._wake = Wake(self._store, f"sheaf/replicas/{self._run}", self._spread, client.terms.lease_seconds)

    def settle(self) -> None:
        """No step follows: what late gradients were gathered are applied. Every worker that lives calls this."""
        if self.plan.serves.gathers:
            self.once(f"settle/{self.index}", lambda: self._everywhere.drain(self.index))

    def states(self) -> list[State]:
        """As of any step beside a server; shards of each place are the first of its workers' to keep."""
        buffers = {f"buffer/{name}": value for name, value in self.model.named_buffers()}
        common = {"index": self.index, "expected_weight": self._expectation.weight}
        found = self._everywhere.states(self.index)
        each = [found.get(rank, ({}, {})) for rank in range(self.workers)]
        return [(buffers | named, {**common, "shards": shards}) for named, shards in each]

    def full_state_alone(self) -> dict[str, Tensor]:
        """What ``full_state`` gives, found by this worker alone; nobody may push meanwhile."""
        mesh = self._spread.mesh
        return self._named(self._everywhere.whole(self.index, self._portion, lambda rank: mesh.place(rank).tp))

    @property
    def _gone(self) -> Collection[int]:
        """Replicas that compute no more."""
        return {*super()._gone, *self._wake.given_up()}

    def stays(self, error: WorkerFailed) -> bool:
        """After what a step raised: whether it was that this worker's replica is lost.

        If so, this worker goes on to serve until the others are done, and then it is True. Raises WorkerFailed when no
        replica is left.
        """
        return self._wake.stays(error, lambda: self._gone, self.client.close)

    def _looked(self) -> None:
        self._wake.look(self._members(self.lost()))

    def _leave(self) -> None:
        if not self._wake.begun:
            super()._leave()
            self._wake.done()

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
        """When to stop, and what comes next, is what the first place's server says; lateness the largest of all."""
        if self.plan.exact:
            return  # every place's server was told the same
        first, part = self._replica.rank == 0, self.client.part
        told = self._of_all(float(seen.stop and first), seen.delay, seen.staleness, -1 if part is None else part)
        stops, delays, stalenesses, parts = (told[start::4] for start in range(4))
        seen.stop, seen.delay, seen.staleness = any(stops), int(max(delays)), int(max(stalenesses))
        self.client.part = int(max(parts))  # what the first place's server deals is the replica's

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
        others = [str(rank) for rank in mesh.mates(gone) if rank != gone]
        return WorkerFailed(
            f"worker {gone} is gone at step {failed.meta.get('clock', self.index)}, and with it its replica, which "
            f"workers {', '.join(others)} are of too: look at its output; start again from the last checkpoint"
        )
