"""What all workers tell each other once a step: each microbatch's loss and weight, and whether to stop."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from sheaf.cluster.primitives import Pending
from sheaf.errors import NonFiniteLoss, WorkerFailed
from sheaf.parallel.world import World


@dataclass(frozen=True)
class Told:
    """The sums and weights of every microbatch of the step, in order, and whether a worker was asked to stop."""

    sums: tuple[float, ...]
    weights: tuple[float, ...]
    counts: tuple[int, ...]  # microbatches per worker
    stop: bool

    @property
    def weight(self) -> float:
        """The weight of the whole global batch."""
        return math.fsum(self.weights)

    @property
    def loss(self) -> float:
        """Sum over weight of the whole global batch."""
        return math.fsum(self.sums) / self.weight

    def check(self, step: int) -> None:
        """Raise NonFiniteLoss naming the first microbatch whose loss is no number, or whose batch has no weight."""
        for index, (total, weight) in enumerate(zip(self.sums, self.weights, strict=True)):
            if not math.isfinite(total) or not math.isfinite(weight):
                raise NonFiniteLoss(step, index, total / weight if weight else total)
        if self.weight == 0:
            advice = "No microbatch of the step has any weight: look at the loss's weight (all padding?)."
            raise NonFiniteLoss(step, 0, math.nan, advice)


class Exchange:
    """Collects this worker's losses of a step and adds up everyone's; ``told`` waits for the result once."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._mine = torch.zeros(0, dtype=torch.float64)
        self._pending: Pending | None = None
        self._sent: Tensor | None = None
        self._told: Told | None = None
        self._microbatches = 0
        self._losses: list[tuple[int, Tensor, Tensor | float | int]] = []
        self.stop = False

    def begin(self, microbatches: int) -> None:
        """Begin a step of so many microbatches."""
        self._microbatches = microbatches
        self._losses.clear()
        self._pending = self._sent = self._told = None

    def add(self, microbatch: int, total: Tensor, weight: Tensor | float) -> None:
        """One microbatch of this worker; the numbers are read when they are sent."""
        weight = weight.detach() if isinstance(weight, Tensor) else weight
        self._losses.append((microbatch, total.detach(), weight))

    @property
    def mine(self) -> list[tuple[int, float, float]]:
        """What was added since the step began: (microbatch, sum, weight)."""
        return [(index, float(total), float(weight)) for index, total, weight in self._losses]

    @property
    def own_weight(self) -> float:
        """The weight of the losses that were added since the step began."""
        return math.fsum(weight for _, _, weight in self.mine)

    def send(self) -> None:
        """This worker has no more to add: start the sum over all workers."""
        count = self._microbatches
        device = self._world.device  # an accelerator's losses stay on it, so that it need not finish before this
        mine = torch.zeros(2 * count + self._world.workers + 1, dtype=torch.float64, device=device)
        for microbatch, total, weight in self._losses:
            mine[microbatch] = total.reshape(())
            mine[count + microbatch] = weight.reshape(()) if isinstance(weight, Tensor) else weight
        mine[2 * count + self._world.rank] = len(self._losses)
        mine[-1] = float(self.stop)
        self._sent = mine
        if self._world.workers > 1:
            self._pending = self._world.all_reduce(mine, "losses")

    @property
    def known(self) -> bool:
        """Whether ``told`` would not wait for others."""
        return self._told is not None or (self._sent is not None and (self._pending is None or self._pending.done))

    def told(self) -> Told:
        """Everyone's losses; waits for the last worker to have sent its own.

        Raises WorkerFailed when the workers together did not compute each microbatch once.
        """
        if self._told is None:
            if self._sent is None:
                self.send()
            if self._pending is not None:
                self._world.wait(self._pending)
            assert self._sent is not None
            values = self._sent.cpu().tolist()
            count = self._microbatches
            self._told = Told(
                sums=tuple(values[:count]),
                weights=tuple(values[count : 2 * count]),
                counts=tuple(round(value) for value in values[2 * count : -1]),
                stop=values[-1] > 0,
            )
            if sum(self._told.counts) != count:
                raise WorkerFailed(
                    f"the workers computed {self._told.counts} microbatches of a step that has {count}: they do not "
                    "run the same step; build the step on every worker alike, and load the same checkpoint everywhere"
                )
        return self._told
