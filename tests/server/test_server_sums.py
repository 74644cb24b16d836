"""In lock-step a backup is given each clock's sum: wherever its primary ends, every worker's part counts once."""

import threading
import time

import pytest
import torch
from server_cases import HELD, KEYS, Servers, all_at_once, forms, listener, shard_of, step

from sheaf.parallel.server.frame import BadFrame, Head, Kind, Wire, _packed
from sheaf.parallel.server.greeting import WORKER, Guest, receive
from sheaf.parallel.server.link import Link, first_heard
from sheaf.parallel.server.log import Entry, Terms, losses
from sheaf.parallel.server.moving import packed_shard, unpacked_shard
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


def pushed(shard, worker, clock, *, commit=True):
    """A worker's push to a shard, which tells it to apply it, too."""
    arena = shard.room()
    for view in arena.views.values():
        view.copy_(torch.randn(view.shape, generator=torch.Generator().manual_seed(10 * clock + worker)))
    meta = {"used": list(range(len(shard.form.pieces))), "any": True, "losses": [[worker, 0.5, 1.0]], "expected": 3.0}
    for kind in (Kind.PUSH, Kind.COMMIT)[: 1 + commit]:
        room = arena if kind == Kind.PUSH else None
        shard.do(Entry(kind, worker, 1, clock + 1, clock, meta=meta if room else {}, arena=room))


def met(shard):
    """Let a clock's gradients meet; the entry that a backup is given for it."""
    norm = shard.partial() ** 0.5
    entry = shard.meeting(norm)
    raw = bytes(entry.arena.raw)
    shard.do(entry)
    return entry, raw


def copied(entry, raw, shard):
    """The entry as it comes to another seat."""
    room = shard.room()
    room.raw[:] = raw
    return Entry(entry.kind, clock=entry.clock, meta=entry.meta, arena=room)


def joined_shard():
    terms = Terms(workers=WORKERS, shards=1, clip=CLIP, lease_seconds=LONG_S)
    shard = shard_of(0, forms(1)[0], terms, momentum)
    for worker in range(WORKERS):
        shard.do(Entry(Kind.JOIN, worker, 1))
    return shard


@torch.no_grad()
@pytest.mark.parametrize("ended", [False, True], ids=["its primary lives", "its primary ends"])
@pytest.mark.parametrize("held", range(WORKERS))
def test_a_seat_recruited_in_the_middle_of_a_clock_goes_on_to_the_same_bits(held, ended):
    through, primary = joined_shard(), joined_shard()
    for shard in (through, primary):
        for worker in range(WORKERS):
            pushed(shard, worker, 0)
        met(shard)
        for worker in range(held):
            pushed(shard, worker, 1)
        pushed(shard, held, 1, commit=False)
    recruited = shard_of(0, primary.form, primary.terms, momentum)
    unpacked_shard(recruited, packed_shard(primary))
    if ended:
        for worker in range(WORKERS):  # all push again what was not answered
            pushed(recruited, worker, 1)
        met(recruited)
    else:
        for worker in range(held, WORKERS):
            pushed(primary, worker, 1)
        recruited.do(copied(*met(primary), recruited))
    for worker in range(held, WORKERS):
        pushed(through, worker, 1)
    met(through)
    for clock in (2, 3):
        for shard in (through, recruited):
            for worker in range(WORKERS):
                pushed(shard, worker, clock)
            met(shard)
    assert all(torch.equal(value, through.values[name]) for name, value in recruited.values.items())
    for what in ("version", "applied", "members", "norms", "whole_norms", "failure"):
        assert getattr(recruited, what) == getattr(through, what)
    assert [losses(recruited.told[clock].values()) for clock in (1, 2, 3)] == [
        losses(through.told[clock].values()) for clock in (1, 2, 3)
    ]
    assert len({id(arena) for arena in recruited.free}) == len(recruited.free), "no room is given to two gradients"


@torch.no_grad()
def test_a_seat_that_missed_a_clock_says_so_and_changes_nothing():
    primary, behind = joined_shard(), joined_shard()
    for clock in range(2):
        for worker in range(WORKERS):
            pushed(primary, worker, clock)
        entry, raw = met(primary)
    before = {name: value.clone() for name, value in behind.values.items()}
    behind.do(copied(entry, raw, behind))
    assert "step 0" in behind.hopeless["message"]
    assert "step 1" in behind.hopeless["message"]
    other = joined_shard()
    for worker in range(WORKERS):
        pushed(other, worker, 1)
    assert "some are lost" in other.hopeless["message"]
    for shard in (behind, other):
        assert not shard.ready
        assert all(torch.equal(value, before[name]) for name, value in shard.values.items())


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
