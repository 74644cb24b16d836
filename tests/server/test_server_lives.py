"""Who lives is not given up, however long its steps are; and what strangers, the gone and the slow may cost a shard."""

import ctypes
import errno
import os
import socket
import threading
import time
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from plain import mlp_float64, plain
from server_cases import KEYS, Servers, all_at_once, forms, gradient, shard_of, step

from sheaf.parallel import build
from sheaf.parallel.server import assemble, greeting
from sheaf.parallel.server.door import Door
from sheaf.parallel.server.frame import Head, Kind
from sheaf.parallel.server.greeting import WORKER, Guest
from sheaf.parallel.server.host import Host
from sheaf.parallel.server.link import Failed, Link
from sheaf.parallel.server.log import Entry, Terms
from sheaf.parallel.server.peers import Peers
from sheaf.parallel.server.seats import PRIMARY, Throne
from sheaf.plans import Plan

LONG_S = 60.0  # a lease that nobody may wait for


def mute_at_first(task, text, gate):
    """The losses of three steps, of which worker 1 begins the first when its lease has run out: till then it is in a
    call that keeps Python's lock, so that no thread of it can say that it lives.
    """
    lease_seconds, assemble.LEASE_SECONDS = assemble.LEASE_SECONDS, 1.0
    try:
        made = build(task, Plan.parse(text))
    finally:
        assemble.LEASE_SECONDS = lease_seconds
    pipe = os.open(gate, os.O_RDWR)
    if made.rank:
        ctypes.PyDLL(None).read(pipe, ctypes.create_string_buffer(1), 1)
    else:
        (host,) = made.hosts
        while 1 not in host.leases.expired() and 1 in host.shard.clocks.workers:
            time.sleep(0.01)
        time.sleep(5 * host.terms.lease_seconds / 20)  # it has been looked at since
        os.write(pipe, b"!")
    losses = [made().loss for _ in range(3)]
    made.close()
    os.close(pipe)
    return losses


def test_in_lock_step_who_cannot_speak_in_its_first_step_for_longer_than_a_lease_is_waited_for(ranks, tmp_path):
    os.mkfifo(tmp_path / "gate")
    task = mlp_float64()
    for losses in ranks(mute_at_first, 2, task, "dp=2,server=1", str(tmp_path / "gate")):
        assert losses == pytest.approx(plain(task, 3).losses, rel=1e-11)


def test_in_lock_step_who_hung_up_is_not_waited_for():
    with Servers(Terms(workers=2, shards=1, lease_seconds=LONG_S)) as servers:
        (host,) = servers.hosts
        first, second = servers.clients
        for client in (first, second):
            client.join(0)
        with host.changed:
            host.leases.expire(1)
            assert (host.leases.expired(), host._silent()) == ([1], [])
            host.leases._until[1] -= 1800.0  # nor is it waited for without end
            assert host._silent() == [1]
            host.leases.heard(1)
        all_at_once([lambda one=one: step(one, 0, gradient(one.worker, 0), expected=2.0) for one in (first, second)])
        second.close()
        with host.changed:
            assert host.changed.wait_for(lambda: not host.door.lines[1], 60)
        host.leases.expire(1)
        with pytest.raises(Failed) as caught:
            step(first, 1, gradient(0, 1))
        assert (caught.value.meta["why"], caught.value.meta["worker"]) == ("worker", 1)


def test_a_replica_of_several_that_cannot_speak_in_its_first_step_is_waited_for_and_later_given_up():
    with Servers(Terms(workers=2, shards=1, staleness=None, lease_seconds=LONG_S, place=0)) as servers:
        (host,) = servers.hosts
        first, second = servers.clients
        for client in (first, second):
            client.join(0)
        step(first, 0, gradient(0, 0))
        with host.changed:
            for worker in (0, 1):
                host.leases.expire(worker)
            assert host._silent() == [0]
            assert host.changed.wait_for(lambda: host.shard.clocks.workers == (1,), 60)
        step(second, 0, gradient(1, 0))
        host.leases.expire(1)
        with host.changed:
            assert host.changed.wait_for(lambda: not host.shard.clocks.workers, 60)


def test_what_is_kept_waits_for_a_long_step_and_not_for_the_gone():
    with Servers(Terms(workers=2, shards=1, staleness=None, lease_seconds=0.2)) as servers:
        (host,) = servers.hosts
        host.leases.expired = lambda *_: []  # nobody's runs out
        first, second = servers.clients
        for client in (first, second):
            client.join(0)
        step(first, 0, gradient(0, 0))
        found = []
        waiting = threading.Thread(target=lambda: found.append(host.wait_for_all(1)), daemon=True)
        waiting.start()
        waiting.join(5 * 0.2)
        assert not found
        step(second, 0, gradient(1, 0))
        waiting.join(60)
        assert found == [True]
        host.lose(1)
        assert host.wait_for_all(1)
        host.lose(0)
        assert not host.wait_for_all(2)


class Slow(socket.socket):
    """A connection on which each byte takes a second of ``now``, and that waits for one as long as it is told."""

    def __init__(self, now):
        super().__init__()
        self.now, self.count = now, 0
        self.settimeout(5.0)

    def sendall(self, data):
        pass

    def recv(self, size):
        assert self.gettimeout() == pytest.approx(5.0 - self.count)
        self.now[0] += 1.0
        self.count += 1
        return b"S"


def test_a_stranger_that_greets_a_byte_at_a_time_is_not_heard_to_its_end(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(greeting, "time", SimpleNamespace(monotonic=lambda: now[0]))
    guest = Guest(WORKER, 0, 1)
    for greet in (greeting.receive, lambda *given: greeting.greet(given[0], guest, *given[1:])):
        with Slow(now) as slow, pytest.raises(TimeoutError, match="too long to greet"):
            greet(slow, KEYS.token, KEYS.digest)
        assert slow.count == 5


def test_who_stood_still_itself_asks_again_before_it_takes_a_shard_for_lost():
    with Servers(Terms(workers=1, shards=1, staleness=None, lease_seconds=LONG_S), backups=True) as servers:
        link = Link(0, servers.addresses[0], Guest(WORKER, 0, 1), KEYS, 64, LONG_S)
        link.ask(Head(Kind.BEAT, 0, 1))
        link.start(Head(Kind.BEAT, 0, 1))
        link._alive -= 10 * LONG_S
        link._wire.close()
        assert link.finish()[0].kind == Kind.ACK
        link.close()


class Full(socket.socket):
    """Of which the system cannot let anybody in twice, as there are too many open files."""

    times = 2

    def accept(self):
        if self.times:
            self.times -= 1
            raise OSError(errno.EMFILE, "Too many open files")
        return super().accept()


def host_at(listening, terms, **made):
    shard = shard_of(0, forms(1)[0], terms, **made)
    return Host(shard, PRIMARY, listening, KEYS, Throne(dist.HashStore(), "shard/0"), Peers(KEYS, terms.lease_seconds))


def test_a_shard_that_could_not_let_somebody_in_lets_the_next_in():
    listening = Full(fileno=socket.create_server(("127.0.0.1", 0)).detach())
    host = host_at(listening, Terms(workers=1, shards=1, staleness=None, lease_seconds=LONG_S))
    host.open()
    link = Link(0, [host.address], Guest(WORKER, 0, 1), KEYS, 64, LONG_S)
    try:
        assert link.ask(Head(Kind.BEAT, 0, 1))
        link.close()
        assert not listening.times
    finally:
        host.close()


def test_what_is_told_of_steps_is_little_however_far_one_worker_is_behind():
    terms = Terms(workers=2, shards=1, staleness=None)
    made = forms(1)[0]
    shard = shard_of(0, made, terms)
    for worker in (0, 1):
        shard.do(Entry(Kind.JOIN, worker, 1))

    def push(worker, clock):
        meta = {"used": list(range(len(made.pieces))), "losses": [[worker, 0.5, 1.0]], "samples": 2, "any": True}
        shard.do(Entry(Kind.PUSH, worker, 1, clock + 1, clock, meta=meta, arena=shard.room()))
        shard.do(Entry(Kind.COMMIT, worker, 1, clock + 1))

    for clock in range(1500):
        push(0, clock)
    push(1, 0)
    assert shard.told[1499] == {0: {"losses": [[0, 0.5, 1.0]], "samples": 2}}
    assert shard.told[0] == {1: {"losses": [[1, 0.5, 1.0]], "samples": 2}}  # its own report has it
    assert len(shard.told) == 1024


def test_the_picture_of_a_shard_goes_with_the_worker_that_was_to_read_it():
    with Servers(Terms(workers=2, shards=1, staleness=None, lease_seconds=LONG_S)) as servers:
        (host,) = servers.hosts
        for client in servers.clients:
            client.join(0)
            assert client._links[0].ask(client._head(Kind.STATE))[1]["total"] > 0
        assert set(host._pictures._made) == {0, 1}
        host.lose(1)
        servers.clients[0].leave()
        assert not host._pictures._made


class Unkept(torch.optim.lr_scheduler.LRScheduler):
    """A scheduler of whose state no checkpoint can hold all."""

    def get_lr(self):
        return [group["lr"] for group in self.optimizer.param_groups]

    def state_dict(self):
        return {"odd": threading.Lock()}


def test_a_shard_that_no_other_seat_can_take_over_goes_on_alone_and_says_so(capfd):
    terms = Terms(workers=1, shards=1, staleness=None, lease_seconds=LONG_S)
    host = host_at(socket.create_server(("127.0.0.1", 0)), terms, scheduler=Unkept)
    elsewhere = Door(socket.create_server(("127.0.0.1", 0)), KEYS, "elsewhere", 1 << 20, LONG_S)
    elsewhere.open(lambda wire, guest: wire.head(), threading.Condition())
    try:
        host.recruits = [elsewhere.address]
        host.keep_backed()
        assert not host.recruits
        assert not host.backed
        assert capfd.readouterr().err.startswith("sheaf: shard 0 has no backup any more: ")
    finally:
        host.close()
        elsewhere.close()
