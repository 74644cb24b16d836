"""The rows of dealt tables that this worker needs in a step: pulled once, ahead where they are known; and their sums.

Two generations are kept: rows of the version that the step under way computes with, and those asked for of the next,
which come when their owners have made their update.
"""

import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future

import torch
from torch import Tensor

from sheaf.parallel.rows.meeting import Form, Rows
from sheaf.parallel.rows.pulls import Line, Owner
from sheaf.parallel.world import World


class _Table:
    """Rows of one table as of one version: each has a slot, in the order in which they were asked for."""

    def __init__(self, form: Form, device: torch.device) -> None:
        self.form = form
        self.slot_of = torch.full((form.rows,), -1, device=device)
        self.ids = torch.empty(0, dtype=torch.int64, device=device)  # by slot
        self.request = torch.empty(0, dtype=torch.int64, device=device)  # by slot, the number of the request
        self.values = torch.empty(0, form.width, dtype=form.dtype, device=device)
        self.sums = torch.zeros(0, form.width, dtype=form.dtype, device=device)
        self.touched = torch.zeros(0, dtype=torch.bool, device=device)

    def clear(self) -> None:
        """Forget every row."""
        self.slot_of[self.ids] = -1
        self.ids, self.request = self.ids[:0], self.request[:0]
        self.forget_sums()

    def forget_sums(self) -> None:
        """Forget every gradient."""
        self.sums[: self.touched.numel()].zero_()
        self.touched = torch.zeros_like(self.ids, dtype=torch.bool)

    def unknown(self, ids: Tensor) -> Tensor:
        """Those of the ids that nobody has asked for."""
        return ids[self.slot_of[ids] < 0]

    def add(self, ids: Tensor, request: int) -> None:
        """Give new ids slots."""
        start, count = self.ids.numel(), ids.numel()
        self.slot_of[ids] = torch.arange(start, start + count, device=ids.device)
        self.ids = torch.cat((self.ids, ids))
        self.request = torch.cat((self.request, torch.full_like(ids, request)))
        self.touched = torch.cat((self.touched, self.touched.new_zeros(count)))
        room = self.values.shape[0]
        if start + count > room:
            more = (max(start + count, 2 * room) - room, self.form.width)
            self.values = torch.cat((self.values, self.values.new_empty(more)))
            self.sums = torch.cat((self.sums, self.sums.new_zeros(more)))


class _Generation:
    """All tables as of one version, and what has been asked of their owners."""

    def __init__(self, forms: Sequence[Form], device: torch.device) -> None:
        self.tables = [_Table(form, device) for form in forms]
        self.requests: list[list[tuple[int, list[Tensor], Future[list[Tensor]] | None]]] = []
        self.waiting: set[int] = set()

    def clear(self) -> None:
        """Forget everything; what is still to come is dropped when it comes."""
        for table in self.tables:
            table.clear()
        self.requests, self.waiting = [], set()


class Store:
    """Pulled rows by table name, and the gradients that backwards leave of them.

    ``lines`` by owner: for the version under way, and for the next, whose answers wait for the owner's update (so the
    two are never behind each other). ``missed`` counts rows that were asked for when a forward stood still for them.
    """

    def __init__(
        self, world: World, forms: Sequence[Form], owner: Owner, lines: Mapping[int, tuple[Line, Line]]
    ) -> None:
        self._world, self.forms, self._owner, self._lines = world, tuple(forms), owner, dict(lines)
        self._places = {form.name: place for place, form in enumerate(forms)}
        self._starts = [torch.tensor(form.starts, device=world.device) for form in forms]
        self._now, self._next = _Generation(forms, world.device), _Generation(forms, world.device)
        self.missed = self.pulled = 0

    @property
    def device(self) -> torch.device:
        """Where rows are looked up."""
        return self._world.device

    def begin_step(self) -> None:
        """Forget the last step's gradients."""
        for table in self._now.tables:
            table.forget_sums()

    def updated(self) -> None:
        """This worker has made its update: the next version's rows are those to compute with."""
        self._owner.updated()
        self._now.clear()
        self._now, self._next = self._next, self._now

    def loaded(self) -> None:
        """Other values have been put in the blocks: whatever was asked for is of no use."""
        self._next.clear()
        self.updated()

    def ask(self, wanted: Mapping[str, Tensor], *, ahead: bool = False) -> None:
        """Ask for rows (ids by table, each once, rising) that nobody has asked for; ``ahead``: of the next version."""
        generation = self._next if ahead else self._now
        number = len(generation.requests)
        new: list[Tensor] = []
        for table in generation.tables:
            ids = wanted.get(table.form.name)
            found = table.ids[:0] if ids is None else table.unknown(ids)
            table.add(found, number)
            new.append(found)
        if not any(found.numel() for found in new):
            return
        places = [torch.searchsorted(ids, starts).tolist() for ids, starts in zip(new, self._starts, strict=True)]
        parts: list[tuple[int, list[Tensor], Future[list[Tensor]] | None]] = []
        for worker in range(self._world.workers):
            ids = [one[place[worker] : place[worker + 1]] for one, place in zip(new, places, strict=True)]
            if not any(one.numel() for one in ids):
                continue
            come: Future[list[Tensor]] | None = None
            if worker != self._world.rank:
                self.pulled += sum(one.numel() for one in ids)
                come = self._lines[worker][ahead].ask(self._owner.version + ahead, [one.cpu() for one in ids])
            parts.append((worker, ids, come))
        generation.waiting.add(number)
        generation.requests.append(parts)

    def rows(self, name: str, ids: Tensor) -> Tensor:
        """A copy (k, width) of rows by id (k, each once, rising): waits for those under way, asks for others."""
        place = self._places[name]
        table = self._now.tables[place]
        unknown = table.unknown(ids)
        if unknown.numel():
            self.missed += unknown.numel()
            self.ask({name: unknown})
        slots = table.slot_of[ids]
        if self._now.waiting:
            for number in self._now.waiting.intersection(table.request[slots].unique().tolist()):
                self._install(number)
        return table.values[slots]

    def add(self, name: str, ids: Tensor, gradient: Tensor) -> None:
        """A gradient (k, width) of rows that were looked up."""
        table = self._now.tables[self._places[name]]
        slots = table.slot_of[ids]
        table.sums.index_add_(0, slots, gradient)
        table.touched[slots] = True

    def sums(self, name: str) -> Rows | None:
        """The step's gradients of a table so far; None where no backward came to it."""
        table = self._now.tables[self._places[name]]
        slots = table.touched.nonzero().view(-1)
        if not slots.numel():
            return None
        ids, order = table.ids[slots].sort()
        return ids, table.sums[slots[order]]

    def close(self) -> None:
        """Ask nothing and give nothing any more."""
        for lines in self._lines.values():
            for line in lines:
                line.close()
        self._owner.close()

    def _install(self, number: int) -> None:
        start = time.perf_counter()
        for _, ids, come in self._now.requests[number]:
            found = [None] * len(ids) if come is None else come.result()
            for place, (table, mine, rows) in enumerate(zip(self._now.tables, ids, found, strict=True)):
                if mine.numel():
                    values = self._owner.rows(place, mine) if rows is None else rows.to(mine.device)
                    table.values[table.slot_of[mine]] = values
        self._now.waiting.discard(number)
        self._world.waited_seconds += time.perf_counter() - start
