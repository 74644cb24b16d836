"""One step beside a parameter server: own microbatches, one exchange with every shard, the values that come back."""

import json
import math
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, cast

import torch
import torch.distributed as dist
from torch import Tensor

from sheaf.cluster.traffic import traffic
from sheaf.errors import NonFiniteLoss, WorkerFailed
from sheaf.parallel.devices import memory_bytes
from sheaf.parallel.portion import Portion
from sheaf.parallel.runner import AbstractRunner
from sheaf.parallel.server.beside import Beside, whole
from sheaf.parallel.server.client import Client, GivenUp, Seen
from sheaf.parallel.server.failed import explained
from sheaf.parallel.server.link import Failed
from sheaf.parallel.server.places import forms_of
from sheaf.parallel.server.relaying import State, is_relayable, relaid
from sheaf.parallel.server.restore import numbered
from sheaf.parallel.server.seated import AbstractSeatedStep
from sheaf.parallel.server.seating import Seating, reload
from sheaf.parallel.supply import Supply
from sheaf.parallel.world import World
from sheaf.plans import Plan
from sheaf.record import StepReport
from sheaf.task import Microbatch

_LOOK_SECONDS = 0.005  # between two looks whether something is done
_LEFT = "left"  # in place of a worker's number: it could not do what was to be done once


class Found(NamedTuple):
    """What a worker's forwards and backwards of a step left: (microbatch, sum, weight) of each loss."""

    losses: list[tuple[int, float, float]]
    is_used: bool  # whether any parameter got a gradient
    stop: bool  # whether somebody asked to stop


class ServedStep(AbstractSeatedStep):
    """The step of a plan with ``server``. In lock-step it is one global step, the same on every worker.

    Otherwise it is one step of this worker: it computes the share that it is dealt, pushes the gradient of its mean,
    which each shard applies at once, and pulls values that are as old as the plan allows. Its report counts the losses
    that were told for its clock by then, this worker's and those of workers that are as far.
    """

    def __init__(
        self,
        plan: Plan,
        portion: Portion,
        runner: AbstractRunner,
        client: Client,
        seating: Seating,
    ) -> None:
        super().__init__(plan, portion, runner)
        assert isinstance(self._holding, Beside)
        self.client = client
        self._sit(seating)
        self._beside = self._holding
        self._staleness: Counter[int] = Counter()  # how often each was seen
        self._told_here: list[tuple[int, float, float]] = []
        self._is_over = False  # nobody goes on, and nobody is waited for
        self._supply = Supply(self._order, plan.weights)
        self._run, self._store = self._world.number("sheaf/served"), cast("dist.Store", self._world.counter)

    def __call__(self) -> StepReport:
        """Run the next step: of all workers together in lock-step, else of this one."""
        start, sent, sent_in_all = time.perf_counter(), self.client.sent_bytes, traffic.sent_bytes
        inside = self._spread.waited_seconds
        self._runner.compute_seconds = 0.0
        self._check_trained()
        first, waited, again = self.index, 0.0, 0
        while True:
            step, microbatches = self._dealt()
            norm, seen = self._once(step, microbatches)
            waited += seen.waited_seconds
            self._beside.take()
            if not seen.dropped:
                break
            self.index, again = seen.finished, again + 1
        if self._statistics is not None:
            self._statistics.apply(len(self._order.step(step)))
        if self._observer is not None:
            self._observer.gradients(self.index, self._gradients())
        self._staleness[seen.staleness] += 1
        done = seen.finished - 1  # the others may have gone on without this worker
        told: list[list[float]] = seen.told["losses"]
        samples = int(seen.told["samples"])
        if not told:
            told, samples = [[*one] for one in self._told_here], self._samples(step, self._told_here)
        seconds = seen.told.get("seconds", {})
        weight, inside = math.fsum(one[2] for one in told), self._spread.waited_seconds - inside
        if self.plan.exact:
            norm = seen.told.get("norm")
        if self.plan.exact and not self.plan.stolen:  # a worker that missed steps would divide by another weight
            self._expectation.weight = weight
        report = StepReport(
            step=done,
            loss=math.fsum(one[1] for one in told) / weight if weight else math.nan,
            weight=weight,
            samples=samples,
            seconds=time.perf_counter() - start,
            terms={"compute": self._runner.compute_seconds, "communicate": waited + inside},
            gradient_norm=norm if self.task.clip is not None else None,
            learning_rate=seen.told["rate"],
            memory_bytes=memory_bytes(self._world.device),
            microbatches=tuple(seen.told["counts"].get(str(self._member(rank)), 0) for rank in self._computing),
            computed=tuple(seconds.get(str(worker), 0.0) for worker in self._computing) if seconds else (),
            stop=seen.stop,
            sent_bytes=traffic.sent_bytes - sent_in_all,
            server=self._told_of(seen, again, done - first, sent, waited),
        )
        report.terms["host"] = max(0.0, report.seconds - sum(report.terms.values()))
        self.index = seen.finished
        self._beside.index = self.index
        return report

    @property
    def _computing(self) -> range:
        """The workers that compute, without those that only serve."""
        return range(self._spread.computing.workers)

    @property
    def _together(self) -> World:
        """Those who load the state of their shards together."""
        return self._world

    @property
    def _staleness_mean(self) -> float:
        seen = self._staleness
        return sum(clocks * times for clocks, times in seen.items()) / seen.total()

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the shards of this worker hold, once every worker has come as far, and its own buffers."""
        buffers = {f"buffer/{name}": value for name, value in self.model.named_buffers()}
        named, shards = self._kept()
        return buffers | named, {"index": self.index, "expected_weight": self._expectation.weight, "shards": shards}

    def states(self) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
        """By worker, what ``state`` gives, found by this worker alone once all that live have come as far.

        Buffers are this worker's own.
        """
        self.client.read(self.index)
        buffers = {f"buffer/{name}": value for name, value in self.model.named_buffers()}
        named, shards = self._of_all_shards()
        common = {"index": self.index, "expected_weight": self._expectation.weight}
        first = buffers | named, {**common, "shards": shards}
        return [first, *((buffers, {**common, "shards": {}}) for _ in range(self.workers - 1))]

    def _of_all_shards(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What all shards hold, as they tell it: tensors, and the rest by shard."""
        return numbered(enumerate(self.client.states()))

    def settle(self) -> None:
        """No step follows: what late gradients were gathered are applied. Every worker that lives calls this."""
        if self.plan.serves.gathers:
            self.once(f"settle/{self.index}", lambda: self._drain(self.clock))

    def _drain(self, clock: int) -> None:
        """Have the shards apply what they have gathered, once every worker has come to ``clock``."""
        self.client.read(clock)
        self.client.drain(clock)

    def heed(self, lost: Callable[[], Collection[int]]) -> None:
        """Give up at once whom ``lost`` names, before a lease has run out."""
        self._heed(lost)

    @property
    def gives_whole(self) -> bool:
        return self._first == self.rank

    @property
    def _first(self) -> int:
        """The first worker that lives, and whose replica does."""
        gone = self._gone
        return next((rank for rank in self._computing if self._member(rank) not in gone), self.rank)

    @property
    def _gone(self) -> Collection[int]:
        """The workers of the clock that are known to be gone."""
        return self._members(self.lost())

    def stays(self, error: WorkerFailed) -> bool:  # noqa: ARG002 - replicas of several workers look at it
        """After what a step raised: whether the others go on without this worker; if so, once they are done."""
        return False

    def once(self, name: str, do: Callable[[], Any]) -> Any:
        """What ``do`` gives, of what JSON knows, on the first worker that lives; every worker that lives calls this.

        When that worker is lost before it has done it, the next does it. ``name`` is used once in a run.
        """
        key, turn, me = f"sheaf/once/{self._run}/{name}", 0, str(self.rank)
        while not self._store.check([key]):
            holder = ""
            if self.gives_whole:  # one that lives may be at it yet, though its replica is lost
                holder = self._store.compare_set(f"{key}/{turn}", "", me).decode()
            if holder == me:
                self._store.set(key, json.dumps(self._attempted(do, f"{key}/{turn}")))
            elif holder == _LEFT or (holder and int(holder) in self.lost()):
                turn += 1
            elif not self.gives_whole and self._member(self.rank) in self._gone:
                raise GivenUp(f"the others go on without worker {self.rank}'s replica, which has lost another")
            else:
                time.sleep(_LOOK_SECONDS)
        return json.loads(self._store.get(key))

    def _attempted(self, do: Callable[[], Any], turn: str) -> Any:
        """What ``do`` gives; where it fails, the turn is the next worker's."""
        try:
            return do()
        except BaseException:
            self._store.compare_set(turn, str(self.rank), _LEFT)
            raise

    def brought(self, name: str, mine: Any) -> dict[int, Any]:
        """By worker, what those of its replica bring, of what JSON knows; every worker that lives calls this, the first
        is told. Of those that are lost nothing is brought.
        """
        key, found = f"sheaf/brought/{self._run}/{name}", dict[int, Any]()
        self._store.set(f"{key}/{self.rank}", json.dumps(mine))
        for rank in self._spread.mesh.mates(self.rank) if self.gives_whole else ():
            while not self._store.check([f"{key}/{rank}"]) and self._member(self.rank) not in self._gone:
                time.sleep(_LOOK_SECONDS)
            if self._store.check([f"{key}/{rank}"]):
                found[rank] = json.loads(self._store.get(f"{key}/{rank}"))
        return found

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Go on where ``state`` stood; collective. Both seats of a shard take over what its worker kept."""
        self._world.barrier()
        with torch.no_grad():
            for name, value in self.model.named_buffers():
                value.copy_(tensors[f"buffer/{name}"])
        self.index, self._expectation.weight = values["index"], values["expected_weight"]
        self._beside.index = self.index
        reload(self._together, self.hosts, self.plan.serves.shards, tensors, values)
        self._world.barrier()
        self.client.join(self.index)
        self.client.read(self.index)
        self._beside.take()
        self._staleness.clear()
        self._world.barrier()

    def relaid(self, saved: str, read: Callable[[int], State]) -> State | None:
        """What to ``load`` of a checkpoint of the plan ``saved``, of which ``read`` gives each worker's part.

        None where it differs in more than where shards lie.
        """
        if not is_relayable(self.plan, saved):
            return None
        other, (tensors, values) = Plan.parse(saved), read(self.rank)
        buffers = {name: value for name, value in tensors.items() if name.startswith("buffer/")}
        if self.rank:
            return buffers, values | {"shards": {}}
        forms, old = (forms_of(self.model, self._beside.parameters, plan.serves.shards) for plan in (self.plan, other))
        named, shards = relaid(other, read, forms, old)
        return buffers | named, values | {"shards": shards}

    def full_state_alone(self) -> dict[str, Tensor]:
        """What ``full_state`` gives, found by this worker alone; nobody may push meanwhile."""
        self._beside.first = self.gives_whole
        return super().full_state()

    def close(self) -> None:
        """Say good-bye, and stay until the others have: this worker may hold their shards."""
        try:
            self._leave()
            for host in self.hosts:
                host.wait_until_left(0.0 if self._is_over else 3 * host.terms.lease_seconds)
        finally:  # somebody may have had enough of waiting
            self._rise()
        super().close()

    def _leave(self) -> None:
        """Say good-bye."""
        self.client.leave()

    def _dealt(self) -> tuple[int, tuple[Microbatch, ...]]:
        """The step of what is computed now, and its microbatches: those that this worker is dealt, or all."""
        if self.client.part is None:
            return self.index, self._order.step(self.index)
        part = self._supply.part(self.client.part)
        return part.step, part.microbatches

    def _samples(self, step: int, losses: list[tuple[int, float, float]]) -> int:
        """How many samples the microbatches have that these losses are of."""
        microbatches = self._order.step(step)
        return sum(len(microbatches[index].samples) for index, _, _ in losses)

    def _once(self, step: int, microbatches: tuple[Microbatch, ...]) -> tuple[float | None, Seen]:
        """Compute this worker's share and exchange it."""
        self._runner.compute(step, microbatches, len(microbatches))
        found = self._found(len(self._order.step(step)))
        self._told_here = found.losses
        norm = None
        if not self.plan.exact:
            norm = self._own(step, found.losses)
        used = self._beside.put()
        common = {
            "losses": found.losses,
            "samples": self._samples(step, found.losses),
            "any": found.is_used,
            "stop": found.stop,
            "expected": self._expectation.weight,
            "watch": self._observer is not None,
        }
        try:
            seen = self.client.exchange(self.index, [{"used": places, **common} for places in used])
        except Failed as failed:
            raise self._explained(failed) from None
        self._settled(seen)
        return norm, seen

    def _explained(self, failed: Failed) -> Exception:
        return explained(failed.meta, self.index)

    def _found(self, microbatches: int) -> Found:  # noqa: ARG002 - replicas of several workers look at it
        """What this worker found of a step of so many microbatches."""
        return Found(self._exchange.mine, bool(self._beside.held()), self._exchange.stop)

    def _settled(self, seen: Seen) -> None:
        """What is seen is this worker's own to decide by; those of one replica decide together."""

    def _seen(self, seen: Seen) -> dict[str, float]:
        """What the record has beside the rest: where parts are dealt, how many came back so far."""
        return {"returned": seen.told["back"]} if "back" in seen.told else {}

    def _told_of(self, seen: Seen, again: int, missed: int, sent: int, waited: float) -> dict[str, float]:
        """What the record has of an exchange; ``sent`` bytes were sent to shards before it."""
        return {
            "staleness": seen.staleness,
            "staleness_max": max(self._staleness),
            "staleness_mean": self._staleness_mean,
            "delay": seen.delay,
            "dropped": again,
            "missed": missed,
            "sent_bytes": self.client.sent_bytes - sent,
            "waited_seconds": waited,
            **self._seen(seen),
        }

    def _own(self, step: int, mine: list[tuple[int, float, float]]) -> float | None:
        """Outside lock-step: the gradient of the mean of what this worker computed of a step."""
        for index, total, weight in mine:
            if not math.isfinite(total) or not math.isfinite(weight):
                raise NonFiniteLoss(step, index, total / weight if weight else total)
        weight = math.fsum(one[2] for one in mine)
        if not weight:
            self._beside.begin_step()  # nothing here has any weight
            return None
        norm = self._beside.clip(step, self.task.clip, self._expectation.weight / weight)
        self._expectation.weight = weight
        return norm

    def _gradients(self) -> dict[str, Tensor]:
        """The step's gradient: of all workers in lock-step, else this one's own, as it was pushed."""
        if not self.plan.exact:
            return self._beside.held()
        return self._applied(self._beside.parameters)

    def _applied(self, served: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The gradients that were applied to those that are ``served`` in the last step of lock-step."""
        told = self.client.gradients()
        used = {
            arena.form.pieces[place].name
            for arena, each in zip(self.client.values, told, strict=True)
            for place in each["used"]
        }
        found = whole(self.client.values, {name: value.detach() for name, value in served.items()})
        return {name: found[name] for name in self._trained if name in used}
