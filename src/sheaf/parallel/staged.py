"""One stage's forward and backward of a microbatch, with what came from earlier stages and goes to later ones."""

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

from sheaf.parallel.ledger import Kept
from sheaf.parallel.passing import Finished, Passing
from sheaf.parallel.post import BACKWARD, FLAGS, Post
from sheaf.parallel.runner import AbstractRunner, Parts
from sheaf.task import Microbatch, arguments, as_loss


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

    def forward(self, microbatch: Microbatch, stage: int) -> None:
        """A microbatch's forward as this stage, and its loss in the last; what backward needs is kept."""
        parts, passing, statistics = self.parts, self._passing, self.parts.statistics
        if microbatch.index not in self._batches:
            self._batches[microbatch.index] = parts.fetched(self._step, microbatch)
        batch, total = self._batches[microbatch.index], None
        self.position = (self._step, microbatch.index)
        parts.streams.enter(self._step, microbatch.index)
        passing.begin(stage, batch)
        with statistics.microbatch() if statistics is not None else nullcontext():
            try:
                with parts.autocast(), parts.holding.forward_context(), parts.forward_context(), passing:
                    positional, named = arguments(parts.task, batch)
                    output = parts.holding.model(*positional, **named)
                    loss = as_loss(parts.task.loss(output, batch), len(microbatch.samples))
                    total = passing.bring(loss.sum)
                    weight = passing.bring(loss.weight) if isinstance(loss.weight, Tensor) else loss.weight
                if total is not None and self.leads:
                    parts.exchange.add(microbatch.index, total, weight)
            except Finished:
                pass
            if statistics is not None and self.collects:
                statistics.collect(microbatch.index)
        passing.end(total)
        parts.holding.leave_forward()
        self._kept[microbatch.index, stage] = passing.kept

    def roots(self, kept: Kept, stage: int) -> tuple[list[Tensor], list[Tensor]]:
        """Where the stage's backward starts, and with which gradients: received, and the loss's own."""
        roots: list[Tensor] = []
        gradients: list[Tensor] = []
        for later in sorted(kept.sent):
            sent = kept.sent[later]
            flags = self._post.receive(torch.zeros(len(sent), dtype=torch.uint8), later, stage, FLAGS)
            for tensor, come in zip(sent, flags.tolist(), strict=True):
                if come:
                    out = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
                    gradients.append(self._post.receive(out, later, stage, BACKWARD))
                    roots.append(tensor)
        if kept.loss is not None and kept.loss.requires_grad:
            roots.append(kept.loss)
            gradients.append(self.parts.seed(kept.loss))
        return roots, gradients

    def send_back(self, kept: Kept, stage: int) -> None:
        """Send earlier stages the gradients of what came from them, where there are any."""
        for earlier in sorted(kept.received):
            leaves: Sequence[Tensor] = kept.received[earlier]
            flags = torch.tensor([leaf.grad is not None for leaf in leaves], dtype=torch.uint8)
            self._post.send(flags, stage, earlier, FLAGS)
            for leaf in leaves:
                if leaf.grad is not None:
                    self._post.send(leaf.grad.contiguous(), stage, earlier, BACKWARD)

    def backward_context(self) -> AbstractContextManager[object]:
        """What a backward runs in."""
        return self.parts.statistics.backward() if self.parts.statistics is not None else nullcontext()
