"""What a worker needs to look up rows that others hold: lines to them, an owner of its own, the mode of a forward."""

import hashlib
import json
import secrets
import socket
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

from torch import nn

from sheaf.parallel.rows.ahead import Ahead, Fetch
from sheaf.parallel.rows.lookups import Lookups
from sheaf.parallel.rows.meeting import form_of
from sheaf.parallel.rows.pulls import Line, Owner
from sheaf.parallel.rows.store import Store
from sheaf.parallel.rows.tables import Tables
from sheaf.parallel.server.addresses import own_address, told_all
from sheaf.parallel.server.link import Keys
from sheaf.parallel.shares import AbstractDealer
from sheaf.parallel.world import World
from sheaf.task import Microbatch, Order, Task


@dataclass(frozen=True)
class Pulling:
    """The mode in which forwards run, and who fetches one microbatch ahead for it."""

    lookups: Lookups
    ahead: Ahead
    store: Store

    def fetched(self, step: int, microbatch: Microbatch, fetch: Fetch) -> Any:
        """A microbatch's batch, by ``fetch``; that of the next is fetched too, and the rows of both are asked for."""
        return self.ahead.fetched(step, microbatch, fetch)

    @contextmanager
    def around(self, mode: AbstractContextManager[object]) -> Iterator[None]:
        """What a forward runs in, with what it would run in otherwise around it."""
        with mode, self.lookups:
            yield


def pulling(
    task: Task,
    world: World,
    model: nn.Module,
    tables: Tables,
    dealer: AbstractDealer,
    touch: Callable[[str], object],
) -> Pulling:
    """Open the lines between all workers (collective). ``task`` has its microbatch decided; ``model`` is this
    worker's, ``touch`` is told which tables get gradients.
    """
    assert task.microbatch is not None
    held = {name: value for name, value in model.named_parameters() if name in tables.dealt}
    forms = [form_of(name, value, tables) for name, value in held.items()]
    told = json.dumps([[form.name, form.rows, form.width, str(form.dtype), form.starts] for form in forms])
    keys = Keys(bytes.fromhex(world.agreed(lambda: secrets.token_hex(32))), hashlib.sha256(told.encode()).digest())
    listener = socket.create_server((own_address(world.workers), 0))
    host, port = listener.getsockname()[:2]
    at = told_all(world, [(host, port)])
    owner = Owner(listener, keys, forms, list(held.values()), world.rank)
    lines = {
        other: (Line(other, at[other][0], world.rank, keys, forms), Line(other, at[other][0], world.rank, keys, forms))
        for other in range(world.workers)
        if other != world.rank
    }
    store = Store(world, forms, owner, lines)
    order = Order(task.num_samples, task.batch, task.microbatch, task.seed, shuffle=task.shuffle)

    def mine(step: int) -> list[Microbatch]:
        return [microbatch for microbatch, _ in dealer.deal(step, order.step(step))]

    ahead = Ahead(store, mine)
    lookups = Lookups(store, held, touch, ahead.looked_up)
    lookups.guard(model)
    return Pulling(lookups, ahead, store)
