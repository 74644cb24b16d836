"""Steps per second: Sheaf's executors beside hand-written PyTorch, DistributedDataParallel and fully_shard."""

from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.distributed.optim import ZeroRedundancyOptimizer
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

from bench.interleaved import ratio, rounds
from sheaf import Loss, Plan, Task, build, launch
from sheaf.task import Blueprint
from sheaf.zoo.models.gpt import GPT

VOCABULARY, LENGTH, PER_WORKER = 8192, 128, 8


def model() -> nn.Module:
    """7.4 million parameters: 4 layers of width 256, a vocabulary of 8192, an untied head, no dropout."""
    return GPT(vocabulary=VOCABULARY, context=LENGTH, width=256, layers=4, heads=4, dropout=0.0, tied=False)


def tokens() -> TensorDataset:
    """1024 random sequences and their shifted selves."""
    drawn = torch.randint(0, VOCABULARY, (1024, LENGTH + 1), generator=torch.Generator().manual_seed(0))
    return TensorDataset(drawn[:, :-1].contiguous(), drawn[:, 1:].contiguous())


def summed_loss(logits: Tensor, batch: Any) -> Loss:
    """Cross-entropy over tokens."""
    return Loss(F.cross_entropy(logits.flatten(0, 1), batch[1].flatten(), reduction="sum"), batch[1].numel())


def adamw(parameters: Any) -> torch.optim.Optimizer:
    """The optimizer of every contender."""
    return torch.optim.AdamW(parameters, lr=1e-4)


def task(workers: int) -> Task:
    """One microbatch per worker and step."""
    return Task(
        model=model, loss=summed_loss, optimizer=adamw, data=tokens(), batch=PER_WORKER * workers, microbatch=PER_WORKER
    )


def loader(workers: int) -> Iterator[list[Tensor]]:
    """Batches for ever, as a hand-written loop loads them."""
    data = tokens()
    sampler = DistributedSampler(data) if workers > 1 else None
    epoch = 0
    while True:
        if sampler is not None:
            sampler.set_epoch(epoch)
        yield from DataLoader(data, PER_WORKER, sampler=sampler, shuffle=sampler is None)
        epoch += 1


def loop(module: nn.Module, optimizer: torch.optim.Optimizer, workers: int) -> Callable[[], float]:
    """A training step as people write it."""
    batches = loader(workers)

    def step() -> float:
        inputs, targets = next(batches)
        optimizer.zero_grad()
        loss = F.cross_entropy(module(inputs).flatten(0, 1), targets.flatten())
        loss.backward()
        optimizer.step()
        return loss.item()

    return step


def plain_model(workers: int) -> nn.Module:
    """The same weights as Sheaf's."""
    return Blueprint(task(workers)).fill(torch.device("cpu"))


def sharded(*, reshard: bool) -> tuple[nn.Module, torch.optim.Optimizer]:
    """fully_shard on every block and the root, and the optimizer built after it."""
    module = plain_model(2)
    for block in module.blocks:  # pyright: ignore[reportGeneralTypeIssues]
        fully_shard(block, reshard_after_forward=reshard)
    fully_shard(module, reshard_after_forward=reshard)
    return module, adamw(module.parameters())


def alone(count: int, steps: int) -> list[dict[str, Any]]:
    """One worker: the serial plan beside a hand-written loop."""
    module = plain_model(1)
    seconds = rounds(
        {"serial": build(task(1), Plan()), "hand-written loop": loop(module, adamw(module.parameters()), 1)},
        count=count,
        steps=steps,
    )
    return [asdict(ratio(seconds, "serial", "hand-written loop"))]


def together(count: int, steps: int) -> list[dict[str, Any]]:
    """Two workers: dp, and every stage of ZeRO, beside torch's own."""
    module = plain_model(2)
    ddp = DistributedDataParallel(module)
    other = plain_model(2)
    ddp_zero = DistributedDataParallel(other)
    zero = ZeroRedundancyOptimizer(other.parameters(), torch.optim.AdamW, lr=1e-4)
    contenders: dict[str, Callable[[], object]] = {
        "DDP": loop(ddp, adamw(ddp.parameters()), 2),
        "DDP + ZeroRedundancyOptimizer": loop(ddp_zero, zero, 2),
        "fully_shard": loop(*sharded(reshard=True), 2),
        "fully_shard, parameters kept": loop(*sharded(reshard=False), 2),
        **{text: build(task(2), Plan.parse(text)) for text in ("dp=2", "dp=2,zero=1", "dp=2,zero=2", "dp=2,zero=3")},
    }
    seconds = rounds(contenders, count=count, steps=steps)
    return [
        asdict(ratio(seconds, ours, peer))
        for ours, peer in (
            ("dp=2", "DDP"),
            ("dp=2,zero=1", "DDP + ZeroRedundancyOptimizer"),
            ("dp=2,zero=2", "fully_shard, parameters kept"),
            ("dp=2,zero=3", "fully_shard"),
            ("dp=2,zero=3", "DDP"),
        )
    ]


def run(count: int = 15, steps: int = 3) -> list[dict[str, Any]]:
    """All ratios, of 1 and of 2 workers with one thread each."""
    (first,) = launch.run(alone, 1, count, steps, threads=1)
    second = launch.run(together, 2, count, steps, threads=1)
    return first + second[0]


if dist.is_available() and __name__ == "__main__":
    for row in run():
        print(row)
