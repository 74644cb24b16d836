"""Seats of shards and workers as processes of their own, to be stopped and killed."""

import contextlib
import multiprocessing
import os
import signal
import time
from datetime import timedelta

import torch
import torch.distributed as dist
from server_cases import KEYS, forms, gradient, listener, put, shard_of

from sheaf.parallel.server.client import Client
from sheaf.parallel.server.host import Host
from sheaf.parallel.server.link import Failed
from sheaf.parallel.server.peers import Peers
from sheaf.parallel.server.seats import BACKUP, PRIMARY, Throne

START_S = 90.0


def hold(pipe, number, seat, terms, port, momentum):
    """Be one seat of a shard until the pipe closes."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20))
    form = forms(terms.shards)[number]
    peers = Peers(KEYS, terms.lease_seconds)
    shard = shard_of(
        number, form, terms, lambda values: torch.optim.SGD(values, lr=1.0, momentum=0.5 if momentum else 0.0)
    )
    host = Host(shard, seat, listener(), KEYS, Throne(store, f"shard/{number}"), peers)
    pipe.send(host.address)
    peers.addresses = pipe.recv()
    if seat == BACKUP:
        host.open()
        pipe.send("open")
    else:
        pipe.recv()
        host.open(peers.addresses[number][1])
        pipe.send("open")
    while True:
        try:
            pipe.recv()
        except EOFError:
            os._exit(0)
        pipe.send({"seat": host.seat, "took_over_at": host.took_over_at, "version": host.shard.version})


def work(pipe, worker, addresses, terms, clocks, pause):
    """Be a worker: push whole numbers, and tell how long each exchange took."""
    torch.set_num_threads(1)
    client = Client(worker, addresses, forms(terms.shards), KEYS, terms)
    client.join(0)
    clock = 0
    while clock < clocks:
        time.sleep(pause)
        whole = {name: value / (terms.workers if terms.exact else 1) for name, value in gradient(worker, clock).items()}
        told = {"losses": [[worker, 1.0, 1.0]], "expected": float(terms.workers) ** 2}
        metas = [{**meta, **told} for meta in put(client, whole)]
        start = time.monotonic()
        try:
            seen = client.exchange(clock, metas)
        except Failed as failed:
            pipe.send(("failed", failed.meta))
            break
        pipe.send(("clock", clock, time.monotonic() - start, seen.staleness))
        clock = seen.finished
    else:
        pipe.send(("done", client.rejoined))
    with contextlib.suppress(EOFError):
        pipe.recv()
    os._exit(0)


def train(pipe, rank, workers, port, text, steps, lease_seconds):
    """Be a worker of a plan with a server, in a process group that nobody mends, and tell of every step."""
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
    for _ in range(steps):
        start = time.monotonic()
        report = step()
        pipe.send(("clock", report.step, time.monotonic() - start, report.loss))
        time.sleep(0.005)
    whole = {name: value.clone() for name, value in step.full_state().items()}
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
    """K shards with both seats and N workers, each a process; killed when the ``with`` block ends."""

    def __init__(self, terms, clocks, pause=0.005, momentum=False):
        self.terms = terms
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["server_processes"])
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self.all, self.pipes, self.context = {}, {}, context
        for number in range(terms.shards):
            for seat in (PRIMARY, BACKUP):
                self._start((seat, number), hold, number, seat, terms, self.store.port, momentum)
        self.addresses = [[self._heard((seat, number)) for seat in (PRIMARY, BACKUP)] for number in range(terms.shards)]
        for pipe in self.pipes.values():
            pipe.send(self.addresses)
        for number in range(terms.shards):
            self._heard((BACKUP, number))
        for number in range(terms.shards):
            self.pipes[PRIMARY, number].send("now")
            self._heard((PRIMARY, number))
        for worker in range(terms.workers):
            self._start(("worker", worker), work, worker, self.addresses, terms, clocks, pause)

    def _start(self, name, function, *args):
        self.all[name], self.pipes[name] = started(self.context, function, *args)

    def _heard(self, name):
        assert self.pipes[name].poll(START_S), f"{name} says nothing"
        return self.pipes[name].recv()

    def signal(self, name, number):
        """Send a signal to one of them."""
        os.kill(self.all[name].pid, number)

    def until(self, worker, clock, timeout_s=60):
        """Wait until a worker has come so far."""
        until = time.monotonic() + timeout_s
        while time.monotonic() < until:
            assert self.pipes["worker", worker].poll(timeout_s)
            message = self.pipes["worker", worker].recv()
            if message[0] == "clock" and message[1] >= clock:
                return
            assert message[0] == "clock", message

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
            process.join(10)
            process.close()
        for pipe in self.pipes.values():
            pipe.close()
