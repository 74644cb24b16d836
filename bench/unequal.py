"""Two workers that are not alike: one at half speed, or stalling now and then; shares beside DDP's equal halves.

A worker at half speed is one whose control group gives it half a core (bench.quota), where its neighbour has a whole
one. Which weights its shares and shards get is measured in each run, in steps before the first round in which both
compute: beside a busy neighbour it is slower than beside one that waits, as it does under DDP. Shares reckon with its
update as well, which without ZeRO nobody waits for: it begins its next step so much later. And a worker with a quota is
the faster the more it waits, so one microbatch more and one less for it are tried there as well (``tried``, seconds of
a step).

Stalls are real: another process stops the second worker for a second at random moments (bench.stalls), the same ones
for every contender in a round, others in the next. Half of a step's microbatches take about as long as a stall, of a
long step's three times as long: the longer, the more is left to steal when one comes. What nobody could do better is in
``bench.stall_limits``.

Each contender makes ``ROUNDS`` times 10 steps, 200, beside a worker at half speed: about 9 minutes, and 8 for stalls.
Long steps, of three times as many microbatches, take 10 more, in a quarter of the rounds. Half of the rounds take half
of that, and say as much with wider quartiles. Were there only computing, at twice the speed for one wherever it
computes, no shares could gain more than 1.5. What each worker does in every step whoever computed what (laying out and
summing gradients, the update) takes the slow one as long under every plan without ZeRO; with it each updates its shard
alone, and the slow one's is as much smaller as it is slower, so that more may be gained. The more microbatches a step
has, the less that counts. ``terms`` of a row are what a step's seconds went to on each worker.
"""

import os
import statistics
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import Subset

from bench.executors import adamw, plain_model, task, tokens
from bench.interleaved import ratio, rounds
from bench.quota import quota
from bench.stalls import stalls as stalls_of
from sheaf import Plan, Task, build, launch
from sheaf.parallel.shares import REMEMBERED, Paces
from sheaf.plans.layout import soonest
from sheaf.plans.shares import weights_text
from sheaf.record import StepReport
from sheaf.search.families import SHARDS_OF
from sheaf.search.space import weighted_shares
from sheaf.task import Order, fetch

ROUNDS = 20
TRIED = 12  # steps of each dealing that may be the fastest, before the first round
PER_WORKER = 6  # microbatches of a step for each worker under equal shares
LONGER = 3  # times as many in long steps
HALF = ("dp=2,shares={shares}", "dp=2,shares=stolen,zero=1,shards={shards}")  # by measured speeds
STALLED = ("dp=2", "dp=2,shares=stolen")


def small_task(samples: int, per_worker: int = PER_WORKER) -> Task:
    """The model of bench.executors, a step of so many microbatches twice; each has all of them, as DDP needs it."""
    batch = 2 * per_worker * samples
    data = Subset(tokens(), range(len(tokens()) // batch * batch))
    return replace(task(2), data=data, batch=batch, microbatch=samples)


def ddp_loop(given: Task, losses: list[float]) -> Callable[[], None]:
    """DDP over the same microbatches in the same order, each worker half of them, gradients summed in the last."""
    model = DistributedDataParallel(plain_model(2))
    optimizer = adamw(model.parameters())
    order = Order(given.num_samples, given.batch, given.microbatch or 1, given.seed, shuffle=given.shuffle)
    rank, index = dist.get_rank(), iter(range(10**9))
    each = given.batch // (2 * (given.microbatch or 1))

    def step() -> None:
        number = next(index)
        mine = order.step(number)[rank * each : (rank + 1) * each]
        optimizer.zero_grad()
        total = torch.zeros(())
        for place, microbatch in enumerate(mine):
            inputs, targets = fetch(given, microbatch.samples, 0)
            with nullcontext() if place == len(mine) - 1 else model.no_sync():
                loss = F.cross_entropy(model(inputs).flatten(0, 1), targets.flatten()) / each
                loss.backward()
            total += loss.detach()
        optimizer.step()
        dist.all_reduce(total)
        losses.append(float(total) / 2)

    return step


def compared(
    plans: tuple[str, ...], size: tuple[int, int], share: float, count: int, steps: int, *, stalls: bool
) -> dict[str, Any]:
    """Seconds per step of every contender, how far their losses are apart, and what steps went to, on this worker."""
    with ExitStack() as held:
        limited = held.enter_context(quota(share)) if dist.get_rank() == 1 and share < 1 else True
        told = torch.tensor(float(limited))
        dist.all_reduce(told)
        if told < 2:
            return {"skipped": "making a control group needs root and the cpu controller"}
        given = small_task(*size)
        found, tried = by_speed(given) if share < 1 else ({}, {})
        plans = tuple(plan.format(**found) for plan in plans)
        losses: dict[str, list[float]] = {"DDP": []}
        reports: dict[str, list[StepReport]] = {text: [] for text in plans}
        contenders: dict[str, Callable[[], object]] = {"DDP": ddp_loop(given, losses["DDP"])}
        for text in plans:
            contenders[text] = _noted(build(given, Plan.parse(text)), reports[text])
        around = held.enter_context(_stalls()) if stalls else nullcontext
        seconds = rounds(contenders, count=count, steps=steps, around=around)
        losses |= {text: [report.loss for report in each] for text, each in reports.items()}
        pairs = ((text, pair) for text in plans for pair in zip(losses[text], losses["DDP"], strict=True))
        apart = max(abs(one - other) / abs(other) for _, (one, other) in pairs)
    terms = {text: _terms(each[steps:]) for text, each in reports.items()}
    return {"plans": plans, "seconds": seconds, "apart": apart, "terms": terms, "tried": tried}


def by_speed(given: Task) -> tuple[dict[str, str], dict[str, float]]:
    """The shares of two workers and their shards, by how fast they are when both compute.

    Shares are the fastest of those that a search would weigh by these speeds, and of one microbatch more and less for
    the slower worker, each tried in whole steps; the seconds of these are told as well.
    """
    step = build(given, Plan.parse("dp=2,shares=balanced"))
    paces, updates = Paces(2), torch.zeros(2)
    for _ in range(4 * REMEMBERED):
        report = step()
        paces.learn(report.computed, report.microbatches, updates.tolist())
        updates.zero_()[dist.get_rank()] = report.terms["optimizer"]
        dist.all_reduce(updates)
    step.close()
    seconds = paces.seconds or (1.0, 1.0)
    count = given.batch // (given.microbatch or 1)
    fast, slow = soonest(count, seconds, paces.updates)
    shards = weighted_shares(seconds, 2 * SHARDS_OF) or "1:1"
    shares = [weights_text((fast + more, slow - more)) for more in (0, 1, -1) if min(fast + more, slow - more) > 0]
    steps = {weights: build(given, Plan.parse(HALF[0].format(shares=weights))) for weights in shares}
    found = rounds(steps, count=TRIED // 4, steps=4)
    took = torch.tensor([statistics.median(found[weights]) for weights in shares])
    dist.all_reduce(took, dist.ReduceOp.MAX)
    for one in steps.values():
        one.close()
    tried = dict(zip(shares, took.tolist(), strict=True))
    return {"shares": min(shares, key=lambda weights: tried[weights]), "shards": shards}, tried


def _terms(reports: list[StepReport]) -> dict[str, float]:
    """The median seconds of each term of a step."""
    return {term: statistics.median(report.terms[term] for report in reports) for term in reports[0].terms}


def run(count: int = ROUNDS) -> list[dict[str, Any]]:
    """All ratios: ``count`` rounds of 10 steps with a worker at half speed, and as many of 4 with one that stalls; a
    quarter as many where steps are long.
    """
    fewer, longer = max(2, count // 4), LONGER * PER_WORKER
    results: list[dict[str, Any]] = []
    for what, plans, size, share, turns, steps, stalls in (
        ("one worker at half speed", HALF, (1, PER_WORKER), 0.5, count, 10, False),
        ("one worker at half speed, long steps", HALF, (1, longer), 0.5, fewer, 4, False),
        ("a worker stalls for a second", STALLED, (3, PER_WORKER), 1.0, count, 4, True),
        ("a worker stalls for a second, long steps", STALLED, (3, longer), 1.0, fewer, 4, True),
    ):
        both = launch.run(compared, 2, plans, size, share, turns, steps, threads=1, stalls=stalls)
        found = both[0]
        if "skipped" in found:
            results.append({"what": what, **found})
            continue
        for text in found["plans"]:
            beside = asdict(ratio(found["seconds"], text, "DDP"))
            told: dict[str, Any] = {"steps": turns * steps, "losses_apart": found["apart"]}
            if found["tried"]:
                told["tried"] = found["tried"]
            told["terms"] = [one["terms"][text] for one in both]
            results.append({"what": what, **beside, **told})
    return results


def _noted(step: Any, reports: list[StepReport]) -> Callable[[], None]:
    def noted() -> None:
        reports.append(step())

    return noted


@contextmanager
def _stalls() -> Iterator[Callable[[int], AbstractContextManager[object]]]:
    """What stalls worker 1 while a turn lasts: on worker 0 another process that stops it, on the others nothing."""
    pids = torch.zeros(dist.get_world_size(), dtype=torch.int64)
    pids[dist.get_rank()] = os.getpid()
    dist.all_reduce(pids)
    if dist.get_rank() != 0:
        yield nullcontext
        return
    with stalls_of(int(pids[1])) as turn:
        yield turn
