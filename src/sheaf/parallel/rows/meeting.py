"""Gradients of tables meet row by row: each worker sends the rows that it touched, and sums go in worker order.

A shared table's rows go to all workers, who add up the same numbers in the same order; a dealt table's go to the
worker that holds them. Either way a dense gradient is laid out where the optimizer steps, so that its update is that
of one process: rows that nobody touched have a zero.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor, nn

from sheaf.cluster.primitives import Pending
from sheaf.errors import PlanError
from sheaf.parallel.rows.tables import Tables
from sheaf.parallel.world import World

Rows = tuple[Tensor, Tensor]  # ids (k), int64, each once, rising; rows (k, width)
_ID = torch.int32  # as ids travel


@dataclass(frozen=True)
class Form:
    """How one table's rows travel: ``starts`` has where each worker's block begins, and the end; empty where every
    worker holds all rows.
    """

    name: str
    rows: int
    width: int
    dtype: torch.dtype
    narrow: bool = False
    starts: tuple[int, ...] = ()

    def row_bytes(self) -> int:
        """Of one row and its id, as they travel."""
        return self.width * self.dtype.itemsize + _ID.itemsize


class RowsMeeting:
    """Sums the rows of several tables over the workers. Collective: every worker starts and finishes alike.

    ``parameters`` are the tables as this worker holds them. ``sums`` gives the rows of a dealt table that this
    worker's backwards touched; those of a shared one are the rows of its gradient that are not zero.
    ``sent_bytes`` adds up what this worker has sent.
    """

    def __init__(
        self, world: World, tables: Tables, parameters: Mapping[str, nn.Parameter], factor: Callable[[], float]
    ) -> None:
        self._world, self._factor = world, factor
        self._parameters = {name: value for name, value in parameters.items() if _travels(name, value, tables)}
        self.forms = tuple(form_of(name, value, tables) for name, value in self._parameters.items())
        self.sums: Callable[[str], Rows | None] = lambda _name: None
        self.sent_bytes = 0
        self._mine: list[list[Rows]] = []
        self._counts: list[list[int]] = []
        self._received: list[Tensor] = []
        self._given: list[Tensor] = []
        self._pending: Pending | None = None

    @property
    def names(self) -> frozenset[str]:
        """Of the tables that meet here."""
        return frozenset(self._parameters)

    def start(self) -> None:
        """Backwards have run: tell how many rows go where, and send them."""
        world, factor = self._world, self._factor()
        self._mine = [self._dealt(form, self._taken(form, factor)) for form in self.forms]
        told = torch.tensor(
            [[self._mine[table][peer][0].numel() for table in range(len(self.forms))] for peer in range(world.workers)],
            device=world.device,
        )
        heard = torch.empty_like(told)
        world.wait(world.all_to_all(heard, told, "how many rows of tables go where"))
        self._counts = heard.cpu().tolist()
        self._given = [self._packed(peer) for peer in range(world.workers)]
        self._received = [self._room(peer) for peer in range(world.workers)]
        self.sent_bytes += sum(message.numel() for message in self._given)
        self._pending = world.swap(self._received, self._given, f"touched rows of {self.forms[0].name}")

    def finish(self, used: set[str]) -> None:
        """Every table that any worker used has the step's gradient; no other has one."""
        assert self._pending is not None
        self._world.wait(self._pending)
        come = [
            [self._mine[table][self._world.rank] for table in range(len(self.forms))]
            if peer == self._world.rank
            else self._unpacked(peer)
            for peer in range(self._world.workers)
        ]
        for table, form in enumerate(self.forms):
            parameter = self._parameters[form.name]
            parameter.grad = (
                self._summed(form, parameter, [rows[table] for rows in come]) if form.name in used else None
            )
        self._pending, self._mine, self._given, self._received = None, [], [], []

    def _taken(self, form: Form, factor: float) -> Rows:
        """What this worker gives of a table."""
        parameter = self._parameters[form.name]
        _refuse_mixed(form, parameter.grad)
        found = self.sums(form.name) if form.starts else _touched(parameter.grad)
        parameter.grad = None
        if found is None:
            return parameter.new_empty(0, dtype=torch.int64), parameter.detach().new_empty(0, form.width)
        ids, rows = found
        return ids, rows * factor

    def _dealt(self, form: Form, taken: Rows) -> list[Rows]:
        """To each worker what it adds up."""
        if not form.starts:
            return [taken] * self._world.workers
        ids, rows = taken
        places = torch.searchsorted(ids, torch.tensor(form.starts, device=ids.device)).tolist()
        return [(ids[low:high], rows[low:high]) for low, high in pairwise(places)]

    def _packed(self, peer: int) -> Tensor:
        given = [rows[peer] for rows in self._mine]
        if peer == self._world.rank or not any(ids.numel() for ids, _ in given):
            return torch.empty(0, dtype=torch.uint8, device=self._world.device)
        flat = [ids.to(_ID).view(torch.uint8) for ids, _ in given]
        return torch.cat(flat + [rows.contiguous().view(-1).view(torch.uint8) for _, rows in given])

    def _room(self, peer: int) -> Tensor:
        counts = [] if peer == self._world.rank else self._counts[peer]
        size = sum(count * form.row_bytes() for count, form in zip(counts, self.forms, strict=False))
        return torch.empty(size, dtype=torch.uint8, device=self._world.device)

    def _unpacked(self, peer: int) -> list[Rows]:
        counts = self._counts[peer]
        sizes = [count * _ID.itemsize for count in counts]
        sizes += [count * (form.row_bytes() - _ID.itemsize) for count, form in zip(counts, self.forms, strict=True)]
        parts = [part.clone() for part in self._received[peer].split(sizes)]  # each where its type may begin
        return [
            (ids.view(_ID).long(), rows.view(form.dtype).view(-1, form.width))
            for ids, rows, form in zip(parts, parts[len(counts) :], self.forms, strict=False)
        ]

    def _summed(self, form: Form, parameter: nn.Parameter, come: Sequence[Rows]) -> Tensor:
        first = form.starts[self._world.rank] if form.starts else 0
        if form.narrow:
            ids = torch.cat([ids for ids, _ in come]).unique()
            total = parameter.detach().new_zeros(ids.numel(), form.width)
            for mine, rows in come:
                total.index_add_(0, torch.searchsorted(ids, mine), rows)
            return torch.sparse_coo_tensor(ids[None], total, parameter.shape, is_coalesced=True, check_invariants=False)
        whole = torch.zeros_like(parameter)
        for mine, rows in come:
            whole.index_add_(0, mine - first, rows)
        return whole


def _refuse_mixed(form: Form, gradient: Tensor | None) -> None:
    """The optimizer sees a gradient of the kind that the model's own backward makes."""
    if gradient is None or gradient.is_sparse == form.narrow:
        return
    kind, wanted = ("sparse", "sparse=False") if gradient.is_sparse else ("dense", "sparse=True only")
    raise PlanError(
        f"the gradient of {form.name} is {kind}, where its layer says otherwise, and an optimizer does not do the same "
        f"with both: look its rows up with {wanted}"
    )


def _travels(name: str, value: nn.Parameter, tables: Tables) -> bool:
    return value.requires_grad and (name in tables.shared or name in tables.dealt)


def form_of(name: str, value: nn.Parameter, tables: Tables) -> Form:
    """Of a table as this worker holds it."""
    found = tables.dealt.get(name)
    starts: tuple[int, ...] = ()
    rows = value.shape[0]
    if found is not None:
        cut = found.cut
        starts = tuple(cut.offset(worker) for worker in range(len(cut.sizes) + 1))
        rows = cut.length
    return Form(name, rows, value.shape[1:].numel(), value.dtype, name in tables.narrow, starts)


def _touched(gradient: Tensor | None) -> Rows | None:
    """The rows of a gradient that are not all zero; of one kept as rows, all of those."""
    if gradient is None:
        return None
    if gradient.is_sparse:
        rows = gradient.coalesce()
        return rows.indices()[0], rows.values().flatten(1)
    flat = gradient.flatten(1)
    ids = flat.ne(0).any(1).nonzero().view(-1)
    return ids, flat[ids]
