"""Layers in stages: Sheaf's pipelines beside `torch.distributed.pipelining` with stages of equally many layers.

The model is the GPT of `bench.tensor`, whose head over 8192 words costs as much as several layers, so that an equal
count of layers is no equal share of the work. Everyone runs the same microbatches in one process group, one thread
per worker. Four stages on fewer than four cores get a quota each, such as half a core (see ``bench.quota``). Where that
cannot be set they share the cores, and hide each other's waiting: neither balance nor bubbles show then.
"""

import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.pipelining import PipelineStage, Schedule1F1B, ScheduleGPipe
from torch.distributed.pipelining.schedules import PipelineScheduleSingle
from torch.nn import functional as F

from bench.interleaved import ratio, rounds
from bench.quota import quota
from bench.tensor import BATCH, LAYERS, Planned, adamw, agreed, batches, plain_model, task
from sheaf import launch
from sheaf.cluster.machine import available_cores
from sheaf.parallel.pipeline import Pipeline
from sheaf.plans.schedule import Action, actions
from sheaf.plans.timeline import simulate

MICROBATCHES = 8
SCHEDULES: dict[str, type[PipelineScheduleSingle]] = {"gpipe": ScheduleGPipe, "1f1b": Schedule1F1B}
LEADING, TRAILING = 2, 2  # blocks of the GPT before its layers (two embeddings) and behind them (norm, head)


class Stage(nn.Module):
    """Some of the GPT's layers; the embeddings with the first, norm and head with the last."""

    def __init__(self, whole: Any, first: int, last: int) -> None:
        super().__init__()
        self.tokens, self.positions = (whole.tokens, whole.positions) if first == 0 else (None, None)
        self.layers = nn.Sequential(*whole.blocks[first:last])
        self.end = nn.Sequential(whole.norm, whole.head) if last == LAYERS else nn.Identity()

    def forward(self, given: Tensor) -> Tensor:
        if self.tokens is not None and self.positions is not None:
            given = self.tokens(given) + self.positions(torch.arange(given.shape[1]))
        return self.end(self.layers(given))


class Handmade:
    """A step of torch's own pipeline; ``losses`` are the last stage's."""

    def __init__(self, kind: type[PipelineScheduleSingle], given: Iterator[Any]) -> None:
        self.rank, self.stages = dist.get_rank(), dist.get_world_size()
        each = LAYERS // self.stages
        module = Stage(plain_model(), self.rank * each, (self.rank + 1) * each)
        stage = PipelineStage(module, self.rank, self.stages, torch.device("cpu"))
        self.schedule = kind(stage, MICROBATCHES, loss_fn=_loss)
        self.optimizer, self.batches = adamw(module.parameters()), given
        self.losses: list[float] = []

    def __call__(self) -> None:
        inputs, targets = next(self.batches)
        self.optimizer.zero_grad()
        found: list[Tensor] = []
        given: dict[str, Any] = {"target": targets, "losses": found} if self.rank == self.stages - 1 else {}
        self.schedule.step(*([inputs] if self.rank == 0 else []), **given)
        self.optimizer.step()
        self.losses += [float(torch.stack(found).detach().mean())] if found else []


def _loss(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.flatten(0, 1), targets.flatten())


class Watched(Planned):
    """A step of Sheaf's pipeline that notes what each action took without waiting, and when it began and ended."""

    def __init__(self, text: str) -> None:
        super().__init__(replace(task(), microbatch=BATCH // MICROBATCHES), text)
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


def plans(stages: int) -> dict[str, str]:
    """Sheaf's plans by name: both schedules with stages it balances, and 1F1B with equally many layers in each."""
    each = LAYERS // stages
    equal = ":".join(str(each + LEADING * (stage == 0) + TRAILING * (stage == stages - 1)) for stage in range(stages))
    return {f"pp={stages}:gpipe": "gpipe", f"pp={stages}": "1f1b", f"pp={stages},stages={equal}": "1f1b"}


def together(count: int, steps: int) -> dict[str, Any]:
    """Every contender on this many workers, in turn."""
    with quota(available_cores() / dist.get_world_size()) as limited:
        return _together(count, steps) | {"limited": limited}


def _together(count: int, steps: int) -> dict[str, Any]:
    contenders: dict[str, Handmade | Watched] = {
        kind.__name__: Handmade(kind, batches()) for kind in SCHEDULES.values()
    }
    contenders |= {text: Watched(text) for text in plans(dist.get_world_size())}
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


def compare(stages: int, count: int, steps: int) -> list[dict[str, Any]]:
    """Ratios and bubbles of one number of stages."""
    told = launch.run(together, stages, count, steps, threads=1)
    losses = {name: [one["losses"][name] for one in told if len(one["losses"][name])] for name in told[0]["losses"]}
    apart = agreed(losses, next(iter(SCHEDULES.values())).__name__)
    rows: list[dict[str, Any]] = []
    for text, schedule in plans(stages).items():
        bubbles = bubble([one["spans"][text] for one in told], schedule)
        peer = SCHEDULES[schedule].__name__
        rows.append(
            asdict(ratio(told[0]["seconds"], text, peer))
            | {
                "stages": stages,
                "cores": available_cores(),
                "limited": all(one["limited"] for one in told),
                "microbatches": MICROBATCHES,
                "balanced": "stages=" not in text,
                "bubble": bubbles,
                "losses_apart": apart,
            }
        )
    return rows


def run(count: int = 11, steps: int = 2) -> list[dict[str, Any]]:
    """Two stages, and four."""
    return [row for stages in (2, 4) for row in compare(stages, count, steps)]


if dist.is_available() and __name__ == "__main__":
    for row in run(2, 2):
        print(row)
