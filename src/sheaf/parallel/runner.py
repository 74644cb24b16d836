"""Runs a worker's microbatches of a step: fetch, forward, backward, in whatever order the plan has them."""

import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor

from sheaf.errors import WorkerFailed
from sheaf.parallel.calls import Calling
from sheaf.parallel.exchange import Exchange
from sheaf.parallel.holding import AbstractHolding
from sheaf.parallel.precision import LossScale, autocast
from sheaf.parallel.shares import AbstractDealer, Dealt
from sheaf.parallel.spread import Spread
from sheaf.parallel.statistics import BatchStatistics
from sheaf.split.lengthwise import Lengthwise
from sheaf.split.mode import Splitting
from sheaf.split.sending import Sending
from sheaf.task import Loss, Microbatch, Streams, Task, arguments, as_loss, fetch, key, moved


@dataclass
class Expectation:
    """What one backward's loss sum is divided by: the last step's weight, so that gradients have their usual size.

    The exact weight of a step is known only when its last forward has run; what departs is made up for at the end.
    """

    weight: float


@runtime_checkable
class Pulling(Protocol):
    """Pulls what other workers hold, before a forward asks for it."""

    def fetched(self, step: int, microbatch: Microbatch, fetch: Callable[[int, Microbatch], Any]) -> Any:
        """A microbatch's batch; it may fetch more than this one, and ask for what these need."""
        ...

    def around(self, mode: AbstractContextManager[object]) -> AbstractContextManager[object]:
        """What a forward runs in, with what it would run in otherwise around it."""
        ...


@dataclass(frozen=True)
class Parts:
    """What a runner works with."""

    task: Task
    spread: Spread
    holding: AbstractHolding
    dealer: AbstractDealer
    exchange: Exchange
    expectation: Expectation
    scale: LossScale
    streams: Streams
    statistics: BatchStatistics | None
    splitting: Splitting | None
    sending: Sending | Calling | None = None
    pulling: Pulling | None = None

    def fetched(self, step: int, microbatch: Microbatch) -> Any:
        """A microbatch's batch, on this worker's device."""
        if self.pulling is not None:
            return self.pulling.fetched(step, microbatch, self._fetched)
        return self._fetched(step, microbatch)

    def _fetched(self, step: int, microbatch: Microbatch) -> Any:
        batch = fetch(self.task, microbatch.samples, key(self.task.seed, "data", step, microbatch.index))
        return moved(batch, self.spread.world.device, torch.float64 if self.task.precision == "fp64" else None)

    def arguments(self, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """What the model is called with: where sequences are split, this worker's part of them."""
        given = arguments(self.task, batch)
        return self.splitting.inputs(given) if isinstance(self.splitting, Lengthwise) else given

    def forward_context(self) -> AbstractContextManager[object]:
        """What model and loss run in when layers are split."""
        mode = self.sending or self.splitting or nullcontext()
        return mode if self.pulling is None else self.pulling.around(mode)

    def statistics_of_microbatch(self) -> AbstractContextManager[object]:
        """What a microbatch's forward and backward run in where statistics are merged."""
        return self.statistics.microbatch() if self.statistics is not None else nullcontext()

    def autocast(self) -> AbstractContextManager[object]:
        """The task's precision."""
        return autocast(self.task, self.spread.world.device)

    def seed(self, total: Tensor) -> Tensor:
        """The gradient of a microbatch's loss sum."""
        return torch.full_like(total, self.scale.value / self.expectation.weight)

    def tell(self, microbatch: Microbatch, loss: Loss) -> None:
        """Note a microbatch's loss; of several workers that compute it together, one does."""
        if self.spread.leads:
            self.exchange.add(microbatch.index, loss.sum, loss.weight)


class AbstractRunner(ABC):
    """``position`` is the (step, microbatch) whose forward or loss runs, None where that counts for nothing;
    ``compute_seconds`` counts own work.

    ``spans`` holds (kind, microbatch, stage, start, stop) of the last step's actions, where it is made of such, by
    ``time.perf_counter``.
    """

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.spans: list[tuple[str, int, int, float, float]] = []
        self.position: tuple[int, int] | None = (0, 0)
        self.compute_seconds = 0.0

    def compute(self, step: int, microbatches: Sequence[Microbatch], count: int) -> None:
        """Begin a step anew and run ``microbatches`` of it; losses are told among ``count``."""
        self.parts.exchange.begin(count)
        if self.parts.statistics is not None:
            self.parts.statistics.begin_step()
        self.parts.holding.begin_step()
        self.run(step, microbatches)

    @abstractmethod
    def run(self, step: int, microbatches: Sequence[Microbatch]) -> None:
        """All of this worker's forwards and backwards of a step; its losses are sent when it has no more."""

    def runs(self, block: str) -> bool:  # noqa: ARG002 - a pipeline looks
        """Whether this worker runs a block of the model itself."""
        return True

    @property
    def leads(self) -> bool:
        """Whether this worker speaks for those that compute the microbatch under way with it."""
        return self.parts.spread.leads

    def close(self) -> None:  # noqa: B027 - most have put nothing on it
        """Take everything off the model."""

    def timed(self, start: float, waited: float) -> None:
        """Count what has passed since as own work, waiting apart."""
        now = self.parts.spread.world.now()  # an accelerator's time, by which microbatches are dealt and plans priced
        self.compute_seconds += now - start - (self.parts.spread.waited_seconds - waited)


class WholeModel(AbstractRunner):
    """Each microbatch forward through the whole model, then backward, then the next."""

    def run(self, step: int, microbatches: Sequence[Microbatch]) -> None:
        """As the plan deals them."""
        parts, computed = self.parts, 0
        for microbatch, is_last in parts.dealer.deal(step, microbatches):
            batch = parts.fetched(step, microbatch)
            start, waited = time.perf_counter(), parts.spread.waited_seconds
            self._run(step, microbatch, batch, is_last)
            self.timed(start, waited)
            computed += 1
        if parts.holding.lockstep:
            assert isinstance(parts.dealer, Dealt)
            for _ in range(parts.dealer.rounds(microbatches) - computed):
                parts.holding.idle_round()
        if parts.holding.lockstep or not computed:
            parts.exchange.send()

    def _run(self, step: int, microbatch: Microbatch, batch: Any, is_last: Any) -> None:
        parts, holding = self.parts, self.parts.holding
        with parts.statistics_of_microbatch():
            loss = self.forward(step, microbatch, batch)
            self.collect(microbatch, loss)
            last = bool(is_last())
            if last and not holding.lockstep:
                parts.exchange.send()
            holding.arm(last=last)
            if loss.sum.requires_grad:
                try:
                    torch.autograd.backward([loss.sum], [parts.seed(loss.sum)])
                except Exception:
                    with suppress(WorkerFailed):  # what was wrong here counts more than who is gone since
                        holding.gave_up()
                    raise
            holding.end_backward()

    def forward(self, step: int, microbatch: Microbatch, batch: Any, *, counts: bool = True) -> Loss:
        """A microbatch's loss; who looks on is told of one that ``counts``."""
        parts = self.parts
        self.position = (step, microbatch.index) if counts else None
        parts.streams.enter(step, microbatch.index)
        with parts.autocast(), parts.holding.forward_context(), parts.forward_context():
            positional, named = parts.arguments(batch)
            output = parts.holding.model(*positional, **named)
            return as_loss(parts.task.loss(output, batch), len(microbatch.samples))

    def collect(self, microbatch: Microbatch, loss: Loss) -> None:
        """Forward has run: keep the statistics it left, and tell its loss."""
        if self.parts.statistics is not None:
            self.parts.statistics.collect(microbatch.index)
        self.parts.tell(microbatch, loss)
