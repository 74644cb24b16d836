"""One stage's forward and backward of a microbatch, with what came from earlier stages and goes to later ones."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sheaf.parallel.course import Finished
from sheaf.parallel.ledger import Kept
from sheaf.parallel.passing import Passing
from sheaf.parallel.post import Post
from sheaf.parallel.runner import AbstractRunner, Parts
from sheaf.task import Microbatch, as_loss


class AbstractStaged(AbstractRunner):
    """A runner that goes through the model's forward as one stage at a time."""

    def __init__(self, parts: Parts, passing: Passing, post: Post) -> None:
        super().__init__(parts)
        self._passing, self._post = passing, post
        self._kept: dict[tuple[int, int], Kept] = {}  # by microbatch and stage
        self._batches: dict[int, Any] = {}
        self._step = 0

    @property
    def collects(self) -> bool:
        """Whether this worker looks at the batch statistics of the microbatch under way."""
        return True

    def runs(self, block: str) -> bool:
        """Whether the block's last call was of the stage under way."""
        return self._passing.ran(block)

    def close(self) -> None:
        """Give the blocks their own forward back."""
        self._passing.close()

    def begin(self, step: int) -> None:
        """A step begins."""
        self._step, self.spans = step, []
        self._kept.clear()
        self._batches.clear()

    def end(self) -> None:
        """Everything has been sent."""
        self._post.settle()
        self._passing.checking = False

    def batch_of(self, microbatch: Microbatch) -> Any:
        """A microbatch's batch, fetched once."""
        if microbatch.index not in self._batches:
            self._batches[microbatch.index] = self.parts.fetched(self._step, microbatch)
        return self._batches[microbatch.index]

    def forward(self, microbatch: Microbatch, stage: int) -> None:
        """A microbatch's forward as this stage, and its loss in the last; what backward needs is kept."""
        batch = self.batch_of(microbatch)
        self.through([(microbatch, batch)], batch, stage)

    def through(self, members: Sequence[tuple[Microbatch, Any]], batch: Any, stage: int) -> None:
        """The forward of a ``batch``: of a microbatch, or of several put together, whose losses are their own."""
        parts, passing, statistics = self.parts, self._passing, self.parts.statistics
        first, losses = members[0][0], list[tuple[Microbatch, Tensor | None, Tensor | float]]()
        self.position = (self._step, first.index)
        parts.streams.enter(self._step, first.index)
        passing.begin(stage, batch)
        with parts.statistics_of_microbatch():
            try:
                with parts.autocast(), parts.holding.forward_context(), parts.forward_context(), passing:
                    positional, named = parts.arguments(batch)
                    output = parts.holding.model(*positional, **named)
                    passing.in_loss = True
                    self.returned(output, members)
                    start = 0
                    for microbatch, own in members:
                        count = len(microbatch.samples)
                        mine = output if len(members) == 1 else output.narrow(0, start, count)
                        start += count
                        loss = as_loss(parts.task.loss(mine, own), count)
                        total = passing.bring(loss.sum)
                        weight = passing.bring(loss.weight) if isinstance(loss.weight, Tensor) else loss.weight
                        losses.append((microbatch, total, weight))
            except Finished:
                if parts.splitting is not None:
                    parts.splitting.settle()
            for microbatch, total, weight in losses:
                if total is not None and self.answers(microbatch):
                    parts.exchange.add(microbatch.index, total, weight)
            if statistics is not None and self.collects:
                statistics.collect(first.index)
        totals = [total for _, total, _ in losses if total is not None]
        passing.end(torch.stack(totals).sum() if len(totals) > 1 else (totals[0] if totals else None))
        parts.holding.leave_forward()
        self._kept[first.index, stage] = passing.kept

    def answers(self, microbatch: Microbatch) -> bool:  # noqa: ARG002 - parts tell owners apart
        """Whether this worker tells the microbatch's loss."""
        return self.leads

    def returned(self, output: Any, members: Sequence[tuple[Microbatch, Any]]) -> None:
        """The model's own forward has run, and the loss has not."""

    def roots(self, kept: Kept, stage: int) -> tuple[list[Tensor], list[Tensor]]:
        """Where the stage's backward starts, and with which gradients: received, and the loss's own."""
        roots: list[Tensor] = []
        gradients: list[Tensor] = []
        for later in sorted(kept.sent):
            sent = kept.sent[later]
            for tensor, come in zip(sent, self._post.receive_gradients(sent, later, stage), strict=True):
                if come is not None:
                    roots.append(tensor)
                    gradients.append(come)
        if kept.loss is not None and kept.loss.requires_grad:
            roots.append(kept.loss)
            gradients.append(self.parts.seed(kept.loss))
        return roots, gradients

    def send_back(self, kept: Kept, stage: int) -> None:
        """Send earlier stages the gradients of what came from them, where there are any."""
        for earlier in sorted(kept.received):
            self._post.send_gradients(kept.received[earlier], stage, earlier)

    def backward_context(self) -> AbstractContextManager[object]:
        """What a backward runs in."""
        return self.parts.statistics.backward() if self.parts.statistics is not None else nullcontext()
