"""The step of a worker that only serves: it has seats of shards, computes nothing, and goes by the others' clocks."""

import math
import time
from collections.abc import Callable, Collection
from typing import Any

import torch
from torch import Tensor, nn

from sheaf.cluster.traffic import traffic
from sheaf.errors import WorkerFailed
from sheaf.parallel.devices import memory_bytes
from sheaf.parallel.optimizers import learning_rate
from sheaf.parallel.portion import Portion
from sheaf.parallel.server.failed import explained
from sheaf.parallel.server.host import Host
from sheaf.parallel.server.log import losses
from sheaf.parallel.server.reading import finished
from sheaf.parallel.server.relaying import State, is_relayable
from sheaf.parallel.server.seated import AbstractSeatedStep
from sheaf.parallel.server.seating import Seating, reload
from sheaf.parallel.server.seats import RETIRED
from sheaf.parallel.spread import Spread
from sheaf.parallel.step import Observer
from sheaf.plans import Plan
from sheaf.record import StepReport
from sheaf.task import Task

_LOOK_SECONDS = 0.1  # between two looks at the clocks, when nothing has told of a change


class ServingStep(AbstractSeatedStep):
    """A call returns when the workers that compute have done the next step, or are all gone.

    ``model`` has parameters without memory: none is held here but in shards.
    """

    def __init__(
        self, task: Task, plan: Plan, spread: Spread, portion: Portion, model: nn.Module, seating: Seating
    ) -> None:
        self.task, self.plan, self.index = task, plan, 0
        self._spread, self._world, self._portion = spread, spread.world, portion
        self._model = model
        self._sit(seating)
        self._world.number("sheaf/served")  # as every worker asks

    @property
    def model(self) -> nn.Module:
        return self._model

    @property
    def position(self) -> tuple[int, int] | None:
        return None

    def runs(self, block: str) -> bool:  # noqa: ARG002 - of none
        return False

    @property
    def leads(self) -> bool:
        return False

    @property
    def losses(self) -> list[tuple[int, float, float]]:
        return []

    @property
    def spans(self) -> list[tuple[str, int, int, float, float]]:
        return []

    @property
    def optimizer(self) -> torch.optim.Optimizer:
        """That of the first shard here."""
        return self.hosts[0].shard.optimizer

    @property
    def gives_whole(self) -> bool:
        return False

    def __call__(self) -> StepReport:
        """Serve until the others have done one step more. Raises what they raise when it cannot be applied."""
        start, sent = time.perf_counter(), traffic.sent_bytes
        every = max(1, self.plan.meets_locally.every)
        meets = (self.index + 1) % every == 0  # else the others do the step alone
        while meets and not self._is_done(self.clock):
            self._wait()
        told: dict[int, dict[str, Any]] = {}
        stop_at, rate = None, None
        for host in sorted(self._live, key=lambda one: finished(one.shard), reverse=True)[:1]:  # it knows the step
            with host.changed:
                told = dict(host.shard.told.get(self.clock, {})) if meets else {}
                stop_at = host.shard.stop_at
                rate = learning_rate(host.shard.optimizer)
        each = losses(told.values())
        weight = math.fsum(one[2] for one in each)
        seconds = time.perf_counter() - start
        report = StepReport(
            step=self.index,
            loss=math.fsum(one[1] for one in each) / weight if weight else math.nan,
            weight=weight,
            samples=sum(int(one.get("samples", 0)) for one in told.values()),
            seconds=seconds,
            terms={"wait": seconds},
            learning_rate=rate,
            memory_bytes=memory_bytes(self._world.device),
            microbatches=tuple(len(told.get(worker, {}).get("losses", ())) for worker in range(self.plan.computing)),
            sent_bytes=traffic.sent_bytes - sent,
            stop=meets and stop_at is not None and self.clock + 1 >= stop_at,
        )
        self.index += 1
        return report

    def serve(self, lost: Callable[[], Collection[int]]) -> None:
        """Serve until every worker that computes has said good-bye, or is one of those ``lost``.

        Raises WorkerFailed when all of them are lost.
        """
        self._heed(lost)
        while not self._is_over():
            self._wait()
        if set(self.lost()) >= set(range(self.plan.computing)):
            raise WorkerFailed("every worker that computes is lost: look at what each of them wrote last")

    def request_stop(self) -> None:
        """Nothing: those who compute are asked too, and say when."""

    def settle(self) -> None:
        """Nothing: those who compute see to it."""

    def conclude(self) -> None:
        """Nothing: those who compute see to it."""

    def observe(self, observer: Observer | None) -> None:
        """Nothing: here are no gradients to look at."""

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the shards of this worker hold, once every worker has come as far."""
        named, shards = self._kept()
        return named, {"index": self.index, "expected_weight": 0.0, "shards": shards}

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Go on where ``state`` stood; collective."""
        self._world.barrier()
        self.index = values["index"]
        reload(self._world, self.hosts, self.plan.serves.shards, tensors, {**values, "index": self.clock})
        self._world.barrier()  # then the others join
        self._world.barrier()

    def relaid(self, saved: str, read: Callable[[int], State]) -> State | None:
        """What to ``load`` of a checkpoint of the plan ``saved``: of shards worker 0 has all."""
        return ({}, read(0)[1] | {"shards": {}}) if is_relayable(self.plan, saved) else None

    def full_state(self) -> dict[str, Tensor]:
        """Nothing: worker 0 gives the whole."""
        return {}

    def close(self) -> None:
        """Stay until the others have said good-bye."""
        try:
            for host in self._live:
                host.wait_until_left(3 * host.terms.lease_seconds)
        finally:  # somebody may have had enough of waiting
            self._rise()
        self._spread.close()

    @property
    def _live(self) -> list[Host]:
        """The seats that know how far the workers are."""
        return [host for host in self.hosts if host.seat != RETIRED]

    def _is_done(self, index: int) -> bool:
        """Whether a step was done, as far as is known here."""
        live = self._live
        for host in live:
            with host.changed:
                if finished(host.shard) > index:
                    return True
                if host.shard.failure is not None:
                    raise explained(host.shard.failure, index)
        return self._is_over()

    def _is_over(self) -> bool:
        """Whether nobody will ask anything of the seats here any more."""
        lost = self.lost()
        return all(
            member.left or worker in lost for host in self._live for worker, member in host.shard.members.items()
        )

    def _wait(self) -> None:
        for host in self._live[:1]:
            with host.changed:
                host.changed.wait(_LOOK_SECONDS)
