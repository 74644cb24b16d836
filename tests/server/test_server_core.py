"""Shards, clocks and wires: sums are exact, reads are never older than allowed, strangers are turned away."""

import contextlib
import socket
import struct
import threading
import time
import zlib

import pytest
import torch
import torch.distributed as dist
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from server_cases import (
    HELD,
    KEYS,
    SIZES,
    Servers,
    all_at_once,
    gradient,
    put,
    run_out,
    same,
    shard_of,
    step,
    wanted,
)

from sheaf.errors import PlanError, WorkerFailed
from sheaf.parallel.server.addresses import own_address
from sheaf.parallel.server.client import Client
from sheaf.parallel.server.frame import HEAD_BYTES, BadFrame, Head, Kind, Wire
from sheaf.parallel.server.greeting import WORKER, Guest, Refused, greet
from sheaf.parallel.server.host import Host
from sheaf.parallel.server.link import Keys, Link
from sheaf.parallel.server.log import Terms
from sheaf.parallel.server.peers import Peers
from sheaf.parallel.server.places import spread
from sheaf.parallel.server.seats import PRIMARY, Throne
from sheaf.plans.layout import Held

QUICK = 30.0  # a lease that nobody may wait for
SHORT_S = 1.0  # one that runs out, yet not because the machine is busy


def weighted(worker, clock, terms):
    """At staleness 0 a sum is divided by the weight of all; each worker's is 1 of N, so the sum is multiplied by N."""
    return {name: value / terms.workers for name, value in gradient(worker, clock).items()}


@given(
    sizes=st.lists(st.integers(1, 60), min_size=1, max_size=6),
    rows=st.integers(1, 5),
    count=st.integers(1, 6),
    doubles=st.booleans(),
)
def test_every_number_lies_on_one_shard_and_bytes_are_even(sizes, rows, count, doubles):
    held = [Held(f"p{n}", size, "float64" if doubles and n % 2 else "float32") for n, size in enumerate(sizes)]
    held.append(Held("e", rows * 7, "float32"))
    held.append(Held("frozen", 9, "float32", trained=False))
    found = spread(held, SIZES, {"e": 7}, count)
    assert len(found) == count
    covered = {(piece.name, number) for shard in found for piece in shard for number in range(piece.start, piece.stop)}
    assert sum(piece.num_elements for shard in found for piece in shard) == len(covered)
    assert covered == {(one.name, number) for one in held if one.trained for number in range(one.num_elements)}
    dense = [
        sum(
            piece.num_elements * (8 if doubles and int(piece.name[1:]) % 2 else 4)
            for piece in shard
            if piece.name != "e"
        )
        for shard in found
    ]
    assert max(dense) - min(dense) <= 16
    for shard in found:
        assert all(piece.start % 7 == 0 for piece in shard if piece.name == "e")
        assert len({piece.name for piece in shard}) == len(shard)
        assert all(piece.offset % 16 == 0 for piece in shard)


@pytest.mark.parametrize("backups", [False, True])
def test_lock_step_is_a_fixed_order_sum(backups):
    terms = Terms(workers=3, shards=2, lease_seconds=QUICK)
    reals = {
        worker: {
            held.name: torch.randn(held.num_elements, generator=torch.Generator().manual_seed(worker)) for held in HELD
        }
        for worker in range(3)
    }
    with Servers(terms, backups=backups) as servers:
        for worker in (2, 0, 1):
            servers.clients[worker].join(0)
        for clock in range(3):
            # whoever comes first, the order of the sum is that of the workers
            order = [(0, 0.1), (1, 0.0), (2, 0.05)] if clock % 2 else [(0, 0.0), (1, 0.1), (2, 0.02)]

            def one(worker, pause, clock=clock):
                time.sleep(pause)
                return step(servers.clients[worker], clock, reals[worker], expected=3.0)

            seen = all_at_once([lambda pair=pair: one(*pair) for pair in order])
            assert [each.staleness for each in seen] == [0, 0, 0]
        found = servers.whole(servers.clients[1].values)
        for held in HELD:
            total = (reals[0][held.name] + reals[1][held.name]) + reals[2][held.name]
            if held.name == "b":
                total = (reals[0]["b"].double() + reals[1]["b"].double()) + reals[2]["b"].double()
            reference = torch.zeros_like(total)
            for _ in range(3):
                reference -= total
            assert torch.equal(found[held.name], reference.to(found[held.name].dtype)), held.name
        if backups:  # they have the very same bits
            for host, backup in zip(servers.hosts, servers.backups, strict=True):
                assert all(torch.equal(value, backup.shard.values[name]) for name, value in host.shard.values.items())
                assert backup.shard.applied == 3


@pytest.mark.parametrize("staleness", [0, 1, 3, None])
def test_nothing_older_than_allowed_is_read(staleness):
    terms = Terms(workers=3, shards=2, staleness=staleness, lease_seconds=QUICK)
    clocks, gaps = 12, []

    with Servers(terms) as servers:
        for client in servers.clients:
            client.join(0)
        ahead = threading.Event()

        def one(worker):
            for clock in range(clocks):
                if worker == 0 and staleness != 0 and clock == 1:
                    assert ahead.wait(60)
                seen = step(servers.clients[worker], clock, gradient(worker, clock), expected=3.0)
                gaps.append(seen.staleness)
                if worker and clock == 1:  # it has read what the first, which waits, has no part in
                    ahead.set()

        all_at_once([lambda worker=worker: one(worker) for worker in range(3)])
        found = servers.read(clock=clocks)
        assert same(found, wanted((w, c) for w in range(3) for c in range(clocks)))
    if staleness is not None:
        assert max(gaps) <= staleness
    if staleness != 0:
        assert max(gaps) >= 1  # who went on without the first ran ahead


def test_a_reader_waits_for_the_slowest_and_no_longer():
    terms = Terms(workers=2, shards=1, staleness=2, lease_seconds=QUICK)
    with Servers(terms) as servers:
        fast, slow = servers.clients
        fast.join(0)
        slow.join(0)
        assert [step(fast, clock, gradient(0, clock)).staleness for clock in range(2)] == [1, 2]
        done = []

        def third():
            step(fast, 2, gradient(0, 2))
            done.append(time.monotonic())

        def later():
            time.sleep(0.15)
            assert not done
            started = time.monotonic()
            step(slow, 0, gradient(1, 0))
            return started

        _, started = all_at_once([third, later])
        assert done[0] >= started


def test_a_dead_worker_does_not_freeze_the_clock():
    terms = Terms(workers=3, shards=2, staleness=1, lease_seconds=SHORT_S)
    with Servers(terms) as servers:
        for client in servers.clients:
            client.join(0)
        servers.clients[2].close()  # no word, no beat
        start = time.monotonic()
        all_at_once(
            [
                lambda worker=worker: [step(servers.clients[worker], c, gradient(worker, c)) for c in range(5)]
                for worker in range(2)
            ]
        )
        assert time.monotonic() - start < SHORT_S + 10  # of a busy machine
        assert same(servers.read(clock=5), wanted((w, c) for w in range(2) for c in range(5)))


def test_in_lock_step_a_dead_worker_ends_the_run_by_name():
    terms = Terms(workers=2, shards=2, lease_seconds=SHORT_S)
    with Servers(terms) as servers:
        for client in servers.clients:
            client.join(0)
        servers.clients[1].close()
        from sheaf.parallel.server.link import Failed

        with pytest.raises(Failed) as caught:
            step(servers.clients[0], 0, gradient(0, 0))
        assert caught.value.meta["why"] == "worker"
        assert caught.value.meta["worker"] == 1
        assert not servers.hosts[0].shard.version


def test_clipping_is_by_the_norm_of_all_shards():
    terms = Terms(workers=2, shards=3, clip=0.5, lease_seconds=QUICK)
    with Servers(terms) as servers:
        for client in servers.clients:
            client.join(0)
        seen = all_at_once(
            [
                lambda worker=worker: step(servers.clients[worker], 0, gradient(worker, 0), expected=2.0)
                for worker in range(2)
            ]
        )
        whole = {held.name: gradient(0, 0)[held.name] + gradient(1, 0)[held.name] for held in HELD}
        norm = sum(float(value.double().square().sum()) for value in whole.values()) ** 0.5
        assert seen[0].told["norm"] == pytest.approx(norm, rel=1e-6)
        found = servers.whole(servers.clients[0].values)
        for name, value in whole.items():
            torch.testing.assert_close(found[name], -value * (0.5 / (norm + 1e-6)))


def test_what_nobody_used_stays_as_it_is_and_what_one_used_moves():
    terms = Terms(workers=2, shards=1, lease_seconds=QUICK)
    with Servers(terms, optimizer=lambda values: torch.optim.SGD(values, lr=1.0, weight_decay=0.5)) as servers:
        for value in servers.hosts[0].shard.values.values():
            value.fill_(1.0)
        names = [piece.name for piece in servers.forms[0].pieces]

        def one(worker, name):
            client = servers.clients[worker]
            client.join(0)
            meta = put(client, gradient(worker, 0))[0] | {"used": [names.index(name)], "expected": 2.0}
            client.exchange(0, [meta | {"losses": [[worker, 1.0, 1.0]]}])

        all_at_once([lambda: one(0, "a"), lambda: one(1, "b")])
        found = servers.read()
        assert torch.equal(found["e"], torch.ones(20))  # no gradient: no weight decay either
        assert torch.equal(found["a"], 1.0 - (gradient(0, 0)["a"] + 0.5))
        assert torch.equal(found["b"], 1.0 - (gradient(1, 0)["b"] + 0.5))


def test_workers_of_one_machine_listen_on_loopback_only(monkeypatch):
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    assert own_address(4) == "127.0.0.1"
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.2")
    assert own_address(4).startswith("127.")
    assert own_address(2) == "127.0.0.1"


def test_a_push_sent_twice_counts_once():
    terms = Terms(workers=1, shards=1, staleness=None, lease_seconds=QUICK)
    with Servers(terms) as servers:
        client = servers.clients[0]
        client.join(0)
        meta = put(client, gradient(0, 0))[0]
        link = client._links[0]
        head = Head(Kind.PUSH, 0, client.incarnation, 1)
        for _ in range(3):
            link.start(head, meta, client.out[0].raw)
            link.finish()
        for _ in range(3):
            link.ask(Head(Kind.PULL, 0, client.incarnation, 1, clock=1), into=client.values[0].raw)
        link.start(head, meta, client.out[0].raw)  # long after it was applied
        link.finish()
        assert servers.hosts[0].shard.version == 1
        assert same(servers.read(), wanted([(0, 0)]))


MIDDLE = ("nothing sent", "one has it", "all have it", "one was told to apply it", "one was told to drop it")


@pytest.mark.parametrize("taken", [False, True])
@pytest.mark.parametrize("stage", MIDDLE)
def test_wherever_a_worker_was_when_it_was_given_up_its_samples_count_once(stage, taken):
    terms, steps = Terms(workers=2, shards=2, staleness=None, lease_seconds=QUICK), 4
    with Servers(terms) as servers:
        dying, other = servers.clients
        for client in (dying, other):
            client.join(0)
        metas = put(dying, gradient(0, 0))
        dying._sequence = 1
        for shard in range({MIDDLE[0]: 0, MIDDLE[1]: 1}.get(stage, 2)):
            link = dying._links[shard]
            link.start(dying._head(Kind.PUSH), metas[shard], dying.out[shard].raw)
            link.finish()
        if stage == MIDDLE[3]:
            dying._links[0].ask(dying._head(Kind.PULL, clock=1), into=dying.values[0].raw)
        if stage == MIDDLE[4]:
            dying._links[0].ask(dying._head(Kind.ABANDON))
        for host in servers.hosts:
            host.lose(0)
        clock = run_out(other, 0, steps) if taken else 0
        dying._sequence = 0  # it is still in that exchange
        seen = dying.exchange(0, metas)
        counted = stage == MIDDLE[3]
        assert dying.rejoined == 1
        assert {host.shard.clocks.of(0) for host in servers.hosts} == {seen.finished}, (
            "else a last step keeps all waiting"
        )
        assert seen.dropped is (taken and not counted)
        assert (run_out(dying, seen.finished, steps) == seen.finished) is taken
        run_out(other, clock, steps)
        assert same(servers.read(), wanted((place, index) for place in range(2) for index in range(steps)))
        assert servers.hosts[0].shard.dealing.returned == 1
        assert {host.shard.version for host in servers.hosts} == {2 * steps}


def test_another_runs_server_at_the_address_of_a_seat_that_died_is_passed_by():
    terms = Terms(workers=1, shards=1, lease_seconds=QUICK)
    others = Keys(b"x" * 32, KEYS.digest)
    with Servers(terms, backups=True) as servers:
        client = servers.clients[0]
        client.join(0)
        step(client, 0, gradient(0, 0))
        address = servers.hosts[0].address
        servers.hosts[0].close()
        made = shard_of(0, servers.forms[0], terms)
        peers, throne = Peers(others, QUICK), Throne(dist.HashStore(), "shard/0")
        another = Host(made, PRIMARY, socket.create_server(address), others, throne, peers)
        another.open()
        try:
            step(client, 1, gradient(0, 1))
            reader = Client(0, servers.addresses, servers.forms, KEYS, terms)
            reader.read(2)
            assert same(servers.whole(reader.values), wanted([(0, 0), (0, 1)]))
            reader.close()
            known = Link(0, servers.addresses[0], Guest(WORKER, 0, 2), KEYS, 64, QUICK)
            known.ask(Head(Kind.BEAT, 0, 2))
            servers.backups[0].close()
            with pytest.raises(PlanError, match="another token"):  # and not that it is lost
                Link(0, servers.addresses[0], Guest(WORKER, 0, 2), KEYS, 64, 0.1).ask(Head(Kind.BEAT, 0, 1))
            known._lease = 0.1
            with pytest.raises(WorkerFailed, match="no sign of life"):  # it knows that its shard was elsewhere
                known.ask(Head(Kind.BEAT, 0, 2))
        finally:
            another.close()
        assert another.shard.version == 0


def test_strangers_are_named_and_turned_away_and_the_server_lives():
    terms = Terms(workers=1, shards=1, staleness=None, lease_seconds=QUICK)
    with Servers(terms) as servers:
        host = servers.hosts[0]
        for keys, what in (
            (Keys(b"x" * 32, KEYS.digest), "token"),
            (Keys(KEYS.token, b"o" * 32), "another task"),
        ):
            link = Link(0, [host.address], Guest(WORKER, 0, 1), keys, 64, QUICK)
            with pytest.raises(PlanError, match=what):
                link.ask(Head(Kind.BEAT, 0, 1))
        with socket.create_connection(host.address) as noise:
            noise.recv(32)
            noise.sendall(b"GET / HTTP/1.1\r\n" * 20)
            assert noise.recv(64)[:1] == b"\x01"
        servers.clients[0].join(0)
        step(servers.clients[0], 0, gradient(0, 0))
        assert [line.partition(": ")[2] for line in host.refusals] == [
            "refused: its token is wrong",
            "refused: it is of another task or plan",
            "refused: its first bytes were no greeting",
        ]


@pytest.mark.parametrize("last", ["x", None, [1], True])
def test_a_worker_that_joins_as_nothing_known_is_refused_by_name(last):
    with Servers(Terms(workers=1, shards=1, staleness=None, lease_seconds=QUICK)) as servers:
        host = servers.hosts[0]
        with socket.create_connection(host.address, timeout=60) as known:
            greet(known, Guest(WORKER, 0, 1), KEYS.token, KEYS.digest)
            wire = Wire(known, most_data_bytes=64, silence_seconds=60)
            wire.send(Head(Kind.JOIN, 0, 1, request=1), {"last": last})
            with pytest.raises(ConnectionError):
                wire.head()
        assert [line.partition(": ")[2] for line in host.refusals] == [
            "a worker that joins tells of an incarnation that is no whole number"
        ]
        assert not host.shard.members[0].incarnation, "nothing of it was done"
        servers.clients[0].join(0)


@pytest.fixture(scope="module")
def fuzzed():
    with Servers(Terms(workers=1, shards=1, staleness=None, lease_seconds=QUICK)) as servers:
        servers.clients[0].join(0)
        yield servers


@settings(
    max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow]
)
@given(
    noise=st.binary(max_size=300),
    greeted=st.booleans(),
    kind=st.integers(0, 255),
    numbers=st.lists(st.integers(0, 2**31 - 1), min_size=5, max_size=5),
    sizes=st.tuples(st.integers(0, 2**32 - 1), st.integers(0, 2**63)),
)
def test_no_bytes_bring_the_server_down(fuzzed, noise, greeted, kind, numbers, sizes):
    host = fuzzed.hosts[0]
    version = host.shard.version
    with socket.create_connection(host.address, timeout=60) as stranger:
        if greeted:  # even one that knows the token
            greet(stranger, Guest(WORKER, 0, 1), KEYS.token, KEYS.digest)
            packed = struct.pack("<4sBBxxiQQQqqIQ", b"SHFS", 1, kind, 0, *numbers, *sizes)
            stranger.sendall(packed + struct.pack("<I", zlib.crc32(packed)))
        stranger.settimeout(0.3)
        with contextlib.suppress(OSError):  # it hangs up as soon as it has seen enough
            stranger.sendall(noise)
            stranger.shutdown(socket.SHUT_WR)
            while stranger.recv(4096):
                pass
    assert host.shard.version == version
    before = fuzzed.read()
    assert set(before) == {held.name for held in HELD}


def test_sizes_are_checked_before_bytes_are_taken():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sending = Wire(ours, most_data_bytes=10**9, silence_seconds=60)
        taking = Wire(theirs, most_data_bytes=100, silence_seconds=60)
        sending.send(Head(Kind.PUSH), {"a": [1]}, memoryview(bytes(100)))
        head = taking.head()
        assert taking.meta(head) == {"a": [1]}
        with pytest.raises(BadFrame, match="100 bytes came where 7 were agreed on"):
            taking.data(head, memoryview(bytearray(7)))
        taking.skip(head)
        sending.send(Head(Kind.PUSH), None, memoryview(bytes(101)))
        with pytest.raises(BadFrame, match="at most"):
            taking.head()
        assert HEAD_BYTES < 100


def test_a_server_that_takes_the_wrong_token_is_no_server_of_ours():
    listening = socket.create_server(("127.0.0.1", 0))
    with listening:

        def lie():
            connection, _ = listening.accept()
            with connection:
                connection.sendall(bytes(32))
                connection.recv(1000)
                connection.sendall(b"\x00" + bytes(32))

        def ask():
            with socket.create_connection(listening.getsockname()) as mine, pytest.raises(Refused, match="token"):
                greet(mine, Guest(WORKER, 0, 1), KEYS.token, KEYS.digest)

        all_at_once([lie, ask])


def test_a_shard_nobody_answers_for_is_named():
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))  # and does not listen: nobody else gets this port meanwhile
        link = Link(3, [silent.getsockname()[:2]], Guest(WORKER, 0, 1), KEYS, 64, 0.1)
        with pytest.raises(WorkerFailed, match=r"shard 3 .* no sign of life"):
            link.ask(Head(Kind.BEAT, 0, 1))
