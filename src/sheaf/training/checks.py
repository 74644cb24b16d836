"""What is refused before any worker starts: data that cannot be read, a model that memory cannot hold."""

import random

import numpy as np
import psutil
import torch

from sheaf.errors import PlanError
from sheaf.plans import Plan
from sheaf.task import Task, fetch
from sheaf.task.blueprint import Blueprint
from sheaf.units import pretty_bytes


def first_sample(task: Task) -> None:
    """Read ``data[0]`` and collate it alone.

    Raises DataError naming the index when it cannot be had, TaskError when it cannot be collated.
    """
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        fetch(task, [0], 0)
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])


def affordable(blueprint: Blueprint, plan: Plan, memory_bytes: int) -> None:
    """Refuse a plan whose parameters and gradients alone exceed ``memory_bytes``, shared by all its workers.

    A lower bound: optimizer state and activations come on top (``sheaf plan`` counts those too).
    Raises PlanError with the numbers.
    """
    whole = {name: value for name, value in blueprint.parameters.items() if plan.part(name) not in ("tp", "ep")}
    parts = [value for name, value in blueprint.parameters.items() if name not in whole]
    held = sum(value.numel() * blueprint.dtype_of(value).itemsize for value in whole.values())
    trained = sum(value.numel() * blueprint.dtype_of(value).itemsize for value in whole.values() if value.requires_grad)
    once = sum(value.numel() * blueprint.dtype_of(value).itemsize * (1 + int(value.requires_grad)) for value in parts)
    copies_held = 1 if plan.zero >= 3 else plan.dp
    copies_trained = 1 if plan.zero >= 2 else plan.dp
    needed = held * copies_held + trained * copies_trained + once
    if needed > memory_bytes:
        remedy = "use zero=3, which shards both, or " if plan.zero < 3 and plan.dp > 1 and not plan.by_parts else ""
        there_is = pretty_bytes(float(memory_bytes))
        raise PlanError(
            f"the model does not fit: {plan} keeps {copies_held} x {pretty_bytes(float(held))} of parameters and "
            f"{copies_trained} x {pretty_bytes(float(trained))} of gradients, and there is {there_is} of "
            f"memory: {remedy}train a smaller model, or on more memory"
        )


def memory_bytes() -> int:
    """What the workers of this machine can share: the accelerators' memory where there are any, otherwise RAM."""
    if torch.accelerator.is_available() and torch.accelerator.current_accelerator() == torch.device("cuda"):
        return sum(torch.cuda.get_device_properties(i).total_memory for i in range(torch.cuda.device_count()))
    return psutil.virtual_memory().total
