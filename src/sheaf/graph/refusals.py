"""Models of which nothing is trained, losses that reach nothing of one, gradients that an optimizer cannot take."""

from collections.abc import Mapping

import torch
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch.optim import Optimizer, SparseAdam

from sheaf.errors import TaskError
from sheaf.graph.example import global_streams_kept, precision
from sheaf.graph.facts import LOSS, ModelFacts
from sheaf.graph.gradients import with_gradients
from sheaf.graph.ops import tensors
from sheaf.graph.trace import CPU, SMALL_BYTES
from sheaf.task import Blueprint, Order, Streams, Task, arguments, as_loss, fetch, key, moved
from sheaf.task.probe import over_stand_ins


def refuse_untrainable(task: Task, facts: ModelFacts) -> None:
    """Raise TaskError where nothing of the model is trained, the loss reaches nothing of it, its optimizer could not
    take a gradient that it would be given, or its schedule is none.
    """
    refuse_untrained(facts)
    refuse_unreached(task, facts)
    refuse_narrow(task, facts.samples)
    refuse_unscheduled(task)


def refuse_untrained(facts: ModelFacts) -> None:
    """Raise TaskError where nothing of the model is trained."""
    if not any(one.requires_grad for one in facts.parameters):
        has = "no parameter of the model requires a gradient" if facts.parameters else "the model has no parameters"
        raise TaskError(f"{has}, so there is nothing to train: give it one that requires_grad")


def refuse_unreached(task: Task, facts: ModelFacts) -> None:
    """Raise TaskError where no microbatch of the first step has a loss that reaches a parameter that is trained.

    One in which nothing is reached may be followed by others in which it is, and what is left out may be drawn. So
    where the traced microbatch makes that likely, the first step is computed, with the streams that training has. Of a
    model of more than 2 GiB, and of one that fails there, the first step tells.
    """
    if facts.parameter_bytes > SMALL_BYTES or any(one.backward_kernels for one in facts.blocks if one.name != LOSS):
        return
    try:
        with global_streams_kept():
            where = _cut_off(task, facts.samples)
    except Exception:  # noqa: BLE001 - whatever it is, nobody knows yet
        return
    if where:
        raise TaskError(where)


def _cut_off(task: Task, samples: int) -> str:
    """What cuts the losses of the first step off from all that is trained; empty where one of them is not."""
    blueprint, given = Blueprint(task), False
    model = blueprint.fill(CPU).train()
    streams = Streams(model, task.seed, CPU)
    for one in Order(task.num_samples, task.batch, samples, task.seed, shuffle=task.shuffle).step(0):
        batch = fetch(task, one.samples, key(task.seed, "data", 0, one.index))
        batch = moved(batch, CPU, torch.float64 if task.precision == "fp64" else None)
        streams.enter(0, one.index)
        with precision(task, CPU):
            positional, named = arguments(task, batch)
            output = model(*positional, **named)
            loss = as_loss(task.loss(output, batch), len(one.samples)).sum
        if loss.requires_grad:
            loss.backward()
            if any(value.grad is not None for value in model.parameters()):
                return ""
        else:
            given |= any(value.requires_grad for value in tensors(output))
    looked = "look for detach(), .data, item() or no_grad() in"
    if given:
        return (
            "the loss depends on no parameter that is trained, though the model's output does: "
            f"{looked} the loss function, and for a loss that does not use the output"
        )
    return (
        "the model's output, or what the loss takes of it, depends on no parameter that is trained: "
        f"{looked} the model's forward, and for layers that it does not call"
    )


def refuse_narrow(task: Task, samples: int) -> None:
    """Raise TaskError where the task's optimizer is SparseAdam and would be given a dense gradient.

    Model, loss and backward of a microbatch of ``samples`` samples run on tensors without memory. Of a model whose path
    depends on values the first step tells.
    """
    try:
        if not isinstance(over_stand_ins(task.optimizer, [(2, True)]), SparseAdam):
            return
    except TaskError:  # it wants other parameters than these, and tells in time what it cannot do
        return
    blueprint = with_gradients(task, samples)
    with blueprint.mode:
        made = task.optimizer(list(blueprint.model.parameters()))
    refuse_dense(made, {id(value): name for name, value in blueprint.model.named_parameters()})


def refuse_unscheduled(task: Task) -> None:
    """Raise TaskError where the task's scheduler cannot be built, or makes no schedule, such as None for want of a
    return.

    The optimizer that it is given is built over tensors without memory; of one that cannot be, training tells.
    """
    if task.scheduler is None:
        return
    blueprint = Blueprint(task)
    with blueprint.recording():
        try:
            optimizer = task.optimizer([*blueprint.model.parameters()])
        except Exception:  # noqa: BLE001 - whatever it is, training tells
            return
        try:
            made: object = task.scheduler(optimizer)
        except (DataDependentOutputException, DynamicOutputShapeException):
            return
        except Exception as error:
            raise TaskError(
                f"building the scheduler raised {type(error).__name__}: {error}; scheduler= must be a function from "
                "the optimizer to a torch.optim.lr_scheduler, such as lambda optimizer: "
                "torch.optim.lr_scheduler.StepLR(optimizer, 30)"
            ) from error
    if not callable(getattr(made, "step", None)):
        raise TaskError(
            f"scheduler() returned {made!r:.60}, which has no step(): it must return a torch.optim.lr_scheduler"
        )


def refuse_dense(optimizer: Optimizer, names: Mapping[int, str]) -> None:
    """Raise TaskError where a parameter that an optimizer of rows is to step has a dense gradient; ``names`` by id."""
    held = [value for group in optimizer.param_groups for value in group["params"] if value.grad is not None]
    dense = [names.get(id(value), "a parameter") for value in held if value.grad.layout is torch.strided]
    if dense:
        raise TaskError(
            f"{dense[0]} ({len(dense)} parameters in all) got a dense gradient, and {type(optimizer).__name__} steps "
            "only by those that torch keeps as rows, of layers built with sparse=True: use SGD or Adagrad, which take "
            "both, or AdamW and no sparse=True"
        )
