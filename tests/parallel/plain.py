"""The answer as plain PyTorch on one process computes it, written without Sheaf's executors or its serial reference."""

import os
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import all_gather_object
from torch.nn import functional as F
from torch.utils._pytree import tree_map_only
from torch.utils.data import default_collate

from sheaf import Loss, Task
from sheaf.task import Order, Streams, key
from sheaf.task.blueprint import Blueprint

os.environ.setdefault("HF_HUB_OFFLINE", "1")


class Run:
    """Losses, gradients (before clipping) and weights of every step, and the buffers at the end."""

    def __init__(self) -> None:
        self.losses: list[float] = []
        self.gradients: list[dict[str, Tensor]] = []
        self.weights: list[dict[str, Tensor]] = []
        self.buffers: dict[str, Tensor] = {}


class Look:
    """Keeps every step's gradients."""

    def __init__(self, run: Run) -> None:
        self.run = run

    def gradients(self, step: int, gradients: dict[str, Tensor]) -> None:
        """Called by the step."""
        self.run.gradients.append({name: value.clone() for name, value in gradients.items()})


def plain(task: Task, steps: int) -> Run:
    """Gradient accumulation over the step's microbatches, one loss divided by one weight."""
    model = Blueprint(task).fill(torch.device("cpu"))
    optimizer = task.optimizer(list(model.parameters()))
    scheduler = task.scheduler(optimizer) if task.scheduler else None
    streams = Streams(model, task.seed, torch.device("cpu"))
    order = Order(len(task.data), task.batch, task.microbatch or task.batch, task.seed, shuffle=task.shuffle)
    low = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(task.precision)
    run, scale = Run(), 2.0**16 if task.precision == "fp16" else 1.0
    for step in range(steps):
        model.zero_grad()
        total, weight = 0.0, 0.0
        for microbatch in order.step(step):
            torch.manual_seed(key(task.seed, "data", step, microbatch.index))
            batch = (task.collate or default_collate)([task.data[index] for index in microbatch.samples])
            if task.precision == "fp64":
                batch = tree_map_only(Tensor, lambda item: item.double() if item.is_floating_point() else item, batch)
            streams.enter(step, microbatch.index)
            with torch.autocast("cpu", low or torch.bfloat16, enabled=low is not None):
                given: Any = task.inputs(batch) if task.inputs else (batch[0],)
                output = model(**given) if isinstance(given, dict) else model(*given)
                loss = task.loss(output, batch)
            if not isinstance(loss, Loss):
                loss = Loss(loss * len(microbatch.samples), len(microbatch.samples))
            (loss.sum * (scale / task.batch)).backward()
            total, weight = total + float(loss.sum.detach()), weight + float(loss.weight)
        gradients = {}
        for name, parameter in model.named_parameters():
            if parameter.grad is not None:
                parameter.grad.mul_(task.batch / (scale * weight))
                gradients[name] = parameter.grad.clone()
        if task.clip is not None:
            nn.utils.clip_grad_norm_(model.parameters(), task.clip)
        optimizer.step()
        if scheduler:
            scheduler.step()
        run.losses.append(total / weight)
        run.gradients.append(gradients)
        run.weights.append({name: value.detach().clone() for name, value in model.named_parameters()})
    run.buffers = {name: value.clone() for name, value in model.named_buffers()}
    streams.close()
    return run


def brief(task: Task) -> Task:
    """The same with an epoch of two steps, of which the second is as small as the last of its own epoch."""
    return replace(task, data=task.data[: task.batch + len(task.data) % task.batch])


def planned(task: Task, plan_text: str, steps: int) -> Run | None:
    """The same under a plan, on this rank; rank 0 returns the run."""
    from sheaf.parallel import build
    from sheaf.plans import Plan

    step = build(task, Plan.parse(plan_text))
    run = Run()

    step.observe(Look(run))
    for _ in range(steps):
        report = step()
        run.losses.append(report.loss)
        whole, names = step.full_state(), step._portion.blueprint.parameters
        run.weights.append({name: value.clone() for name, value in whole.items() if name in names})
    run.buffers = {name: value.clone() for name, value in step.model.named_buffers()}
    step.close()
    return run if step.rank == 0 else None


def assert_same(found: Run, wanted: Run, tolerance: float) -> None:
    """Losses, every gradient, every weight and buffer, relative to the wanted tensor's size."""
    for step, (loss, reference) in enumerate(zip(found.losses, wanted.losses, strict=True)):
        assert abs(loss - reference) <= tolerance * abs(reference), f"loss of step {step}: {loss} for {reference}"
    for kind in ("gradients", "weights"):
        for step, (tensors, references) in enumerate(zip(getattr(found, kind), getattr(wanted, kind), strict=True)):
            assert set(tensors) == set(references), f"{kind} of step {step}: {set(tensors) ^ set(references)}"
            whole = sum(float(reference.double().square().sum()) for reference in references.values()) ** 0.5
            for name, reference in references.items():
                _close(f"{kind} of step {step}: {name}", tensors[name], reference, tolerance, whole)
    assert set(found.buffers) == set(wanted.buffers)
    whole = sum(float(reference.double().square().sum()) for reference in wanted.buffers.values()) ** 0.5
    for name, reference in wanted.buffers.items():  # the running mean of what is normalised already is rounding alone
        _close(f"buffer {name}", found.buffers[name], reference, tolerance, whole)


def _close(what: str, value: Tensor, reference: Tensor, tolerance: float, whole: float) -> None:
    assert value.shape == reference.shape, what
    error = float((value.double() - reference.double()).norm())
    # a gradient that is zero in exact arithmetic (an attention's key bias) is rounding alone
    size = max(float(reference.double().norm()), 1e-3 * whole)
    assert error <= tolerance * max(size, 1e-30), f"{what}: off by {error / max(size, 1e-30):.2e} of {size:.2e}"


def mlp_float64(**changes: Any) -> Task:
    """An MLP in float64: any mistake shows at once above 1e-12."""
    generator = torch.Generator().manual_seed(1)
    inputs, labels = torch.randn(45, 12, generator=generator), torch.randint(0, 5, (45,), generator=generator)
    task = Task(
        model=lambda: nn.Sequential(nn.Linear(12, 17), nn.Tanh(), nn.Linear(17, 9), nn.Tanh(), nn.Linear(9, 5)),
        loss=lambda output, batch: F.cross_entropy(output, batch[1]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        data=list(zip(inputs, labels, strict=True)),
        batch=14,
        microbatch=3,
        precision="fp64",
    )
    return replace(task, **changes)


def ragged_gpt(**changes: Any) -> Task:
    """A GPT with tied embeddings and dropout 0.1 on padded sequences of unequal length."""
    from sheaf.zoo.models.gpt import GPT

    generator = torch.Generator().manual_seed(2)
    texts = [
        torch.randint(0, 40, (int(length),), generator=generator)
        for length in torch.randint(3, 14, (26,), generator=generator)
    ]

    def collate(items: list[Tensor]) -> Tensor:
        return nn.utils.rnn.pad_sequence(items, batch_first=True, padding_value=40)

    def loss(logits: Tensor, batch: Tensor) -> Loss:
        targets = batch[:, 1:]
        real = targets != 40
        return Loss(F.cross_entropy(logits[real], targets[real], reduction="sum"), real.sum())

    task = Task(
        model=lambda: GPT(vocabulary=41, context=16, width=24, layers=2, heads=3, dropout=0.1, padding=40),
        loss=loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        data=texts,
        collate=collate,
        inputs=lambda batch: (batch[:, :-1],),
        batch=10,
        microbatch=2,
        clip=1.0,
        scheduler=lambda optimizer: torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 10),
    )
    return replace(task, **changes)


def norm_resnet(**changes: Any) -> Task:
    """A residual network with BatchNorm, whose last batch of an epoch does not divide."""
    from sheaf.zoo.models.resnet import ResNet

    generator = torch.Generator().manual_seed(3)
    images, labels = torch.randn(22, 1, 8, 8, generator=generator), torch.randint(0, 10, (22,), generator=generator)
    task = Task(
        model=lambda: ResNet(channels=1, classes=10, blocks=1, widths=(4, 8)),
        loss=lambda output, batch: F.cross_entropy(output, batch[1]),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
        data=list(zip(images, labels, strict=True)),
        batch=16,
        microbatch=4,
    )
    return replace(task, **changes)


def transformers_gpt2(**changes: Any) -> Task:
    """GPT-2 from its transformers config, as it is."""

    def model() -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        return GPT2LMHeadModel(
            GPT2Config(n_layer=2, n_embd=32, n_head=4, vocab_size=61, n_positions=16, bos_token_id=0, eos_token_id=0)
        )

    return _transformers(model, 61, changes)


def transformers_bert(**changes: Any) -> Task:
    """BERT with its masked language model head from its transformers config, as it is."""

    def model() -> nn.Module:
        from transformers import BertConfig, BertForMaskedLM

        return BertForMaskedLM(
            BertConfig(
                hidden_size=32,
                num_hidden_layers=2,
                num_attention_heads=4,
                intermediate_size=48,
                vocab_size=61,
                max_position_embeddings=16,
            )
        )

    return _transformers(model, 61, changes)


def _transformers(model: Any, vocabulary: int, changes: dict[str, Any]) -> Task:
    data = torch.randint(1, vocabulary, (20, 12), generator=torch.Generator().manual_seed(4))
    task = Task(
        model=model,
        loss=lambda output, batch: F.cross_entropy(output.logits.flatten(0, 1), batch.flatten(), reduction="mean"),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        data=data,
        inputs=lambda batch: {"input_ids": batch, "attention_mask": torch.ones_like(batch)},
        batch=8,
        microbatch=2,
    )
    return replace(task, **changes)


class Cube(torch.autograd.Function):
    """An activation that nobody can see into."""

    @staticmethod
    def forward(ctx: Any, given: Tensor) -> Tensor:
        ctx.save_for_backward(given)
        return given**3 / 10

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        (given,) = ctx.saved_tensors
        return gradients[0] * given**2 * 0.3


def copies_agree(step: Any) -> bool:
    """Whether what several workers of a replica hold is the same on all of them, to the last bit (collective)."""
    held = {
        name: value.detach().clone()
        for name, value in step.model.named_parameters()
        if name not in step._portion.slices and step._portion.holds(name)
    }
    everyone: list[Any] = [None] * step.workers
    all_gather_object(everyone, (step._spread.place.dp, held))
    mine = [other for replica, other in everyone if replica == step._spread.place.dp]
    return all(torch.equal(value, other[name]) for other in mine for name, value in held.items() if name in other)
