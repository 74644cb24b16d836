"""What ends a seat, a spare, a client or a line ends nothing else, and leaves no thread."""

import threading

import pytest
import torch.distributed as dist
from server_cases import KEYS, Servers, all_at_once, forms, gradient, listener, put, same, shard_of, step, wanted

from sheaf.errors import WorkerFailed
from sheaf.parallel.server.client import Client
from sheaf.parallel.server.frame import Head, Kind
from sheaf.parallel.server.greeting import SHARD, Guest
from sheaf.parallel.server.host import Host
from sheaf.parallel.server.link import Link
from sheaf.parallel.server.log import Terms
from sheaf.parallel.server.peers import Peers
from sheaf.parallel.server.seats import BACKUP, PRIMARY, RETIRED, Throne
from sheaf.parallel.server.spare import Spare

QUICK = 0.5
LONG = 10.0


def test_a_seat_that_is_closed_while_it_asks_what_counts_tells_its_backup_nothing(monkeypatch):
    with Servers(Terms(workers=2, shards=2, staleness=None, lease_seconds=LONG), backups=True) as servers:
        first, second = servers.clients
        all_at_once([lambda: first.join(0), lambda: second.join(0)])
        metas = put(first, gradient(0, 0))
        first._sequence = 1
        for link, meta, arena in zip(first._links, metas, first.out, strict=True):
            link.start(first._head(Kind.PUSH, clock=0), meta, arena.raw)
        first._finish()
        first._links[0].ask(first._pulling(1, commit=True), None, first.values[0].raw)  # and dies before shard 1 knows

        answers, closed = servers.hosts
        giver, asked, send = threading.Thread(target=closed.lose, args=(0,)), threading.Event(), Link._send

        def sent(link, wire):
            send(link, wire)
            if link.guest.role == SHARD:
                asked.set()

        monkeypatch.setattr(Link, "_send", sent)
        hang_up = closed.peers.close
        monkeypatch.setattr(closed.peers, "close", lambda: (hang_up(), giver.join(1)))
        with answers.changed:  # shard 0 does not answer yet
            giver.start()
            assert asked.wait(60)
            closed.close()
        giver.join(60)
        heir = servers.backups[1]
        with heir.changed:
            assert heir.changed.wait_for(lambda: heir.seat == PRIMARY, 60)
        heir.lose(0)
        assert heir.shard.members[0].committed == 1
        assert same(servers.read(worker=1), wanted([(0, 0)]))


def test_a_spare_that_became_a_backup_leaves_the_shard_to_the_primary(monkeypatch):
    form, terms, store = forms(1)[0], Terms(workers=1, shards=1, staleness=None, lease_seconds=1.0), dist.HashStore()

    def apart():
        return listener(), KEYS, Throne(store, "shard/0"), Peers(KEYS, terms.lease_seconds)

    primary = Host(shard_of(0, form, terms), PRIMARY, *apart())
    spare = Spare(0, form, lambda: shard_of(0, form, terms), *apart(), terms.lease_seconds)
    spare.open()
    primary.recruits = [spare.address]
    primary.open()
    client = Client(0, [[primary.address, spare.address]], [form], KEYS, terms)
    try:
        client.join(0)
        with primary.changed:
            while not primary.backed:
                primary.changed.wait(0.01)
        primary.recruits = []
        host, hang_up = spare.host, spare.peers.close

        def slowly():
            hang_up()
            with host.changed:
                host.changed.wait_for(lambda: host.seat != BACKUP, 5)

        monkeypatch.setattr(spare.peers, "close", slowly)
        spare.close()
        assert spare.join()
        step(client, 0, gradient(0, 0))
        assert (primary.seat, host.seat) == (PRIMARY, RETIRED)
    finally:
        client.close()
        for one in (primary, spare):
            one.close()


def test_beats_are_over_when_a_client_is_closed_while_a_shard_is_silent(monkeypatch):
    asked, ask = threading.Event(), Link.ask

    def told(link, head, *given):
        if head.kind == Kind.BEAT:
            asked.set()
        return ask(link, head, *given)

    monkeypatch.setattr(Link, "ask", told)
    with Servers(Terms(workers=1, shards=1, staleness=None, lease_seconds=60.0)) as servers:
        host, client = servers.hosts[0], servers.clients[0]
        monkeypatch.setattr(client._ended, "wait", lambda _: client._ended.is_set())  # beats at once
        client.join(0)
        assert asked.wait(60)
        with host.changed:
            client.close()
            assert client._threads.join()
            assert not [one.name for one in threading.enumerate() if one.name == "sheaf-worker-0-beats"]


def test_a_line_that_was_ended_asks_nobody_any_more():
    with Servers(Terms(workers=1, shards=1, staleness=None, lease_seconds=QUICK)) as servers:
        used, new = (Link(0, servers.addresses[0], Guest(SHARD, -1, 0), KEYS, 0, QUICK) for _ in range(2))
        question = Head(Kind.SETTLE, worker=0, incarnation=1)
        assert used.ask(question)[1] == {"committed": 0}
        for link in (used, new):
            link.end()
            with pytest.raises(WorkerFailed, match="was closed"):
                link.ask(question)
