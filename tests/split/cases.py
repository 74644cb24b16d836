"""Split work against plain torch: the same function on whole tensors, and on slices by workers that talk.

``check`` runs the workers as real ranks, ``check_threads`` as threads of this process, quick enough for Hypothesis.
"""

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

import sheaf.split.rules  # noqa: F401 - gives the rules to the registry
from sheaf.plans.split import Cut, Slice
from sheaf.split.mode import Splitting
from sheaf.split.moves import Part, sliced
from sheaf.split.team import GroupTeam
from sheaf.split.tensor import Split

OWN = "by the test"  # why the harness itself moves something


@dataclass(frozen=True)
class Given:
    """An argument: a tensor of this shape, which may be cut along ``dim``; ``held`` as a parameter is.

    ``kind`` is normal (random), long (small random numbers, no gradient), mask, plain (random, without gradient), ones.
    """

    shape: tuple[int, ...]
    dim: int | None = None
    sizes: tuple[int, ...] = ()
    outer: int = 1
    held: bool = False
    kind: str = "normal"

    @property
    def slice(self) -> Slice | None:
        return None if self.dim is None else Slice(self.dim, Cut(self.sizes, self.outer))


@dataclass(frozen=True)
class Outcome:
    """Where the results were cut (None: whole), and what moved: operation and why, in order."""

    cuts: tuple[Slice | None, ...]
    moves: tuple[tuple[str, str], ...]

    @property
    def gathered(self) -> bool:
        """Whether a whole tensor had to be put together."""
        return any(why.startswith("whole for") for _, why in self.moves)


def whole(*shape: int, kind: str = "normal") -> Given:
    return Given(shape, kind=kind)


def cut(shape: Sequence[int], dim: int, sizes: Sequence[int], outer: int = 1, kind: str = "normal") -> Given:
    return Given(tuple(shape), dim, tuple(sizes), outer, kind=kind)


def held(shape: Sequence[int], dim: int, sizes: Sequence[int], outer: int = 1) -> Given:
    return Given(tuple(shape), dim, tuple(sizes), outer, held=True)


def check(
    ranks: Any, function: Callable[..., Any], *givens: Given, workers: int = 2, mode: Callable[..., Any] = Splitting
) -> Outcome:
    """Values and gradients of ``function`` are those of plain torch, on every one of ``workers`` real ranks.

    ``function`` gets the tensors and returns one or several; numbers, and lists of them, must be equal too.
    """

    def run() -> Outcome:
        moves: list[tuple[str, str]] = []
        team = GroupTeam(None, explain=lambda operation, why, _: _noted(moves, operation, why))
        return compare(team, moves, function, givens, mode)

    outcomes = ranks(run, workers)
    assert all(outcome == outcomes[0] for outcome in outcomes), outcomes
    return outcomes[0]


def check_threads(function: Callable[..., Any], *givens: Given, workers: int = 2) -> Outcome:
    """As ``check``, with threads that hand each other tensors."""
    room = Room(workers)
    outcomes: list[Any] = [None] * workers

    def run(rank: int) -> None:
        team = ThreadTeam(room, rank)
        try:
            outcomes[rank] = compare(team, team.moves, function, givens)
        except BaseException as error:
            outcomes[rank] = error
            room.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(1, workers)]
    for thread in threads:
        thread.start()
    run(0)
    for thread in threads:
        thread.join()
    errors = [one for one in outcomes if isinstance(one, BaseException)]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    assert all(outcome == outcomes[0] for outcome in outcomes), outcomes
    return outcomes[0]


def compare(
    team: Any,
    moves: list[tuple[str, str]],
    function: Callable[..., Any],
    givens: Sequence[Given],
    mode: Callable[..., Any] = Splitting,
) -> Outcome:
    """On one worker: run whole and split, and compare every result and every gradient."""
    values = [_drawn(given, number) for number, given in enumerate(givens)]
    wholes = [_leaf(value) for value in values]
    expected = _listed(function(*wholes))
    wanted = _gradients(expected, wholes)

    leaves, arguments = [], []
    parameters: dict[int, tuple[str, Slice]] = {}
    for number, (given, value) in enumerate(zip(givens, values, strict=True)):
        place = given.slice
        if place is None:
            leaves.append(_leaf(value))
            arguments.append(leaves[-1])
        elif given.held:
            leaves.append(nn.Parameter(sliced(value, place.dim, place.cut, team.rank).clone()))
            parameters[id(leaves[-1])] = (f"parameter{number}", place)
            arguments.append(leaves[-1])
        else:
            leaves.append(_leaf(value))
            local = Part.apply(leaves[-1], place.dim, place.cut, team, OWN)
            arguments.append(Split(local, place.dim, place.cut))
    splitting = mode(team, parameters)
    with splitting:
        found = _listed(function(*arguments))
    cuts = tuple(Slice(one.axis, one.cut) if isinstance(one, Split) else None for one in found)
    together = [splitting.gather(one, OWN) if isinstance(one, Split) else one for one in found]

    assert len(together) == len(expected), f"{len(together)} results, not {len(expected)}"
    for number, (mine, right) in enumerate(zip(together, expected, strict=True)):
        _same(mine, right, f"result {number}")
    gradients = _gradients(together, leaves)
    for number, (given, mine, right) in enumerate(zip(givens, gradients, wanted, strict=True)):
        place = given.slice if given.held else None
        if right is not None and place is not None:
            right = sliced(right, place.dim, place.cut, team.rank)
        if mine is not None or right is not None:
            filled = [torch.zeros_like(leaves[number]) if one is None else one for one in (mine, right)]
            _same(*filled, f"gradient of argument {number}")
    return Outcome(cuts, tuple(one for one in moves if OWN not in one[1]))


def _same(mine: Any, right: Any, what: str) -> None:
    if not isinstance(right, Tensor):
        assert mine == right, f"{what}: {mine}, not {right}"
        return
    assert (mine.shape, mine.dtype) == (right.shape, right.dtype), (
        f"{what}: {mine.shape} {mine.dtype}, not {right.shape}"
    )
    torch.testing.assert_close(mine, right, rtol=1e-12, atol=1e-12, equal_nan=True, msg=lambda text: f"{what}: {text}")


def _drawn(given: Given, number: int) -> Tensor:
    generator = torch.Generator().manual_seed(1000 + number)
    if given.kind == "long":
        return torch.randint(0, 5, given.shape, generator=generator)
    if given.kind == "mask":
        return torch.rand(given.shape, generator=generator) < 0.5
    if given.kind == "ones":
        return torch.ones(given.shape, dtype=torch.float64)
    return torch.randn(given.shape, generator=generator, dtype=torch.float64).requires_grad_(given.kind == "normal")


def _leaf(value: Tensor) -> Tensor:
    return value.detach().clone().requires_grad_(value.requires_grad)


def _listed(result: Any) -> list[Any]:
    return list(result) if isinstance(result, tuple | list) else [result]


def _gradients(results: Sequence[Any], leaves: Sequence[Tensor]) -> list[Tensor | None]:
    """Of a random projection of all results."""
    generator = torch.Generator().manual_seed(7)
    total = torch.zeros((), dtype=torch.float64)
    for result in results:
        if isinstance(result, Tensor) and result.is_floating_point():
            weights = torch.randn(result.shape, generator=generator, dtype=torch.float64)
            if result.requires_grad:
                total = total + (result * weights).sum()
    if total.requires_grad:
        total.backward()
    return [leaf.grad for leaf in leaves]


class Offers(Splitting):
    """Keeps what a rehearsal would be offered to cut, and the units it would be asked for."""

    def __init__(self, parameters: Sequence[Tensor] = (), workers: int = 2) -> None:
        super().__init__(ThreadTeam(Room(workers), 0), {})
        self.offered: list[tuple[tuple[int, ...], int, Cut | None]] = []
        self.refined: list[tuple[int, int]] = []
        self._offerable = {id(parameter) for parameter in parameters}

    def propose(self, tensor: Tensor, dim: int, cut: Cut | None = None) -> None:
        if id(tensor) in self._offerable:
            self.offered.append((tuple(tensor.shape), dim, cut))

    def refine(self, split: Split, outer: int, unit: int) -> None:
        self.refined.append((outer, unit))

    def fallback(self, func: Any, args: Any, kwargs: Any) -> Any:
        return None

    def _concerns(self, value: Any) -> bool:
        return super()._concerns(value) or id(value) in self._offerable

    @classmethod
    def seen(cls, function: Callable[..., Any], *givens: Given) -> "Offers":
        """What worker 0 would ask for in one call."""
        arguments = []
        for given, value in zip(givens, map(_drawn, givens, range(len(givens))), strict=True):
            place = given.slice
            arguments.append(
                value if place is None else Split(sliced(value, place.dim, place.cut, 0), place.dim, place.cut)
            )
        with cls() as mode:
            function(*arguments)
        return mode


class _noted:
    def __init__(self, moves: list[tuple[str, str]], operation: str, why: str) -> None:
        moves.append((operation, why))

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None: ...


class Room:
    """Where threads meet: each lays something down, and all see everything."""

    def __init__(self, workers: int) -> None:
        self.workers, self.laid = workers, [None] * workers
        self.barrier = threading.Barrier(workers, timeout=100)

    def meet(self, rank: int, what: Any) -> list[Any]:
        self.laid[rank] = what
        self.barrier.wait()
        everything = list(self.laid)
        self.barrier.wait()
        return everything


class ThreadTeam:
    """A team of threads; says so when they do not all do the same."""

    def __init__(self, room: Room, rank: int) -> None:
        self.room, self.rank, self.workers = room, rank, room.workers
        self.moves: list[tuple[str, str]] = []

    def total(self, tensor: Tensor, why: str) -> Tensor:
        return sum(self._meet("all_reduce", why, tensor.clone(), tensor.shape))

    def collect(self, own: Tensor, shapes: Sequence[Sequence[int]], why: str) -> list[Tensor]:
        parts = self._meet("all_gather", why, own.clone(), [tuple(shape) for shape in shapes])
        assert [part.shape for part in parts] == [tuple(shape) for shape in shapes], why
        return parts

    def swap_sum(self, pieces: list[Tensor], why: str) -> Tensor:
        everyone = self._meet("reduce_scatter", why, [piece.clone() for piece in pieces], None)
        return sum(theirs[self.rank] for theirs in everyone)

    def trade(self, own: Tensor, other: int, shape: Sequence[int], why: str) -> Tensor:
        theirs = self._meet("trade", why, own.clone(), None)[other]
        assert theirs.shape == tuple(shape), why
        return theirs

    def _meet(self, operation: str, why: str, what: Any, alike: Any) -> list[Any]:
        self.moves.append((operation, why))
        met = self.room.meet(self.rank, ((operation, why, alike), what))
        assert all(one[0] == met[0][0] for one in met), f"workers are in other places: {[one[0] for one in met]}"
        return [one[1] for one in met]
