"""Runs a worker's list of pipeline actions: forwards and backwards of microbatches, one stage at a time."""

import time
from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from sheaf.parallel.ledger import Kept
from sheaf.parallel.passing import Finished, Passing
from sheaf.parallel.post import BACKWARD, FLAGS, Post
from sheaf.parallel.runner import AbstractRunner, Parts
from sheaf.parallel.shares import Dealt
from sheaf.parallel.weights import Later, inputs_first
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
        self._later: dict[tuple[int, int], Later] = {}
        self._apart = plan.schedule == "zero-bubble" and plan.recompute == "none" and not parts.holding.lockstep
        self._step = 0
        self._mine: tuple[Microbatch, ...] = ()

    def runs(self, block: str) -> bool:
        """Whether the block's last call was of the stage under way; outside of forward, of any of this worker's."""
        if self._passing.stage >= 0:
            return self._passing.ran(block)
        return any(self._is_here(stage) for stage in self._passing.where.get(block, ()))

    def run(self, step: int, microbatches: Sequence[Microbatch]) -> None:
        """As the schedule lists them."""
        parts, plan = self.parts, self._plan
        assert isinstance(parts.dealer, Dealt)
        self._step, self.spans = step, []
        self._mine = tuple(microbatch for microbatch, _ in parts.dealer.deal(step, microbatches))
        # in lockstep all replicas go through one list, idle where they have no microbatch
        count = parts.dealer.rounds(microbatches) if parts.holding.lockstep else len(self._mine)
        listed = actions(plan.schedule, workers=plan.pp, stages=plan.num_stages, microbatches=count)
        mine = listed[parts.spread.place.pp]
        self._kept.clear()
        self._later.clear()
        self._batches.clear()
        if not self._is_here(plan.num_stages - 1):
            parts.exchange.send()
        last_forward = max((place for place, action in enumerate(mine) if self._ends(action)), default=-1)
        final = max((place for place, action in enumerate(mine) if action.kind in "BW"), default=-1)
        for place, action in enumerate(mine):
            start, waited = time.perf_counter(), parts.spread.waited_seconds
            parts.holding.enter_stage(action.stage, forward=action.kind == "F")
            if action.microbatch >= len(self._mine):
                self._idle(action)
            elif action.kind == "F":
                self._forward(action)
                if place == last_forward:
                    parts.exchange.send()
            elif action.kind == "B":
                self._backward(action, last=place == final)
            else:
                self._weights(action, last=place == final)
            self.timed(start, waited)
            self.spans.append((action.kind, action.microbatch, action.stage, start, time.perf_counter()))
        self._post.settle()
        self._passing.checking = False

    def close(self) -> None:
        """Give the blocks their own forward back."""
        self._passing.close()

    def _is_here(self, stage: int) -> bool:
        return stage % self._plan.pp == self.parts.spread.place.pp

    def _ends(self, action: Action) -> bool:
        last = self._plan.num_stages - 1
        return action.kind == "F" and action.stage == last and action.microbatch < len(self._mine)

    def _idle(self, action: Action) -> None:
        """Another replica has one microbatch more."""
        if action.kind == "F":
            self.parts.holding.leave_forward()
        elif action.kind == "B":
            self.parts.holding.idle_round()

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
        parts.holding.leave_forward()
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
        leaves = [leaf for stage in sorted(kept.received) for leaf in kept.received[stage]]
        parts.holding.arm(last=last)
        with parts.statistics.backward() if parts.statistics is not None else nullcontext():
            later = inputs_first(roots, gradients, leaves) if self._apart and roots and not kept.hooked else None
            if later is not None:
                self._later[action.microbatch, action.stage] = later
            elif roots:
                torch.autograd.backward(roots, gradients)
        parts.holding.end_backward()
        for stage in sorted(kept.received):
            leaves = kept.received[stage]
            flags = torch.tensor([leaf.grad is not None for leaf in leaves], dtype=torch.uint8)
            self._post.send(flags, action.stage, stage, FLAGS)
            for leaf in leaves:
                if leaf.grad is not None:
                    self._post.send(leaf.grad.contiguous(), action.stage, stage, BACKWARD)

    def _weights(self, action: Action, *, last: bool) -> None:
        """What the backward of inputs has left, if anything."""
        if self.parts.holding.lockstep:
            return
        self.parts.holding.arm(last=last)
        later = self._later.pop((action.microbatch, action.stage), None)
        if later is not None:
            with self.parts.statistics.backward() if self.parts.statistics is not None else nullcontext():
                later()
        self.parts.holding.end_backward()
