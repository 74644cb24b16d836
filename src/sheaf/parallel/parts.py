"""Different plans for different parts: some blocks are replicas' own, others are split over all replicas.

Krizhevsky, 2014, "One weird trick for parallelizing convolutional neural networks" (arXiv:1404.5997), for any blocks
and with the microbatch as the atom: a replica computes its own microbatch in the blocks that are data parallel; for
the others all workers compute every microbatch of the round together, one after the other, each with its slice of the
layers. So the parameters of a split part are held once over all workers, and their gradients never travel.
"""

import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from sheaf.errors import PlanError, nearest
from sheaf.parallel.ledger import Kept
from sheaf.parallel.passing import Finished, Passing
from sheaf.parallel.portion import Portion
from sheaf.parallel.post import BACKWARD, FLAGS, Post
from sheaf.parallel.rehearsal import rehearse
from sheaf.parallel.runner import AbstractRunner, Parts
from sheaf.parallel.shares import Dealt
from sheaf.parallel.world import World
from sheaf.plans import Plan
from sheaf.plans.layout import apportion
from sheaf.task import Blueprint, Microbatch, arguments, as_loss

SPLIT = "tp"


@dataclass(frozen=True)
class Segments:
    """Runs of blocks in forward order that are computed alike: ``blocks`` maps block names to the segments of their
    calls, ``split`` says of each segment whether all workers compute it together. ``between`` maps parameters that are
    used between blocks to segments; ``apart`` are the parameters of split segments.
    """

    blocks: dict[str, tuple[int, ...]]
    split: tuple[bool, ...]
    between: dict[str, int]
    apart: frozenset[str]


def segments(plan: Plan, blueprint: Blueprint, blocks: dict[str, nn.Module]) -> Segments:
    """The segments that a plan's parts mean for a model.

    Raises PlanError for parts that name no block, that name modules inside a block only, and whose parameters are
    shared with a replicated block.
    """
    rehearsal = rehearse(Portion(blueprint), blocks)
    _refuse_names(plan, blueprint.model, blocks)
    where: dict[str, tuple[int, ...]] = {}
    split: list[bool] = []
    for kind, names in groupby(rehearsal.order, key=lambda name: plan.part(name) == SPLIT):
        for name in names:
            where[name] = (*where.get(name, ()), len(split))
        split.append(kind)
    return _owned(plan, blueprint, blocks, where, tuple(split), rehearsal.outside)


def _owned(
    plan: Plan,
    blueprint: Blueprint,
    blocks: dict[str, nn.Module],
    where: dict[str, tuple[int, ...]],
    split: tuple[bool, ...],
    outside: frozenset[str],
) -> Segments:
    canonical = {alias: name for name, aliases in blueprint.names.items() for alias in (name, *aliases)}
    users: dict[str, set[int]] = {name: set() for name in blueprint.names}
    for name, block in blocks.items():
        for parameter, _ in block.named_parameters(remove_duplicate=False):
            if name in where:
                users[canonical[f"{name}.{parameter}" if name else parameter]].update(where[name])
    between: dict[str, int] = {}
    apart: set[str] = set()
    for name, found in users.items():
        kinds = {split[segment] for segment in found}
        if len(kinds) > 1:
            raise PlanError(
                f"parameter {name} is shared between a part that {plan} splits and one that it replicates: give both "
                "the same answer"
            )
        if not found or name in outside:
            between[name] = min(found, default=0)
        if split[min(found, default=0)]:
            apart.add(name)
    return Segments(where, split, between, frozenset(apart))


def _refuse_names(plan: Plan, model: nn.Module, blocks: dict[str, nn.Module]) -> None:
    names = [name for name, _ in model.named_modules()]
    for glob, answer in plan.parts:
        alone = Plan(dp=2, parts=((glob, SPLIT),))
        if answer != SPLIT or any(alone.part(block) for block in blocks):
            continue
        inside = [name for name in names if alone.part(name)]
        if not inside:
            raise PlanError(f"{glob}={answer} matches no module of the model; {nearest(glob, names)}")
        block = next((block for block in blocks if inside[0].startswith(f"{block}.")), "")
        raise PlanError(f"{glob}={answer} matches modules inside {block or 'a block'} only: name whole blocks, {block}")


class PartsPost(Post):
    """Passes tensors between segments: what its owner alone computes goes to all for a split segment, and the gradient
    of what all computed comes from its owner.
    """

    def __init__(self, world: World, split: Sequence[bool]) -> None:
        super().__init__(world, len(split))
        self._split, self.owner = tuple(split), 0

    def send(self, tensor: Tensor, origin: int, target: int, kind: int) -> None:
        """To every worker that runs the target segment for the microbatch of ``owner``."""
        mine = self._world.rank == self.owner
        if self._split[target] or mine:
            if self._split[origin] or mine:
                super().send(tensor, origin, target, kind)
            if mine and self._split[target] and not self._split[origin]:
                for other in range(self._world.workers):
                    if other != self.owner:
                        self.start(tensor, other, self._tag(origin, target, kind))

    def receive(self, out: Tensor, origin: int, target: int, kind: int) -> Tensor:
        """From this worker itself, or from the owner where only that has it."""
        if self._world.rank == self.owner or self._split[origin]:
            return super().receive(out, origin, target, kind)
        return self.finish(out, self.owner, self._tag(origin, target, kind))

    def is_here(self, stage: int) -> bool:  # noqa: ARG002 - every segment is
        """Each worker runs every segment."""
        return True

    def _rank(self, stage: int) -> int:  # noqa: ARG002 - in memory
        return self._world.rank


class PartsRunner(AbstractRunner):
    """Goes round by round: each replica has one microbatch in a round, and split segments compute all of them."""

    def __init__(self, parts: Parts, plan: Plan, passing: Passing, post: PartsPost, found: Segments) -> None:
        super().__init__(parts)
        self._plan, self._passing, self._post, self._found = plan, passing, post, found
        self._kept: dict[tuple[int, int], Kept] = {}
        self._batches: dict[int, Any] = {}
        self._step = 0

    @property
    def leads(self) -> bool:
        """Whether this worker owns the microbatch under way."""
        return self._post.owner == self.parts.spread.world.rank

    def runs(self, block: str) -> bool:
        """Whether the block's last call was of the segment under way."""
        return self._passing.ran(block)

    def run(self, step: int, microbatches: Sequence[Microbatch]) -> None:
        """All rounds of a step."""
        parts = self.parts
        assert isinstance(parts.dealer, Dealt)
        self._step, self.spans = step, []
        shares = apportion(len(microbatches), self._plan.weights)
        starts = [sum(shares[:worker]) for worker in range(len(shares))]
        rounds = max(shares)
        split = self._found.split
        # a parameter may be used in several replicated segments: it is ready in the last that backward comes to
        final = next((segment for segment, together in enumerate(split) if not together), -1)
        for number in range(rounds):
            here = [(worker, microbatches[starts[worker] + number]) for worker, n in enumerate(shares) if number < n]
            for segment in range(len(split)):
                last = segment == len(split) - 1
                self._each(here, segment, forward=True, backward=last and split[segment])
            if number == rounds - 1:
                parts.exchange.send()
            for segment in reversed(range(len(split))):
                if segment == len(split) - 1 and split[segment]:
                    continue
                if number == rounds - 1 and segment == final:
                    parts.holding.arm(last=True)
                self._each(here, segment, forward=False, backward=True)
            self._kept.clear()
            self._batches.clear()
        self._post.settle()
        self._passing.checking = False

    def close(self) -> None:
        """Give the blocks their own forward back."""
        self._passing.close()

    def _each(
        self,
        here: Sequence[tuple[int, Microbatch]],
        segment: int,
        *,
        forward: bool,
        backward: bool,
    ) -> None:
        """A segment of every microbatch of the round that this worker computes."""
        for owner, microbatch in here:
            if not self._found.split[segment] and owner != self.parts.spread.world.rank:
                continue
            self._post.owner = owner
            for kind, wanted, action in (("F", forward, self._forward), ("B", backward, self._backward)):
                if wanted:
                    start, waited = time.perf_counter(), self.parts.spread.waited_seconds
                    action(microbatch, segment)
                    self.timed(start, waited)
                    self.spans.append((kind, microbatch.index, segment, start, time.perf_counter()))

    def _forward(self, microbatch: Microbatch, segment: int) -> None:
        parts, passing = self.parts, self._passing
        if microbatch.index not in self._batches:
            self._batches[microbatch.index] = parts.fetched(self._step, microbatch)
        batch = self._batches[microbatch.index]
        self.position = (self._step, microbatch.index)
        parts.streams.enter(self._step, microbatch.index)
        passing.begin(segment, batch)
        statistics, total = parts.statistics, None
        with statistics.microbatch() if statistics is not None else nullcontext():
            try:
                with parts.autocast(), parts.forward_context(), passing:
                    positional, named = arguments(parts.task, batch)
                    output = parts.holding.model(*positional, **named)
                    loss = as_loss(parts.task.loss(output, batch), len(microbatch.samples))
                    total = passing.bring(loss.sum)
                    weight = passing.bring(loss.weight) if isinstance(loss.weight, Tensor) else loss.weight
                if total is not None and self.leads:
                    parts.exchange.add(microbatch.index, total, weight)
            except Finished:
                pass
            if statistics is not None and self.leads:
                statistics.collect(microbatch.index)
        passing.end(total)
        self._kept[microbatch.index, segment] = passing.kept

    def _backward(self, microbatch: Microbatch, segment: int) -> None:
        parts, kept = self.parts, self._kept.pop((microbatch.index, segment))
        roots: list[Tensor] = []
        gradients: list[Tensor] = []
        for later in sorted(kept.sent):
            flags = torch.zeros(len(kept.sent[later]), dtype=torch.uint8)
            flags = self._post.receive(flags, later, segment, FLAGS)
            for tensor, come in zip(kept.sent[later], flags.tolist(), strict=True):
                if come:
                    out = torch.empty(tensor.shape, dtype=tensor.dtype, device=tensor.device)
                    gradients.append(self._post.receive(out, later, segment, BACKWARD))
                    roots.append(tensor)
        if kept.loss is not None and kept.loss.requires_grad:
            roots.append(kept.loss)
            gradients.append(parts.seed(kept.loss))
        with parts.statistics.backward() if parts.statistics is not None else nullcontext():
            if roots:
                torch.autograd.backward(roots, gradients)
        for earlier in sorted(kept.received):
            leaves = kept.received[earlier]
            flags = torch.tensor([leaf.grad is not None for leaf in leaves], dtype=torch.uint8)
            self._post.send(flags, segment, earlier, FLAGS)
            for leaf in leaves:
                if leaf.grad is not None:
                    self._post.send(leaf.grad.contiguous(), segment, earlier, BACKWARD)


def whole_outside(plan: Plan) -> Callable[[str], bool]:
    """Of a parameter's name: whether it is in a part that is not split."""
    return lambda name: plan.part(name) != SPLIT
