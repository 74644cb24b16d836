"""One shard: a state machine over a log. The same entries in the same order leave the same bits on its backup."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from sheaf.parallel.server.clock import Clocks
from sheaf.parallel.server.frame import Kind
from sheaf.parallel.server.late import BUFFERED, COMPENSATED, PLAIN, Buffer, adjusted_
from sheaf.parallel.server.places import Arena, Form

_KEPT_CLOCKS = 3  # finished clocks of which losses are still known


@dataclass(frozen=True)
class Terms:
    """What all shards and workers of a run agree on.

    ``staleness`` in clocks, None: unbounded; ``late`` one of ``plans.server.LATE``; ``dropped_beyond`` updates a
    gradient is not applied; ``clip`` the largest global norm of a clock's gradient, at staleness 0; ``lease_seconds``
    without a sign of life end a worker's membership, and a silent seat's.
    """

    workers: int
    shards: int
    staleness: int | None = 0
    late: str = PLAIN
    dropped_beyond: int | None = None
    clip: float | None = None
    lease_seconds: float = 10.0

    @property
    def exact(self) -> bool:
        """Whether each update is the sum over all workers."""
        return self.staleness == 0


@dataclass(frozen=True)
class Entry:
    """One line of the log. ``base`` is the version on which a gradient was computed."""

    kind: Kind
    worker: int = -1
    incarnation: int = 0
    sequence: int = 0
    clock: int = 0
    base: int = 0
    meta: dict[str, Any] = field(default_factory=dict[str, Any])
    arena: Arena | None = None


@dataclass
class Member:
    """What a shard knows of one worker: that nothing of it is applied twice is decided by this alone."""

    incarnation: int = 0
    fenced: int = 0  # incarnations up to this one are not heard any more
    committed: int = 0  # sequence of the last gradient that counts
    staged: Entry | None = None
    history: dict[int, int] = field(default_factory=dict[int, int])  # committed, by earlier incarnations


class Fenced(Exception):
    """The message is of an incarnation that was given up."""


class Shard:
    """The values of one shard, their optimizer, and who has sent what. Not for several threads at once.

    ``values`` are flat tensors by parameter name, over which ``optimizer`` was made; ``scheduler`` steps once per
    clock. ``version`` counts updates. At staleness 0 ``applied`` counts the clocks whose gradients have met.
    """

    def __init__(
        self,
        number: int,
        form: Form,
        values: dict[str, Tensor],
        optimizer: torch.optim.Optimizer,
        terms: Terms,
        scheduler: Any = None,
        start: int = 0,
    ) -> None:
        self.number, self.form, self.values, self.terms = number, form, values, terms
        self.optimizer, self.scheduler = optimizer, scheduler
        self.version, self.applied, self.scheduled = 0, start, start
        self.members = {worker: Member() for worker in range(terms.workers)}
        self.clocks = Clocks(dict.fromkeys(range(terms.workers), start), terms.staleness)
        self.told: dict[int, dict[int, dict[str, Any]]] = {}  # clock -> worker -> what it told with its push
        self.norms: dict[int, float] = {}  # by clock, the square of the norm of this shard's part
        self.whole_norms: dict[int, float] = {}
        self.free: list[Arena] = []  # room that no gradient is in any more
        self.failure: dict[str, Any] | None = None
        self.stop_at: int | None = None
        self.watched: dict[str, Tensor] = {}
        self.buffer = Buffer(terms.workers) if terms.late == BUFFERED else None
        self._round: dict[int, Entry] = {}
        self._sum: dict[str, Tensor] | None = None
        self._pulled: dict[int, tuple[int, Arena]] = {}
        for worker in self.members:  # they all begin with the values that are here now
            self._keep_pulled(Entry(Kind.PULLED, worker))

    def do(self, entry: Entry) -> None:
        """Make one transition. Raises Fenced where the entry's incarnation is no longer heard."""
        member = self.members.get(entry.worker)
        if entry.kind == Kind.APPLY:
            self._apply(entry.clock, entry.meta.get("norm"))
        elif member is None:
            raise Fenced
        elif entry.kind == Kind.JOIN:
            self._join(member, entry)
        elif entry.kind == Kind.FENCE:
            member.fenced = max(member.fenced, entry.incarnation)
        elif entry.kind == Kind.LEAVE:
            self._leave(member, entry)
        elif entry.kind == Kind.COMMIT and entry.meta.get("settled"):
            self._commit(member, entry)
        else:
            if entry.incarnation != member.incarnation or entry.incarnation <= member.fenced:
                raise Fenced
            if entry.kind == Kind.PUSH:
                self._stage(member, entry)
            elif entry.kind == Kind.ABANDON:
                self._abandon(member, entry)
            elif entry.kind == Kind.COMMIT:
                self._commit(member, entry)
            elif entry.kind == Kind.PULLED:
                self._keep_pulled(entry)

    def heard(self, worker: int, incarnation: int) -> bool:
        """Whether messages of this incarnation count."""
        member = self.members.get(worker)
        return member is not None and incarnation == member.incarnation > member.fenced

    def knows(self, worker: int, sequence: int) -> bool:
        """Whether a push came before."""
        member = self.members[worker]
        return sequence <= member.committed or (member.staged is not None and member.staged.sequence == sequence)

    @property
    def ready(self) -> bool:
        """Whether everyone's gradients of the next clock are there, and nothing stops them from being applied."""
        return self.terms.exact and self.failure is None and set(self._round) == set(range(self.terms.workers))

    @property
    def hopeless(self) -> dict[str, Any] | None:
        """Why the next clock will never come: what cannot be applied, or at staleness 0 a worker that is gone."""
        if self.failure is None and self.terms.exact and not self.ready:
            gone = sorted(set(range(self.terms.workers)) - set(self.clocks.workers))
            if gone:
                return {"why": "worker", "worker": gone[0], "clock": self.applied}
        return self.failure

    def allows(self, clock: int) -> bool:
        """Whether a worker at ``clock`` may read the values."""
        return self.applied >= clock if self.terms.exact else self.clocks.allows(clock)

    def partial(self) -> float:
        """The square of the norm of this shard's part of the gradient that is ready."""
        held = list(self._summed().values())
        square = float(torch.nn.utils.get_total_norm(held).double() ** 2) if held else 0.0
        self.norms[self.applied] = square
        return square

    def committed(self, worker: int, incarnation: int) -> int:
        """The sequence of the last gradient of an incarnation that counts."""
        member = self.members[worker]
        return member.committed if incarnation == member.incarnation else member.history.get(incarnation, 0)

    def room(self) -> Arena:
        """Room for a gradient."""
        return self.free.pop() if self.free else self.form.arena()

    def pulled_copy(self, worker: int, request: int) -> Arena | None:
        """What a worker's pull of that request read, when it asks again."""
        known = self._pulled.get(worker)
        return known[1] if known is not None and known[0] == request else None

    def forget(self, start: int) -> None:
        """Begin anew at clock ``start``, but for values, optimizer, scheduler and buffer."""
        self.version, self.applied, self.scheduled = 0, start, start
        self.told, self.norms, self.whole_norms, self.watched = {}, {}, {}, {}
        self.failure = self.stop_at = self._sum = None
        self._round = {}
        for worker in self.members:
            self._keep_pulled(Entry(Kind.PULLED, worker))

    def _join(self, member: Member, entry: Entry) -> None:
        if entry.incarnation < member.incarnation or entry.incarnation <= member.fenced:
            raise Fenced
        if entry.incarnation > member.incarnation:
            member.history[member.incarnation] = member.committed
            self._release(member.staged)
            member.incarnation, member.staged, member.committed = entry.incarnation, None, 0
            self.clocks.enter(entry.worker, entry.clock)
            if member.history.keys() != {0}:  # the first comes with the first values
                self._keep_pulled(replace(entry, sequence=0))

    def _leave(self, member: Member, entry: Entry) -> None:
        if entry.incarnation < member.incarnation:
            return
        self._release(member.staged)
        member.fenced, member.staged = max(member.fenced, entry.incarnation), None
        self.clocks.leave(entry.worker)
        self._pulled.pop(entry.worker, None)
        self._schedule()

    def _stage(self, member: Member, entry: Entry) -> None:
        if not self.knows(entry.worker, entry.sequence):
            member.staged = entry
        else:
            self._release(entry)

    def _abandon(self, member: Member, entry: Entry) -> None:
        if member.staged is not None and member.staged.sequence == entry.sequence:
            self._release(member.staged)
            member.staged, member.committed = None, entry.sequence

    def _commit(self, member: Member, entry: Entry) -> None:
        staged = member.staged
        if entry.sequence <= member.committed or staged is None or staged.sequence != entry.sequence:
            return
        member.committed, member.staged = entry.sequence, None
        self.told.setdefault(staged.clock, {})[entry.worker] = staged.meta
        if staged.meta.get("stop") and self.stop_at is None:
            done = [self.clocks.of(worker) for worker in self.clocks.workers]
            self.stop_at = staged.clock + 1 if self.terms.exact else max(done, default=staged.clock) + 1
        if self.terms.exact:
            self._round[entry.worker] = staged
            self._check()
        else:
            self._late(entry.worker, staged)
            self._release(staged)
        self.clocks.advance(entry.worker, staged.clock + 1)
        self._schedule()
        for clock in [clock for clock in self.told if clock < self.clocks.slowest - _KEPT_CLOCKS]:
            del self.told[clock]

    def _check(self) -> None:
        """At staleness 0: what makes the step impossible, found out alike on every shard."""
        if set(self._round) != set(range(self.terms.workers)):
            return
        told = losses(self._round[worker].meta for worker in sorted(self._round))
        clock = self.applied
        for index, total, weight in told:
            if not math.isfinite(total) or not math.isfinite(weight):
                value = total / weight if weight else total
                self.failure = {"why": "loss", "clock": clock, "microbatch": index, "value": value}
                return
        if not sum(weight for _, _, weight in told):
            self.failure = {"why": "weight", "clock": clock}
        elif not any(entry.meta.get("any") for entry in self._round.values()):
            self.failure = {"why": "unused", "clock": clock}

    def _summed(self) -> dict[str, Tensor]:
        """At staleness 0: the clock's gradients, added in the order of workers."""
        if self._sum is None:
            sums: dict[str, Tensor] = {}
            for worker in sorted(self._round):
                for name, gradient in _used(self._round[worker]).items():
                    if name in sums:
                        sums[name] += gradient
                    else:
                        sums[name] = gradient
            metas = [self._round[worker].meta for worker in sorted(self._round)]
            weight = math.fsum(weight for _, _, weight in losses(metas))
            factor = metas[0].get("expected", weight) / weight
            if sums and factor != 1.0:
                torch._foreach_mul_(list(sums.values()), factor)
            self._sum = sums
        return self._sum

    def _apply(self, clock: int, norm: float | None) -> None:
        if clock < self.applied or self.failure is not None or not self.ready:
            return
        sums = self._summed()
        if self.terms.clip is not None and clock not in self.norms:
            self.partial()  # a backup may be asked for it one day
        if any(entry.meta.get("watch") for entry in self._round.values()):
            self.watched = {name: gradient.clone() for name, gradient in sums.items()}
        if norm is not None and not math.isfinite(norm):
            self.failure = {"why": "norm", "clock": clock, "value": norm}
            return
        if norm is not None:
            self.whole_norms[clock] = norm
        if norm is not None and self.terms.clip is not None and sums:
            one = torch.tensor(norm, dtype=next(iter(sums.values())).dtype)
            torch._foreach_mul_(list(sums.values()), float((self.terms.clip / (one + 1e-6)).clamp(max=1.0)))
        self._update(sums)
        for staged in self._round.values():
            self._release(staged)
        self._round, self._sum = {}, None
        for known in (self.norms, self.whole_norms):
            known.pop(clock - _KEPT_CLOCKS, None)
        self.applied = clock + 1
        self._schedule()

    def _late(self, worker: int, staged: Entry) -> None:
        gradients = _used(staged)
        pulled = self._pulled.get(worker)
        tau = self.version - staged.base
        if self.buffer is not None:
            if gradients and (full := self.buffer.add(gradients)) is not None:
                self._update(full)
            return
        for name, gradient in gradients.items():
            before = pulled[1].views[name] if pulled is not None else None
            adjusted_(self.terms.late, gradient, tau, self.values[name], before)
        if gradients:
            self._update(gradients)

    def _update(self, gradients: dict[str, Tensor]) -> None:
        for name, value in self.values.items():
            value.grad = gradients.get(name)
        self.optimizer.step()
        for value in self.values.values():
            value.grad = None
        self.version += 1

    def _schedule(self) -> None:
        if self.scheduler is None:
            return
        reached = self.applied if self.terms.exact else self.clocks.slowest
        while self.scheduled < reached:
            if isinstance(self.scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
                told = losses(self.told[self.scheduled].values())
                self.scheduler.step(math.fsum(one[1] for one in told) / math.fsum(one[2] for one in told))
            else:
                self.scheduler.step()
            self.scheduled += 1

    def _release(self, entry: Entry | None) -> None:
        if entry is not None and entry.arena is not None:
            self.free.append(entry.arena)

    def _keep_pulled(self, entry: Entry) -> None:
        if self.terms.late != COMPENSATED:
            return
        arena = self._pulled[entry.worker][1] if entry.worker in self._pulled else self.form.arena()
        arena.copy_(self.values)
        self._pulled[entry.worker] = (entry.sequence, arena)


def losses(told: Iterable[dict[str, Any]]) -> list[tuple[int, float, float]]:
    """All microbatches that were told of, in order, with their losses' sums and weights."""
    return sorted((index, total, weight) for each in told for index, total, weight in each.get("losses", ()))


def _used(entry: Entry) -> dict[str, Tensor]:
    """The gradients of parameters that had one."""
    assert entry.arena is not None
    names: Sequence[int] = entry.meta.get("used", ())
    pieces = entry.arena.form.pieces
    return {pieces[place].name: entry.arena.views[pieces[place].name] for place in names}
