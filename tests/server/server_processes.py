"""Seats of shards and workers as processes of their own, to be stopped and killed."""

import contextlib
import multiprocessing
import os
import signal
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from server_cases import KEYS, dealt, forms, gradient, listener, put, shard_of

from sheaf.parallel.server import points
from sheaf.parallel.server.borrowing import Borrower
from sheaf.parallel.server.client import Client
from sheaf.parallel.server.host import Host
from sheaf.parallel.server.link import Failed
from sheaf.parallel.server.peers import Peers
from sheaf.parallel.server.seats import BACKUP, PRIMARY, Throne
from sheaf.parallel.server.spare import Spare

START_S = 90.0
HELD_S = 0.4  # a worker that is held does one clock in so many seconds


class Gate:
    """Shut until ``set``. An end of a pipe, and no lock: a process that is killed at it keeps nobody else."""

    def __init__(self, context):
        self.theirs, self._ours = context.Pipe(duplex=False)

    def set(self):
        """Let all pass, now and later."""
        self._ours.close()


def hold(pipe, number, seat, terms, port, momentum, fail=""):
    """Be one seat of a shard until the pipe closes."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20))
    form = forms(terms.shards)[number]
    peers, throne = Peers(KEYS, terms.lease_seconds), Throne(store, f"shard/{number}")

    def make():
        return shard_of(
            number, form, terms, lambda values: torch.optim.SGD(values, lr=1.0, momentum=0.5 if momentum else 0.0)
        )

    if seat in (PRIMARY, BACKUP):
        host = spare = Host(make(), seat, listener(), KEYS, throne, peers)
    else:
        host, spare = None, Spare(number, form, make, listener(), KEYS, throne, peers, terms.lease_seconds)
    pipe.send(spare.address)
    peers.addresses = pipe.recv()
    spare.recruits = [address for address in peers.addresses[number][2:] if address != spare.address]
    if seat != PRIMARY:
        spare.open()
        pipe.send("open")
    else:
        pipe.recv()
        host.open(peers.addresses[number][1])
        pipe.send("open")
    points.arm(fail)
    while True:
        try:
            pipe.recv()
        except EOFError:
            os._exit(0)
        host = host or spare.host
        if host is None:
            pipe.send({"seat": seat})
            continue
        told = {"took_over_at": host.took_over_at, "version": host.shard.version, "backed": host.backed}
        pipe.send({"seat": host.seat, **told})


def linger(gates, clock, clocks):
    """Stay at the last gate one has come to until it is open or HELD_S are over; for the last clocks until it is open.

    They are more than any staleness here, so nobody is done before another that was held.
    """
    reached = [gate for start, gate in gates if start <= clock]
    if reached:
        reached[-1].poll(None if clock >= clocks - 5 else HELD_S)


def work(pipe, worker, addresses, terms, clocks, pause, gates, fail=""):
    """Be a worker: push whole numbers until the parts of all clocks were dealt; tell how long each exchange took."""
    torch.set_num_threads(1)
    client = Client(worker, addresses, forms(terms.shards), KEYS, terms)
    client.join(0)
    pipe.send("joined")
    gates[0][1].poll(None)
    points.arm(fail)
    clock = 0
    while (part := dealt(client, clock))[0] < clocks:
        linger(gates, clock, clocks)
        time.sleep(pause)
        step, place = part
        whole = {name: value / (terms.workers if terms.exact else 1) for name, value in gradient(place, step).items()}
        told = {"losses": [[worker, 1.0, 1.0]], "expected": float(terms.workers) ** 2}
        metas = [{**meta, **told} for meta in put(client, whole)]
        start = time.monotonic()
        try:
            seen = client.exchange(clock, metas)
        except Failed as failed:
            pipe.send(("failed", failed.meta))
            break
        if not seen.dropped:
            pipe.send(("clock", clock, time.monotonic() - start, seen.staleness))
        clock = seen.finished
    else:
        if client.part is not None:
            client.leave()  # another may have more to do, and is not to wait for this one's clock
        pipe.send(("done", client.rejoined))
    with contextlib.suppress(EOFError):
        pipe.recv()
    os._exit(0)


def borrow(pipe, worker, addresses, terms, clocks, pause, gates, fail=""):
    """Be a worker that borrows microbatches: push whole numbers, one gradient for each, and tell of every step."""
    torch.set_num_threads(1)
    made = forms(terms.shards)
    client = Borrower(worker, addresses, made, KEYS, terms)
    client.join(0)
    pipe.send("joined")
    gates[0][1].poll(None)
    points.arm(fail)
    clock = 0
    while clock < clocks:
        linger(gates, clock, clocks)
        start, computed, refused, again = time.monotonic(), [], 0, False
        while True:
            held = []
            while True:
                found = client.take(clock, terms.lent, held, wait=not held and (again or not held), stop=False)
                if found is None:
                    break
                time.sleep(pause)
                held.append(found)
                if again:
                    break
            again = True
            if not held:
                break
            whole = gradient(held[0], clock)
            for other in held[1:]:
                whole = {name: value + gradient(other, clock)[name] for name, value in whole.items()}
            told = {"losses": [[index, 1.0, 1.0] for index in held], "expected": float(terms.lent)}
            metas = [{**meta, **told} for meta in put(client, whole)]
            if client.cover(clock, terms.lent, metas):
                computed += held
            else:
                refused += 1
        seen = client.catch_up(clock + 1)
        pipe.send(("clock", seen.finished - 1, time.monotonic() - start, computed, refused))
        clock = seen.finished
    pipe.send(("done", client.rejoined))
    with contextlib.suppress(EOFError):
        pipe.recv()
    os._exit(0)


def train(pipe, rank, workers, port, text, steps, lease_seconds, lost=(), holds=()):
    """Be a worker of a plan with a server, in a process group that nobody mends, and tell of every step.

    ``holds``: pairs of a step and a gate; that step is not done before the gate is open. Meanwhile it tells its seats.
    """
    import sys
    from pathlib import Path

    sys.path.insert(0, str(Path(__file__).parent.parent / "parallel"))
    from plain import mlp_float64

    from sheaf.parallel import build
    from sheaf.parallel.server import assemble
    from sheaf.plans import Plan

    torch.set_num_threads(1)
    assemble.LEASE_SECONDS = lease_seconds
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=60))
    dist.init_process_group("gloo", store=store, rank=rank, world_size=workers)
    step = build(mlp_float64(batch=15), Plan.parse(text))
    pipe.send("ready")
    pipe.recv()
    gates = dict(holds)
    for index in range(steps):
        while index in gates and not gates[index].poll(HELD_S):
            pipe.send(("held", {host.shard.number: (host.seat, host.backed) for host in step.hosts}))
        start = time.monotonic()
        report = step()
        pipe.send(("clock", report.step, time.monotonic() - start, report.loss))
        time.sleep(0.005)
    if lost:
        step.lost = lambda: lost
    whole = {name: value.clone() for name, value in step.full_state_alone().items()}
    seats = {host.shard.number: host.seat for host in step.hosts}
    pipe.send(("done", whole, seats))
    with contextlib.suppress(EOFError):
        pipe.recv()
    os._exit(0)


def started(context, function, *args):
    """A process that runs ``function(pipe, *args)``, and the other end of its pipe."""
    ours, theirs = context.Pipe()
    process = context.Process(target=function, args=(theirs, *args), daemon=True)
    process.start()
    theirs.close()
    return process, ours


class Processes:
    """K shards with both seats and N workers, each a process; killed when the ``with`` block ends.

    Workers are ``held`` at these clocks, and cannot be done before both gates are open, however long the machine takes
    to kill what is to be killed: ``go`` opens the first, ``again`` the second.
    """

    def __init__(self, terms, clocks, pause=0.005, momentum=False, fails=None, spares=0, held=()):
        self.terms, fails = terms, fails or {}
        self.seats = (PRIMARY, BACKUP, *(f"spare {number}" for number in range(spares)))
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["server_processes"])
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.all, self.pipes, self.context = {}, {}, context
        start, self.go, self.again = Gate(context), Gate(context), Gate(context)
        gates = [(clock, gate.theirs) for clock, gate in zip((0, *held), (start, self.go, self.again), strict=False)]
        for number in range(terms.shards):
            for seat in self.seats:
                fail = fails.get((seat, number), "")
                self._start((seat, number), hold, number, seat, terms, self.store.port, momentum, fail)
        self.addresses = [[self._heard((seat, number)) for seat in self.seats] for number in range(terms.shards)]
        for pipe in self.pipes.values():
            pipe.send(self.addresses)
        for number in range(terms.shards):
            for seat in self.seats[1:]:
                self._heard((seat, number))
        for number in range(terms.shards):
            self.pipes[PRIMARY, number].send("now")
            self._heard((PRIMARY, number))
        for worker in range(terms.workers):
            be = borrow if terms.lent else work
            who = ("worker", worker)
            self._start(who, be, worker, self.addresses, terms, clocks, pause, gates, fails.get(who, ""))
        for worker in range(terms.workers):  # one that begins late may find the work done
            self._heard(("worker", worker))
        start.set()

    def _start(self, name, function, *args):
        self.all[name], self.pipes[name] = started(self.context, function, *args)

    def _heard(self, name):
        assert self.pipes[name].poll(START_S), f"{name} says nothing"
        return self.pipes[name].recv()

    def signal(self, name, number):
        """Send a signal to one of them."""
        os.kill(self.all[name].pid, number)

    def until(self, worker, clock):
        """Wait until a worker has come so far."""
        self.heard(worker, lambda message: message[1] >= clock)

    def heard(self, worker, enough, timeout_s=60):
        """What a worker tells of its clocks until one is enough."""
        found = []
        while not found or not enough(found[-1]):
            assert self.pipes["worker", worker].poll(timeout_s), f"worker {worker} stands still after {found[-3:]}"
            found.append(self.pipes["worker", worker].recv())
            assert found[-1][0] == "clock", found[-1]
        return found

    def rest(self, worker, timeout_s=60):
        """All that a worker still tells, until it is done."""
        found = []
        while True:
            assert self.pipes["worker", worker].poll(timeout_s), f"worker {worker} stands still after {found[-3:]}"
            try:
                message = self.pipes["worker", worker].recv()
            except EOFError:
                return [*found, ("gone",)]
            found.append(message)
            if message[0] != "clock":
                return found

    def ask(self, seat, number):
        """What a seat says of itself."""
        self.pipes[seat, number].send("?")
        return self._heard((seat, number))

    def values(self):
        """The whole parameters, as the shards have them now."""
        made = forms(self.terms.shards)
        reader = Client(0, self.addresses, made, KEYS, self.terms)
        reader.read(0)
        found = {}
        for form, arena in zip(made, reader.values, strict=True):
            for piece in form.pieces:
                found.setdefault(piece.name, {})[piece.start] = arena.views[piece.name].clone()
        reader.close()
        return {name: torch.cat([parts[start] for start in sorted(parts)]) for name, parts in found.items()}

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.all.values():
            if process.is_alive():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(process.pid, signal.SIGCONT)
                process.kill()
        for process in self.all.values():
            process.join(30)
            process.close()
        for pipe in self.pipes.values():
            pipe.close()
