"""Build a plan's step for a loop of one's own, on every worker that torchrun started, or alone."""

import torch

from sheaf import launch, parallel
from sheaf.parallel import Step
from sheaf.plans import Plan
from sheaf.task import Task


def build(task: Task, plan: Plan | str, *, device: torch.device | None = None) -> Step:
    """Make this worker's step of the plan; calling it runs one global step and returns its report.

    Every worker calls this alike. A process that torchrun started joins the others; one that is alone serves plans of
    one worker. ``device``: this worker's own accelerator, or the CPU, when left out.

    Raises PlanError listing every rule that the plan breaks, TaskError for a model that cannot be built.
    """
    world = launch.join() or launch.World.alone()
    chosen = Plan.parse(plan) if isinstance(plan, str) else plan
    return parallel.build(task, chosen, device=world.device if device is None else device)
