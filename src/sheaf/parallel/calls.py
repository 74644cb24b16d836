"""The mode in which replicas compute modules for each other: experts in a list, each of which one replica holds.

A call of such a module gives a tensor that is due (`sheaf.parallel.due`). When something looks at it, all calls that
have come together go to the owners; each owner runs its modules on the rows of every caller by itself, as the caller
would, and sends back what they make. Whatever the rows depend on, each replica has a microbatch, a path and a pace of
its own: replicas only tell each other what they ask for, and one that asks for nothing more serves until all are done.

Expert parallelism after Lepikhin et al., 2020, "GShard" (arXiv:2006.16668), for modules that nobody has stacked.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter, tree_map

from sheaf.errors import PlanError
from sheaf.parallel.asked import DTYPES, Asked, Call, Flat, Gate
from sheaf.parallel.due import SHAPES, Due, PutOff, valued
from sheaf.parallel.stand_ins import StandIns
from sheaf.parallel.trees import line_of_model
from sheaf.split.listed import MOST_DIMS
from sheaf.split.mode import leaves
from sheaf.split.sent import Swapping, Travel, reached
from sheaf.split.unseen import AbstractSeeing
from sheaf.task import Streams


class Calling(AbstractSeeing):
    """Runs a replica's forward and loss where ``dealt`` says which replica computes which modules.

    ``stand_ins`` know these modules as they were built.
    """

    def __init__(
        self,
        team: Swapping,
        model: nn.Module,
        dealt: Mapping[str, int],
        streams: Streams,
        stand_ins: StandIns,
    ) -> None:
        super().__init__()
        self.team, self._streams, self._stand_ins = team, streams, stand_ins
        self._names, self._owners = tuple(dealt), tuple(dealt.values())
        modules = [model.get_submodule(name) for name in self._names]
        self._forwards: list[Callable[..., Any]] = [module.forward for module in modules]
        self._wrapped = list(zip(modules, (module.__dict__.get("forward") for module in modules), strict=True))
        self._trains = [any(one.requires_grad for one in module.parameters()) for module in modules]
        self._apart = {
            id(one): name for name, module in zip(self._names, modules, strict=True) for one in module.parameters()
        }
        self._put_off, self._waiting = PutOff(), list[Call]()
        self._calls: list[list[Call]] = [[] for _ in range(team.workers)]  # of the microbatch, by caller
        self._trips: list[Flat] = []
        self._token: Tensor | None = None
        self._inside = 0
        self.is_idle = self.is_observed = False
        for number, module in enumerate(modules):
            module.forward = self._called(number)

    def close(self) -> None:
        """Give the modules their own forward back."""
        for module, own in self._wrapped:
            module.__dict__.pop("forward", None)
            if own is not None:
                module.__dict__["forward"] = own
        self._wrapped.clear()

    # A microbatch ---------------------------------------------------------------------------------------------------

    @contextmanager
    def microbatch(self, *, idle: bool = False) -> Iterator[None]:
        """Run a microbatch's forward, ``finish`` and backward inside."""
        self._forget()
        self._streams.forget_others()
        self.is_idle = idle
        try:
            yield
        finally:
            self._forget()
            self.is_idle = False

    def finish(self, loss: Tensor | None) -> list[tuple[Tensor, Tensor]]:
        """Forward has run, or there is none: serve the others until they are done, and say what else backward starts
        from, with its gradient (collective).
        """
        while not self._round(ends=True):
            pass
        if not self._trips:
            return []
        trips, nodes = (frozenset[int](), frozenset[Any]()) if loss is None else reached(loss)
        mine = [id(trip) in trips for trip in self._trips]
        mine += [call.node in nodes for call in self._calls[self.team.rank]]
        shapes = [(len(self._trips) + len(calls),) for calls in self._calls]
        said = self.team.collect(
            torch.tensor(mine, dtype=torch.int64, device=self._device), shapes, "which experts count"
        )
        for flags, calls in zip((one.tolist() for one in said), self._calls, strict=True):
            for call, used in zip(calls, flags[len(self._trips) :], strict=True):
                call.used = bool(used)
        for number, trip in enumerate(self._trips):
            trip.used = any(bool(one[number]) for one in said)
        token = self._token
        return [(token, torch.zeros_like(token))] if token is not None and token.requires_grad else []

    def _forget(self) -> None:
        self._put_off.forget()
        self._waiting, self._trips, self._token = [], [], None
        self._calls = [[] for _ in range(self.team.workers)]

    # Forward --------------------------------------------------------------------------------------------------------

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._inside:
            return func(*args, **kwargs)
        given = list(leaves(args, kwargs))
        if any(type(leaf) is Due for leaf in given):
            if func in SHAPES:
                return func(*args, **kwargs)
            if not any(type(leaf) is Due and leaf.value is not None for leaf in given):
                later = self._put_off.put(func, args, kwargs)
                if later is not None:
                    return later
            whole: tuple[tuple[Any, ...], dict[str, Any]] = self.whole((args, kwargs), "")
            return func(*whole[0], **whole[1])
        self.look(given, func)
        return func(*args, **kwargs)

    def look(self, given: Sequence[Any], func: Callable[..., Any] | None = None) -> None:
        """A function that the mode may see, or not, is about to be given these.

        Raises PlanError for a parameter of a module that another replica may hold.
        """
        for leaf in given:
            name = self._apart.get(id(leaf))
            if name is not None and func not in SHAPES and not self._inside:
                raise PlanError(
                    f"{line_of_model()} uses a parameter of {name} outside of its forward, and one replica alone holds "
                    "it: use tp in place of ep"
                )
        if self._put_off.concerns(func or torch.add, given):
            self.settle()

    def is_away(self, value: Any) -> bool:
        """Whether a tensor is due."""
        return type(value) is Due

    def whole(self, value: Any, why: str) -> Any:  # noqa: ARG002 - as a Splitting's
        """The same value with everything that was due come, in containers too."""
        if any(type(leaf) is Due and leaf.value is None for leaf in tree_iter(value)):
            self.settle()
        return tree_map(valued, value)

    def _called(self, number: int) -> Callable[..., Any]:
        name, forward = self._names[number], self._forwards[number]

        def called(*args: Any, **kwargs: Any) -> Any:
            if self._inside or not self._depth:
                return forward(*args, **kwargs)
            if torch._C._current_graph_task_id() != -1:
                raise PlanError(
                    f"{name} runs again in backward, and another replica may hold it: switch the model's own "
                    "checkpointing off, or use tp in place of ep"
                )
            if len(args) != 1 or kwargs or not _is_rows(args[0]):
                raise PlanError(
                    f"{name} is called with other things than one tensor of rows, which cannot be sent to the replica "
                    "that holds it: use tp in place of ep"
                )
            rows = self.whole(args[0], "")
            self.look([rows])
            return self._due(number, rows)

        return called

    def _due(self, number: int, rows: Tensor) -> Due:
        width, dtype = self._look(number, rows)
        kind = rows.device.type
        cast = 1 + DTYPES.index(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else 0
        graph = torch.is_grad_enabled()
        asked = Asked(
            module=number,
            shape=tuple(rows.shape),
            dtype=DTYPES.index(rows.dtype),
            width=width,
            made=DTYPES.index(dtype),
            graph=int(graph),
            needs=int(graph and rows.requires_grad),
            autocast=cast,
            stream=self._streams.under_way,
        )
        with torch._C.DisableTorchFunction():
            due = Due((*rows.shape[:-1], width), dtype, rows.device)
        self._waiting.append(Call(asked, rows, due))
        self._put_off.reads(rows)
        return due

    def _look(self, number: int, rows: Tensor) -> tuple[int, torch.dtype]:
        """The width and dtype of what a module makes, from a run on fakes."""
        name = self._names[number]
        shape = [2, *rows.shape[1:]] if rows.ndim > 1 else list(rows.shape)
        dtype = str(rows.dtype).removeprefix("torch.")
        with torch._C.DisableTorchFunction():
            fake = self._stand_ins.of(shape, dtype, requires_grad=rows.requires_grad, device=rows.device)
        given = ((fake,), {})
        made = self._stand_ins.block(name, given, lambda: given)
        if made is None:
            raise PlanError(
                f"what {name} returns depends on values ({self._stand_ins.why}), so replicas cannot know what comes "
                "back from it: use tp in place of ep"
            )
        return made.output.shape[-1], made.output.dtype

    # Rounds ---------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """All calls that wait go out, and what was put off is done (collective, with those who have ended too)."""
        if self._waiting:
            with torch.enable_grad():
                self._round(ends=False)
        self._put_off.catch_up()

    def _round(self, *, ends: bool) -> bool:
        """Serve what all ask for; whether all have ended."""
        mine, self._waiting = self._waiting, []
        rank, workers = self.team.rank, self.team.workers
        device = mine[0].rows.device if mine and mine[0].rows is not None else self._device
        head = torch.tensor([int(ends), len(mine)], dtype=torch.int64, device=device)
        heads = [one.tolist() for one in self.team.collect(head, [(2,)] * workers, "who asks for experts")]
        counts = [count for _, count in heads]
        if not any(counts):
            return all(end for end, _ in heads)
        columns = MOST_DIMS + 8
        table = torch.tensor([call.asked.packed() for call in mine], dtype=torch.int64, device=device)
        shapes = [(count, columns) for count in counts]
        said = self.team.collect(table.reshape(len(mine), columns), shapes, "which rows go to which expert")
        told = [[Call(Asked.unpacked(row)) for row in one.tolist()] for one in said]
        told[rank] = mine
        for calls, kept in zip(told, self._calls, strict=True):
            kept += calls
        self._inside += 1
        try:
            self._serve(told)
        finally:
            self._inside -= 1
        return False

    def _serve(self, told: list[list[Call]]) -> None:
        made: list[tuple[int, Call, Tensor]] = []  # by whom it was asked for, what this replica makes
        anchors: list[Tensor] = []
        for dtype in sorted({call.asked.dtype for calls in told for call in calls}):
            there = [[call for call in calls if call.asked.dtype == dtype] for calls in told]
            come = self._outward(there, DTYPES[dtype])
            anchors.append(come[1])
            for (caller, call), rows in zip(self._mine(there), come[0], strict=True):
                made.append((caller, call, self._run(call, rows)))
        for dtype in sorted({call.asked.made for calls in told for call in calls}):
            there = [[call for call in calls if call.asked.made == dtype] for calls in told]
            self._back(there, [one for one in made if one[1].asked.made == dtype], anchors, DTYPES[dtype])

    def _mine(self, told: list[list[Call]]) -> Iterator[tuple[int, Call]]:
        """Calls of this replica's modules, caller after caller."""
        for caller, calls in enumerate(told):
            for call in calls:
                if self._owners[call.asked.module] == self.team.rank:
                    yield caller, call

    def _by_owner(self, calls: list[Call]) -> list[Call]:
        return sorted(calls, key=lambda call: self._owners[call.asked.module])

    def _outward(self, told: list[list[Call]], dtype: torch.dtype) -> tuple[list[Tensor], Tensor]:
        """Rows for this replica's modules, and all that came in a row."""
        mine, owners = self._by_owner(told[self.team.rank]), range(self.team.workers)
        gives = [
            sum(call.asked.elements for call in mine if self._owners[call.asked.module] == owner) for owner in owners
        ]
        theirs = list(self._mine(told))
        gets = [sum(call.asked.elements for caller, call in theirs if caller == other) for other in owners]
        flat = [self._gated(call).reshape(-1) for call in mine]
        sent = torch.cat(flat) if flat else torch.empty(0, dtype=dtype, device=self._device)
        wanted = any(call.asked.needs for calls in told for call in calls)
        come = self._travel(sent, tuple(gives), tuple(gets), outward=True, wanted=wanted)
        pieces = come.split([call.asked.elements for _, call in theirs]) if theirs else ()
        return [piece.view(call.asked.shape) for piece, (_, call) in zip(pieces, theirs, strict=True)], come

    def _back(
        self, told: list[list[Call]], made: list[tuple[int, Call, Tensor]], anchors: list[Tensor], dtype: torch.dtype
    ) -> None:
        """What this replica made goes to who asked, and what others made becomes what was due."""
        mine, others = self._by_owner(told[self.team.rank]), range(self.team.workers)
        gives = [sum(result.numel() for caller, _, result in made if caller == other) for other in others]
        gets = [
            sum(call.asked.elements_made for call in mine if self._owners[call.asked.module] == owner)
            for owner in others
        ]
        in_order = sorted(made, key=lambda one: one[0])
        flat = [result.reshape(-1) for _, _, result in in_order]
        flat += [anchor[:0].to(dtype) for anchor in anchors]  # so that what comes back depends on what went out
        wanted = any(self._has_gradient(call.asked) for calls in told for call in calls)
        come = self._travel(torch.cat(flat), tuple(gives), tuple(gets), outward=False, wanted=wanted)
        starts = accumulate((call.asked.elements_made for call in mine), initial=0)
        for call, start in zip(mine, starts, strict=False):
            assert call.due is not None
            value = come.narrow(0, start, call.asked.elements_made).view(call.due.shape).clone()
            call.due.value = value if self._has_gradient(call.asked) else value.detach()
            call.node, call.rows = call.due.value.grad_fn, None

    def _run(self, call: Call, rows: Tensor) -> Tensor:
        """A module on one caller's rows, as the caller would run it."""
        asked, name = call.asked, self._names[call.asked.module]
        rows = rows.clone() if asked.needs else rows.detach().clone()
        cast = torch.autocast(rows.device.type, DTYPES[max(asked.autocast - 1, 0)], enabled=bool(asked.autocast))
        with self._streams.for_another(asked.stream), torch.set_grad_enabled(bool(asked.graph)), cast:
            result = self._forwards[asked.module](rows)
        wanted = (*asked.shape[:-1], asked.width), DTYPES[asked.made]
        if not isinstance(result, Tensor) or (tuple(result.shape), result.dtype) != wanted:
            found = f"{tuple(result.shape)} of {result.dtype}" if isinstance(result, Tensor) else type(result).__name__
            raise PlanError(
                f"{name} returned {found} for rows {asked.shape}, and {wanted[0]} of {wanted[1]} was expected: only "
                "modules that return a row for each row can be experts; use tp in place of ep"
            )
        return Gate.apply(result, call)  # pyright: ignore[reportReturnType] - what apply returns is untyped

    def _gated(self, call: Call) -> Tensor:
        assert call.rows is not None
        rows = call.rows if call.asked.needs else call.rows.detach()
        return Gate.apply(rows, call)  # pyright: ignore[reportReturnType]

    def _has_gradient(self, asked: Asked) -> bool:
        return bool(asked.graph and (asked.needs or self._trains[asked.module]))

    def _travel(
        self, flat: Tensor, gives: tuple[int, ...], gets: tuple[int, ...], *, outward: bool, wanted: bool
    ) -> Tensor:
        trip = Flat(self.team, gives, gets, outward, wanted, "rows for experts" if outward else "rows from experts")
        token = self._token
        if token is None:
            token = torch.zeros(1, device=flat.device, requires_grad=True)
        with torch.enable_grad():
            self._token, moved = Travel.apply(token, flat, trip)  # pyright: ignore[reportGeneralTypeIssues]
        self._trips.append(trip)
        return moved

    @property
    def _device(self) -> torch.device:
        module = self._wrapped[0][0]
        return next(module.parameters()).device  # of a slice that may be empty, which has one too


def _is_rows(value: Any) -> bool:
    return isinstance(value, Tensor) and 1 <= value.ndim <= MOST_DIMS and value.dtype in DTYPES
