"""Different plans for different parts: some blocks are replicas' own, others are split over all replicas.

Krizhevsky, 2014, "One weird trick for parallelizing convolutional neural networks" (arXiv:1404.5997), for any blocks
and with the microbatch as the atom: a replica computes its own microbatch in the blocks that are data parallel; for
the others all workers compute every microbatch of the round together, each with its slice of the layers: one after
the other, or at once where that gives the same (``sheaf.parallel.together``). So the parameters of a split part are
held once over all workers, and their gradients never travel.
"""

import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any

import torch
from torch import Tensor, nn

from sheaf.errors import PlanError, nearest
from sheaf.parallel.passing import Passing
from sheaf.parallel.portion import Portion
from sheaf.parallel.post import BACKWARD, FORWARD, Post, packed, unpacked, unpacked_room
from sheaf.parallel.rehearsal import homes_of, rehearse
from sheaf.parallel.runner import Parts
from sheaf.parallel.shares import Dealt
from sheaf.parallel.staged import AbstractStaged
from sheaf.parallel.stand_ins import signature
from sheaf.parallel.together import NotAlikeError, Together, put_together
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


@dataclass(frozen=True)
class Member:
    """A microbatch of a round: who has it, of how many samples it is, and what the segment received for it when it ran
    alone: from which segment, and the shape.
    """

    owner: int
    samples: int
    arrival: tuple[int, tuple[int, ...]]


class PartsPost(Post):
    """Passes tensors between segments: what its owner alone computes goes to all for a split segment, and the gradient
    of what all computed comes from its owner.
    """

    def __init__(self, world: World, split: Sequence[bool]) -> None:
        super().__init__(world, len(split))
        self._split, self.owner = tuple(split), 0
        self.members: tuple[Member, ...] = ()
        self.arrivals: list[tuple[int, tuple[int, ...]]] = []  # of the forward under way: from where, and the shape

    def send(self, tensor: Tensor, origin: int, target: int, kind: int) -> None:
        """To every worker that runs the target segment for the microbatch of ``owner``."""
        if self._passes(origin, target):
            super().send(tensor, origin, target, kind)
        for other in self._others(origin, target):
            self.start(tensor, other, self._tag(origin, target, kind))

    def receive(self, out: Tensor, origin: int, target: int, kind: int) -> Tensor:
        """From this worker itself, or from the owner where only that has it; of several microbatches, row after row.

        Raises NotAlikeError where these have not the shapes that they have one by one.
        """
        if not self.members:
            if kind == FORWARD:
                self.arrivals.append((origin, tuple(out.shape)))
            return self._received(out, origin, target, kind)
        tag, pieces = self._tag(origin, target, kind), list(out.split(self._rows(out, origin)))
        for member, piece in zip(self.members, pieces, strict=True):
            far = member.owner != self._world.rank and not self._split[origin]
            if far and piece.numel():
                self._expected.setdefault(tag, deque()).append((self._coming(piece, member.owner, tag), piece))
        for member, piece in zip(self.members, pieces, strict=True):
            self.owner = member.owner
            found = self._received(piece, origin, target, kind)
            if found is not piece:
                piece.copy_(found)
        return out

    def together(self, members: Sequence["Member"]) -> None:
        """What comes from now on is for these microbatches at once; none: for that of ``owner``."""
        self.members = tuple(members)

    def send_gradients(self, leaves: Sequence[Tensor], origin: int, target: int) -> None:
        """As tensors are sent; of several microbatches, which all computed together, each owner takes its rows."""
        if self.members:
            self._take_gradients(leaves, origin, target)
            return
        if self._passes(origin, target):
            super().send_gradients(leaves, origin, target)
        others = self._others(origin, target)
        message = packed(leaves) if others else None
        for other in others:
            assert message is not None
            self.start(message, other, self._tag(origin, target, BACKWARD))

    def receive_gradients(self, tensors: Sequence[Tensor], origin: int, target: int) -> list[Tensor | None]:
        """From this worker itself, or from the owner."""
        if self._world.rank == self.owner or self._split[origin]:
            return super().receive_gradients(tensors, origin, target)
        return unpacked(self.finish(unpacked_room(tensors), self.owner, self._tag(origin, target, BACKWARD)), tensors)

    def _passes(self, origin: int, target: int) -> bool:
        """Whether this worker goes on with a tensor that it has."""
        mine = self._world.rank == self.owner
        return (self._split[target] or mine) and (self._split[origin] or mine)

    def _others(self, origin: int, target: int) -> list[int]:
        """Who gets a tensor that this worker alone has."""
        alone = self._world.rank == self.owner and self._split[target] and not self._split[origin]
        return [other for other in range(self._world.workers) if alone and other != self.owner]

    def _received(self, out: Tensor, origin: int, target: int, kind: int) -> Tensor:
        if self._world.rank == self.owner or self._split[origin]:
            return super().receive(out, origin, target, kind)
        return self.finish(out, self.owner, self._tag(origin, target, kind))

    def _rows(self, out: Tensor, origin: int) -> list[int]:
        """How many rows of a tensor are each member's: as many as it had alone, and in proportion to its samples."""
        samples = sum(member.samples for member in self.members)
        rows: list[int] = []
        for member in self.members:
            known, shape = member.arrival
            count = shape[0] if shape else 0
            fits = known == origin and shape[1:] == tuple(out.shape[1:])
            if not fits or count * samples != out.shape[0] * member.samples:
                raise NotAlikeError
            rows.append(count)
        return rows

    def _take_gradients(self, leaves: Sequence[Tensor], origin: int, target: int) -> None:
        """Each member's rows, for whoever goes on with it here."""
        samples, before = sum(member.samples for member in self.members), 0
        for member in self.members:
            mine: list[Tensor | None] = []
            for gradient in [leaf.grad for leaf in leaves]:
                if gradient is None:
                    mine.append(None)
                    continue
                each = gradient.shape[0] // samples
                mine.append(gradient.narrow(0, before * each, member.samples * each))
            if self._split[target] or member.owner == self._world.rank:
                tag = self._tag(origin, target, BACKWARD)
                self._own_gradients.setdefault(tag, deque()).append(mine)
            before += member.samples

    def is_here(self, stage: int) -> bool:  # noqa: ARG002 - every segment is
        """Each worker runs every segment."""
        return True

    def _rank(self, stage: int) -> int:  # noqa: ARG002 - in memory
        return self._world.rank


class PartsRunner(AbstractStaged):
    """Goes round by round: each replica has one microbatch in a round, and split segments compute all of them.

    The last segment, where it is split, computes them at once where ``together`` names the blocks that allow it.
    """

    def __init__(
        self,
        parts: Parts,
        plan: Plan,
        passing: Passing,
        post: PartsPost,
        found: Segments,
        together: Together,
    ) -> None:
        super().__init__(parts, passing, post)
        self._plan, self._found, self._owned = plan, found, post
        passing.rows, self._together = together.rows, together
        self._alone: dict[
            Any, tuple[int, tuple[int, ...]] | None
        ] = {}  # what the last segment received of such a batch
        self._unlike: set[Any] = set()
        self._owner_of: dict[int, int] = {}

    @property
    def leads(self) -> bool:
        """Whether this worker owns the microbatch under way."""
        return self._owned.owner == self.parts.spread.world.rank

    @property
    def collects(self) -> bool:
        """As for the loss."""
        return self.leads and not self._owned.members

    def runs(self, block: str) -> bool:
        """Whether the block's last call was of the segment under way, for one microbatch."""
        return super().runs(block) and not self._owned.members

    def answers(self, microbatch: Microbatch) -> bool:
        """Whether this worker owns a microbatch."""
        return self._owner_of.get(microbatch.index) == self.parts.spread.world.rank

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
            self._owner_of = {microbatch.index: worker for worker, microbatch in here}
            for segment in range(len(split)):
                last = segment == len(split) - 1
                if not (last and split[segment] and self._at_once(here, segment)):
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
            self._owned.arrivals = []
            if forward:
                self._noted("F", microbatch, segment, lambda: self.forward(microbatch, segment))  # noqa: B023
            if backward:
                self._noted("B", microbatch, segment, lambda: self._backward(microbatch, segment))  # noqa: B023

    def _at_once(self, here: Sequence[tuple[int, Microbatch]], segment: int) -> bool:
        """Forward and backward of the last segment for all microbatches of the round; False where that cannot be."""
        batches = [self.batch_of(microbatch) for _, microbatch in here]
        known = [one for batch in batches if (one := self._alone.get(signature(batch))) is not None]
        if len(here) == 1 or self._passing.checking or len(known) < len(here):
            return False
        rows = [len(microbatch.samples) for _, microbatch in here]
        batch = put_together(batches, rows)
        if batch is None or signature(batch) in self._unlike:
            return False
        owners = [owner for owner, _ in here]
        self._owned.together([Member(*one) for one in zip(owners, rows, known, strict=True)])
        members = list(zip([microbatch for _, microbatch in here], batches, strict=True))
        first = here[0][1]
        self._together.members = tuple((self._step, one.index, len(one.samples)) for _, one in here)
        try:
            self._noted("F", first, segment, lambda: self.through(members, batch, segment))
        except NotAlikeError:
            self._unlike.add(signature(batch))
            self._owned.together(())
            return False
        finally:
            self._together.members = ()
        self._noted("B", first, segment, lambda: self._backward(first, segment))
        self._owned.together(())
        return True

    def returned(self, output: Any, members: Sequence[tuple[Microbatch, Any]]) -> None:
        """Learn of a microbatch alone whether it may go with others."""
        passing, post = self._passing, self._owned
        last = passing.stage == len(self._found.split) - 1
        rows = sum(len(microbatch.samples) for microbatch, _ in members)
        fits = isinstance(output, Tensor) and output.ndim and output.shape[0] == rows
        if post.members:
            if not fits:
                raise NotAlikeError
        elif last and self._found.split[-1]:
            may = fits and passing.by_rows and passing.computed_here(output) and len(post.arrivals) == 1
            self._alone.setdefault(signature(members[0][1]), post.arrivals[0] if may else None)

    def _noted(self, kind: str, microbatch: Microbatch, segment: int, action: Callable[[], None]) -> None:
        start, waited = time.perf_counter(), self.parts.spread.waited_seconds
        action()
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
