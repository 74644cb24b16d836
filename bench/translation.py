"""Large vocabularies on slow links: translation with tables of 30,000 words, beside DDP, which sends them whole.

Paragraphs of Debian's manual pages and their French translations (fetched with apt-get, see sheaf.zoo.tasks.manpages),
LSTMs of width 256 with attention: 23 million of 24.5 million parameters are in two tables of words and in the head, and
a step looks at a few hundred words. Four hosts (bench.hosts) hold a quarter of the head each. What becomes of the
tables differs by plan: split over the hosts too (``tp``), whole with gradients that travel as rows (``sparse``), or
dealt out by rows (``rows``). The peer is a DDP loop written by hand, on the same microbatches, with the same AdamW.
"""

import json
import statistics
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from bench.hosts import Hosts, cluster, sent_bytes, unavailable
from bench.interleaved import ratio, rounds
from bench.tensor import agreed
from sheaf import Plan, Task, build, launch
from sheaf.cluster.machine import available_cores
from sheaf.cost import microbatch_sizes, price
from sheaf.errors import TaskError
from sheaf.graph import trace
from sheaf.parallel import refuse
from sheaf.task import Blueprint, Order, fetch
from sheaf.zoo.tasks.manpages import manpages
from sheaf.zoo.tasks.number_words import next_word_loss, read

HOSTS, RATES = 4, ("1gbit", "100mbit")
SAMPLES = 2  # pairs a step and host
VOCABULARY, WIDTH = 30_000, 256
PEER = "DDP"
PLANS = tuple(f"dp=4,*_words={answer},head=tp" for answer in ("tp", "sparse", "rows"))
TIMEOUT_S = 1800.0


def task() -> Task:
    """One microbatch per host and step."""
    return manpages(vocabulary_size=VOCABULARY, width=WIDTH, batch=SAMPLES * HOSTS, microbatch=SAMPLES)


def by_hand(given: Task, rank: int) -> Callable[[], float]:
    """A training step as people write it; words are counted over all hosts, for each host has others."""
    count = 0
    module = DistributedDataParallel(Blueprint(given).fill(torch.device("cpu")), gradient_as_bucket_view=True)
    optimizer = given.optimizer(list(module.parameters()))
    order = Order(given.num_samples, given.batch, SAMPLES, given.seed, shuffle=given.shuffle)

    def step() -> float:
        nonlocal count
        batch = fetch(given, order.step(count)[rank].samples, 0)
        optimizer.zero_grad()
        found = next_word_loss(module(*read(batch)), batch)
        told = torch.stack([found.sum.detach(), torch.as_tensor(found.weight, dtype=found.sum.dtype)])
        dist.all_reduce(told)
        (found.sum * HOSTS / told[1]).backward()
        optimizer.step()
        count += 1
        return float(told[0] / told[1])

    return step


def by_plan(given: Task, text: str) -> Callable[[], float]:
    """The same step under a plan."""
    step = build(given, Plan.parse(text))
    return lambda: step().loss


def work(folder: Path, count: int, steps: int, *plans: str) -> None:
    """What a host does: all contenders in turn; seconds, losses and bytes sent go to a file in ``folder``."""
    world = launch.join()
    if world is None:
        raise SystemExit("no host: start this by `python -m bench translation`")
    losses: dict[str, list[float]] = {name: [] for name in (PEER, *plans)}
    sent: dict[str, list[int]] = {name: [] for name in losses}

    def noted(name: str, step: Callable[[], float]) -> Callable[[], None]:
        def call() -> None:
            before = sent_bytes()
            losses[name].append(step())
            sent[name].append(sent_bytes() - before)

        return call

    given = task()
    contenders: dict[str, Callable[[], object]] = {PEER: noted(PEER, by_hand(given, world.rank))}
    contenders |= {text: noted(text, by_plan(given, text)) for text in plans}
    seconds = rounds(contenders, count=count, steps=steps)
    told = {"seconds": seconds, "losses": losses, "sent_bytes": sent}
    (folder / f"{world.rank}.json").write_text(json.dumps(told), encoding="utf-8")


def predicted_bytes(text: str, rate: str) -> float:
    """What the busiest host sends in a step, by the cost model."""
    given, plan = task(), Plan.parse(text)
    sizes = microbatch_sizes(given.batch, SAMPLES)
    found = price(
        plan, trace(given, SAMPLES), cluster(HOSTS, rate), None, microbatches=sizes, split=refuse(given, plan)
    )
    return found.traffic_bytes


def compare(rate: str, plans: tuple[str, ...], count: int, steps: int) -> list[dict[str, Any]]:
    """For each plan the ratio of throughputs, what hosts send in a step, and how far losses are apart."""
    with tempfile.TemporaryDirectory() as folder, Hosts(HOSTS, rate) as hosts:
        given = (folder, count, steps, *plans)
        hosts.run([sys.executable, "-m", "bench.translation", *map(str, given)], timeout_s=TIMEOUT_S)
        told = [json.loads((Path(folder) / f"{rank}.json").read_text(encoding="utf-8")) for rank in range(HOSTS)]
    sent = {
        name: statistics.mean(statistics.median(one["sent_bytes"][name][steps:]) for one in told)
        for name in (PEER, *plans)
    }
    apart = agreed({name: [one["losses"][name] for one in told] for name in (PEER, *plans)})
    return [
        asdict(ratio(told[0]["seconds"], text, PEER))
        | {
            "hosts": HOSTS,
            "rate": rate,
            "cores": available_cores(),
            "samples": SAMPLES,
            "words": list(task().data.sizes),  # pyright: ignore[reportAttributeAccessIssue]
            "sheaf_sent_bytes": sent[text],
            "predicted_bytes": predicted_bytes(text, rate),
            "peer_sent_bytes": sent[PEER],
            "losses_apart": apart,
        }
        for text in plans
    ]


def run(
    count: int = 4, steps: int = 1, plans: tuple[str, ...] = PLANS, rates: tuple[str, ...] = RATES
) -> list[dict[str, Any]]:
    """A row for each rate and plan; one that says why, under ``skipped``, where there are no hosts or no pages.

    Raises ValueError when losses differ by more than rounding.
    """
    reason = unavailable()
    if reason is None:
        try:
            task()  # fetches the pages, which hosts cannot
        except TaskError as error:
            reason = str(error)
    if reason:
        return [{"skipped": reason}]
    return [row for rate in rates for row in compare(rate, plans, count, steps)]


if __name__ == "__main__":
    work(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
