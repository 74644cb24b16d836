"""An example microbatch, and how a model and its loss are run on it, in the task's precision."""

import random
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from sheaf.task import PRECISIONS, Order, Task, fetch, key, moved


def example(task: Task, samples: int, step: int = 0) -> Any:
    """The first microbatch of a step, of at most ``samples`` samples, on the CPU, in the task's floating-point type.

    Raises DataError and TaskError as fetching does.
    """
    order = Order(task.num_samples, task.batch, samples, task.seed, shuffle=task.shuffle)
    with global_streams_kept():
        batch = fetch(task, order.step(step)[0].samples, key(task.seed, "example", step))
    return moved(batch, torch.device("cpu"), torch.float64 if task.precision == "fp64" else None)


def num_samples(task: Task, samples: int) -> int:
    """How many samples an example of at most ``samples`` really holds."""
    return min(samples, task.batch, task.num_samples)


def precision(task: Task, device: torch.device) -> Any:
    """The context in which model and loss run: autocast for bf16 and fp16, else nothing."""
    if task.precision in ("bf16", "fp16"):
        return torch.autocast(device.type, dtype=PRECISIONS[task.precision])
    return nullcontext()


def converted(value: Any, change: Any) -> Any:
    """A batch with ``change`` applied to every tensor in it."""
    return tree_map_only(Tensor, change, value)


@contextmanager
def global_streams_kept() -> Iterator[None]:
    """Put Python's, numpy's and torch's global random generators back as they were."""
    states = random.getstate(), np.random.get_state(), torch.default_generator.get_state()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.default_generator.set_state(states[2])
