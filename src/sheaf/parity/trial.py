"""A plan on trial: serial runs, their noise, the planned run, and what comes of comparing them."""

import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from sheaf.parity import noise, serial
from sheaf.parity.compare import BUFFER, GRADIENT, WEIGHT, Key, backgrounds, departures, sizes
from sheaf.parity.observation import START, Observation, Store
from sheaf.parity.verdict import FLOAT32_EPSILON, FLOAT64_EPSILON, Step, Verdict, judge
from sheaf.task import Task

Read = Callable[[int], Observation]


def try_plan(
    task: Task,
    plan: str,
    steps: int,
    observe: Callable[[], Read],
    directory: Path,
    *,
    microbatch: int,
    device: torch.device,
) -> Verdict:
    """The verdict on the run that ``observe`` does and lets be read, step by step; ``plan`` is its name.

    The serial training comes first, so that a task that fails alone fails before ``observe``. When the two trainings
    differ at all, each step is done again serially from the planned run's own state, and judged by itself.
    Random generators and the number of threads are left as they were found.

    Raises NonFiniteLoss naming the step and microbatch, and whatever ``observe`` raises.
    """
    with undisturbed():
        alone = _serial(task, steps, directory / "serial", microbatch, device)
        planned = observe()
        wandering = noise.measure(task, steps, alone, microbatch=microbatch, device=device)
        trainings = _steps(task, steps, planned, alone, wandering)
        if all(step.identical for step in trainings):
            return judge(trainings, [], plan)
        following = _serial(task, steps, directory / "following", microbatch, device, follow=planned)
        rounding = noise.measure(task, steps, following, microbatch=microbatch, device=device, follow=planned)
        return judge(trainings, _steps(task, steps, planned, following, rounding), plan)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leave Python's, numpy's and torch's random generators and torch's threads as they were."""
    states = random.getstate(), np.random.get_state(), torch.random.get_rng_state(), torch.get_num_threads()
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.random.set_rng_state(states[2])
        torch.set_num_threads(states[3])


def _serial(
    task: Task, steps: int, directory: Path, microbatch: int, device: torch.device, follow: Read | None = None
) -> Read:
    store = Store(directory)
    for observation in serial.train(task, steps, microbatch=microbatch, device=device, follow=follow):
        store.write(observation)
    return store.read


def _steps(task: Task, steps: int, planned: Read, alone: Read, noises: dict[int, dict[Key, float]]) -> list[Step]:
    result: list[Step] = []
    for index in (START, *range(steps)):
        wanted = alone(index)
        result.append(
            Step(
                step=index,
                apart=departures(planned(index), wanted),
                noise=noises.get(index, {}),
                size=sizes(wanted),
                background=backgrounds(wanted),
                moves=wanted.moves,
                epsilon=FLOAT64_EPSILON if task.precision == "fp64" else FLOAT32_EPSILON,
                epsilons=_epsilons(wanted),
            )
        )
    return result


def _epsilons(observation: Observation) -> dict[Key, float]:
    def rounding(tensor: Tensor) -> float:
        return torch.finfo(tensor.dtype).eps if tensor.is_floating_point() else 0.0

    held = {GRADIENT: observation.gradients, BUFFER: observation.buffers, WEIGHT: observation.weights}
    return {Key(kind, name): rounding(tensor) for kind, tensors in held.items() for name, tensor in tensors.items()}
