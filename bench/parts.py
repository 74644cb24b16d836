"""Different plans for different parts: VGG-16 on four hosts with links of 1 Gbit/s, beside DistributedDataParallel.

123.6 of its 138.4 million parameters are in three fully connected layers. Under ``dp=4,classifier.*=tp`` each host
holds a quarter of those and their gradients never travel. The hosts are network namespaces of this machine and share
its cores, so that computing takes longer than on four machines: images are 64 pixels a side (their last feature maps
are spread to the 7 by 7 that the classifier wants), and few. What more of them cost shows in the second row. Without
dropout, since DDP draws other masks.
"""

import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from bench.hosts import unavailable
from bench.on_hosts import beside, found_by, joined, noted, tell
from sheaf import Loss, Plan, Task, build
from sheaf.task import Blueprint, Order, fetch
from sheaf.zoo.models.vgg import VGG

HOSTS, RATE = 4, "1gbit"
SIDE, CLASSES = 64, 1000
SAMPLES = (2, 8)  # a step and host
PLAN, PEER = "dp=4,classifier.*=tp", "DDP"
TIMEOUT_S = 1800.0


class Images:
    """128 random images with random labels."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.images = torch.randn(128, 3, SIDE, SIDE, generator=generator)
        self.labels = torch.randint(0, CLASSES, (128,), generator=generator)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.images[index], self.labels[index]


def summed_loss(logits: Tensor, batch: Any) -> Loss:
    """Cross-entropy over images."""
    return Loss(F.cross_entropy(logits, batch[1], reduction="sum"), len(batch[1]))


def model() -> nn.Module:
    """The paper's sizes."""
    return VGG(classes=CLASSES, dropout=0.0)


sgd = partial(torch.optim.SGD, lr=1e-3, momentum=0.9)


def task(samples: int) -> Task:
    """One microbatch of so many samples per host and step."""
    return Task(model=model, loss=summed_loss, optimizer=sgd, data=Images(), batch=samples * HOSTS, microbatch=samples)


def by_hand(given: Task, rank: int) -> Callable[[], float]:
    """A training step as people write it, on the samples of Sheaf's steps."""
    count = 0
    module = DistributedDataParallel(Blueprint(given).fill(torch.device("cpu")), gradient_as_bucket_view=True)
    optimizer = sgd(module.parameters())
    order = Order(given.num_samples, given.batch, given.batch // HOSTS, given.seed, shuffle=given.shuffle)

    def step() -> float:
        nonlocal count
        inputs, targets = fetch(given, order.step(count)[rank].samples, 0)
        optimizer.zero_grad()
        loss = F.cross_entropy(module(inputs), targets)
        loss.backward()
        optimizer.step()
        count += 1
        return loss.item()

    return step


def by_plan(given: Task) -> Callable[[], float]:
    """The same step under the plan."""
    step = build(given, Plan.parse(PLAN))
    return lambda: step().loss


def work(folder: Path, samples: int, count: int, steps: int) -> None:
    """What a host does: both contenders in turn."""
    rank, given = joined("parts").rank, task(samples)
    contenders = {PEER: by_hand(given, rank), PLAN: by_plan(given)}
    tell(folder, rank, noted(contenders, count=count, steps=steps))


def compare(samples: int, count: int, steps: int) -> dict[str, Any]:
    """The ratio of throughputs, what a host sends in a step, and how far losses are apart."""
    told = found_by("parts", HOSTS, RATE, samples, count, steps, timeout_s=TIMEOUT_S)
    return beside(told, RATE, PEER, steps)[PLAN] | {"image_side": SIDE, "samples": samples}


def run(count: int = 5, steps: int = 1) -> list[dict[str, Any]]:
    """A row for each number of samples; one that says why, under ``skipped``, where there can be no hosts.

    Raises ValueError when losses differ by more than rounding.
    """
    reason = unavailable()
    return [{"skipped": reason}] if reason else [compare(samples, count, steps) for samples in SAMPLES]


if __name__ == "__main__":
    work(Path(sys.argv[1]), *map(int, sys.argv[2:]))
