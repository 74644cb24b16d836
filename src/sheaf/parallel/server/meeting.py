"""Local steps beside a parameter server: every H steps a worker pushes how far it has come, and pulls new values."""

import math
import sys
import time
from collections.abc import Callable
from typing import Any

from torch import Tensor

from sheaf.cluster.traffic import traffic
from sheaf.parallel.devices import memory_bytes
from sheaf.parallel.optimizers import learning_rate
from sheaf.parallel.portion import Portion
from sheaf.parallel.runner import AbstractRunner
from sheaf.parallel.server.client import Client, Seen
from sheaf.parallel.server.departing import Departing
from sheaf.parallel.server.failed import explained
from sheaf.parallel.server.link import Failed
from sheaf.parallel.server.relaying import State
from sheaf.parallel.server.scheduled import Scheduled
from sheaf.parallel.server.seating import Seating, reload
from sheaf.parallel.server.step import ServedStep
from sheaf.parallel.step import Step
from sheaf.plans import Plan
from sheaf.record import StepReport
from sheaf.task import Microbatch


class MeetingStep(ServedStep):
    """One call is a step of this worker, by its own optimizer; clocks count meetings, after every ``local`` steps.

    At one it pushes what its weights departed by since the last, which the shards' outer optimizer takes for a
    gradient. In lock-step that is the mean over all workers, by the weight of the losses they stepped by. Otherwise
    each departure is an update of its own, and counts by its weight over that of all workers in a round, so that one
    from each adds up to such a mean; how much a round has is told by what this worker's samples weighed so far. There
    shard 0 deals rounds: a worker's share of every step in one is used when its departure is, and goes back before.

    A report has this worker's own loss; of a meeting also what the record has of any exchange with a server, with the
    loss of the round (``round_loss``, and its weight) over all workers that have told of it by then: in lock-step, all.
    Who asks to stop is heard at the next meeting, and is told so.
    """

    def __init__(
        self,
        plan: Plan,
        portion: Portion,
        runner: AbstractRunner,
        client: Client,
        seating: Seating,
    ) -> None:
        super().__init__(plan, portion, runner, client, seating)
        assert isinstance(self._holding, Departing)
        self._own_weights = self._holding
        self._own_weights.begin()
        self._every = plan.meets_locally.every
        self._schedule = Scheduled(self._scheduler, self._holding.optimizer)
        self._round = self._nothing()
        self._seen_weight, self._seen_samples = 0.0, 0  # of all that this worker computed
        self._concluded = f"sheaf/concluded/{self._run}"  # after how many steps, once somebody has
        self._last_loss = math.nan
        self._has_said = False  # when who asked to stop is heard

    def __call__(self) -> StepReport:
        """Run this worker's next step, and meet the others after the last of a round."""
        start, sent, sent_in_all = time.perf_counter(), self.client.sent_bytes, traffic.sent_bytes
        inside, first = self._spread.waited_seconds, self.index
        self._runner.compute_seconds = 0.0
        self._check_trained()
        norm, samples = self._alone(self.index % self._every)
        seen, again, waited = None, 0, 0.0
        while (self.index + 1) % self._every == 0:
            seen = self._meet()
            waited += seen.waited_seconds
            if not seen.dropped:
                break
            again, after = again + 1, (seen.finished + 1) * self._every
            if self._within(after) < after:  # the others have concluded in the midst of that round
                self._staleness[seen.staleness] += 1
                break
            self.index = after - 1
            for turn in range(self._every):
                norm, samples = self._alone(turn)
        self.index = self._within(self.index + 1 if seen is None else seen.finished * self._every)
        self._beside.index = self.clock
        self._schedule.go(self.index)
        if self.index % self._every == 0:
            self._schedule.meet()
        mine = self._exchange.mine
        weight = math.fsum(one[2] for one in mine)
        self._last_loss = math.fsum(one[1] for one in mine) / weight if weight else self._last_loss
        inside = self._spread.waited_seconds - inside
        report = StepReport(
            step=self.index - 1,
            loss=self._last_loss,
            weight=weight,
            samples=samples,
            seconds=time.perf_counter() - start,
            terms={"compute": self._runner.compute_seconds, "communicate": waited + inside},
            gradient_norm=norm if self.task.clip is not None else None,
            learning_rate=learning_rate(self._holding.optimizer),
            memory_bytes=memory_bytes(self._world.device),
            microbatches=tuple(len(mine) if rank == self.rank else 0 for rank in self._computing),
            stop=seen is not None and seen.stop,
            sent_bytes=traffic.sent_bytes - sent_in_all,
            server={} if seen is None else self._told_of(seen, again, self.index - 1 - first, sent, waited),
        )
        report.terms["host"] = max(0.0, report.seconds - sum(report.terms.values()))
        self._say_when()
        return report

    def _say_when(self) -> None:
        """To who asked to stop between two meetings: when it is heard."""
        left = -self.index % self._every
        if self._exchange.stop and left and self.gives_whole and not self._has_said:
            self._has_said = True
            text = f"asked to stop: the workers agree on it when they meet, {left} of {self._every} steps from here"
            print(f"sheaf: {text}", file=sys.stderr, flush=True)

    def _seen(self, seen: Seen) -> dict[str, float]:
        """What the record has beside the rest."""
        told: list[list[float]] = seen.told["losses"]
        weight = math.fsum(one[2] for one in told)
        mean = {"round_loss": math.fsum(one[1] for one in told) / weight, "round_weight": weight} if weight else {}
        return {**super()._seen(seen), **mean}

    def conclude(self) -> None:
        """No step follows, and nothing is saved any more but the model: out of lock-step, what came after the last
        meeting meets too, as a round of so many steps. Every worker that lives calls this.
        """
        if self.plan.serves.exact:
            return  # the whole is the mean of the workers' weights
        turns = self.index % self._every
        if turns:
            self._store.set(self._concluded, str(self.index))  # before any clock tells of it
        while turns and self._meet(turns).dropped:
            for turn in range(turns):
                self._alone(turn)
        self._beside.index = clock = -(-self.index // self._every)
        if self.plan.serves.gathers:
            self.once("conclude", lambda: self._drain(clock))

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What this worker has of its own, and what its shards hold once every worker has come as far.

        Out of lock-step the run goes on at the last meeting: what came after is not used, and dealt again.
        """
        named, shards = self._kept()
        tensors, values = self._own_state()
        return tensors | named, {**values, "shards": shards}

    def states(self) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
        """By worker, what ``state`` gives, found by this worker alone: all go on with its inner optimizer's state."""
        self.client.read(self.clock)
        tensors, values = self._own_state()
        named, shards = self._of_all_shards()
        mates = (tensors if rank in self._computing else {} for rank in range(1, self.workers))
        return [(tensors | named, {**values, "shards": shards}), *((one, {**values, "shards": {}}) for one in mates)]

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Go on where ``state`` stood; collective."""
        clock = values["index"] // self._every
        self._world.barrier()
        reload(self._together, self.hosts, self.plan.serves.shards, tensors, {**values, "index": clock})
        self._world.barrier()
        self.client.join(clock)
        self.client.read(clock)
        Step.load(self, tensors, values)
        if not self.plan.serves.exact:
            self._own_weights.arrive()
        told = values["meeting"]
        self._round, self._schedule.steps = dict(told["round"]), told["scheduled"]
        self._schedule.meet()
        self._seen_weight, self._seen_samples = told["seen_weight"], told["seen_samples"]
        self._beside.index = self.clock
        self._staleness.clear()
        self._world.barrier()

    def relaid(self, saved: str, read: Callable[[int], State]) -> State | None:  # noqa: ARG002 - others look
        """None: a run goes on under the same plan alone."""
        return None

    def _own_state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        tensors, values = Step.state(self)
        exact = self.plan.serves.exact
        values = values if exact else self._schedule.as_met(values)
        values["index"] = self.index if exact else self.clock * self._every
        values["meeting"] = {
            "round": self._round if exact else self._nothing(),
            "seen_weight": self._seen_weight,
            "seen_samples": self._seen_samples,
            "scheduled": self._schedule.steps if exact else self._schedule.steps_met,
        }
        return tensors, values

    def _within(self, steps: int) -> int:
        """So many steps; where this worker jumps to them, to be where the others are, no more than these had done when
        they concluded: their clocks count what came after the last meeting as a round.
        """
        if steps <= self.index + 1 or not self._store.check([self._concluded]):
            return steps
        return min(steps, int(self._store.get(self._concluded)))

    def _nothing(self) -> dict[str, float]:
        """What the round under way has so far: the sum and the weight of losses, and samples."""
        return {"sum": 0.0, "weight": 0.0, "samples": 0}

    def _alone(self, turn: int) -> tuple[float | None, int]:
        """Make a round's step of that turn by this worker's own gradient; its norm, and how many samples it has."""
        step, microbatches = self._dealt_in(turn)
        whole = self._order.step(step)
        self._runner.compute(step, microbatches, len(whole))
        mine = self._exchange.mine
        norm = self._own(step, mine)
        weight, held = math.fsum(one[2] for one in mine), self._beside.held()
        if weight and not held:
            raise explained({"why": "unused"}, step)
        if self._observer is not None:
            self._observer.gradients(self.index, held)
        self._holding.optimizer.step()  # without gradients nothing moves
        if self._statistics is not None:
            self._statistics.apply(len(whole))
        samples = self._samples(step, mine)
        self._own_weights.weight += weight
        self._round["sum"] += math.fsum(one[1] for one in mine)
        self._round["weight"] += weight
        self._round["samples"] += samples
        self._seen_weight, self._seen_samples = self._seen_weight + weight, self._seen_samples + samples
        return norm, samples

    def _dealt_in(self, turn: int) -> tuple[int, tuple[Microbatch, ...]]:
        """The step of what is computed in a turn of the round, and its microbatches: this worker's, or all."""
        if self.client.part is None:
            return self.index, self._order.step(self.index)
        clock, place = divmod(self.client.part, self.plan.dp)
        part = self._supply.part((clock * self._every + turn) * self.plan.dp + place)
        return part.step, part.microbatches

    def _meet(self, turns: int = 0) -> Seen:
        """Push what the weights departed by in the round, of so many steps (0: all that are between two meetings), and
        go on from the values that come back.
        """
        told = self._round
        used = self._own_weights.depart(self._factor(turns or self._every))
        common = {
            "losses": [[self.rank, told["sum"], told["weight"]]],
            "samples": told["samples"],
            "any": True,
            "stop": self._exchange.stop,
            "expected": 1.0,
        }
        if not told["weight"] and not self.plan.serves.exact:
            used = [[] for _ in used]  # nothing here has any weight
        try:
            seen = self.client.exchange(self.clock, [{"used": places, **common} for places in used])
        except Failed as failed:
            clock = int(failed.meta.get("clock", self.clock))
            raise explained({**failed.meta, "clock": (clock + 1) * self._every - 1}, self.index) from None
        if not seen.dropped:
            self._staleness[seen.staleness] += 1
        self._own_weights.arrive()
        self._round = self._nothing()
        return seen

    def _factor(self, turns: int) -> float:
        """By what a departure of so many steps counts: in lock-step shards divide by the weight of all, else it is a
        part of a mean.
        """
        weight = self._round["weight"]
        if self.plan.serves.exact:
            return weight
        if not weight:
            return 0.0
        whole = self._seen_weight / self._seen_samples * self.task.batch * turns
        return weight / whole * (self.plan.dp if self.plan.serves.gathers else 1)  # what is gathered becomes a mean
