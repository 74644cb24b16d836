"""Different plans for different parts: some blocks are replicas' own, others are split over all replicas.

Krizhevsky, 2014, "One weird trick for parallelizing convolutional neural networks" (arXiv:1404.5997), for any blocks
and with the microbatch as the atom: a replica computes its own microbatch in the blocks that are data parallel; for
the others all workers compute every microbatch of the round together, one after the other, each with its slice of the
layers. So the parameters of a split part are held once over all workers, and their gradients never travel.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

import torch
from torch import Tensor, nn

from sheaf.errors import PlanError, nearest
from sheaf.parallel.passing import Passing
from sheaf.parallel.portion import Portion
from sheaf.parallel.post import Post
from sheaf.parallel.rehearsal import homes_of, rehearse
from sheaf.parallel.runner import Parts
from sheaf.parallel.shares import Dealt
from sheaf.parallel.staged import AbstractStaged
from sheaf.parallel.world import World
from sheaf.plans import Plan
from sheaf.plans.layout import apportion
from sheaf.task import Blueprint, Microbatch

SPLIT = "tp"


@dataclass(frozen=True)
class Segments:
    """Runs of blocks in forward order that are computed alike: ``blocks`` maps block names to the segments of their
    calls, ``split`` says of each segment whether all workers compute it together. ``homes`` maps parameters that are
    used between blocks to segments; ``apart`` are the parameters of split segments.
    """

    blocks: dict[str, tuple[int, ...]]
    split: tuple[bool, ...]
    homes: dict[str, int]
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
    users = {
        name: {segment for block in found for segment in where.get(block, ())}
        for name, found in homes_of(Portion(blueprint), blocks).items()
    }
    homes: dict[str, int] = {}
    apart: set[str] = set()
    for name, found in users.items():
        kinds = {split[segment] for segment in found}
        if len(kinds) > 1:
            raise PlanError(
                f"parameter {name} is shared between a part that {plan} splits and one that it replicates: give both "
                "the same answer"
            )
        if not found or name in outside:
            homes[name] = min(found, default=0)
        if split[min(found, default=0)]:
            apart.add(name)
    return Segments(where, split, homes, frozenset(apart))


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


class PartsRunner(AbstractStaged):
    """Goes round by round: each replica has one microbatch in a round, and split segments compute all of them."""

    def __init__(self, parts: Parts, plan: Plan, passing: Passing, post: PartsPost, found: Segments) -> None:
        super().__init__(parts, passing, post)
        self._plan, self._found, self._owned = plan, found, post

    @property
    def leads(self) -> bool:
        """Whether this worker owns the microbatch under way."""
        return self._owned.owner == self.parts.spread.world.rank

    @property
    def collects(self) -> bool:
        """As for the loss."""
        return self.leads

    def run(self, step: int, microbatches: Sequence[Microbatch]) -> None:
        """All rounds of a step."""
        parts = self.parts
        assert isinstance(parts.dealer, Dealt)
        self.begin(step)
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
        self.end()

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
            self._owned.owner = owner
            for kind, wanted, action in (("F", forward, self.forward), ("B", backward, self._backward)):
                if wanted:
                    start, waited = time.perf_counter(), self.parts.spread.waited_seconds
                    action(microbatch, segment)
                    self.timed(start, waited)
                    self.spans.append((kind, microbatch.index, segment, start, time.perf_counter()))

    def _backward(self, microbatch: Microbatch, segment: int) -> None:
        kept = self._kept.pop((microbatch.index, segment))
        roots, gradients = self.roots(kept, segment)
        with self.backward_context():
            if roots:
                torch.autograd.backward(roots, gradients)
        self.send_back(kept, segment)


def whole_outside(plan: Plan) -> Callable[[str], bool]:
    """Of a parameter's name: whether it is in a part that is not split."""
    return lambda name: plan.part(name) != SPLIT
