"""A task with its microbatch decided: its own, the plan's, or an equal share of the batch if that changes nothing."""

from dataclasses import replace

from torch import nn

from sheaf.errors import PlanError
from sheaf.plans import Plan
from sheaf.plans.stages import default_microbatch
from sheaf.task import Blueprint, Task, keras


def with_microbatch(task: Task, plan: Plan, model: nn.Module | None = None) -> Task:
    """The task with its microbatch decided: its own, the plan's, or an equal share of the batch.

    ``model`` is the task's, of any tensors, where it has been built before. Raises PlanError when task and plan give
    one and they differ, since the task's decides the answer; and when neither gives one though the model computes
    with the statistics of a microbatch or draws random numbers in each, since the answer would depend on the plan.
    """
    if task.microbatch is not None and plan.microbatch not in (None, task.microbatch):
        raise PlanError(
            f"the plan says microbatch={plan.microbatch} and the task microbatch={task.microbatch}: "
            "leave it out of one of them"
        )
    chosen = task.microbatch or plan.microbatch
    if chosen is None:
        name = _depends_on_microbatch(Blueprint(task).model if model is None else model)
        if name is not None:
            raise PlanError(
                f"neither the task nor the plan gives a microbatch, and {name} makes the answer depend on it: "
                f"give the task one, such as microbatch={max(1, task.batch // 4)}"
            )
        chosen = default_microbatch(plan, task.batch)
    if chosen > task.batch:
        raise PlanError(f"microbatch={chosen} is larger than batch={task.batch}: lower it or raise batch")
    return replace(task, microbatch=chosen)


def _depends_on_microbatch(model: nn.Module) -> str | None:
    """The first of torch's own modules that draws, or mixes the samples of a microbatch, and what it is."""
    for name, module in model.named_modules():
        if module.training and (_mixes(module) or _draws(module)):
            return f"{name or 'the model'} ({type(module).__name__})"
    return None


def _mixes(module: nn.Module) -> bool:
    if keras.is_batch_norm(module):
        return True
    if isinstance(module, nn.modules.instancenorm._InstanceNorm):
        return module.track_running_stats
    return isinstance(module, nn.modules.batchnorm._BatchNorm)


def _draws(module: nn.Module) -> bool:
    if keras.is_layer(module):
        return keras.may_draw(module)
    if isinstance(module, nn.modules.dropout._DropoutNd):
        return module.p > 0
    if isinstance(module, nn.MultiheadAttention):
        return module.dropout > 0
    if isinstance(module, nn.RNNBase):
        return module.dropout > 0 and module.num_layers > 1
    if isinstance(module, nn.RReLU):
        return module.lower < module.upper
    return isinstance(module, nn.FractionalMaxPool2d | nn.FractionalMaxPool3d)
