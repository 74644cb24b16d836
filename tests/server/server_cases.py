"""Parameter servers for tests: all seats in this process, values and gradients that are whole numbers."""

import contextlib
import hashlib
import os
import socket
import threading

import torch
import torch.distributed as dist

from sheaf.parallel import build
from sheaf.parallel.server.borrowing import Borrower
from sheaf.parallel.server.client import Client
from sheaf.parallel.server.host import Host
from sheaf.parallel.server.link import Keys
from sheaf.parallel.server.peers import Peers
from sheaf.parallel.server.places import Form, spread
from sheaf.parallel.server.seats import BACKUP, PRIMARY, Throne
from sheaf.parallel.server.shard import Shard
from sheaf.plans import Plan
from sheaf.plans.layout import Held

# Tests that run side by side are runs of their own: one may be given the port of a seat that another one has killed.
_RUN = "".join(os.environ.get(f"PYTEST_XDIST_{one}", "") for one in ("TESTRUNUID", "WORKER"))
KEYS = Keys(hashlib.sha256(f"token {_RUN}".encode()).digest(), hashlib.sha256(b"task").digest())
HELD = (Held("a", 7, "float32"), Held("b", 12, "float64"), Held("e", 20, "float32"))
DTYPES = {"a": torch.float32, "b": torch.float64, "e": torch.float32}
SIZES = {"float32": 4, "float64": 8}


def forms(shards):
    """Dense a and b, and e with rows of 4."""
    return [
        Form(pieces, tuple(DTYPES[piece.name] for piece in pieces)) for pieces in spread(HELD, SIZES, {"e": 4}, shards)
    ]


def shard_of(number, form, terms, optimizer=None, scheduler=None):
    """A shard of zeros; SGD with a rate of 1 unless said otherwise."""
    values = {
        piece.name: torch.zeros(piece.num_elements, dtype=dtype)
        for piece, dtype in zip(form.pieces, form.dtypes, strict=True)
    }
    made = (optimizer or (lambda tensors: torch.optim.SGD(tensors, lr=1.0)))(list(values.values()))
    return Shard(number, form, values, made, terms, scheduler(made) if scheduler else None)


def listener(address="127.0.0.1"):
    return socket.create_server((address, 0))


class Servers:
    """K shards with their seats in this process, and clients for N workers."""

    def __init__(self, terms, *, backups=False, between=None, **made):
        self.terms, self.forms = terms, forms(terms.shards)
        self.store = dist.HashStore()
        self.hosts, self.backups, addresses = [], [], []
        for number, form in enumerate(self.forms):
            throne = Throne(self.store, f"shard/{number}")
            seats = []
            for seat, kept in ((PRIMARY, self.hosts), (BACKUP, self.backups)):
                if seat == BACKUP and not backups:
                    continue
                peers = Peers(KEYS, terms.lease_seconds)
                kept.append(Host(shard_of(number, form, terms, **made), seat, listener(), KEYS, throne, peers))
                seats.append(kept[-1].address)
            addresses.append(seats)
        self.addresses = addresses
        for number, host in enumerate(self.hosts):
            host.peers.addresses = addresses
            if backups:
                self.backups[number].peers.addresses = addresses
                self.backups[number].open()
                host.open(addresses[number][1])
            else:
                host.open()
        reached = [[between(address) for address in seats] for seats in addresses] if between else addresses
        kind = Borrower if terms.lent else Client
        self.clients = [kind(worker, reached, self.forms, KEYS, terms) for worker in range(terms.workers)]

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for client in self.clients:
            client.close()
        for host in (*self.hosts, *self.backups):
            host.close()
        over = [host.join() for host in (*self.hosts, *self.backups)]
        assert all(over)

    def whole(self, arenas):
        """The whole parameters, from what lies on each shard."""
        found = {held.name: torch.zeros(held.num_elements, dtype=DTYPES[held.name]) for held in HELD}
        for form, arena in zip(self.forms, arenas, strict=True):
            for piece in form.pieces:
                found[piece.name][piece.start : piece.stop] = arena.views[piece.name]
        return found

    def read(self, worker=0, clock=0):
        self.clients[worker].read(clock)
        return {name: value.clone() for name, value in self.whole(self.clients[worker].values).items()}


def gradient(worker, clock):
    """Whole numbers, so that sums are exact whatever their order."""
    found = {}
    for index, held in enumerate(HELD):
        numbers = torch.arange(held.num_elements, dtype=torch.int64)
        found[held.name] = ((numbers * 7 + worker * 13 + clock * 5 + index) % 9 - 3).to(DTYPES[held.name])
    return found


def put(client, whole):
    """A gradient into the client's rooms; what each shard is told of it."""
    metas = []
    for arena in client.out:
        for piece in arena.form.pieces:
            arena.views[piece.name].copy_(whole[piece.name][piece.start : piece.stop])
        metas.append({"used": list(range(len(arena.form.pieces))), "any": True, "losses": [], "expected": 1.0})
    return metas


def step(client, clock, whole, weight=1.0, **more):
    """Push one gradient as clock's; at staleness 0 the weights of all workers add up to 1 by the caller's care."""
    metas = [{**meta, "losses": [[client.worker, weight, weight]], **more} for meta in put(client, whole)]
    return client.exchange(clock, metas)


def dealt(client, clock):
    """The step and place of what a worker computes next: what it is dealt, or its own share of the clock."""
    return divmod(client.part, client.terms.workers) if client.part is not None else (clock, client.worker)


def run_out(client, clock, steps):
    """Push what a worker is dealt until all parts of so many steps were; its clock then."""
    while (part := dealt(client, clock))[0] < steps:
        clock = step(client, clock, gradient(part[1], part[0])).finished
    return clock


def all_at_once(functions, timeout_s=100):
    """Run them in threads; raise what the first raised."""
    raised, results = [], [None] * len(functions)

    def guarded(index, function):
        try:
            results[index] = function()
        except BaseException as error:
            raised.append(error)

    threads = [threading.Thread(target=guarded, args=pair, daemon=True) for pair in enumerate(functions)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout_s)
    if raised:
        raise raised[0]
    assert not any(thread.is_alive() for thread in threads), "a thread still waits"
    return results


def wanted(pushes):
    """Zeros minus every gradient that counts."""
    found = {held.name: torch.zeros(held.num_elements, dtype=DTYPES[held.name]) for held in HELD}
    for worker, clock in pushes:
        for name, value in gradient(worker, clock).items():
            found[name] -= value
    return found


def same(found, reference):
    return set(found) == set(reference) and all(torch.equal(found[name], reference[name]) for name in reference)


suppress = contextlib.suppress


def in_one_go(task, plan, steps):
    """A step that was called so often, its losses, its state after the second, and the whole weights at the end."""
    step = build(task, Plan.parse(plan))
    losses = [step().loss for _ in range(2)]
    tensors, values = step.state()
    kept = {name: value.clone() for name, value in tensors.items()}, values
    losses += [step().loss for _ in range(steps - 2)]
    return step, losses, kept, {name: value.clone() for name, value in step.full_state().items()}
