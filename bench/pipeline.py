"""Layers in stages: Sheaf's pipelines beside `torch.distributed.pipelining` with stages of equally many layers.

The first model is the GPT of `bench.tensor`, whose head over 8192 words costs as much as several layers, so that an
equal count of layers is no equal share of the work; then VGG-16, whose layers differ in cost, and a translation
transformer, whose decoder's layers cost more than its encoder's and whose head costs most. Sheaf's stages are those
that `sheaf train` would take: balanced by what blocks take here, measured before, and cut inside of a block where that
is clearly better; each row has the plan. Everyone runs the same microbatches
in one process group, one thread per worker. Four stages on fewer than four cores get a quota each, such as
half a core (see ``bench.quota``). Where that cannot be set they share the cores, and hide each other's waiting: neither
balance nor bubbles show then.
"""

import os
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
from torch.nn import functional as F

from bench.interleaved import ratio, rounds
from bench.pipeline_models import CASES, Case
from bench.quota import quota
from bench.tensor import LAYERS, Planned, adamw, agreed
from sheaf import Plan, Task, launch
from sheaf.api.choice import checked, promised
from sheaf.cluster.machine import available_cores
from sheaf.parallel.pipeline import Pipeline
from sheaf.plans.schedule import Action, actions
from sheaf.plans.timeline import simulate
from sheaf.task import Blueprint, Order, fetch

MICROBATCHES = 8
SCHEDULES: dict[str, type[PipelineScheduleSingle]] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
LEADING, TRAILING = 2, 2  # blocks of the GPT before its layers (two embeddings) and behind them (norm, head)


class Handmade:
    """A step of torch's own pipeline; ``losses`` are the last stage's."""

    def __init__(self, case: Case, kind: type[PipelineScheduleSingle]) -> None:
        self.case, self.rank, self.stages = case, dist.get_rank(), dist.get_world_size()
        each = case.layers // self.stages
        self.first, self.last = self.rank * each, (self.rank + 1) * each
        given = case.task()
        module = case.stage(Blueprint(given).fill(torch.device("cpu")), self.first, self.last)
        stage = PipelineStage(module, self.rank, self.stages, torch.device("cpu"))
        self.schedule = kind(stage, MICROBATCHES, loss_fn=_loss)
        self.optimizer, self.batches = adamw(module.parameters()), batches(given)
        self.losses: list[float] = []

    def __call__(self) -> None:
        batch = next(self.batches)
        inputs, targets = self.case.given(batch)
        self.optimizer.zero_grad()
        found: list[Tensor] = []
        told: dict[str, Any] = {"target": targets, "losses": found} if self.rank == self.stages - 1 else {}
        named = self.case.named(batch, self.first, self.last)
        self.schedule.step(*([inputs] if self.rank == 0 else []), **named, **told)
        self.optimizer.step()
        self.losses += [float(torch.stack(found).detach().mean())] if found else []


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, -2), targets.flatten())


def batches(given: Task) -> Iterator[Any]:
    """The samples of Sheaf's steps, for ever."""
    step, order = 0, Order(given.num_samples, given.batch, given.batch, given.seed, shuffle=given.shuffle)
    while True:
        yield fetch(given, order.step(step)[0].samples, 0)
        step += 1


class Watched(Planned):
    """A step of Sheaf's pipeline that notes what each action took without waiting, and when it began and ended."""

    def __init__(self, case: Case, text: str) -> None:
        super().__init__(in_microbatches(case), text)
        self.steps: list[list[tuple[str, int, float, float, float]]] = []  # kind, stage, start, stop, without waiting
        runner: Any = self.step._runner  # a bench may look inside
        assert isinstance(runner, Pipeline)
        runner._forward, runner._backward = self._noted(runner._forward), self._noted(runner._backward)

    def __call__(self) -> None:
        self.steps.append([])
        super().__call__()

    def _noted(self, call: Callable[..., None]) -> Callable[..., None]:
        spread = self.step._spread

        def noted(action: Action, **named: Any) -> None:
            start, waited = time.perf_counter(), spread.waited_seconds
            call(action, **named)
            stop = time.perf_counter()
            own = stop - start - (spread.waited_seconds - waited)
            self.steps[-1].append((action.kind, action.stage, start, stop, own))

        return noted


def in_microbatches(case: Case) -> Task:
    """The task as Sheaf gets it."""
    given = case.task()
    return replace(given, microbatch=given.batch // MICROBATCHES)


def plans(case: Case, stages: int) -> dict[str, str]:
    """Schedules by plan: those whose stages Sheaf balances, and for the GPT 1F1B with as many layers in each."""
    balanced = {f"pp={stages}:gpipe": "gpipe", f"pp={stages}": "1f1b"}
    if case.name != "gpt":
        return balanced
    each = LAYERS // stages
    equal = ":".join(str(each + LEADING * (stage == 0) + TRAILING * (stage == stages - 1)) for stage in range(stages))
    return balanced | {f"pp={stages},stages={equal}": "1f1b"}


def as_trained(case: Case, text: str) -> str:
    """The plan with the stages that `sheaf train` would take.

    Raises RuntimeError where nothing could be measured.
    """
    given = in_microbatches(case)
    price, reason = promised(given, checked(given, Plan.parse(text)), world=None, source=None, note=lambda _line: None)
    if price is None:
        raise RuntimeError(reason)
    return str(price.plan)


@contextmanager
def measured_now() -> Iterator[None]:
    """What was measured before does not count here."""
    before = os.environ.get("SHEAF_CACHE")
    with tempfile.TemporaryDirectory(prefix="sheaf_bench_") as folder:
        os.environ["SHEAF_CACHE"] = folder
        try:
            yield
        finally:
            del os.environ["SHEAF_CACHE"]
            if before is not None:
                os.environ["SHEAF_CACHE"] = before


def together(name: str, cuts: dict[str, str], count: int, steps: int) -> dict[str, Any]:
    """Every contender on this many workers, in turn; ``cuts`` are Sheaf's plans with their stages, by name."""
    with quota(available_cores() / dist.get_world_size()) as limited:
        return _together(CASES[name], cuts, count, steps) | {"limited": limited}


def _together(case: Case, cuts: dict[str, str], count: int, steps: int) -> dict[str, Any]:
    contenders: dict[str, Handmade | Watched] = {kind.__name__: Handmade(case, kind) for kind in SCHEDULES.values()}
    contenders |= {name: Watched(case, text) for name, text in cuts.items()}
    seconds = rounds(dict(contenders), count=count, steps=steps)
    return {
        "seconds": seconds,
        "losses": {name: one.losses for name, one in contenders.items()},
        "spans": {name: one.steps[steps:] for name, one in contenders.items() if isinstance(one, Watched)},
    }


def bubble(by_worker: Sequence[list[list[tuple[str, int, float, float, float]]]], schedule: str) -> dict[str, float]:
    """Shares of the workers' time in which they wait, over steps: measured (the median); what the list of actions
    gives for the stages' measured times; and in theory, for stages that are all alike.
    """
    workers, measured = len(by_worker), list[float]()
    for step in zip(*by_worker, strict=True):
        spans = [span for worker in step for span in worker]
        whole = max(span[3] for span in spans) - min(span[2] for span in spans)
        measured.append(1 - sum(span[4] for span in spans) / (workers * whole))
    took: dict[tuple[str, int], list[float]] = {}
    for worker in by_worker:
        for step in worker:
            for kind, stage, _, _, own in step:
                took.setdefault((kind, stage), []).append(own)
    forward, backward = ([statistics.median(took[kind, stage]) for stage in range(workers)] for kind in "FB")
    listed = actions(schedule, workers=workers, stages=workers, microbatches=MICROBATCHES)
    timeline = simulate(listed, forward_seconds=forward, backward_seconds=backward)
    return {
        "measured": statistics.median(measured),
        "of_these_stages": timeline.bubble,
        "of_equal_stages": (workers - 1) / (MICROBATCHES + workers - 1),
    }


def compare(name: str, stages: int, count: int, steps: int) -> list[dict[str, Any]]:
    """Ratios and bubbles of one model in one number of stages."""
    case = CASES[name]
    with measured_now():
        cuts = {text: as_trained(case, text) for text in plans(case, stages)}
    told = launch.run(together, stages, name, cuts, count, steps, threads=1)
    losses = {name: [one["losses"][name] for one in told if len(one["losses"][name])] for name in told[0]["losses"]}
    apart = agreed(losses, next(iter(SCHEDULES.values())).__name__)
    rows: list[dict[str, Any]] = []
    for text, schedule in plans(case, stages).items():
        bubbles = bubble([one["spans"][text] for one in told], schedule)
        peer = SCHEDULES[schedule].__name__
        rows.append(
            asdict(ratio(told[0]["seconds"], text, peer))
            | {
                "model": name,
                "stages": stages,
                "plan": cuts[text],
                "cores": available_cores(),
                "limited": all(one["limited"] for one in told),
                "microbatches": MICROBATCHES,
                "balanced": "stages=" not in text,
                "bubble": bubbles,
                "losses_apart": apart,
            }
        )
    return rows


def run(count: int = 7, steps: int = 2) -> list[dict[str, Any]]:
    """Each model in two stages, and in four."""
    return [row for name in CASES for stages in (2, 4) for row in compare(name, stages, count, steps)]


if dist.is_available() and __name__ == "__main__":
    for row in run(2, 2):
        print(row)
