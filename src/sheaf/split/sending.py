"""The mode in which replicas send tokens to the experts that other replicas hold, and get back what became of them.

Expert parallelism after Lepikhin et al., 2020, "GShard" (arXiv:2006.16668): experts that are stacked along the first
dimension of their parameters are dealt out over the replicas, each held once; the rest of the model is replicated.
Where a product meets such a parameter with one row of places per expert, or with rows that are sorted by expert, they
go to the experts' owners (all-to-all), stay there through products, biases and elementwise work, and come back when
anything else asks.

Replicas come to the same trips in the same order, each in its own microbatch. Before rows leave, replicas tell each
other how many each has, and what it is about to do: who departs, since its control flow depends on its data, makes all
of them stop with a PlanError. A replica without a microbatch goes along ``idle``: it sends no rows, serves its experts,
and leaves no gradient but theirs.
"""

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.overrides import resolve_name

import sheaf.split.rules  # noqa: F401  # pyright: ignore[reportUnusedImport] - gives the rules to the registry
from sheaf.errors import PlanError
from sheaf.plans.split import Cut, Slice
from sheaf.split.mode import Splitting, leaves
from sheaf.split.moves import sliced
from sheaf.split.places import AbstractPlaces, Stacked
from sheaf.split.registry import FALLBACK, RULES, SENT, is_inplace
from sheaf.split.sent import Sent, Swapping, Travel, Trip, Unsendable, reached
from sheaf.split.tensor import Split

HEAD = 8  # whole numbers that a replica tells before it sends, beside those of its own rows
_END = 0  # of forward; what goes before it is told by the kind of its places


class Sending(Splitting):
    """Runs a replica's forward and loss whose experts are slices. ``parameters`` as for Splitting, all cut along 0.

    ``shared`` are the model's other parameters and its buffers, the same on every replica: what each finds of their
    gradient is added up with that of the rest of its microbatch.
    """

    def __init__(
        self, team: Swapping, parameters: Mapping[int, tuple[str, Slice]], shared: Iterable[Tensor] = ()
    ) -> None:
        super().__init__(team, parameters)
        self.replicas = team
        self._alike = {id(tensor): tensor for tensor in shared}
        self._trips: list[Trip] = []
        self._token: Tensor | None = None
        self._trail = 0
        self._most = 1 + max((held.cut.length for _, held in parameters.values()), default=1)  # numbers of its own
        self.is_idle = self.is_observed = False

    # A microbatch ---------------------------------------------------------------------------------------------------

    @contextmanager
    def microbatch(self, *, idle: bool = False) -> Iterator[None]:
        """Run a microbatch's forward, ``finish`` and backward inside."""
        self._trips, self._token, self._trail, self.is_idle = [], None, 0, idle
        try:
            yield
        finally:
            self._trips, self._token, self.is_idle = [], None, False

    def finish(self, loss: Tensor) -> list[tuple[Tensor, Tensor]]:
        """Forward has run: what else backward starts from, with its gradient (collective).

        Raises PlanError on every replica when one of them has sent tokens to other experts, or has done other things
        with them, than the rest.
        """
        self._agree(_END, "the end", loss.device, ())
        if not self._trips:
            return []
        seen = frozenset[int]() if self.is_idle else reached(loss)[0]
        mine = torch.tensor([id(trip) in seen for trip in self._trips], dtype=torch.int64, device=loss.device)
        said = self.team.collect(mine, [mine.shape] * self.team.workers, "which experts count")
        for trip, *flags in zip(self._trips, *(flags.tolist() for flags in said), strict=True):
            trip.used = any(flags)
        token = self._token
        return [(token, torch.zeros_like(token))] if token is not None and token.requires_grad else []

    # What rules ask for ---------------------------------------------------------------------------------------------

    def send(self, tensor: Tensor, split: "Split | Sent", why: str, places: AbstractPlaces | None = None) -> Sent:
        """Rows of this replica's microbatch to the owners of the experts.

        They are at ``places``, at those of what was sent before, or (experts, *middle, width).
        """
        origin = split.origin or ""
        if places is None:
            stack = Stacked(tensor.shape[0], tuple(tensor.shape[1:-1]))
            places = split.places if isinstance(split, Sent) else stack
        cut = Cut.even(places.num_experts, self.team.workers)
        rows, own = places.rows(tensor), places.own
        if self.is_idle:
            rows, own = places.none(rows.detach()), (0,) * len(own)
        given = (places.num_experts, tensor.shape[-1], zlib.crc32(str(tensor.dtype).encode()))
        told = self._agree(places.kind, f"{why} with {origin}", tensor.device, given, int(rows.requires_grad), *own)
        places = places.settled([one[1:] for one in told])
        wanted = torch.is_grad_enabled() and any(flag for flag, *_ in told)
        moved = self._travel(rows, Trip(self.replicas, cut, places, True, wanted, f"tokens for {origin}{self.place}"))
        return Sent(moved, places, origin)

    def counted(self, ends: Tensor, rows: int) -> tuple[int, ...]:  # noqa: ARG002 - a rehearsal may know no more
        """How many of the rows, which are sorted by expert, each expert has: the first of them end at ``ends[0]``."""
        return tuple(end - start for start, end in pairwise([0, *ends.tolist()]))

    def back(self, sent: Sent) -> Tensor:
        """This replica's own rows, brought back; once, however often they are asked for."""
        local, places = sent.local, sent.places
        wanted = torch.is_grad_enabled() and local.requires_grad
        if sent.home is not None and sent.version == local._version and (sent.traced or not wanted):
            return sent.home
        cut = Cut.even(places.num_experts, self.team.workers)
        moved = self._travel(
            local, Trip(self.replicas, cut, places, False, wanted, f"tokens from {sent.origin}{self.place}")
        )
        home = moved.new_zeros(places.shape(local.shape[-1])) if self.is_idle else places.seen(moved)
        sent.home, sent.version, sent.traced = home, local._version, wanted
        return home

    def is_shared(self, tensor: Tensor) -> bool:
        """Whether a tensor is a parameter or buffer that every replica has whole."""
        return id(tensor) in self._alike

    def whole(self, value: Any, why: str) -> Any:
        """The same value with everything that was sent brought back, in containers too."""
        if isinstance(value, Sent):
            return self.back(value)
        if isinstance(value, list | tuple) and any(isinstance(item, Sent) for item in leaves(tuple(value), {})):
            made = [self.whole(item, why) for item in value]
            return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
        if isinstance(value, dict):
            return {key: self.whole(item, why) for key, item in value.items()}
        return super().whole(value, why)

    def gather(self, split: Split, why: str) -> Tensor:
        """Raises Unsendable: nobody holds all experts."""
        raise self._unsendable(split, why)

    def enter(self, tensor: Tensor, why: str) -> Tensor:
        """A tensor that all replicas have alike, beside slices of experts."""
        if self.is_shared(tensor):
            return tensor
        raise self._unsendable(tensor, why)

    def part(self, tensor: Tensor, dim: int, cut: Cut, why: str) -> Tensor:
        """This worker's experts of a parameter."""
        if isinstance(tensor, Split) and (tensor.axis, tensor.cut) == (dim, cut):
            return tensor.local
        if self.is_shared(tensor):
            return sliced(tensor, dim, cut, self.team.rank)
        raise self._unsendable(tensor, why)

    def total(self, partial: Tensor, why: str) -> Tensor:
        """Raises Unsendable."""
        raise self._unsendable(partial, why)

    # ----------------------------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        given = list(leaves(args, kwargs))
        is_sent = any(type(leaf) is Sent for leaf in given)
        if not is_sent and not any(self._concerns(leaf) for leaf in given):
            return func(*args, **kwargs)
        args = tuple(self._seen(value) for value in args)
        kwargs = {key: self._seen(value) for key, value in kwargs.items()}
        rule = SENT.get(func)
        result = FALLBACK if rule is None else rule(self, func, args, kwargs)
        if result is not FALLBACK:
            if isinstance(result, Sent | tuple):  # more than asking for a shape
                self._note(func, given)
            return result
        why = (resolve_name(func) or getattr(func, "__name__", str(func))).rpartition(".")[2]
        if is_sent:
            if (is_inplace(func) and isinstance(args[0], Sent)) or isinstance(kwargs.get("out"), Sent):
                raise self._unsendable(args[0] if isinstance(args[0], Sent) else kwargs["out"], why)
            args = tuple(self.whole(value, why) for value in args)
            kwargs = {key: self.whole(value, why) for key, value in kwargs.items()}
            return self.__torch_function__(func, types, args, kwargs)
        rule = RULES.get(func)
        split = next((leaf for leaf in leaves(args, kwargs) if type(leaf) is Split), None)
        if split is None:
            return func(*args, **kwargs)
        try:
            result = FALLBACK if rule is None else rule(self, func, args, kwargs)
        except Unsendable as error:
            raise self._unsendable(split, why) from error
        if result is FALLBACK:
            raise self._unsendable(split, why)
        return result

    def _unsendable(self, tensor: Tensor, why: str) -> Unsendable:
        name = (tensor.origin if isinstance(tensor, Split | Sent) else None) or ""
        what = f"{name} is taken for experts and" if name else "a stack of experts"
        return Unsendable(f"{what} meets {why}, where tokens cannot be sent to experts: use tp in place of ep", name)

    def _travel(self, rows: Tensor, trip: Trip) -> Tensor:
        again = torch._C._current_graph_task_id() != -1  # a block runs again in backward: its graph is not used
        chained = torch.is_grad_enabled() and not again
        token = self._token if chained else None
        if token is None:
            token = torch.zeros(1, device=rows.device, requires_grad=True)
        following, moved = Travel.apply(token, rows, trip)
        if chained:
            self._token = following
            self._trips.append(trip)
        return moved

    def _note(self, func: Callable[..., Any], given: Iterable[Any]) -> None:
        """Remember what was done to rows of all replicas: they must all have done the same."""
        numbers = [leaf for leaf in given if not isinstance(leaf, Tensor | torch.device)]
        name = getattr(func, "__name__", str(func))
        self._trail = zlib.crc32(repr((name, numbers)).encode(), self._trail)

    def _agree(
        self, kind: int, what: str, device: torch.device, alike: Sequence[int], *own: int
    ) -> list[tuple[int, ...]]:
        """Tell each other what comes next: ``alike`` must be so on every replica, ``own`` comes back of each."""
        again = torch._C._current_graph_task_id() != -1
        head = (kind, int(again), zlib.crc32(what.encode()), 0 if again else len(self._trips), self._trail)
        values = [*head, *alike, *[0] * (3 - len(alike)), *own, *[0] * (self._most - len(own))]
        told = self.team_told(torch.tensor(values, dtype=torch.int64, device=device), what)
        for replica, other in enumerate(told):
            if other[:HEAD] != told[0][:HEAD]:
                raise PlanError(
                    f"replica {replica} came to other experts, or did other things with their tokens, than replica 0 "
                    f"(here, on replica {self.team.rank}: {what}): their control flow or a number in it depends on the "
                    "microbatch, which expert parallelism cannot follow; use tp in place of ep"
                )
        return [tuple(other[HEAD : HEAD + len(own)]) for other in told]

    def team_told(self, mine: Tensor, what: str) -> list[list[int]]:
        """Everyone's numbers."""
        said = self.team.collect(mine, [mine.shape] * self.team.workers, f"who sends what: {what}{self.place}")
        return [values.tolist() for values in said]
