"""Runs a worker's list of pipeline actions: forwards and backwards of microbatches, one stage at a time."""

import time
from collections.abc import Sequence
from itertools import islice

import torch

from sheaf.parallel.passing import Passing
from sheaf.parallel.post import Post
from sheaf.parallel.runner import Parts
from sheaf.parallel.shares import Dealt
from sheaf.parallel.staged import AbstractStaged
from sheaf.parallel.weights import Later, inputs_first
from sheaf.plans import Plan
from sheaf.plans.schedule import Action, actions, tells_apart
from sheaf.task import Microbatch


class Pipeline(AbstractStaged):
    """Stages of one replica."""

    def __init__(self, parts: Parts, plan: Plan, passing: Passing, post: Post) -> None:
        super().__init__(parts, passing, post)
        self._plan = plan
        self._later: dict[tuple[int, int], Later] = {}
        self._apart = tells_apart(plan)
        passing.notes_hooks = self._apart
        self._mine: tuple[Microbatch, ...] = ()

    def runs(self, block: str) -> bool:
        """Whether the block's last call was of the stage under way; outside of forward, of any of this worker's."""
        if self._passing.stage >= 0:
            return super().runs(block)
        return any(self._is_here(stage) for stage in self._passing.where.get(block, ()))

    def run(self, step: int, microbatches: Sequence[Microbatch]) -> None:
        """As the schedule lists them."""
        parts, plan = self.parts, self._plan
        assert isinstance(parts.dealer, Dealt)
        self.begin(step)
        self._mine = tuple(microbatch for microbatch, _ in parts.dealer.deal(step, microbatches))
        # in lockstep all replicas go through one list, idle where they have no microbatch
        count = parts.dealer.rounds(microbatches) if parts.holding.lockstep else len(self._mine)
        listed = actions(plan.schedule, workers=plan.pp, stages=plan.num_stages, microbatches=count)
        mine = listed[parts.spread.place.pp]
        self._later.clear()
        if not self._is_here(plan.num_stages - 1):
            parts.exchange.send()
        last_forward = max((place for place, action in enumerate(mine) if self._ends(action)), default=-1)
        final = max((place for place, action in enumerate(mine) if action.kind in "BW"), default=-1)
        ready = [False] * len(mine)
        for place, action in enumerate(mine):
            # Gloo announces a receive on the line on which this worker sends: late, it waits behind what is sent.
            for soon in islice((soon for soon in range(place, len(mine)) if mine[soon].kind != "W"), 2):
                ready[soon] = ready[soon] or self._expect(mine[soon])
                if not ready[soon]:  # messages come in order: what comes first must be received first
                    break
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
        self.end()

    def _is_here(self, stage: int) -> bool:
        return stage % self._plan.pp == self.parts.spread.place.pp

    def _ends(self, action: Action) -> bool:
        last = self._plan.num_stages - 1
        return action.kind == "F" and action.stage == last and action.microbatch < len(self._mine)

    def _expect(self, action: Action) -> bool:
        """Be ready for what an action will receive, as far as that is known; False where it is not."""
        if action.microbatch >= len(self._mine):
            return True
        microbatch = self._mine[action.microbatch]
        if action.kind == "F":
            return self._passing.expect(action.stage, self.batch_of(microbatch))
        kept = self._kept.get((microbatch.index, action.stage))
        if kept is None:
            return False
        for later in sorted(kept.sent):
            self._post.expect_gradients(kept.sent[later], later, action.stage)
        return True

    def _idle(self, action: Action) -> None:
        """Another replica has one microbatch more."""
        if action.kind == "F":
            self.parts.holding.leave_forward()
        elif action.kind == "B":
            self.parts.holding.idle_round()

    def _forward(self, action: Action) -> None:
        microbatch = self._mine[action.microbatch]
        self.forward(microbatch, action.stage)
        if self._plan.virtual == 1:
            self._batches.pop(microbatch.index)

    def _backward(self, action: Action, *, last: bool) -> None:
        parts, kept = self.parts, self._kept.pop((self._mine[action.microbatch].index, action.stage))
        roots, gradients = self.roots(kept, action.stage)
        leaves = [leaf for stage in sorted(kept.received) for leaf in kept.received[stage]]
        parts.holding.arm(last=last)
        with self.backward_context():
            later = inputs_first(roots, gradients, leaves) if self._apart and roots and not kept.hooked else None
            if later is not None:
                self._later[action.microbatch, action.stage] = later
            elif roots:
                torch.autograd.backward(roots, gradients)
        parts.holding.end_backward()
        self.send_back(kept, action.stage)

    def _weights(self, action: Action, *, last: bool) -> None:
        """What the backward of inputs has left, if anything."""
        if self.parts.holding.lockstep:
            return
        self.parts.holding.arm(last=last)
        later = self._later.pop((action.microbatch, action.stage), None)
        if later is not None:
            with self.backward_context():
                later()
        self.parts.holding.end_backward()
