"""Rounding noise, measured: the serial run again with its sums in other orders, and how far that takes it."""

from collections.abc import Callable

import torch

from sheaf.parity.arithmetic import FLIPPED, ROLLED, Arithmetic
from sheaf.parity.compare import Key, departures, largest
from sheaf.parity.observation import START, Observation
from sheaf.parity.serial import train
from sheaf.task import Task


def reorderings(threads: int) -> tuple[Arithmetic, ...]:
    """The orders in which noise is measured, given how many threads the base run computes with.

    Microbatches meet in two and three partial sums and from last to first, the division comes before or after the
    sum, the kernels add up backwards or from the middle, and another number of threads shares the work. A step of one
    microbatch is reordered inside its kernels, so its noise is not trivially zero.
    """
    return (
        Arithmetic(parts=2, kernels=FLIPPED),
        Arithmetic(parts=3, kernels=ROLLED, late=True),
        Arithmetic(parts=8, threads=1 if threads > 1 else 2),
        Arithmetic(kernels=FLIPPED, late=True),
    )


def measure(
    task: Task,
    steps: int,
    base: Callable[[int], Observation],
    *,
    microbatch: int,
    device: torch.device,
    follow: Callable[[int], Observation] | None = None,
) -> dict[int, dict[Key, float]]:
    """For every step, how far the reordered serial runs come from the ``base`` run at most, tensor by tensor.

    ``follow`` is what the base run followed, if it did.
    """
    noise: dict[int, dict[Key, float]] = {step: {} for step in range(steps)}
    for arithmetic in reorderings(torch.get_num_threads()):
        run = train(task, steps, microbatch=microbatch, device=device, arithmetic=arithmetic, follow=follow)
        for observation in run:
            if observation.step != START:
                apart = departures(observation, base(observation.step))
                noise[observation.step] = largest((noise[observation.step], apart))
    return noise
