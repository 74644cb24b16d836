"""Large vocabularies on slow links: translation with tables of 30,000 words, beside DDP, which sends them whole.

Paragraphs of Debian's manual pages and their French translations (fetched with apt-get, see sheaf.zoo.tasks.manpages),
LSTMs of width 256 with attention: 23 million of 24.5 million parameters are in two tables of words and in the head, and
a step looks at a few hundred words. Four hosts (bench.hosts) hold a quarter of the head each. What becomes of the
tables differs by plan: split over the hosts too (``tp``), whole with gradients that travel as rows (``sparse``), or
dealt out by rows (``rows``). The peer is a DDP loop written by hand, on the same microbatches, with the same AdamW.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel

from bench.hosts import unavailable
from bench.on_hosts import beside, found_by, joined, noted, predicted_bytes, tell
from sheaf import Plan, Task, build
from sheaf.errors import TaskError
from sheaf.task import Blueprint, Order, fetch
from sheaf.zoo.tasks.manpages import manpages
from sheaf.zoo.tasks.number_words import next_word_loss, read

HOSTS = 4
MEASURED = (("1gbit", 2), ("100mbit", 2), ("100mbit", 8))  # links, and pairs a step and host
MANY_ROUNDS = 2  # at most, where hosts that share cores compute for long
VOCABULARY, WIDTH = 30_000, 256
PEER = "DDP"
PLANS = tuple(f"dp=4,*_words={answer},head=tp" for answer in ("tp", "sparse", "rows"))
TIMEOUT_S = 1800.0


def task(samples: int = MEASURED[0][1]) -> Task:
    """One microbatch per host and step."""
    return manpages(vocabulary_size=VOCABULARY, width=WIDTH, batch=samples * HOSTS, microbatch=samples)


def by_hand(given: Task, rank: int) -> Callable[[], float]:
    """A training step as people write it; words are counted over all hosts, for each host has others."""
    count = 0
    module = DistributedDataParallel(Blueprint(given).fill(torch.device("cpu")), gradient_as_bucket_view=True)
    optimizer = given.optimizer(list(module.parameters()))
    order = Order(given.num_samples, given.batch, given.microbatch or 1, given.seed, shuffle=given.shuffle)

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


def work(folder: Path, samples: int, count: int, steps: int, *plans: str) -> None:
    """What a host does: all contenders in turn."""
    rank, given = joined("translation").rank, task(samples)
    contenders = {PEER: by_hand(given, rank)} | {text: by_plan(given, text) for text in plans}
    tell(folder, rank, noted(contenders, count=count, steps=steps))


def compare(rate: str, samples: int, plans: tuple[str, ...], count: int, steps: int) -> list[dict[str, Any]]:
    """For each plan the ratio of throughputs, what hosts send in a step, and how far losses are apart."""
    told = found_by("translation", HOSTS, rate, samples, count, steps, *plans, timeout_s=TIMEOUT_S)
    given = task(samples)
    words = list(given.data.sizes)  # pyright: ignore[reportAttributeAccessIssue]
    return [
        row | {"samples": samples, "words": words, "predicted_bytes": predicted_bytes(given, text, HOSTS, rate)}
        for text, row in beside(told, rate, PEER, steps).items()
    ]


def run(
    count: int = 4,
    steps: int = 1,
    plans: tuple[str, ...] = PLANS,
    measured: tuple[tuple[str, int], ...] = MEASURED,
) -> list[dict[str, Any]]:
    """A row for each plan at each rate and number of samples; one that says why, under ``skipped``, where there are no
    hosts or no pages.

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
    fewest = min(samples for _, samples in measured)
    return [
        row
        for rate, samples in measured
        for row in compare(rate, samples, plans, count if samples == fewest else min(count, MANY_ROUNDS), steps)
    ]


if __name__ == "__main__":
    work(Path(sys.argv[1]), *(int(one) for one in sys.argv[2:5]), *sys.argv[5:])  # pyright: ignore[reportArgumentType]
