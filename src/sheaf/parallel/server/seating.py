"""Which worker has which seat of each shard, and how seats are opened: beside replicas, or apart."""

import hashlib
import json
import secrets
import socket
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from sheaf.parallel.optimizers import sliced_optimizer
from sheaf.parallel.outer import optimizer_of
from sheaf.parallel.portion import Portion
from sheaf.parallel.server.addresses import own_address, told_all
from sheaf.parallel.server.host import Host
from sheaf.parallel.server.link import Address, Keys
from sheaf.parallel.server.log import Terms
from sheaf.parallel.server.peers import Peers
from sheaf.parallel.server.places import Form
from sheaf.parallel.server.restore import part, restored, shared
from sheaf.parallel.server.seats import BACKUP, PRIMARY, Throne
from sheaf.parallel.server.shard import Shard
from sheaf.parallel.server.spare import Spare
from sheaf.parallel.server.threads import soon
from sheaf.parallel.world import World
from sheaf.plans import Plan
from sheaf.task import Task

NOWHERE: Address = ("", 0)


@dataclass(frozen=True)
class Seating:
    """This worker's seats, open; and by shard where all its seats are: the primary, the backup, where a next may be."""

    keys: Keys
    addresses: list[list[Address]]
    hosts: list[Host]
    spares: list[Spare]

    @property
    def seats(self) -> list[Host]:
        """Those that there are now: spares may have become some."""
        return [*self.hosts, *(spare.host for spare in self.spares if spare.host is not None)]

    def close(self) -> None:
        """Stop answering; nothing is done here any more once this returns, unless it takes very long."""
        for one in (*self.hosts, *self.spares):
            one.close()
        until = soon()
        for one in (*self.hosts, *self.spares):
            one.join(until)


def seated(number: int, workers: int, computing: int) -> list[int]:
    """The workers that have a seat of shard ``number``, in order: its primary, its backup, and where a next may be.

    They are all of the ``workers``, or, where only some of them are ``computing``, all others.

    >>> seated(1, 3, 3), seated(0, 4, 2), seated(1, 4, 2)
    ([1, 2, 0], [2, 3], [3, 2])
    """
    holders = range(computing, workers) if computing < workers else range(workers)
    return [holders[(number + place) % len(holders)] for place in range(len(holders))]


def take_seats(
    task: Task,
    plan: Plan,
    world: World,
    portion: Portion,
    parameters: Mapping[str, nn.Parameter],
    forms: list[Form],
    terms: Terms,
    value: Callable[[str], Tensor],
) -> Seating:
    """Open this worker's seats (collective). ``value`` gives a parameter's first values, whole, wherever they are."""
    token = bytes.fromhex(world.agreed(lambda: secrets.token_hex(32)))
    keys = Keys(token, digest(task, plan, parameters, forms))
    number_of_run = world.number("sheaf/servers")
    address = own_address(world.everyone)
    store: Any = world.counter
    if hasattr(store, "clone"):  # a connection of its own: the run's may be waiting
        store = store.clone()
    lease = terms.lease_seconds
    order = [seated(number, world.workers, plan.computing) for number in range(terms.shards)]
    hosts: list[Host] = []
    spares: list[Spare] = []
    listeners: list[socket.socket] = []
    try:
        if world.rank in order[0]:
            listeners += [socket.create_server((address, 0)) for _ in order]
        for number, listener in enumerate(listeners):
            throne, peers = Throne(store, f"sheaf/server/{number_of_run}/shard/{number}"), Peers(keys, lease)
            make = partial(_shard, task, plan, number, forms[number], terms, portion, value)
            place = order[number].index(world.rank)
            if place < 2:
                hosts.append(Host(make(), (PRIMARY, BACKUP)[place], listener, keys, throne, peers))
            else:
                spares.append(Spare(number, forms[number], make, listener, keys, throne, peers, lease))
        mine: list[Address] = [listener.getsockname()[:2] for listener in listeners] or [NOWHERE] * terms.shards
        at = told_all(world, mine)
        addresses = [[at[rank][number] for rank in ranks] for number, ranks in enumerate(order)]
        _open(world, hosts, spares, addresses)
    except BaseException:
        Seating(keys, [], hosts, spares).close()
        for listener in listeners:
            listener.close()
        raise
    return Seating(keys, addresses, hosts, spares)


def _open(world: World, hosts: list[Host], spares: list[Spare], addresses: list[list[Address]]) -> None:
    """Begin to answer."""
    for one in (*hosts, *spares):
        one.peers.addresses = addresses
    for spare in spares:
        spare.recruits = [address for address in addresses[spare.number][2:] if address != spare.address]
        spare.open()
    for host in hosts:
        host.recruits = addresses[host.shard.number][2:]
        if host.seat == BACKUP:
            host.open()
    world.barrier()
    for host in hosts:
        if host.seat == PRIMARY:
            host.open(next(iter(addresses[host.shard.number][1:]), None))
    world.barrier()


def _shard(
    task: Task, plan: Plan, number: int, form: Form, terms: Terms, portion: Portion, value: Callable[[str], Tensor]
) -> Shard:
    values: dict[str, Tensor] = {
        piece.name: value(piece.name).detach().reshape(-1)[piece.start : piece.stop].cpu().clone()
        for piece in form.pieces
    }
    if plan.local:  # workers have the task's optimizer
        return Shard(number, form, values, optimizer_of(plan.meets_locally, list(values.values())), terms)
    optimizer = sliced_optimizer(portion, {piece.name: (values[piece.name], piece) for piece in form.pieces})
    scheduler = task.scheduler(optimizer) if task.scheduler is not None else None
    return Shard(number, form, values, optimizer, terms, scheduler)


def digest(task: Task, plan: Plan, parameters: Mapping[str, nn.Parameter], forms: list[Form]) -> bytes:
    """What both ends of a connection must agree on before any bytes of tensors travel."""
    shapes = [[name, list(value.shape), str(value.dtype), value.requires_grad] for name, value in parameters.items()]
    places = [[[piece.name, piece.start, piece.stop, piece.offset] for piece in form.pieces] for form in forms]
    known = [str(plan), task.name, task.seed, task.batch, task.microbatch, task.precision, task.clip, shapes, places]
    return hashlib.sha256(json.dumps(known).encode()).digest()


def reload(
    world: World, hosts: Sequence[Host], shards: int, tensors: dict[str, Tensor], values: dict[str, Any]
) -> None:
    """Put what workers kept of shards into all seats of these (collective); ``values`` as ``state`` gave them."""
    for number in range(shards):
        mine = None
        if str(number) in values["shards"]:
            mine = part(tensors, f"shard/{number}/"), values["shards"][str(number)]
        found = shared(world, mine, f"shard {number}")
        for host in hosts:
            if host.shard.number == number:
                host.restart(lambda shard, found=found: restored(shard, *found, values["index"]))
