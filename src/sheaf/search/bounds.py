"""The least that a plan could take and hold, found without pricing it: what a search of many plans leaves out by.

Every bound is below the price, whatever the plan's other answers: computing of the busiest replica, what its layers
send, a pipeline's filling and draining; parameters and what is kept for them.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any, TypeVar

from sheaf.cost.basis import Basis
from sheaf.cost.communication import ALL_GATHER, ALL_REDUCE, REDUCE_SCATTER
from sheaf.cost.compute import STATE_BYTES_PER_BYTE
from sheaf.cost.memory import needed_bytes
from sheaf.cost.pipeline import stage_names, workers
from sheaf.cost.placement import Seat
from sheaf.cost.step import own_seconds
from sheaf.plans import Plan

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
        basis, size = self.basis(plan), self.size(plan)
        full = self.batch // size
        if basis.alike(plan.workers) and not plan.stolen and ":" not in plan.shares:
            count = -(-self.batch // size)
            turns = float(max(0, -(-count // plan.dp) - (1 if self.batch % size else 0)))
        else:
            turns = full / plan.dp
        if plan.pp == 1:
            key = (id(basis), id(basis.fabric(plan, "tp")), plan.recompute, plan.stolen, size)
            return SAFE * turns * self._once(key, lambda: self._whole(plan, basis, size))
        own, ahead = self._once(
            (id(basis), plan.recompute, size, plan.pp, plan.num_stages, plan.stages, id(basis.fabric(plan, "tp"))),
            lambda: self._stages(plan, basis, size),
        )
        if not cut:
            return SAFE * turns * sum(own) / plan.pp
        # The last microbatch's gradients of weights may be found while those of inputs go on their way back.
        waits = ahead if turns >= 1 and plan.schedule != "zero-bubble" else (0.0,) * len(ahead)
        return SAFE * max(turns * mine + before for mine, before in zip(own, waits, strict=True))

    def meeting(self, plan: Plan) -> float:
        """Beside ``seconds``, at least so long gradients and weights of an exact plan travel unhidden."""
        if plan.by_parts or plan.server or not plan.exact or plan.alike == 1 or plan.zero >= 2:
            return 0.0
        basis = self.basis(plan)
        parts = workers(plan, basis) if plan.pp > 1 else (basis.whole,)
        fullest, links = max(parts, key=lambda part: part.trainable_bytes), basis.fabric(plan, "dp")

        def made() -> float:
            sent = fullest.buckets(plan.bucket_bytes)
            pieces = [links.seconds(REDUCE_SCATTER if plan.zero else ALL_REDUCE, size) for size in sent]
            hidden = max(0.0, basis.cluster.overlap) * sum(pieces[:-1])
            return sum(pieces) - hidden + sum(links.seconds(ALL_GATHER, size) for size in sent if plan.zero)

        return SAFE * self._once((id(fullest), id(links), plan.zero, plan.bucket_bytes), made)

    def fits(self, plan: Plan) -> bool:
        """Whether its parameters, and what is kept for each, may fit; a plan that fits always does."""
        if plan.by_parts or plan.server:
            return True
        basis = self.basis(plan)
        seats = basis.seating.kinds(plan.workers)
        whole = basis.whole
        state = basis.profile.optimizer_state_bytes_per_byte if basis.profile else STATE_BYTES_PER_BYTE
        held, trained, alike = whole.parameter_bytes, whole.trainable_bytes, plan.alike
        least = (
            held / (alike if plan.zero == 3 else 1)
            + trained / (alike if plan.zero >= 2 else 1)
            + trained * state / (alike if plan.zero else 1)
        ) / plan.pp
        return any(needed_bytes(int(least * SAFE), seat.device_kind) <= seat.available_bytes for seat in seats)

    def _whole(self, plan: Plan, basis: Basis, size: int) -> float:
        """What a microbatch takes on the fastest seat."""
        paces = [basis.pace(basis.whole, seat) for seat in basis.seating.kinds(plan.workers)]
        crossing = basis.crossing(basis.whole, basis.fabric(plan, "tp")).seconds(size, again=plan.again)
        return min(own_seconds(plan, pace, size) for pace in paces) + crossing

    def _stages(self, plan: Plan, basis: Basis, size: int) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """By worker, what a microbatch takes on its stages, and on all before its first."""
        first = basis.seats(plan.workers)[0]
        scale = min(_times_as_long(first, seat, basis) for seat in basis.seating.kinds(plan.workers))
        scale *= min(1.0, size / basis.facts.samples)  # launching kernels takes as long for any size
        each = basis.block_seconds(plan)
        costs: list[float] = []
        begin = 0
        for names in stage_names(plan, basis):
            costs.append(sum(each[begin : begin + len(names)]) * scale)
            begin += len(names)
        own = tuple(sum(costs[worker :: plan.pp]) for worker in range(plan.pp))
        return own, (0.0, *accumulate(costs[: plan.pp - 1]))

    def _once(self, key: Any, make: Callable[[], T]) -> T:
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]


def _times_as_long(first: Seat, seat: Seat, basis: Basis) -> float:
    """What anything takes on ``seat`` at least, beside what it takes on the ``first``."""
    if basis.profile is not None:
        return first.speed / seat.speed
    return min(
        first.flops_per_second / seat.flops_per_second,
        first.memory_bytes_per_second / seat.memory_bytes_per_second,
        seat.kernel_seconds / first.kernel_seconds if first.kernel_seconds else 1.0,
    )
