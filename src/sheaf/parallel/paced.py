"""A step by each worker's own pace: nobody is waited for between meetings, nor at one once enough are there."""

import json
import math
import statistics
import time
import warnings
from collections import deque
from collections.abc import Sequence
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from sheaf.cluster.traffic import traffic
from sheaf.errors import NonFiniteLoss, TaskError
from sheaf.graph import cut
from sheaf.parallel.board import Board, Closed
from sheaf.parallel.devices import memory_bytes
from sheaf.parallel.exchange import Exchange
from sheaf.parallel.holding import Factor
from sheaf.parallel.optimizers import learning_rate, load_named_state, named_state
from sheaf.parallel.own_pace import OwnPace
from sheaf.parallel.portion import Portion
from sheaf.parallel.precision import LossScale
from sheaf.parallel.recompute import again, recompute
from sheaf.parallel.runner import AbstractRunner, Expectation, Parts, WholeModel
from sheaf.parallel.shares import REMEMBERED, Dealt
from sheaf.parallel.spread import Spread
from sheaf.parallel.statistics import BatchStatistics
from sheaf.parallel.step import Step
from sheaf.parallel.supply import Part, Supply
from sheaf.parallel.wants import refuse_looking
from sheaf.parallel.world import World
from sheaf.plans import Plan
from sheaf.record import StepReport
from sheaf.task import Microbatch, Streams, Task

TIMEOUT_SECONDS = 1800.0  # for which a meeting waits for its quorum, as long as collectives do


class PacedStep(Step):
    """One call is a step of this worker. Between meetings it computes what it is dealt; at one it meets who is there.

    A worker that is late for a meeting goes on from what came of it, and its part goes to the next meeting or is
    dropped. While others are ahead, it passes the steps that they have done without computing, which the report counts
    as missed. What nobody will use is dealt again, to whoever is there, so each sample is used once (``supply``). So
    every worker passes every step, and saves and stops where the others do.
    """

    def __init__(self, plan: Plan, portion: Portion, runner: AbstractRunner, everyone: World) -> None:
        super().__init__(plan, portion, runner)
        assert isinstance(self._holding, OwnPace)
        refuse_looking(plan, looking=isinstance(self._scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau))
        self._own, self._everyone, self._local = self._holding, everyone, plan.meets_locally
        self._own.meets(() if self._statistics is None else self._statistics.moving)
        self._board = self._new_board()
        self._known = -1  # the last meeting whose outcome this worker has
        self._passed: list[int] = []  # meetings of which this worker may yet ask how they ended
        self._missing = False  # whether the others are past the meeting that comes next
        self._supply = Supply(self._order, plan.weights)
        self._dealt: list[tuple[Part, int]] = []  # until the next meeting, with who takes which
        self._turns: list[list[Part]] = []  # of these, this worker's, by step
        self._unused: list[int] = []  # parts that it passed without computing, and has not told yet
        self._busy = self.workers  # how many have something to compute before the next meeting
        self._took = [deque[float](maxlen=REMEMBERED) for _ in range(self.workers)]  # seconds for one turn, by worker
        self._spent, self._done = 0.0, 0  # seconds and turns since the last meeting
        self._tally = {"late": 0, "missed": 0, "dropped": 0}  # meetings, samples, samples
        self._since = 0  # samples of this worker since the last meeting
        self._losses: list[tuple[int, float, float]] = []
        self._last_loss = math.nan

    @property
    def losses(self) -> list[tuple[int, float, float]]:
        """What this worker computed in the last step: (microbatch, sum, weight)."""
        return self._losses

    def __call__(self) -> StepReport:
        """Run this worker's part of the next step, and meet the others after the last of those between meetings."""
        start, waited, sent = time.perf_counter(), self._everyone.waited_seconds, traffic.sent_bytes
        self._runner.compute_seconds, self._losses = 0.0, []
        self._check_trained()
        meeting, turn = divmod(self.index, self._local.every)
        if turn == 0:
            self._open(meeting)
        norm: float | None = None
        turns = self._turns[turn]
        samples = sum(part.samples for part in turns)
        if self._missing:
            self._tally["missed"] += samples
            if self._local.late == "merge":  # else all know by themselves
                self._unused += [part.number for part in turns]
            turns, samples = [], 0
        self._since += samples
        self._own.begin_step()
        for part in turns:
            norm = self._alone(part.step, part.microbatches)
        self._spent, self._done = self._spent + self._runner.compute_seconds, self._done + len(turns)
        weight = math.fsum(one[2] for one in self._losses)
        total = math.fsum(one[1] for one in self._losses)
        closed, seen, met = None, dict[str, float](), 0.0
        if turn == self._local.every - 1:
            before = time.perf_counter()
            closed, norm = self._meet(meeting, {"sum": total, "weight_of_step": weight, "samples": samples}, norm)
            met = time.perf_counter() - before
            seen = {
                "present": len(closed.present),
                "absent": self.workers - len(closed.present),
                "weight": math.fsum(told["weight"] for told in closed.told.values()),
                "waited_seconds": met,
                **self._tally,
                "returned": self._supply.returned,
                "waiting": self._supply.waiting_samples,
            }
            if self._local.every == 1:  # all that was dealt is of this step
                total = math.fsum(told["sum"] for told in closed.told.values())
                weight = math.fsum(told["weight_of_step"] for told in closed.told.values())
                samples = sum(told["samples"] for told in closed.told.values())
        self._schedule()
        self._last_loss = total / weight if weight else self._last_loss
        report = StepReport(
            step=self.index,
            loss=self._last_loss,
            weight=weight,
            samples=samples,
            seconds=time.perf_counter() - start,
            terms={"compute": self._runner.compute_seconds, "communicate": self._everyone.waited_seconds - waited},
            gradient_norm=norm if self.task.clip is not None else None,
            learning_rate=learning_rate(self._holding.optimizer),
            memory_bytes=memory_bytes(self._world.device),
            microbatches=tuple(
                sum(len(part.microbatches) for part in turns) if worker == self.rank else 0
                for worker in range(self.workers)
            ),
            sent_bytes=traffic.sent_bytes - sent,
            stop=closed is not None and any(told["stop"] for told in closed.told.values()),
            meeting=seen,
        )
        report.terms["wait"] = max(0.0, met - report.terms["communicate"])
        report.terms["host"] = max(0.0, report.seconds - sum(report.terms.values()))
        self.index += 1
        return report

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]:
        """As of any step, with what this worker carries; collective, as every worker must have come as far."""
        self._catch_up()
        tensors, values = super().state()
        more = {
            "known": self._known,
            "took": [list(took) for took in self._took],
            "spent": self._spent,
            "done": self._done,
            "counts": self._tally,
            "since": self._since,
            "supply": self._supply.kept(),
            "unused": self._unused,
        }
        return tensors, {**values, "pace": more}

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
        """As of any step; every worker loads what it saved."""
        super().load(tensors, values)
        kept = values["pace"]
        self._known, self._spent, self._done = kept["known"], kept["spent"], kept["done"]
        self._took = [deque(took, maxlen=REMEMBERED) for took in kept["took"]]
        self._tally, self._since, self._unused = dict(kept["counts"]), kept["since"], list(kept["unused"])
        self._supply.restore(kept["supply"])
        self._missing, self._board = False, self._new_board()
        self._passed.clear()
        self._deal()

    def full_state(self) -> dict[str, Tensor]:
        """As of any step; between meetings, weights are the mean of the workers'."""
        self._catch_up()
        return super().full_state()

    def close(self) -> None:
        """As of any step."""
        self._everyone.close()
        super().close()

    def _new_board(self) -> Board:
        store = self._everyone.counter
        assert store is not None
        quorum = self._local.quorum or self.workers
        return Board(
            store,
            f"sheaf/meetings/{self._everyone.number('sheaf/boards')}",
            self.rank,
            self.workers,
            quorum=quorum,
            grace_seconds=self._local.grace,
            timeout_seconds=TIMEOUT_SECONDS,
        )

    def _open(self, meeting: int) -> None:
        """The steps before a meeting begin, from the outcome of the one before."""
        self._deal()
        self._missing = self._board.closed(meeting) is not None
        if not self._missing and self._known < meeting - 1:
            self._missing = not self._adopted(meeting - 1)

    def _catch_up(self) -> None:
        """All workers are here: where they have just met, so has this one, in effect."""
        meeting = self.index // self._local.every
        if self.index % self._local.every == 0 and self._known < meeting - 1:
            self._adopted(meeting - 1)

    def _adopted(self, meeting: int) -> bool:
        """Take the outcome of a meeting that this worker missed; False where the others are further by now."""
        content = self._board.outcome(meeting)
        if content is None:
            return False
        closed = self._board.closed(meeting)
        if self.rank == 0 and closed is not None:  # the store is here, and gives it to the others who were late
            traffic.message(len(content) * (self.workers - len(closed.present) - 1))
        more = self._own.adopt(content)
        if self._own.by_gradients:
            told = json.loads(more.pop("values").numpy().tobytes())
            with torch.no_grad():
                for name, value in self._own.parameters.items():
                    value.copy_(more.pop(f"parameter/{name}"))
            named = {name.removeprefix("optimizer/"): value for name, value in more.items()}
            load_named_state(self._own.optimizer, self._own.optimizer_names(), named, told["optimizer"])
            self._expectation.weight = told["expected"]
        self._known = meeting
        self._leave()
        return True

    def _leave(self) -> None:
        for meeting in self._passed:
            self._board.leave(meeting)
        self._passed.clear()

    def _outcome(self) -> bytes:
        """What those need who missed the meeting: where gradients meet, the optimizer's state too."""
        if not self._own.by_gradients:
            return self._own.outcome({})
        tensors, values = named_state(self._own.optimizer, self._own.optimizer_names())
        told = json.dumps({"optimizer": values, "expected": self._expectation.weight}).encode()
        more = {f"optimizer/{name}": value for name, value in tensors.items()}
        more |= {f"parameter/{name}": value for name, value in self._own.parameters.items()}
        return self._own.outcome(more | {"values": torch.frombuffer(bytearray(told), dtype=torch.uint8)})

    def _deal(self) -> None:
        """What each worker computes until the next meeting: of every step equal parts, or by who is faster."""
        known = self._local.steps == "speed" and all(self._took)
        seconds = [statistics.median(took) for took in self._took] if known else []
        every = self._local.every
        self._dealt = self._supply.dealt(every, seconds)
        self._busy = len({taker for part, taker in self._dealt if part.microbatches})
        mine = [part for part, taker in self._dealt if taker == self.rank]
        edges = [round(len(mine) * turn / every) for turn in range(every + 1)]
        self._turns = [[part for part in mine[low:high] if part.microbatches] for low, high in pairwise(edges)]

    def _alone(self, step: int, microbatches: Sequence[Microbatch]) -> float | None:
        """Compute a part of a step, and step by its gradient, or keep that for the meeting; gives the norm."""
        whole = self._order.step(step)
        self._runner.compute(step, microbatches, len(whole))
        mine = self._exchange.mine
        for index, total, weight in mine:
            if not math.isfinite(total) or not math.isfinite(weight):
                raise NonFiniteLoss(step, index, total / weight if weight else total)
        self._losses += mine
        weight = self._exchange.own_weight
        self._own.finish(self._own.touched)
        if self._statistics is not None:
            self._statistics.apply(len(whole))
        self._own.weight += weight
        if self._own.by_gradients or not weight:
            return None
        norm = self._stepped(self._own.touched)
        self._expectation.weight = weight
        return norm

    def _stepped(self, used: set[str]) -> float | None:
        """Clip by the norm and step the optimizer."""
        if not used:
            raise TaskError(
                f"no parameter got a gradient from the loss of step {self.index}: look for detach(), .data, item() or "
                "no_grad() between the model's output and the loss, and for a loss that does not use the output"
            )
        if self._observer is not None:
            held = self._own.held()
            self._observer.gradients(self.index, {name: held[name] for name in self._trained if name in used})
        norm: float | None = None
        if self.task.clip is not None:
            total = torch.nn.utils.get_total_norm(list(self._own.held().values()))
            norm = float(total)
            if not math.isfinite(norm):
                advice = "The loss is a number but its gradient is not: look for sqrt or log at zero, or 0/0."
                raise NonFiniteLoss(self.index, 0, norm, advice)
            self._own.scale(float((self.task.clip / (total + 1e-6)).clamp(max=1.0)))
        self._own.optimizer.step()
        return norm

    def _meet(self, meeting: int, told: dict[str, float], norm: float | None) -> tuple[Closed, float | None]:
        """Be at a meeting, or find that it is over; gives who was there."""
        own = self._own
        closed = self._board.closed(meeting)
        if closed is None:
            weight = float(own.weight) + float(own.carried_weight)
            names = sorted(own.touched) if own.by_gradients else []
            more = {"weight": weight, "used": names, "stop": self._exchange.stop, "unused": self._unused}
            took = self._spent / self._done if self._done else 0.0
            closed = self._board.arrive(
                meeting, {**told, **more, "seconds": took}, brings=any(self._turns), bringing=self._busy
            )
        if self.rank in closed.told:
            norm = self._met(meeting, closed, norm)
            self._unused = []
        elif not self._missing:
            self._tally["late"] += 1
            if self._local.late == "drop":
                self._tally["dropped"] += self._since
            own.miss()
        for worker, one in closed.told.items():
            if one["seconds"] > 0:
                self._took[worker].append(one["seconds"])
        self._supply.settle(self._dealt, self._back(closed), closed.present)
        self._spent, self._done, self._since = 0.0, 0, 0
        self._passed.append(meeting)
        if self._known == meeting:
            self._leave()
        return closed, norm

    def _back(self, closed: Closed) -> list[int]:
        """Parts that nobody will use, as all workers find alike: who was absent brings its own later, or drops it."""
        if self._local.late == "drop":
            return [part.number for part, taker in self._dealt if taker not in closed.told]
        return [number for told in closed.told.values() for number in told["unused"]]

    def _met(self, meeting: int, closed: Closed, norm: float | None) -> float | None:
        own, total = self._own, math.fsum(one["weight"] for one in closed.told.values())
        if own.by_gradients:
            if not total and len(closed.present) == self.workers:
                advice = "No microbatch of the step has any weight: look at the loss's weight (all padding?)."
                raise NonFiniteLoss(self.index, 0, math.nan, advice)
            used = {name for one in closed.told.values() for name in one["used"]}
            own.meet_gradients(closed.present, used, total)
            if total:  # without any, what was dealt to those who are absent was all there is
                norm = self._stepped(used)
                self._expectation.weight = total
        own.meet(closed.present, total)
        self._known = meeting
        if len(closed.present) < self.workers and self.rank == closed.present[0]:
            content = self._outcome()
            self._board.post(meeting, content)
            late = self.workers - len(closed.present)
            traffic.message(len(content) * (late if self.rank == 0 else 1))  # the store is beside worker 0
        return norm

    def _schedule(self) -> None:
        """Every worker's learning rate goes with the step, however often it stepped."""
        if self._scheduler is not None:
            with warnings.catch_warnings():  # this worker may not have stepped yet
                warnings.filterwarnings("ignore", message="Detected call of `lr_scheduler.step", category=UserWarning)
                self._scheduler.step()


def pace(task: Task, plan: Plan, spread: Spread, portion: Portion) -> PacedStep:
    """The step of a plan whose workers go by their own clocks; called on every worker (collective)."""
    world = spread.world
    everyone = World(world.device, gathers_apart=True)
    here = torch.zeros(world.workers, device=world.device)  # some backends want all ranks in a group's first messages
    everyone.wait(everyone.all_gather(here, here[world.rank : world.rank + 1].clone(), "the first meeting"))
    alone = World(world.device, among=[[rank] for rank in range(world.workers)])
    exchange, expectation = Exchange(alone), Expectation(float(task.batch))

    def factor() -> float:
        weight = exchange.own_weight
        return expectation.weight / weight if weight else 0.0

    holding = OwnPace(portion, everyone, Factor(factor), plan)
    streams = Streams(holding.model, task.seed, world.device)
    recompute(again(plan, cut(holding.model)).values(), streams)
    parts = Parts(
        task=task,
        spread=spread,
        holding=holding,
        dealer=Dealt((1,), 0),  # a turn is this worker's own
        exchange=exchange,
        expectation=expectation,
        scale=LossScale(task),
        streams=streams,
        statistics=BatchStatistics(holding.model, alone),
        splitting=None,
    )
    return PacedStep(plan, portion, WholeModel(parts), everyone)
