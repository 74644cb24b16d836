"""The shards of all places in a replica, as one worker reaches them: for files, which it writes without the others."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor

from sheaf.parallel.portion import Portion
from sheaf.parallel.server.client import Client
from sheaf.parallel.server.link import Address, Keys
from sheaf.parallel.server.log import Terms
from sheaf.parallel.server.places import Form
from sheaf.parallel.server.relaying import State
from sheaf.parallel.server.restore import numbered, shared
from sheaf.parallel.server.seating import Seating
from sheaf.parallel.spread import Spread, put_slice
from sheaf.plans.layout import Piece


@dataclass(frozen=True)
class Place:
    """Where the seats of one place's shards are, by shard, and how its parameters lie on them; ``ranks`` have it."""

    ranks: tuple[int, ...]
    addresses: list[list[Address]]
    keys: Keys
    forms: list[Form]


def introduced(spread: Spread, seating: Seating, forms: Sequence[Form]) -> list[Place]:
    """All places, which their workers tell all others (collective)."""
    found: list[Place] = []
    for ranks in spread.mesh.dp_groups:
        mine = None
        if spread.world.rank == ranks[0]:
            told = {
                "token": seating.keys.token.hex(),
                "digest": seating.keys.digest.hex(),
                "addresses": seating.addresses,
                "forms": [[[*piece, str(kind)] for piece, kind in _listed(form)] for form in forms],
            }
            mine = dict[str, Tensor](), told
        _, told = shared(spread.world, mine, f"the parameter server of worker {ranks[0]}")
        keys = Keys(bytes.fromhex(told["token"]), bytes.fromhex(told["digest"]))
        addresses = [[(str(host), int(port)) for host, port in seats] for seats in told["addresses"]]
        found.append(Place(ranks, addresses, keys, [_form(each) for each in told["forms"]]))
    return found


def _listed(form: Form) -> list[tuple[tuple[str, int, int, int], torch.dtype]]:
    pieces = [(piece.name, piece.start, piece.stop, piece.offset) for piece in form.pieces]
    return list(zip(pieces, form.dtypes, strict=True))


def _form(told: list[tuple[str, int, int, int, str]]) -> Form:
    pieces = tuple(Piece(name, start, stop, offset) for name, start, stop, offset, _ in told)
    return Form(pieces, tuple(getattr(torch, kind.removeprefix("torch.")) for *_, kind in told))


class Everywhere:
    """Reads the shards of all ``places`` as a worker of replica ``member``, over lines that are hung up after it."""

    def __init__(self, places: Sequence[Place], member: int, terms: Terms, incarnation: Callable[[], int]) -> None:
        self._places, self._member, self._terms, self._incarnation = places, member, terms, incarnation

    @contextmanager
    def _lines(self) -> Iterator[list[Client]]:
        made = [
            Client(self._member, place.addresses, place.forms, place.keys, self._terms, lambda _: self._incarnation())
            for place in self._places
        ]
        try:
            yield made
        finally:
            for client in made:
                client.close()

    def drain(self, clock: int) -> None:
        """Have every shard apply what it has gathered, once every replica has come to ``clock``."""
        with self._lines() as lines:
            for client in lines:
                client.read(clock)
            for client in lines:
                client.drain(clock)

    def states(self, clock: int) -> dict[int, State]:
        """What ``state`` has of shards, of those workers that keep it, once every replica has come to ``clock``."""
        found: dict[int, State] = {}
        with self._lines() as lines:
            for place, client in zip(self._places, lines, strict=True):
                client.read(clock)
                found[place.ranks[0]] = numbered(enumerate(client.states()))
        return found

    def whole(self, clock: int, portion: Portion, part: Callable[[int], int]) -> dict[str, Tensor]:
        """Whole parameters by name, once every replica has come to ``clock``; ``part``: which slice a rank holds.

        Those that are not trained are as they were first.
        """
        made: dict[str, Tensor] = {}
        with self._lines() as lines:
            for place, client in zip(self._places, lines, strict=True):
                client.read(clock)
                for name, flat in _joined(client).items():
                    fake, found = portion.blueprint.parameters[name], portion.slices.get(name)
                    shape = tuple(fake.shape)
                    if found is None:
                        made[name] = flat.view(shape)
                        continue
                    rank = part(place.ranks[0])
                    whole = made.setdefault(name, torch.zeros(shape, dtype=flat.dtype))
                    local = flat.view(found.local_shape(shape, rank))
                    put_slice(whole, local, found.dim, found.cut.ranges(rank))
        rest = [name for name in portion.blueprint.parameters if name not in made]
        return made | {name: portion.blueprint.value(name) for name in rest}


def _joined(client: Client) -> dict[str, Tensor]:
    """What a place holds of each parameter, flat, from what was read last of its shards."""
    parts: dict[str, dict[int, Tensor]] = {}
    for arena in client.values:
        for piece in arena.form.pieces:
            parts.setdefault(piece.name, {})[piece.start] = arena.views[piece.name]
    return {name: torch.cat([each[start] for start in sorted(each)]) for name, each in parts.items()}
