"""What a task's optimizer and schedule want that no step can give: the loss once more, or one that nobody knows."""

import inspect

import torch
from torch import nn

from sheaf.errors import PlanError, TaskError
from sheaf.plans import Plan
from sheaf.task import Task


def refuse_closure(task: Task) -> None:
    """Raise TaskError for an optimizer whose step wants a function that computes the loss again, such as LBFGS."""
    try:
        made = task.optimizer([nn.Parameter(torch.zeros(1, 1))])
        wanted = inspect.signature(made.step).parameters.values()
    except Exception:  # noqa: BLE001 - one that wants other parameters tells in time
        return
    if any(one.default is one.empty and one.kind is one.POSITIONAL_OR_KEYWORD for one in wanted):
        raise TaskError(
            f"{type(made).__name__} computes the loss again within a step (its step() wants a closure), and here each "
            "step computes it once, on all workers: use an optimizer that steps by gradients, such as AdamW"
        )


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
