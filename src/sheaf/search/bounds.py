"""The least that a plan could take and hold, found without pricing it: what a search of many plans leaves out by.

Every bound is below the price, whatever the plan's other answers: computing of the busiest replica, what its layers
send, a pipeline's filling and draining; parameters, what is kept for them, and for backward.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from itertools import accumulate
from typing import Any, TypeVar

import numpy as np

from sheaf.cost.basis import Basis
from sheaf.cost.communication import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER
from sheaf.cost.deals import own_seconds
from sheaf.cost.memory import needed_bytes
from sheaf.cost.overheads import meeting_seconds
from sheaf.cost.pipeline import kept_stages, slowest_of_any, stage_names, workers
from sheaf.cost.placement import Seat
from sheaf.graph.facts import BlockFact
from sheaf.plans import Plan
from sheaf.plans.offload import ON_DEVICE, OPTIMIZER
from sheaf.plans.rows import SPARSE, named
from sheaf.plans.schedule import tells_apart
from sheaf.plans.stages import placed

SAFE = 1 - 1e-9  # sums in another order differ by less
T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class Bounds:
    """Bounds for the plans of one question; what they share is worked out once."""

    batch: int
    basis: Callable[[Plan], Basis]  # of a plan
    size: Callable[[Plan], int]  # samples of its microbatches
    _known: dict[Any, Any] = field(default_factory=dict[Any, Any])

    def seconds(self, plan: Plan, *, cut: bool = True) -> float:
        """No step of the plan takes less; without ``cut``, nor of one with other stages, or another schedule."""
        if plan.by_parts:
            return 0.0  # what a part spares is not known before it is priced
        if cut or plan.parts or plan.stages or plan.server:
            return self._computing(plan, cut=cut) + self._offloading(plan)
        mesh = plan.dp, plan.tp, plan.cp, plan.pp, plan.sequence
        key = ("seconds", *mesh, plan.recompute, plan.shares, plan.offload, plan.zero > 0, self.size(plan))
        return self._once(key, lambda: self._computing(plan, cut=False) + self._offloading(plan))

    def _offloading(self, plan: Plan) -> float:
        """Nobody copies and steps less in its host's memory than its part of the model, on the fastest seat."""
        if plan.offload != OPTIMIZER:
            return 0.0
        basis = self.basis(plan)
        paces = (basis.pace(basis.whole, seat) for seat in basis.seating.kinds(plan.workers))
        stepped = basis.whole.trainable_bytes / plan.pp / (plan.alike if plan.zero else 1)
        return SAFE * stepped * min(pace.optimizer_seconds_per_byte for pace in paces)

    def _computing(self, plan: Plan, *, cut: bool) -> float:
        basis, size = self._on_device(plan), self.size(plan)
        full = self.batch // size
        apace = plan.server and plan.serves.staleness is None  # each goes on at its own pace, whoever has more
        if self.basis(plan).alike(plan.workers) and not plan.stolen and ":" not in plan.shares and not apace:
            count = -(-self.batch // size)
            turns = float(max(0, -(-count // plan.dp) - (1 if self.batch % size else 0)))
        else:
            turns = full / plan.dp
        there = id(basis), id(basis.fabric(plan, "tp")), plan.recompute, size, self._where(plan, basis)
        if plan.pp == 1:
            return SAFE * turns * self._once((*there, plan.stolen), lambda: self._whole(plan, basis, size))
        if not cut:
            made = self._once((*there, plan.pp), lambda: self._any_stages(plan, basis, size))
            return SAFE * turns * made
        own, ahead = self._once(
            (*there, plan.pp, plan.num_stages, plan.stages), lambda: self._stages(plan, basis, size)
        )
        # The last microbatch's gradients of weights may be found while those of inputs go on their way back.
        waits = ahead if turns >= 1 and not tells_apart(plan) else (0.0,) * len(ahead)
        return SAFE * max(turns * mine + before for mine, before in zip(own, waits, strict=True))

    def meeting(self, plan: Plan) -> float:
        """Beside ``seconds``, at least so long gradients and weights of an exact plan travel unhidden."""
        if plan.by_parts or named(plan.parts, SPARSE):
            return 0.0  # tables do not travel whole
        if plan.server or not plan.exact or plan.alike == 1 or plan.zero >= 2:
            return 0.0
        basis = self._on_device(plan)
        parts = workers(plan, basis) if plan.pp > 1 else (basis.whole,)
        fullest, links = max(parts, key=lambda part: part.trainable_bytes), basis.fabric(plan, "dp")

        def made() -> float:
            sent = fullest.buckets(plan.bucket_bytes)
            pieces = [links.seconds(REDUCE_SCATTER if plan.zero else ALL_REDUCE, size) for size in sent]
            hidden = max(0.0, basis.cluster.overlap) * sum(pieces[:-1])
            return sum(pieces) - hidden + sum(links.seconds(ALL_GATHER, size) for size in sent if plan.zero)

        least = self._once((id(fullest), id(links), plan.zero, plan.bucket_bytes), made)
        return SAFE * max(0.0, least + min(0.0, meeting_seconds(basis.profile, plan)))

    def fits(self, plan: Plan, *, cut: bool = True) -> bool:
        """Whether what it holds may fit; a plan that fits always does. Without ``cut``, nor does one of the same mesh
        with other stages or another schedule, or that recomputes.
        """
        return self.room(plan, cut=cut)[plan.offload == OPTIMIZER]

    def room(self, plan: Plan, *, cut: bool = True) -> tuple[bool, bool]:
        """Whether there may be room for the plan, as ``fits`` says it, with its optimizers on the devices; and in the
        hosts' memory.
        """
        if plan.server or (plan.parts and (plan.by_parts or named(plan.parts, SPARSE))):
            return True, True
        basis = self._on_device(plan)
        if cut and plan.pp > 1:
            return self._room(plan, basis, cut=True)
        key = (id(basis), "room", plan.zero, plan.alike, plan.pp, plan.workers)
        return self._once(key, lambda: self._room(plan, basis, cut=False))

    def _room(self, plan: Plan, basis: Basis, *, cut: bool) -> tuple[bool, bool]:
        seats = basis.seating.kinds(plan.workers)

        def fits(state: float) -> bool:
            return all(
                any(needed_bytes(int(least * SAFE), seat.device_kind) <= seat.available_bytes for seat in seats)
                for least in self._holds(plan, basis, state, cut=cut)
            )

        # Most of those that are asked about fit neither way.
        return (fits(basis.state), True) if fits(0.0) else (False, False)

    def _holds(self, plan: Plan, basis: Basis, state: float, *, cut: bool) -> Iterator[float]:
        """Bytes that the fullest worker holds at least, with so many of optimizer state for a byte that is trained: by
        the whole model, then by its blocks, which takes longer to find.
        """
        alike = plan.alike
        # Bytes by byte of parameters, and of those that are trained: gradients, the sent or sharded ones, and state.
        held = 1 / alike if plan.zero == 3 else 1.0
        trained = 1 + (alike > 1) + state if not plan.zero else (plan.zero == 1) + (1 + state) / alike
        yield (basis.whole.parameter_bytes * held + basis.whole.trainable_bytes * trained) / plan.pp
        if not cut and plan.pp > 1:
            each = self._blocks_hold(plan, basis)
            yield slowest_of_any((each[:, 0] * held + each[:, 1] * trained).tolist(), plan.pp)
        elif plan.pp > 1:
            key = (id(basis), "held", plan.num_stages, plan.pp, plan.stages, plan.again)
            parameters, stepped, saved = self._once(key, lambda: self._each_holds(plan, basis))
            size = min(self.size(plan), self.batch)
            often = ("kept", plan.schedule, plan.pp, plan.virtual, plan.dp, plan.shares, size, basis.facts.samples)
            kept = self._once(often, lambda: self._keeps(plan, size) * size / basis.facts.samples)
            yield float((parameters * held + stepped * trained + saved * kept).max())

    def _on_device(self, plan: Plan) -> Basis:
        """What the plan has in common with others, wherever their optimizers step."""
        basis = self.basis(plan)
        if plan.offload != OPTIMIZER:
            return basis
        return self._once((id(basis), "on device"), lambda: self.basis(replace(plan, offload=ON_DEVICE)))

    def _whole(self, plan: Plan, basis: Basis, size: int) -> float:
        """What a microbatch takes on the fastest seat."""
        paces = [basis.pace(basis.whole, seat) for seat in basis.seating.kinds(plan.workers)]
        crossing = basis.crossing(basis.whole, basis.fabric(plan, "tp")).seconds(size, again=plan.again)
        return min(own_seconds(plan, pace, size) for pace in paces) + crossing

    def _where(self, plan: Plan, basis: Basis) -> int:
        """Which workers a plan has, as far as that counts: where all are as fast as the first, how busy its host is."""
        return -basis.seats(plan.workers)[0].busy if basis.alike(plan.workers) else plan.workers

    def _scale(self, plan: Plan, basis: Basis, size: int) -> float:
        """What a microbatch takes on the fastest seat, beside one of the facts on the first."""
        first = basis.seats(plan.workers)[0]
        scale = min(_times_as_long(first, seat, basis) for seat in basis.seating.kinds(plan.workers))
        return scale * min(1.0, size / basis.facts.samples)  # launching kernels takes as long for any size

    def _any_stages(self, plan: Plan, basis: Basis, size: int) -> float:
        """What a microbatch takes on the busiest worker at least, wherever the model is cut."""
        return slowest_of_any(basis.block_seconds(plan), plan.pp) * self._scale(plan, basis, size)

    def _stages(self, plan: Plan, basis: Basis, size: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """By worker, what a microbatch takes on its stages, and on all before its first."""
        scale = self._scale(plan, basis, size)
        each = basis.block_seconds(plan)
        costs: list[float] = []
        begin = 0
        for names in stage_names(plan, basis):
            costs.append(sum(each[begin : begin + len(names)]) * scale)
            begin += len(names)
        own = tuple(sum(costs[worker :: plan.pp]) for worker in range(plan.pp))
        return own, (0.0, *accumulate(costs[: plan.pp - 1]))

    def _keeps(self, plan: Plan, size: int) -> np.ndarray:
        """By worker of a pipeline, of how many microbatches of that size it keeps what backward needs: (pp,)."""
        return np.array(kept_stages(plan, -(-self.batch // size))) / plan.virtual

    def _each_holds(self, plan: Plan, basis: Basis) -> np.ndarray:
        """By worker of a pipeline, what its blocks hold as ``_blocks_hold`` says it: (3, pp)."""
        blocks = self._blocks_hold(plan, basis)
        starts = [0, *accumulate(map(len, stage_names(plan, basis)))]
        stages = np.add.reduceat(blocks, starts[:-1])
        return np.ascontiguousarray(stages.reshape(plan.virtual, plan.pp, 3).sum(axis=0).T)

    def _blocks_hold(self, plan: Plan, basis: Basis) -> np.ndarray:
        """By block: bytes of its parameters, of those trained, and of what a microbatch keeps of it: (blocks, 3)."""
        whole = basis.whole.facts

        def held() -> list[tuple[int, int]]:
            sizes = {one.name: (one.size_bytes, one.size_bytes * one.requires_grad) for one in whole.parameters}
            return [_parameters_hold(block, sizes) for block in placed(whole)]

        def made() -> np.ndarray:
            mine = self._once((id(basis), "parameters"), held)
            kept = [_keeps_once(block, again=plan.again) for block in placed(whole)]
            return np.array([(*sizes, size) for sizes, size in zip(mine, kept, strict=True)], dtype=float)

        return self._once((id(basis), "blocks", plan.again), made)

    def _once(self, key: Any, make: Callable[[], T]) -> T:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]


def _parameters_hold(block: BlockFact, sizes: Mapping[str, tuple[int, int]]) -> tuple[int, int]:
    """Bytes of a block's parameters, and of those trained; ``sizes`` by parameter."""
    mine = [sizes[name] for name in block.parameters]
    return sum(size for size, _ in mine), sum(size for _, size in mine)


def _keeps_once(block: BlockFact, *, again: bool) -> int:
    """Bytes that a microbatch keeps of a block."""
    return block.fresh_input_bytes if again and block.composite else block.saved_bytes + block.saved_input_bytes


def _times_as_long(first: Seat, seat: Seat, basis: Basis) -> float:
    """What anything takes on ``seat`` at least, beside what it takes on the ``first``."""
    if basis.profile is not None:
        return first.speed / seat.speed
    return min(
        first.flops_per_second / seat.flops_per_second,
        first.memory_bytes_per_second / seat.memory_bytes_per_second,
        seat.kernel_seconds / first.kernel_seconds if first.kernel_seconds else 1.0,
    )
