"""Runs a worker's list of pipeline actions: forwards and backwards of microbatches, one stage at a time."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from sheaf.parallel.passing import Finished, Kept, Passing
from sheaf.parallel.post import BACKWARD, FLAGS, Post
from sheaf.parallel.runner import AbstractRunner, Parts
from sheaf.parallel.shares import Dealt
from sheaf.plans import Plan
from sheaf.plans.schedule import Action, actions
from sheaf.task import Microbatch, arguments, as_loss


class Pipeline(AbstractRunner):
    """Stages of one replica."""

    def __init__(self, parts: Parts, plan: Plan, passing: Passing, post: Post) -> None:
        super().__init__(parts)
        self._plan, self._passing, self._post = plan, passing, post
        self._kept: dict[tuple[int, int], Kept] = {}
        self._batches: dict[int, Any] = {}
        self._step = 0
        self._mine: tuple[Microbatch, ...] = ()

    def runs(self, block: str) -> bool:
        """Whether the block is of the stage under way; outside of forward, of any of this worker's stages."""
        stage = self._passing.where.get(block)
        if stage is None:
            return False
        return stage == self._passing.stage if self._passing.stage >= 0 else self._is_here(stage)

    def run(self, step: int, microbatches: Sequence[Microbatch]) -> None:
        """As the schedule lists them."""
        parts, plan = self.parts, self._plan
        assert isinstance(parts.dealer, Dealt)
        self._step, self.spans = step, []
        self._mine = tuple(microbatch for microbatch, _ in parts.dealer.deal(step, microbatches))
        listed = actions(plan.schedule, workers=plan.pp, stages=plan.num_stages, microbatches=len(self._mine))
        mine = listed[parts.spread.place.pp]
        self._kept.clear()
        self._batches.clear()
        if not self._is_here(plan.num_stages - 1):
            parts.exchange.send()
        last_forward = max((place for place, action in enumerate(mine) if self._ends(action)), default=-1)
        backwards = [place for place, action in enumerate(mine) if action.kind == "B"]
        for place, action in enumerate(mine):
            start, waited = time.perf_counter(), parts.spread.waited_seconds
            if action.kind == "F":
                self._forward(action)
                if place == last_forward:
                    parts.exchange.send()
            elif action.kind == "B":
                self._backward(action, last=place == backwards[-1])
            self.timed(start, waited)
            self.spans.append((*action, start, time.perf_counter()))
        if parts.holding.lockstep:
            for _ in range((parts.dealer.rounds(microbatches) - len(self._mine)) * plan.virtual):
                parts.holding.idle_round()
        self._post.settle()
        self._passing.checking = False

    def close(self) -> None:
        """Give the blocks their own forward back."""
        self._passing.close()

    def _is_here(self, stage: int) -> bool:
        return stage % self._plan.pp == self.parts.spread.place.pp

    def _ends(self, action: Action) -> bool:
        return action.kind == "F" and action.stage == self._plan.num_stages - 1

    def _batch(self, number: int) -> Any:
        if number not in self._batches:
            self._batches[number] = self.parts.fetched(self._step, self._mine[number])
        return self._batches[number]

    def _forward(self, action: Action) -> None:
        parts, passing = self.parts, self._passing
        microbatch, batch = self._mine[action.microbatch], self._batch(action.microbatch)
        self.position = (self._step, microbatch.index)
        parts.streams.enter(self._step, microbatch.index)
        passing.begin(action.stage, batch)
        statistics, total = parts.statistics, None
        with statistics.microbatch() if statistics is not None else nullcontext():
            try:
                with parts.autocast(), parts.holding.forward_context(), parts.forward_context(), passing:
                    positional, named = arguments(parts.task, batch)
                    output = parts.holding.model(*positional, **named)
                    loss = as_loss(parts.task.loss(output, batch), len(microbatch.samples))
                    total = passing.bring(loss.sum)
                    weight = passing.bring(loss.weight) if isinstance(loss.weight, Tensor) else loss.weight
                if total is not None:
                    parts.tell(microbatch, type(loss)(total, weight))
            except Finished:
                pass
            if statistics is not None:
                statistics.collect(microbatch.index)
        passing.end(total)
        self._kept[action.microbatch, action.stage] = passing.kept
        self._batches.pop(action.microbatch, None) if self._plan.virtual == 1 else None

    def _backward(self, action: Action, *, last: bool) -> None:
        parts, kept = self.parts, self._kept.pop((action.microbatch, action.stage))
        roots: list[Tensor] = []
        gradients: list[Tensor] = []
        for stage in sorted(kept.sent):
            flags = self._post.receive(
                torch.zeros(len(kept.sent[stage]), dtype=torch.uint8), stage, action.stage, FLAGS
            )
            for tensor, come in zip(kept.sent[stage], flags.tolist(), strict=True):
                if come:
                    out = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
                    gradients.append(self._post.receive(out, stage, action.stage, BACKWARD))
                    roots.append(tensor)
        if kept.loss is not None and kept.loss.requires_grad:
            roots.append(kept.loss)
            gradients.append(parts.seed(kept.loss))
        parts.holding.arm(last=last)
        with parts.statistics.backward() if parts.statistics is not None else nullcontext():
            if roots:
                torch.autograd.backward(roots, gradients)
        parts.holding.end_backward()
        for stage in sorted(kept.received):
            leaves = kept.received[stage]
            flags = torch.tensor([leaf.grad is not None for leaf in leaves], dtype=torch.uint8)
            self._post.send(flags, action.stage, stage, FLAGS)
            for leaf in leaves:
                if leaf.grad is not None:
                    self._post.send(leaf.grad.contiguous(), action.stage, stage, BACKWARD)
