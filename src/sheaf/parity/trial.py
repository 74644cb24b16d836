"""A plan on trial: serial runs, their noise, the planned run, and what comes of comparing them."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from sheaf.graph.example import global_streams_kept
from sheaf.parity import noise, serial
from sheaf.parity.arithmetic import steady
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
        trial = Trial(task, steps, directory, microbatch=microbatch, device=device)
        return trial.judged(plan, observe())


class Trial:
    """A task trained serially, once, to judge any number of plans by. Observations go to ``directory``."""

    def __init__(self, task: Task, steps: int, directory: Path, *, microbatch: int, device: torch.device) -> None:
        self._task, self._steps, self._directory = task, steps, directory
        self._microbatch, self._device = microbatch, device
        self._alone = self._serial("serial")
        self._wandering: dict[int, dict[Key, float]] | None = None

    def judged(self, plan: str, planned: Read) -> Verdict:
        """The verdict on the run of a plan, read step by step."""
        if self._wandering is None:
            self._wandering = self._noise(self._alone)
        trainings = self._compared(planned, self._alone, self._wandering)
        if all(step.identical for step in trainings):
            return judge(trainings, [], plan)
        following = self._serial("following", planned)
        return judge(trainings, self._compared(planned, following, self._noise(following, planned)), plan)

    def _serial(self, name: str, follow: Read | None = None) -> Read:
        store = Store(self._directory / name)
        run = serial.train(self._task, self._steps, microbatch=self._microbatch, device=self._device, follow=follow)
        for observation in run:
            store.write(observation)
        return store.read

    def _noise(self, base: Read, follow: Read | None = None) -> dict[int, dict[Key, float]]:
        return noise.measure(
            self._task, self._steps, base, microbatch=self._microbatch, device=self._device, follow=follow
        )

    def _compared(self, planned: Read, alone: Read, noises: dict[int, dict[Key, float]]) -> list[Step]:
        return _steps(self._task, self._steps, planned, alone, noises)


@contextmanager
def undisturbed() -> Iterator[None]:
    """Leave Python's, numpy's and torch's random generators and torch's threads as they were; ``steady`` inside."""
    threads = torch.get_num_threads()
    with global_streams_kept(), steady():
        try:
            yield
        finally:
            torch.set_num_threads(threads)


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
