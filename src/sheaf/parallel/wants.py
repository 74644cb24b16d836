"""What a task's optimizer and schedule want that no step can give: the loss once more, or one that nobody knows."""

import inspect

import torch
from torch import nn

from sheaf.errors import PlanError, TaskError
from sheaf.plans import Plan
from sheaf.plans.offload import OPTIMIZER
from sheaf.task import Blueprint, Task
from sheaf.task.probe import over_stand_ins, unhosted


def refuse_closure(task: Task) -> None:
    """Raise TaskError for an optimizer whose step wants a function that computes the loss again, such as LBFGS."""
    made = tried(task)
    wanted = () if made is None else inspect.signature(made.step).parameters.values()
    if any(one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD for one in wanted):
        raise TaskError(
            f"{type(made).__name__} computes the loss again within a step (its step() wants a closure), and here each "
            "step computes it once, on all workers: use an optimizer that steps by gradients, such as AdamW"
        )


def tried(task: Task) -> torch.optim.Optimizer | None:
    """The task's optimizer over a stand-in; None for one that wants other parameters, which tells in time."""
    try:
        return over_stand_ins(task.optimizer, [(2, True)])
    except TaskError:
        return None


def looks(task: Task) -> bool:
    """Whether the task's schedule looks at losses, as far as one over a stand-in tells."""
    if task.scheduler is None:
        return False
    stand_in = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    try:
        return isinstance(task.scheduler(stand_in), torch.optim.lr_scheduler.ReduceLROnPlateau)
    except Exception:  # noqa: BLE001 - one that wants the task's own optimizer tells in time
        return False


def refuse_looking(plan: Plan, *, looking: bool) -> None:
    """Raise PlanError where a schedule looks at losses, and workers go by clocks of their own between meetings."""
    if looking and plan.meets_locally.rounds:
        raise PlanError(
            f"local={plan.local}: ReduceLROnPlateau looks at the loss of all workers, which nobody knows between "
            "meetings: use another scheduler, or drop quorum and steps"
        )


def refuse_offloaded(task: Task, plan: Plan, blueprint: Blueprint) -> None:
    """Raise PlanError where the plan has the optimizer step in the host's memory, and it does not."""
    if plan.offload != OPTIMIZER:
        return
    parameters = [(fake.ndim, fake.requires_grad) for fake in blueprint.parameters.values()]
    why = unhosted(task.optimizer, parameters)
    if why:
        raise PlanError(
            f"offload=optimizer steps tensors in the host's memory, and this optimizer does not ({why}): drop offload, "
            "or use one that steps on a processor, such as AdamW without capturable"
        )


def refuse_scaled(task: Task, plan: Plan) -> None:
    """Raise PlanError where losses are scaled, and gradients do not meet whole."""
    if task.precision == "fp16" and not plan.exact:
        raise PlanError(
            f"{plan} does not go with precision='fp16', whose loss scale all workers must change together by gradients "
            "that met whole: use bf16 or fp32"
        )
