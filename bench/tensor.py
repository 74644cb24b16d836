"""Layers split over two workers: Sheaf's `tp=2` beside hand-written DTensor plans and DistributedDataParallel.

All train the same GPT of 7.4 million parameters, written plainly (queries, keys and values apart, since DTensor cannot
split them as one matrix), on the same 16 sequences a step, in one process group of two workers with one thread each.
"""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from torch.distributed.tensor.parallel import (
    ColwiseParallel,
    PrepareModuleInput,
    RowwiseParallel,
    SequenceParallel,
    loss_parallel,
    parallelize_module,
)
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from bench.interleaved import ratio, rounds
from sheaf import Loss, Plan, Task, build, launch
from sheaf.task import Blueprint, Order, fetch

VOCABULARY, LENGTH, BATCH, WORKERS = 8192, 128, 16, 2
WIDTH, LAYERS, HEADS = 256, 4, 4
PLANS = ("tp=2", "tp=2,sequence=1")
DTENSOR = "DTensor"
AGREE = 1e-4  # how far losses may be apart, relatively, for contenders to count as doing the same


class Block(nn.Module):
    """Attention, then a feed-forward part, each behind a norm and added to what came in."""

    def __init__(self) -> None:
        super().__init__()
        self.attention_norm, self.feed_norm = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = SelfAttention()
        self.feed = nn.Sequential(nn.Linear(WIDTH, 4 * WIDTH), nn.GELU("tanh"), nn.Linear(4 * WIDTH, WIDTH))

    def forward(self, hidden: Tensor) -> Tensor:
        hidden = hidden + self.attention(self.attention_norm(hidden))
        return hidden + self.feed(self.feed_norm(hidden))


class SelfAttention(nn.Module):
    """Causal, with as many heads as its projections give: fewer where they are split."""

    def __init__(self) -> None:
        super().__init__()
        self.queries, self.keys, self.values = (nn.Linear(WIDTH, WIDTH) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH)

    def forward(self, hidden: Tensor) -> Tensor:
        queries, keys, values = (
            each(hidden).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2)
            for each in (self.queries, self.keys, self.values)
        )
        mixed = F.scaled_dot_product_attention(queries, keys, values, is_causal=True)
        return self.out(mixed.transpose(1, 2).flatten(2))


class PlainGPT(nn.Module):
    """Tokens in, logits of each next token out; an untied head, no dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCABULARY, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(LAYERS)])
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, VOCABULARY, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)

    def forward(self, tokens: Tensor) -> Tensor:
        hidden = self.tokens(tokens) + self.positions(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(self.norm(hidden))


class Tokens:
    """1024 random sequences, and themselves shifted."""

    def __init__(self) -> None:
        self.drawn = torch.randint(0, VOCABULARY, (1024, LENGTH + 1), generator=torch.Generator().manual_seed(0))

    def __len__(self) -> int:
        return len(self.drawn)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.drawn[index, :-1], self.drawn[index, 1:]


def summed_loss(logits: Tensor, batch: Any) -> Loss:
    """Cross-entropy over tokens."""
    return Loss(F.cross_entropy(logits.flatten(0, 1), batch[1].flatten(), reduction="sum"), batch[1].numel())


adamw = partial(torch.optim.AdamW, lr=1e-4)


def task() -> Task:
    """One microbatch per replica and step."""
    return Task(model=PlainGPT, loss=summed_loss, optimizer=adamw, data=Tokens(), batch=BATCH)


def batches(part: int = 0, parts: int = 1) -> Iterator[Any]:
    """One of ``parts`` equal shares of each step's samples, which are those of Sheaf's steps, for ever."""
    given, step = task(), 0
    order = Order(given.num_samples, BATCH, BATCH // parts, given.seed, shuffle=given.shuffle)
    while True:
        yield fetch(given, order.step(step)[part].samples, 0)
        step += 1


def plain_model() -> nn.Module:
    """The same weights as Sheaf's."""
    return Blueprint(task()).fill(torch.device("cpu"))


class Loop:
    """A training step as people write it; ``losses`` are this worker's."""

    def __init__(
        self,
        module: nn.Module,
        given: Iterator[Any],
        around: Callable[[], AbstractContextManager[object]] = nullcontext,
    ) -> None:
        self.module, self.batches, self.around = module, given, around
        self.optimizer = adamw(module.parameters())
        self.losses: list[float] = []

    def __call__(self) -> None:
        inputs, targets = next(self.batches)
        self.optimizer.zero_grad()
        with self.around():
            loss = F.cross_entropy(self.module(inputs).flatten(0, 1), targets.flatten())
            loss.backward()
        self.optimizer.step()
        self.losses.append((loss.full_tensor() if isinstance(loss, DTensor) else loss).item())


class Planned:
    """A step of Sheaf, and its losses."""

    def __init__(self, given: Task, text: str) -> None:
        self.step = build(given, Plan.parse(text))
        self.losses: list[float] = []

    def __call__(self) -> None:
        self.losses.append(self.step().loss)


def by_dtensor(mesh: DeviceMesh, *, sequence: bool = False, split_loss: bool = False) -> Loop:
    """The plan of PyTorch's own tutorial on tensor parallelism, in its variants."""
    module = plain_model()
    between = Shard(1) if sequence else Replicate()
    plan: dict[str, Any] = {
        "tokens": RowwiseParallel(input_layouts=Replicate(), output_layouts=between),
        "head": ColwiseParallel(
            input_layouts=between,
            output_layouts=Shard(-1) if split_loss else Replicate(),
            use_local_output=not split_loss,
        ),
    }
    layer: dict[str, Any] = {
        "attention": PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(Replicate(),)),
        **dict.fromkeys(("attention.queries", "attention.keys", "attention.values"), ColwiseParallel()),
        "attention.out": RowwiseParallel(output_layouts=between),
        "feed": PrepareModuleInput(input_layouts=(between,), desired_input_layouts=(Replicate(),)),
        "feed.0": ColwiseParallel(),
        "feed.2": RowwiseParallel(output_layouts=between),
    }
    if not sequence:  # a linear layer takes what is whole as it is
        del layer["attention"], layer["feed"]
    if sequence:
        plan |= {"positions": RowwiseParallel(input_layouts=Replicate(), output_layouts=Shard(0))}
        plan |= {"norm": SequenceParallel()}
        layer |= {"attention_norm": SequenceParallel(), "feed_norm": SequenceParallel()}
    for index in range(LAYERS):
        plan |= {f"blocks.{index}.{name}": style for name, style in layer.items()}
    parallelize_module(module, mesh, plan)
    return Loop(module, batches(), loss_parallel if split_loss else nullcontext)


def together(count: int, steps: int) -> dict[str, Any]:
    """Every contender in one process group, in turn; seconds per step, and losses that were told."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (WORKERS,))
    contenders: dict[str, Loop | Planned] = {
        "DDP": Loop(DistributedDataParallel(plain_model()), batches(rank, WORKERS)),
        DTENSOR: by_dtensor(mesh),
        f"{DTENSOR}, sequence parallel": by_dtensor(mesh, sequence=True),
        f"{DTENSOR}, loss parallel": by_dtensor(mesh, split_loss=True),
        f"{DTENSOR}, sequence and loss parallel": by_dtensor(mesh, sequence=True, split_loss=True),
        **{text: Planned(task(), text) for text in PLANS},
    }
    seconds = rounds(dict(contenders), count=count, steps=steps)
    return {"seconds": seconds, "losses": {name: one.losses for name, one in contenders.items()}}


def run(count: int = 11, steps: int = 3) -> list[dict[str, Any]]:
    """Ratios of Sheaf's plans to DDP and to every DTensor plan; of the latter the best is marked.

    Raises ValueError when losses differ by more than rounding, for then somebody does something else.
    """
    told = launch.run(together, WORKERS, count, steps, threads=1)
    apart = agreed({name: [one["losses"][name] for one in told] for name in told[0]["losses"]})
    seconds = told[0]["seconds"]
    peers = [name for name in seconds if name not in PLANS]
    found: list[dict[str, Any]] = [
        asdict(ratio(seconds, plan, peer)) | {"losses_apart": apart} for plan in PLANS for peer in peers
    ]
    split = [one for one in found if one["peer"].startswith(DTENSOR)]
    best = min(split, key=lambda one: one["peer_seconds"])["peer"]
    return [one | {"best": one["peer"] == best} for one in found]


def agreed(losses: dict[str, list[list[float]]], first: str = "DDP") -> float:
    """The widest relative difference from the ``first`` contender's mean loss (over workers) at the same step.

    Raises ValueError when it is more than rounding.
    """
    means = {name: [sum(step) / len(step) for step in zip(*each, strict=True)] for name, each in losses.items()}
    widest, name = 0.0, ""
    for other, theirs in means.items():
        for mine, yours in zip(means[first], theirs, strict=True):
            widest, name = max((widest, name), (abs(mine - yours) / abs(mine), other))
    if not widest <= AGREE:
        raise ValueError(f"losses of {name} are {widest:.1e} apart from {first}'s: one of them trains something else")
    return widest


if dist.is_available() and __name__ == "__main__":
    for row in run(2, 2):
        print(row)
