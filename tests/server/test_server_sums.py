"""In lock-step a backup is given each clock's sum: wherever its primary ends, every worker's part counts once."""

import threading
import time

import pytest
import torch
from server_cases import HELD, KEYS, Servers, all_at_once, listener, step

from sheaf.parallel.server.frame import BadFrame, Head, Kind, Wire, _packed
from sheaf.parallel.server.greeting import WORKER, Guest, receive
from sheaf.parallel.server.link import Link, first_heard
from sheaf.parallel.server.log import Terms
from sheaf.parallel.server.seats import PRIMARY
from sheaf.parallel.server.sums import check_sum

LONG_S, CLOCKS, AT = 60.0, 4, 2
WORKERS, CLIP = 3, 0.5
HALF, UNANSWERED = "half of the sum has come", "the backup has the sum, and nobody knows"
STAGES = ("the backup has nothing", HALF, UNANSWERED)


def reals(worker, clock):
    """A gradient whose sum has other bits in every other order."""
    made = torch.Generator().manual_seed(10 * clock + worker)
    return {held.name: torch.randn(held.num_elements, generator=made, dtype=torch.float64) for held in HELD}


def momentum(values):
    return torch.optim.SGD(values, lr=0.1, momentum=0.9)


def trained(prepare=lambda servers: None):
    """The weights after all clocks, and by shard what its primary forwarded."""
    terms = Terms(workers=WORKERS, shards=2, clip=CLIP, lease_seconds=LONG_S)
    with Servers(terms, backups=True, optimizer=momentum) as servers:
        for client in servers.clients:
            client.join(0)
        told = [recorded(host) for host in servers.hosts]
        prepare(servers)

        def one(worker):
            for clock in range(CLOCKS):
                norm = step(servers.clients[worker], clock, reals(worker, clock), expected=float(WORKERS)).told["norm"]
            return norm

        norms = all_at_once([lambda worker=worker: one(worker) for worker in range(WORKERS)])
        assert len(set(norms)) == 1
        found = servers.read(clock=CLOCKS)
        seats = [*servers.hosts[1:], *servers.backups]
        assert [seat.shard.version for seat in seats] == [CLOCKS] * 3, "every clock is one update"
        assert {member.committed for seat in seats for member in seat.shard.members.values()} == {CLOCKS}
        assert {tuple(seat.shard.told) for seat in seats} == {(1, 2, 3)}, "no more is kept"
        return found, told, [seat.seat for seat in servers.backups]


def recorded(host):
    """What a primary forwards from now on."""
    told, send = [], host._mirror.send

    def sent(entry):
        told.append((entry.kind, entry.arena is not None))
        return send(entry)

    host._mirror.send = sent
    return told


def ended(servers, stage):
    """Have the first shard's primary end when it forwards a clock's sum."""
    host, backup = servers.hosts[0], servers.backups[0]
    send = host._mirror.send

    def sent(entry):
        if (entry.kind, entry.clock) != (Kind.APPLY, AT):
            return send(entry)
        if stage == HALF:
            raw = entry.arena.raw
            head = Head(Kind.APPLY, clock=AT, request=10**6)
            host._mirror._wire.connection.sendall(_packed(head, entry.meta, raw.nbytes) + bytes(raw[: raw.nbytes // 2]))
        if stage == UNANSWERED:
            send(entry)
            assert backup.wait_for_clock(AT + 1, LONG_S)
        host.close()
        return 10**6

    host._mirror.send = sent


@pytest.fixture(scope="module")
def undisturbed():
    return trained()


def test_a_backup_is_given_one_gradient_for_each_clock_and_the_sum_is_what_one_process_makes(undisturbed):
    found, told, _ = undisturbed
    assert told == [[(Kind.APPLY, True)] * CLOCKS] * 2
    values = {held.name: torch.zeros(held.num_elements, dtype=torch.float64) for held in HELD}
    optimizer = momentum(values.values())
    for clock in range(CLOCKS):
        for name, value in values.items():
            value.grad = sum(reals(worker, clock)[name] for worker in range(WORKERS))
        torch.nn.utils.clip_grad_norm_(values.values(), CLIP)
        optimizer.step()
    for name, value in values.items():
        torch.testing.assert_close(found[name].double(), value, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("stage", STAGES)
def test_wherever_the_primary_ends_around_a_sum_the_bits_are_the_same(undisturbed, stage):
    found, _, seats = trained(lambda servers: ended(servers, stage))
    assert seats[0] == PRIMARY
    assert all(torch.equal(value, undisturbed[0][name]) for name, value in found.items())


def test_a_silent_seat_is_noticed_while_another_shard_keeps_saying_that_it_is_busy():
    silent, chatty = listener(), listener()
    done = threading.Event()

    def greeted(listening, words):
        connection, _ = listening.accept()
        receive(connection, KEYS.token, KEYS.digest)
        wire = Wire(connection, most_data_bytes=64, silence_seconds=None)
        while not done.wait(0.02):
            if words:
                wire.send(Head(Kind.BUSY))
        connection.close()

    terms = Terms(workers=1, shards=1, staleness=None, lease_seconds=LONG_S)
    with silent, chatty, Servers(terms) as servers:
        servers.clients[0].join(0)
        for listening, words in ((silent, False), (chatty, True)):
            threading.Thread(target=greeted, args=(listening, words), daemon=True).start()
        guest, addresses = Guest(WORKER, 0, 1), [silent.getsockname()[:2], servers.hosts[0].address]
        lines = [Link(0, addresses, guest, KEYS, 64, 0.3), Link(1, [chatty.getsockname()[:2]], guest, KEYS, 64, LONG_S)]
        lines[0]._lease = LONG_S  # it turns to another seat soon, and gives neither up
        for line in lines:
            line.start(Head(Kind.BEAT, 0, 1))
        until = time.monotonic() + LONG_S
        while (heard := first_heard(lines).heard()) is None:
            assert time.monotonic() < until
        done.set()
        assert heard[0].kind == Kind.ACK
        assert lines[0].reconnected >= 1
        for line in lines:
            line.close()


@pytest.mark.parametrize(
    "parts", [None, [], [[0, 1, 1, {}]], [[0, 1, 1, {}]] * 2, [[0, 1, 1, {}], [1, "x", 1, {}]], [[0, 1, 1, {}], [1]]]
)
def test_a_sum_is_of_one_push_of_each_worker(parts):
    check_sum({"parts": [[0, 1, 1, {}], [1, 1, 1, {}]], "used": [0]}, 1, 2)
    with pytest.raises(BadFrame):
        check_sum({"parts": parts, "used": [0]}, 1, 2)
