"""The answer as plain PyTorch on one accelerator computes it, and as workers under a plan do, each on its own."""

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from plain import Look, Run
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from torch.utils.data import default_collate

from sheaf import Loss, Task, launch
from sheaf.parallel import build
from sheaf.plans import Plan
from sheaf.task import Order, Streams, key
from sheaf.task.blueprint import Blueprint

LOW = {"bf16": torch.bfloat16, "fp16": torch.float16}


@contextlib.contextmanager
def same_kernels() -> Iterator[None]:
    """Convolve in full precision, by kernels that give the same each time."""
    with torch.backends.cudnn.flags(enabled=True, benchmark=False, deterministic=True, allow_tf32=False):
        yield


def alone(task: Task, steps: int) -> Run:
    """Gradient accumulation over a step's microbatches on the accelerator; nothing of a plan."""
    kind = torch.accelerator.current_accelerator()
    assert kind is not None
    device = torch.device(kind.type, 0)
    model = Blueprint(task).fill(device)
    optimizer, streams = task.optimizer(list(model.parameters())), Streams(model, task.seed, device)
    scheduler = task.scheduler(optimizer) if task.scheduler else None
    order = Order(len(task.data), task.batch, task.microbatch or task.batch, task.seed, shuffle=task.shuffle)
    run, scale, low = Run(), 2.0**16 if task.precision == "fp16" else 1.0, LOW.get(task.precision)
    with same_kernels():
        for step in range(steps):
            model.zero_grad()
            total = weight = 0.0
            for microbatch in order.step(step):
                torch.manual_seed(key(task.seed, "data", step, microbatch.index))
                batch = (task.collate or default_collate)([task.data[index] for index in microbatch.samples])
                wide = task.precision == "fp64"
                batch = tree_map_only(
                    Tensor,
                    lambda one: one.to(device, torch.float64 if wide and one.is_floating_point() else None),  # noqa: B023
                    batch,
                )
                streams.enter(step, microbatch.index)
                with torch.autocast(device.type, low or torch.bfloat16, enabled=low is not None):
                    given: Any = task.inputs(batch) if task.inputs else (batch[0],)
                    output = model(**given) if isinstance(given, dict) else model(*given)
                    loss: Any = task.loss(output, batch)
                if not isinstance(loss, Loss):
                    loss = Loss(loss * len(microbatch.samples), len(microbatch.samples))
                (loss.sum * (scale / task.batch)).backward()
                total, weight = total + float(loss.sum.detach()), weight + float(loss.weight)
            for parameter in model.parameters():
                if parameter.grad is not None:
                    parameter.grad.mul_(task.batch / (scale * weight))
            run.gradients.append(_copied({n: p.grad for n, p in model.named_parameters() if p.grad is not None}))
            if task.clip is not None:
                nn.utils.clip_grad_norm_(model.parameters(), task.clip)
            optimizer.step()
            if scheduler:
                scheduler.step()
            run.losses.append(total / weight)
            run.weights.append(_copied(dict(model.named_parameters())))
    run.buffers = _copied(dict(model.named_buffers()))
    streams.close()
    return run


def planned(task: Task, plan: str, steps: int) -> Run | None:
    """The same under a plan, by a worker on an accelerator of its own; worker 0 returns the run."""
    world = launch.join()
    assert world is not None
    assert world.device.type != "cpu", f"worker {world.rank} of {world.workers} has no accelerator of its own"
    step, run = build(task, Plan.parse(plan), device=world.device), Run()
    if step.plan.exact:
        step.observe(Look(run))
    with same_kernels():
        for _ in range(steps):
            run.losses.append(step().loss)
            whole, names = step.full_state(), step._portion.blueprint.parameters
            run.weights.append(_copied({name: value for name, value in whole.items() if name in names}))
    run.gradients = [_copied(each) for each in run.gradients]
    run.buffers = _copied(dict(step.model.named_buffers()))
    assert {value.device for value in step.model.buffers()} <= {world.device}
    step.close()
    return run if world.rank == 0 else None


def _copied(tensors: dict[str, Any]) -> dict[str, Tensor]:
    return {name: value.detach().to_dense().cpu().clone() for name, value in tensors.items()}
