"""What kinds of gradients the parameters of a model get: dense ones, or rows, as torch keeps those of sparse layers."""

from contextlib import suppress

import torch
from torch import nn

from sheaf.graph.example import converted, example, global_streams_kept, num_samples, precision
from sheaf.graph.facts import ModelFacts
from sheaf.graph.trace import CPU, quiet, widen
from sheaf.task import Blueprint, Task, arguments, as_loss


def with_gradients(task: Task, samples: int) -> Blueprint:
    """The task's blueprint, whose parameters have the gradients of a microbatch of ``samples`` samples, without memory.

    Of a model that fails there, or whose path depends on values, those that backward came to.
    """
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
    return blueprint


def rows_stepped(task: Task, facts: ModelFacts, model: nn.Module) -> dict[str, int]:
    """Of each parameter whose gradients are kept as rows, how many of its rows a step has gradients of.

    ``model`` has the gradients of a microbatch.
    """
    touched = {table.name: table.touched(min(task.batch, task.num_samples)) for table in facts.tables}
    return {
        name: max(1, min(value.shape[0], round(touched.get(name, value.shape[0]))))
        for name, value in model.named_parameters()
        if value.grad is not None and value.grad.layout is not torch.strided
    }
