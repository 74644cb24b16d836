"""Tasks to verify, and an executor in one process with two halves of a batch and a fault on request."""

from dataclasses import dataclass, field, replace
from functools import partial

import torch
from torch import nn

from sheaf.record import StepReport
from sheaf.task import Loss, Order, Streams, Task, arguments, as_loss, fetch, key
from sheaf.task.blueprint import Blueprint


class Attention(nn.Module):
    """One head; the gradient of the key's bias is zero but for rounding."""

    def __init__(self, width):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(width, width) for _ in range(3))

    def forward(self, hidden):
        scores = self.query(hidden) @ self.key(hidden).transpose(1, 2) / hidden.shape[-1] ** 0.5
        return hidden + scores.softmax(-1) @ self.value(hidden)


class Model(nn.Module):
    """Embedding tied to the output, attention, dropout, BatchNorm."""

    def __init__(self, width=16, words=23):
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.layers = nn.ModuleList([Attention(width), Attention(width)])
        self.dropout = nn.Dropout(0.1)
        self.norm = nn.BatchNorm1d(width)
        self.head = nn.Linear(width, words)
        self.head.weight = self.embed.weight

    def forward(self, words):
        hidden = self.embed(words)
        for layer in self.layers:
            hidden = self.dropout(layer(hidden))
        return self.head(self.norm(hidden.transpose(1, 2)).transpose(1, 2))


class Straight(Model):
    """The same with a dropout of its own after each layer, so that it can be cut into stages."""

    def __init__(self):
        super().__init__()
        self.dropout = nn.ModuleList([nn.Dropout(0.1), nn.Dropout(0.1)])

    def forward(self, words):
        hidden = self.embed(words)
        for layer, dropout in zip(self.layers, self.dropout, strict=True):
            hidden = dropout(layer(hidden))
        return self.head(self.norm(hidden.transpose(1, 2)).transpose(1, 2))


class Words:
    """Sequences of words; targets of -1 are padding, so that weights are ragged."""

    def __init__(self, num_samples=22, length=7):
        generator = torch.Generator().manual_seed(3)
        self.words = torch.randint(0, 23, (num_samples, length), generator=generator)
        self.lengths = torch.randint(2, length + 1, (num_samples,), generator=generator)

    def __len__(self):
        return len(self.words)

    def __getitem__(self, index):
        targets = self.words[index].roll(-1).masked_fill(torch.arange(self.words.shape[1]) >= self.lengths[index], -1)
        return self.words[index], targets


def ragged_loss(output, batch):
    targets = batch[1]
    total = nn.functional.cross_entropy(output.flatten(0, 1), targets.flatten(), ignore_index=-1, reduction="sum")
    return Loss(total, (targets != -1).sum())


WORDS = Words()
ADAMW = partial(torch.optim.AdamW, lr=1e-3, weight_decay=0.01)


def words_task(**changes):
    values = {
        "model": Model,
        "loss": ragged_loss,
        "optimizer": ADAMW,
        "data": WORDS,
        "batch": 10,
        "microbatch": 3,
        "seed": 5,
        "clip": 1.0,
    }
    return Task(**(values | changes))


@dataclass
class Faults:
    """What a fake executor does wrongly; nothing unless asked."""

    step: int = 0  # from which step on
    scaled: dict = field(default_factory=dict)  # parameter -> factor of its gradient
    twice: int | None = None  # this microbatch counts twice
    stream: int = 0  # added to the microbatch's number when random streams are entered
    decay: bool = True  # False: weight decay is skipped
    reversed_statistics: bool = False  # microbatches are computed last to first
    dropped: str | None = None  # this parameter's gradient is lost
    no_clip: bool = False
    seed: int = 0  # added to the seed of the initial weights
    halves: bool = True


class FakeStep:
    """Two halves of every step added up and divided, as two workers would; every fault is a real executor's."""

    def __init__(self, task, plan, faults):
        self.task, self.plan, self.faults = task, plan, faults
        self.rank, self.workers, self.index, self.position = 0, 1, 0, None
        self.losses, self.leads, self.part, self.runs = [], True, 0, lambda block: True
        self.model = Blueprint(replace(task, seed=task.seed + faults.seed)).fill(torch.device("cpu"))
        self.optimizer = task.optimizer([p for p in self.model.parameters() if p.requires_grad])
        self.order = Order(task.num_samples, task.batch, task.microbatch, task.seed, shuffle=task.shuffle)
        self.streams = Streams(self.model, task.seed, torch.device("cpu"))
        self.observer = None
        self.expected = task.batch

    def observe(self, observer):
        self.observer = observer

    def full_state(self):
        return {name: tensor.detach().clone() for name, tensor in self.model.state_dict().items()}

    def close(self):
        self.streams.close()

    def __call__(self):
        task, index = self.task, self.index
        faults = self.faults if index >= self.faults.step else Faults(halves=self.faults.halves)
        microbatches = self.order.step(index)
        sums, weights = {}, {}
        halves = [{}, {}]
        for each in reversed(microbatches) if faults.reversed_statistics else microbatches:
            batch = fetch(task, each.samples, key(task.seed, "data", index, each.index))
            self.position = index, each.index
            self.streams.enter(index, each.index + faults.stream)
            positional, named = arguments(task, batch)
            with torch.autocast("cpu", torch.bfloat16, enabled=task.precision == "bf16"):
                loss = as_loss(task.loss(self.model(*positional, **named), batch), len(each.samples))
            self.position = None
            (loss.sum if faults.halves else loss.sum * (1 / self.expected)).backward()
            sums[each.index], weights[each.index] = loss.sum.item(), float(loss.weight)
            times = 2 if each.index == faults.twice else 1
            half = halves[each.index % 2 if faults.halves else 0]
            for name, parameter in self.model.named_parameters():
                if parameter.grad is not None:
                    half[name] = half.get(name, 0) + times * parameter.grad
                    parameter.grad = None
        total = sum(weights.values())
        for name, parameter in self.model.named_parameters():
            parts = [half[name] for half in halves if name in half]
            if parts and name != faults.dropped:
                gradient = sum(parts) if not faults.halves else sum(part * (1 / total) for part in parts)
                parameter.grad = gradient * faults.scaled.get(name, 1.0)
                if not faults.halves:
                    parameter.grad *= self.expected / total
        self.expected = total
        gradients = {name: p.grad.clone() for name, p in self.model.named_parameters() if p.grad is not None}
        self.observer.gradients(index, gradients)
        if task.clip is not None and not faults.no_clip:
            nn.utils.clip_grad_norm_(self.model.parameters(), task.clip)
        for group in self.optimizer.param_groups:
            group["weight_decay"] = group["weight_decay"] if faults.decay else 0.0
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.index += 1
        self.losses = [(number, sums[number], weights[number]) for number in sums]
        return StepReport(step=index, loss=sum(sums.values()) / total, weight=total, samples=10, seconds=0.0)
