"""Models of which nothing is trained, and optimizers that cannot take the gradients that they would be given."""

from collections.abc import Mapping
from contextlib import suppress

import torch
from torch import nn
from torch.optim import SGD, Optimizer, SparseAdam

from sheaf.errors import TaskError
from sheaf.graph.example import converted, example, global_streams_kept, num_samples, precision
from sheaf.graph.facts import ModelFacts
from sheaf.graph.trace import CPU, quiet, widen
from sheaf.task import Blueprint, Task, arguments, as_loss
from sheaf.task.probe import over_stand_ins


def refuse_untrainable(task: Task, facts: ModelFacts) -> None:
    """Raise TaskError where nothing of the model is trained, its optimizer could not take a gradient that it would be
    given, or its schedule is none.
    """
    refuse_untrained(facts)
    refuse_narrow(task, facts.samples)
    refuse_unscheduled(task)


def refuse_untrained(facts: ModelFacts) -> None:
    """Raise TaskError where nothing of the model is trained."""
    if not any(one.requires_grad for one in facts.parameters):
        has = "no parameter of the model requires a gradient" if facts.parameters else "the model has no parameters"
        raise TaskError(f"{has}, so there is nothing to train: give it one that requires_grad")


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
    blueprint, batch = Blueprint(task), example(task, samples)
    model = blueprint.model.train()
    with suppress(Exception), global_streams_kept(), quiet(), blueprint.mode:  # what is wrong with it, a trace tells
        if task.precision == "fp64":
            widen(model, blueprint.mode)
        batch = converted(batch, blueprint.mode.from_tensor)
        with precision(task, CPU):
            positional, named = arguments(task, batch)
            loss = as_loss(task.loss(model(*positional, **named), batch), num_samples(task, samples))
        loss.sum.backward()
    with blueprint.mode:
        made = task.optimizer(list(model.parameters()))
    refuse_dense(made, {id(value): name for name, value in model.named_parameters()})


def refuse_unscheduled(task: Task) -> None:
    """Raise TaskError where the task's scheduler makes no schedule, such as None for want of a return."""
    if task.scheduler is None:
        return
    try:
        made: object = task.scheduler(SGD([nn.Parameter(torch.zeros(1))], lr=1.0))
    except Exception:  # noqa: BLE001 - one that wants the task's own optimizer tells in time
        return
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
