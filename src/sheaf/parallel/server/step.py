"""One step beside a parameter server: own microbatches, one exchange with every shard, the values that come back."""

import contextlib
import json
import math
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Sequence
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor

from sheaf.cluster.traffic import traffic
from sheaf.errors import NonFiniteLoss, RunError, TaskError, WorkerFailed
from sheaf.parallel.portion import Portion
from sheaf.parallel.runner import AbstractRunner
from sheaf.parallel.server.beside import Beside, whole
from sheaf.parallel.server.client import Client, Seen
from sheaf.parallel.server.host import Host
from sheaf.parallel.server.link import Failed
from sheaf.parallel.server.restore import kept, restored, shared
from sheaf.parallel.server.seats import PRIMARY
from sheaf.parallel.server.spare import Spare
from sheaf.parallel.step import Step, memory_bytes
from sheaf.plans import Plan
from sheaf.plans.server import outlives
from sheaf.record import StepReport
from sheaf.task import Microbatch

_WATCH_SECONDS = 0.1  # between two looks at who is lost
_LOOK_SECONDS = 0.005  # between two looks whether something is done


class ServedStep(Step):
    """The step of a plan with ``server``. In lock-step it is one global step, the same on every worker.

    Otherwise it is one step of this worker: it computes its share of the step's microbatches, pushes the gradient of
    their mean, which each shard applies at once, and pulls values that are as old as the plan allows. Its report counts
    the losses that were told for this step by then, this worker's and those of workers that are as far.
    """

    def __init__(
        self,
        plan: Plan,
        portion: Portion,
        runner: AbstractRunner,
        client: Client,
        hosts: list[Host],
        spares: Sequence[Spare] = (),
    ) -> None:
        super().__init__(plan, portion, runner)
        assert isinstance(self._holding, Beside)
        self.client, self._hosts, self._spares = client, hosts, spares
        self._beside = self._holding
        self._ended = threading.Event()
        self._staleness: Counter[int] = Counter()  # how often each was seen
        self.lost: Callable[[], Collection[int]] = tuple  # workers that are known to be gone
        self._run, self._store = self._world.number("sheaf/served"), cast("dist.Store", self._world.counter)

    def __call__(self) -> StepReport:
        """Run the next step: of all workers together in lock-step, else of this one."""
        start, sent, sent_in_all = time.perf_counter(), self.client.sent_bytes, traffic.sent_bytes
        self._runner.compute_seconds = 0.0
        self._check_trained()
        microbatches = self._order.step(self.index)
        waited, again = 0.0, 0
        while True:
            norm, seen = self._once(microbatches)
            waited += seen.waited_seconds
            self._beside.take()
            if not seen.dropped:
                break
            again += 1
        if self._statistics is not None:
            self._statistics.apply(len(microbatches))
        if self._observer is not None:
            self._observer.gradients(self.index, self._gradients())
        self._staleness[seen.staleness] += 1
        done = seen.finished - 1 if self.plan.stolen else self.index  # the others may have gone on without this worker
        microbatches = self._order.step(done)
        told: list[list[float]] = seen.told["losses"] or [[*one] for one in self._exchange.mine]
        seconds = seen.told.get("seconds", {})
        weight = math.fsum(one[2] for one in told)
        if self.plan.exact:
            norm = seen.told.get("norm")
        if self.plan.exact and not self.plan.stolen:  # a worker that missed steps would divide by another weight
            self._expectation.weight = weight
        report = StepReport(
            step=done,
            loss=math.fsum(one[1] for one in told) / weight if weight else math.nan,
            weight=weight,
            samples=sum(len(microbatches[int(one[0])].samples) for one in told),
            seconds=time.perf_counter() - start,
            terms={"compute": self._runner.compute_seconds, "communicate": waited},
            gradient_norm=norm if self.task.clip is not None else None,
            learning_rate=seen.told["rate"],
            memory_bytes=memory_bytes(self._world.device),
            microbatches=tuple(seen.told["counts"].get(str(worker), 0) for worker in range(self.workers)),
            computed=tuple(seconds.get(str(worker), 0.0) for worker in range(self.workers)) if seconds else (),
            stop=seen.stop,
            sent_bytes=traffic.sent_bytes - sent_in_all,
            server={
                "staleness": seen.staleness,
                "staleness_max": max(self._staleness),
                "staleness_mean": self._staleness_mean,
                "delay": seen.delay,
                "dropped": again,
                "missed": seen.finished - self.index - 1,
                "sent_bytes": self.client.sent_bytes - sent,
                "waited_seconds": waited,
                **self._seen(seen),
            },
        )
        report.terms["host"] = max(0.0, report.seconds - sum(report.terms.values()))
        self.index = seen.finished
        self._beside.index = self.index
        return report

    @property
    def hosts(self) -> list[Host]:
        """The seats of shards that this worker has now."""
        return [*self._hosts, *(spare.host for spare in self._spares if spare.host is not None)]

    @property
    def _staleness_mean(self) -> float:
        seen = self._staleness
        return sum(clocks * times for clocks, times in seen.items()) / seen.total()

    @property
    def state_owner(self) -> int:
        """Each worker keeps the shard that it holds."""
        return self.rank

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """What the shards of this worker hold, once every worker has come as far, and its own buffers."""
        named = {f"buffer/{name}": value for name, value in self.model.named_buffers()}
        shards: dict[str, Any] = {}
        for host in self.hosts:
            if host.seat == PRIMARY:
                if not host.wait_for_clock(self.index, 3 * host.terms.lease_seconds):
                    raise RunError(f"shard {host.shard.number} waits for workers that are behind step {self.index}")
                tensors, shards[str(host.shard.number)] = kept(host.shard)
                named |= {f"shard/{host.shard.number}/{name}": value for name, value in tensors.items()}
        values = {"index": self.index, "expected_weight": self._expectation.weight, "shards": shards}
        return named, values

    def states(self) -> list[tuple[dict[str, Tensor], dict[str, Any]]]:
        """By worker, what ``state`` gives, found by this worker alone once all that live have come as far.

        Buffers are this worker's own.
        """
        self.client.read(self.index)
        buffers = {f"buffer/{name}": value for name, value in self.model.named_buffers()}
        shards: dict[str, Any] = {}
        named: dict[str, Tensor] = {}
        for number, (tensors, values) in enumerate(self.client.states()):
            shards[str(number)] = values
            named |= {f"shard/{number}/{name}": value for name, value in tensors.items()}
        common = {"index": self.index, "expected_weight": self._expectation.weight}
        first = buffers | named, {**common, "shards": shards}
        return [first, *((buffers, {**common, "shards": {}}) for _ in range(self.workers - 1))]

    def settle(self) -> None:
        """No step follows: what late gradients were gathered are applied. Every worker that lives calls this."""

        def drain() -> None:
            self.client.read(self.index)
            self.client.drain()

        if self.plan.serves.gathers:
            self.once(f"settle/{self.index}", drain)

    def heed(self, lost: Callable[[], Collection[int]]) -> None:
        """Give up at once whom ``lost`` names, before a lease has run out."""
        self.lost = lost
        threading.Thread(target=self._watch, name="sheaf-lost", daemon=True).start()

    def _watch(self) -> None:
        while not self._ended.wait(_WATCH_SECONDS):
            with contextlib.suppress(RuntimeError):  # the store went with the run
                for rank in self.lost():
                    for host in self.hosts:
                        host.lose(rank)

    @property
    def outlives_workers(self) -> bool:
        """Whether the others go on when a worker is lost."""
        return outlives(self.plan.serves, stolen=self.plan.stolen)

    @property
    def gives_whole(self) -> bool:
        return self._first == self.rank

    @property
    def _first(self) -> int:
        """The first worker that lives."""
        return next((rank for rank in range(self.workers) if rank not in self.lost()), self.rank)

    def once(self, name: str, do: Callable[[], Any]) -> Any:
        """What ``do`` gives, of what JSON knows, on the first worker that lives; every worker that lives calls this.

        When that worker is lost before it has done it, the next does it. ``name`` is used once in a run.
        """
        key = f"sheaf/once/{self._run}/{name}"
        while not self._store.check([key]):
            if self.gives_whole:
                self._store.set(key, json.dumps(do()))
            else:
                time.sleep(_LOOK_SECONDS)
        return json.loads(self._store.get(key))

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """Go on where ``state`` stood; collective. Both seats of a shard take over what its worker kept."""
        self._world.barrier()
        with torch.no_grad():
            for name, value in self.model.named_buffers():
                value.copy_(tensors[f"buffer/{name}"])
        self.index, self._expectation.weight = values["index"], values["expected_weight"]
        self._beside.index = self.index
        for number in range(self.plan.serves.shards):
            mine = None
            if str(number) in values["shards"]:
                prefix = f"shard/{number}/"
                held = {name.removeprefix(prefix): one for name, one in tensors.items() if name.startswith(prefix)}
                mine = held, values["shards"][str(number)]
            found = shared(self._world, mine, f"shard {number}")
            for host in self.hosts:
                if host.shard.number == number:
                    host.restart(lambda shard, found=found: restored(shard, *found, self.index))
        self._world.barrier()
        self.client.join(self.index)
        self.client.read(self.index)
        self._beside.take()
        self._staleness.clear()
        self._world.barrier()

    def full_state_alone(self) -> dict[str, Tensor]:
        """What ``full_state`` gives, found by this worker alone; nobody may push meanwhile."""
        self._beside.first = self.gives_whole
        return super().full_state()

    def close(self) -> None:
        """Say good-bye, and stay until the others have: this worker may hold their shards."""
        self.client.leave()
        for host in self.hosts:
            host.wait_until_left(3 * host.terms.lease_seconds)
        for one in (*self._hosts, *self._spares):
            one.close()
        self._ended.set()
        super().close()

    def _once(self, microbatches: tuple[Microbatch, ...]) -> tuple[float | None, Seen]:
        """Compute this worker's share and exchange it."""
        self._exchange.begin(len(microbatches))
        if self._statistics is not None:
            self._statistics.begin_step()
        self._beside.begin_step()
        self._runner.run(self.index, microbatches)
        mine = self._exchange.mine
        norm = None
        if not self.plan.exact:
            norm = self._own(mine)
        used = self._beside.put()
        common = {
            "losses": mine,
            "any": any(used),
            "stop": self._exchange.stop,
            "expected": self._expectation.weight,
            "watch": self._observer is not None,
        }
        try:
            return norm, self.client.exchange(self.index, [{"used": places, **common} for places in used])
        except Failed as failed:
            raise self._explained(failed.meta) from None

    def _seen(self, seen: Seen) -> dict[str, float]:  # noqa: ARG002 - some see more
        """What the record has beside the rest."""
        return {}

    def _own(self, mine: list[tuple[int, float, float]]) -> float | None:
        """Outside lock-step: the gradient of this worker's own mean."""
        for index, total, weight in mine:
            if not math.isfinite(total) or not math.isfinite(weight):
                raise NonFiniteLoss(self.index, index, total / weight if weight else total)
        weight = math.fsum(one[2] for one in mine)
        if not weight:
            self._beside.begin_step()  # nothing here has any weight
            return None
        norm = self._beside.clip(self.index, self.task.clip, self._expectation.weight / weight)
        self._expectation.weight = weight
        return norm

    def _gradients(self) -> dict[str, Tensor]:
        """The step's gradient: of all workers in lock-step, else this one's own, as it was pushed."""
        if not self.plan.exact:
            return self._beside.held()
        told = self.client.gradients()
        used = {
            arena.form.pieces[place].name
            for arena, each in zip(self.client.values, told, strict=True)
            for place in each["used"]
        }
        found = whole(self.client.values, {name: value.detach() for name, value in self._beside.parameters.items()})
        return {name: found[name] for name in self._trained if name in used}

    def _explained(self, meta: dict[str, Any]) -> Exception:
        step, why = int(meta.get("clock", self.index)), meta.get("why")
        if why == "loss":
            return NonFiniteLoss(step, int(meta["microbatch"]), float(meta["value"]))
        if why == "weight":
            advice = "No microbatch of the step has any weight: look at the loss's weight (all padding?)."
            return NonFiniteLoss(step, 0, math.nan, advice)
        if why == "norm":
            advice = "The loss is a number but its gradient is not: look for sqrt or log at zero, or 0/0."
            return NonFiniteLoss(step, 0, float(meta["value"]), advice)
        if why == "unused":
            return TaskError(
                f"no parameter got a gradient from the loss of step {step}: look for detach(), .data, item() or "
                "no_grad() between the model's output and the loss, and for a loss that does not use the output"
            )
        if why == "worker":
            return WorkerFailed(
                f"worker {meta['worker']} is gone at step {step}, and with staleness=0 no step can do without its "
                "part: look at its output; start again from the last checkpoint"
            )
        return WorkerFailed(str(meta.get("message", meta)))
