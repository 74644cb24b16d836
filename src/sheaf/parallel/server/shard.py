"""One shard: a state machine over a log. The same entries in the same order leave the same bits on its backup."""

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from sheaf.parallel.server.clock import Clocks
from sheaf.parallel.server.dealing import Dealing
from sheaf.parallel.server.failed import impossible, missed
from sheaf.parallel.server.frame import Kind
from sheaf.parallel.server.late import BUFFERED, COMPENSATED, DELAYED, Buffer, adjusted_
from sheaf.parallel.server.log import Entry, Fenced, Member, Terms, forget, is_good_bye, losses, settles, told_by, used
from sheaf.parallel.server.places import Arena, Form
from sheaf.parallel.server.points import reached
from sheaf.parallel.server.sums import added, forwarded, received, told_of
from sheaf.parallel.server.update import Update
from sheaf.parallel.server.work import Kept, Key


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
        gathers = terms.late in (BUFFERED, DELAYED)
        self.buffer = Buffer(terms.workers, plain_between=terms.late == DELAYED) if gathers else None
        self.kept = Kept() if terms.lent else None
        self.dealing = Dealing(terms.workers, start) if terms.deals and not number else None
        self.round: dict[int, Entry] = {}
        self._sum: dict[str, Tensor] | None = None
        self.pulled: dict[int, tuple[int, Arena]] = {}
        self._step = Update(values, optimizer, scheduled=scheduler is not None)
        for worker in self.members:  # they all begin with the values that are here now
            self._keep_pulled(Entry(Kind.PULLED, worker))

    def do(self, entry: Entry) -> None:
        """Make one transition. Raises Fenced where the entry's incarnation is no longer heard."""
        member = self.members.get(entry.worker)
        if entry.kind == Kind.APPLY:
            self._apply(entry)
        elif entry.kind == Kind.CLOSE:
            self._close(entry.clock, [(one[0], one[1], one[2]) for one in entry.meta["counted"]])
        elif member is None:
            raise Fenced
        elif entry.kind in (Kind.JOIN, Kind.FENCE, Kind.LEAVE, Kind.RETURN) or settles(entry):
            self._of_member(member, entry)
        elif entry.incarnation != member.incarnation or entry.incarnation <= member.fenced:
            raise Fenced
        elif self.kept is not None:
            self._lend(self.kept, entry)
        elif entry.kind == Kind.PUSH:
            self._stage(member, entry)
        elif entry.kind == Kind.ABANDON:
            self._abandon(member, entry)
        elif entry.kind == Kind.COMMIT:
            self._commit(member, entry)
        elif entry.kind == Kind.PULLED:
            self._keep_pulled(entry)
        elif entry.kind == Kind.DRAIN and self.buffer is not None and self.buffer.gathered:
            self._update(self.buffer.given(self.values))

    def _of_member(self, member: Member, entry: Entry) -> None:
        """A worker comes, goes, or is given up."""
        if entry.kind == Kind.JOIN:
            self._join(member, entry)
        elif entry.kind == Kind.FENCE:
            member.fenced = max(member.fenced, entry.incarnation)
        elif entry.kind == Kind.LEAVE:
            self._leave(member, entry)
        elif entry.kind == Kind.RETURN:
            self._give_back(entry.worker)
        elif entry.kind == Kind.COMMIT:
            self._commit(member, entry)

    def heard(self, worker: int, incarnation: int) -> bool:
        """Whether messages of this incarnation count."""
        member = self.members.get(worker)
        return member is not None and incarnation == member.incarnation > member.fenced

    def knows(self, worker: int, sequence: int) -> bool:
        """Whether a push came before."""
        member = self.members[worker]
        staged = member.staged.sequence if member.staged is not None else 0
        return sequence <= max(member.committed, member.abandoned, staged)

    @property
    def ready(self) -> bool:
        """Whether everyone's gradients of the next clock are there, and nothing stops them from being applied."""
        return self.terms.exact and self.failure is None and self._met

    @property
    def hopeless(self) -> dict[str, Any] | None:
        """Why the next clock will never come: what cannot be applied, or at staleness 0 a worker that is gone."""
        if self.failure is None and self.terms.exact and not self.terms.lent and not self.ready:
            gone = sorted(set(range(self.terms.workers)) - set(self.clocks.workers))
            if gone:
                return {"why": "worker", "worker": gone[0], "clock": self.applied}
        return self.failure

    @property
    def _met(self) -> bool:
        """At staleness 0: whether all gradients of the next clock are there."""
        return bool(self.round) if self.terms.lent else set(self.round) == set(range(self.terms.workers))

    @property
    def is_summing(self) -> bool:
        """Whether gradients have been added up that are not applied yet."""
        return self._sum is not None

    @property
    def borrowers(self) -> list[int]:
        """Workers that were lent microbatches and have not covered them."""
        return sorted(set(self.kept.round.lent.values())) if self.kept is not None and self.kept.round else []

    @property
    def counted(self) -> list[Key]:
        """Where shares are stolen: the pushes of which the next clock's gradient is made, once they are all there."""
        return self.kept.counted.get(self.applied, []) if self.kept is not None else []

    def allows(self, clock: int) -> bool:
        """Whether a worker at ``clock`` may read the values."""
        return self.applied >= clock if self.terms.exact else self.failure is None and self.clocks.allows(clock)

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
        """Room for a gradient; the one thing here for several threads at once."""
        try:
            return self.free.pop()
        except IndexError:
            return self.form.arena()

    def pulled_copy(self, worker: int, request: int) -> Arena | None:
        """What a worker's pull of that request read, when it asks again."""
        known = self.pulled.get(worker)
        return known[1] if known is not None and known[0] == request else None

    def forget(self, start: int) -> None:
        """Begin anew at clock ``start``, but for values, optimizer, scheduler and buffer."""
        self.version, self.applied, self.scheduled = 0, start, start
        self.told, self.norms, self.whole_norms, self.watched = {}, {}, {}, {}
        self.failure = self.stop_at = self._sum = None
        self.round = {}
        if self.kept is not None:
            self.kept.forget()
        for worker in self.members:
            self._keep_pulled(Entry(Kind.PULLED, worker))

    def _join(self, member: Member, entry: Entry) -> None:
        if entry.incarnation < member.incarnation or entry.incarnation <= member.fenced:
            raise Fenced
        if entry.incarnation > member.incarnation:
            member.history[member.incarnation] = member.committed
            self._release(member.staged)
            member.incarnation, member.staged, member.left = entry.incarnation, None, False
            member.committed = member.abandoned = 0
            self._give_back(entry.worker)
            self.clocks.enter(entry.worker, entry.clock)
            self._deal(entry.worker)
            if member.history.keys() != {0}:  # the first comes with the first values
                self._keep_pulled(replace(entry, sequence=0))

    def _leave(self, member: Member, entry: Entry) -> None:
        if entry.incarnation < member.incarnation:
            return
        self._release(member.staged)
        member.fenced, member.staged, member.left = max(member.fenced, entry.incarnation), None, is_good_bye(entry)
        self.clocks.leave(entry.worker)
        self._give_back(entry.worker)
        if self.dealing is not None:
            self.dealing.give_back(entry.worker, lost=not member.left)
        self.pulled.pop(entry.worker, None)
        self._schedule()

    def _lend(self, kept: Kept, entry: Entry) -> None:
        """Where shares are stolen: lend a microbatch, keep a push, or say whether it counts."""
        key = entry.worker, entry.incarnation, entry.sequence
        if entry.clock != self.applied or self.round:
            self._release(entry)  # of a step that is closed
        elif entry.kind == Kind.PUSH:
            self._release(kept.pushes.get(key))
            kept.pushes[key] = entry
        elif entry.kind == Kind.TAKE:
            round_ = kept.begun(int(entry.meta["count"]))
            round_.stop = round_.stop or bool(entry.meta.get("stop"))
            if entry.meta["microbatch"] is not None:
                round_.lent[int(entry.meta["microbatch"])] = entry.worker
        elif entry.kind == Kind.CLAIM and key in kept.pushes:
            round_ = kept.begun(int(entry.meta["count"]))
            round_.stop = round_.stop or bool(entry.meta.get("stop"))
            round_.claim(key, [one[0] for one in kept.pushes[key].meta.get("losses", ())])
            if round_.complete:
                self._close(entry.clock, round_.ordered)

    def _close(self, clock: int, keys: list[Key]) -> None:
        """Where shares are stolen: these pushes are the clock's."""
        if self.kept is None or clock != self.applied or self.round:
            return
        if missing := [key for key in keys if key not in self.kept.pushes]:
            self.failure = {"why": "shard", "message": f"shard {self.number} was never sent {missing} of step {clock}"}
            return
        round_ = self.kept.round
        self.round, spare = self.kept.closed(clock, keys)
        self.free += spare
        told = told_of(self.round)
        if (round_ is not None and round_.stop) or any(one.meta.get("stop") for one in self.round.values()):
            self.stop_at = self.stop_at or clock + 1
        for worker, count in (round_.returned if round_ is not None else {}).items():
            told.setdefault(worker, {"losses": [], "seconds": 0.0})["returned"] = count
        self.told[clock] = told
        self._check()

    def _give_back(self, worker: int) -> None:
        if self.kept is not None and self.kept.round is not None:
            self.kept.round.give_back(worker)

    def _stage(self, member: Member, entry: Entry) -> None:
        if not self.knows(entry.worker, entry.sequence):
            member.staged = entry
        else:
            self._release(entry)

    def _abandon(self, member: Member, entry: Entry) -> None:
        if member.staged is not None and member.staged.sequence == entry.sequence:
            self._release(member.staged)
            member.staged, member.abandoned = None, entry.sequence

    def _commit(self, member: Member, entry: Entry) -> None:
        staged = member.staged
        if staged is None or (staged.incarnation, staged.sequence) != (entry.incarnation, entry.sequence):
            return
        self._count(member, staged)
        if self.terms.exact:
            self.round[entry.worker] = staged
            self._check()
        else:
            self._late(entry.worker, staged)
            self._release(staged)
        self.clocks.advance(entry.worker, staged.clock + 1)
        self._deal(entry.worker, used=True)
        self._schedule()
        forget(self.told, self.clocks.slowest)

    def _count(self, member: Member, staged: Entry) -> None:
        """A worker's gradient counts."""
        member.committed, member.staged = staged.sequence, None
        self.told.setdefault(staged.clock, {})[staged.worker] = told_by(staged)
        if staged.meta.get("stop") and self.stop_at is None:
            done = [self.clocks.of(worker) for worker in self.clocks.workers]
            self.stop_at = staged.clock + 1 if self.terms.exact else max(done, default=staged.clock) + 1

    def _check(self) -> None:
        """At staleness 0, once all gradients of the next clock are there: whether they can be applied."""
        if self._met:
            self.failure = impossible(list(self.round.values()), self.number, self.applied) or self.failure

    def _deal(self, worker: int, *, used: bool = False) -> None:
        """A worker needs a next part where it has none; ``used``: what it had is."""
        if self.dealing is not None:
            self.dealing.deal(worker, self.clocks.workers, used=used)

    def _summed(self) -> dict[str, Tensor]:
        """At staleness 0: the clock's gradients, added in the order of workers."""
        if self._sum is None:
            self._sum = added(self.round)
        return self._sum

    def meeting(self, norm: float | None) -> Entry:
        """At staleness 0: the entry with which the gradients that are ready meet; ``norm`` is that over all shards."""
        entry = forwarded(self.round, self._summed()) if self.terms.sums else Entry(Kind.APPLY, clock=self.applied)
        entry.meta["norm"] = norm
        return entry

    def _receive(self, entry: Entry) -> None:
        """On a backup: a clock's sum came, and with it every worker's part counts."""
        for member in self.members.values():
            self._release(member.staged)
            member.staged = None
        for staged in self.round.values():
            self._release(staged)
        self.round, self._sum = received(entry), used(entry)
        for worker, staged in self.round.items():
            self._count(self.members[worker], staged)
            self.clocks.advance(worker, staged.clock + 1)

    def _apply(self, entry: Entry) -> None:
        clock, norm = entry.clock, entry.meta.get("norm")
        if clock == self.applied and entry.arena is not None and self._sum is None:
            self._receive(entry)
        if clock > self.applied:
            self.failure = missed(self.number, self.applied, clock)
        if clock < self.applied or not self.ready:
            return
        sums = self._summed()
        if self.terms.clip is not None and clock not in self.norms:
            self.partial()  # a backup may be asked for it one day
        if any(entry.meta.get("watch") for entry in self.round.values()):
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
        for staged in self.round.values():
            self._release(staged)
        self.round, self._sum = {}, None
        for known in (self.norms, self.whole_norms, self.told):
            forget(known, clock + 1)
        self.applied = clock + 1
        self._schedule()

    def _late(self, worker: int, staged: Entry) -> None:
        gradients = used(staged)
        pulled = self.pulled.get(worker)
        tau = self.version - staged.base
        if self.buffer is not None:
            if gradients and (full := self.buffer.add(gradients, self.optimizer, self.values)) is not None:
                self._update(full)
            elif gradients and self.buffer.ahead:
                self.version += 1
            return
        for name, gradient in gradients.items():
            before = pulled[1].views[name] if pulled is not None else None
            adjusted_(self.terms.late, gradient, tau, self.values[name], before)
        if gradients:
            self._update(gradients)

    def _update(self, gradients: dict[str, Tensor]) -> None:
        reached("primary.during_apply")
        self.version += 1
        self._step(gradients)

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
        arena = self.pulled[entry.worker][1] if entry.worker in self.pulled else self.form.arena()
        arena.copy_(self.values)
        self.pulled[entry.worker] = (entry.sequence, arena)
