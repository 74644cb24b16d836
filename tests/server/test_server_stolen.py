"""Stolen shares beside a server: every microbatch counts once, whoever dies or stands still, and nobody waits long."""

import itertools
import os
import signal
import time
from pathlib import Path

import pytest
from server_cases import KEYS, Servers, all_at_once, gradient, put, same, wanted

from sheaf.parallel.server import work
from sheaf.parallel.server.borrowing import Borrower
from sheaf.parallel.server.log import Terms
from sheaf.parallel.server.seats import BACKUP, PRIMARY
from sheaf.parallel.server.work import Round

CLOCKS, LENT = 25, 5
WORK_S = 0.5  # how long a worker may be silent about its microbatches at least
BOUND_S = 10.0  # of a busy machine
LONG_S = 60.0  # a lease that nobody may wait for


@pytest.fixture(autouse=True)
def path_of_processes(monkeypatch):
    """Where new processes find the modules of these tests."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), str(here.parent.parent / "src"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


@pytest.fixture
def patient(monkeypatch):
    """Nobody in this process is silent for too long, however busy the machine."""
    monkeypatch.setattr(work, "_LEAST_SECONDS", LONG_S)


def everything(clocks=CLOCKS):
    return wanted((index, clock) for index in range(LENT) for clock in range(clocks))


def longest(told):
    return max(message[2] for message in told if message[0] == "clock")


def borrowing(servers, worker):
    """A client that has joined."""
    client = Borrower(worker, servers.addresses, servers.forms, KEYS, servers.terms)
    client.join(0)
    return client


def covered(client, clock, held, lent=LENT):
    """Push what these microbatches give; whether it counts."""
    whole = gradient(held[0], clock)
    for other in held[1:]:
        whole = {name: value + gradient(other, clock)[name] for name, value in whole.items()}
    told = {"losses": [[index, 1.0, 1.0] for index in held], "expected": float(lent)}
    return client.cover(clock, lent, [{**meta, **told} for meta in put(client, whole)])


def taken(client, clock, count, lent=LENT):
    """So many microbatches, one after the other."""
    held = []
    for _ in range(count):
        held.append(client.take(clock, lent, held, wait=False, stop=False))
    return held


@pytest.mark.usefixtures("patient")
def test_a_late_push_is_refused_as_a_whole_and_the_rest_of_it_is_computed_once():
    terms = Terms(workers=2, shards=2, lease_seconds=LONG_S, lent=LENT)
    with Servers(terms) as servers:
        slow, fast = (borrowing(servers, worker) for worker in range(2))
        try:
            assert taken(slow, 0, 3) == [0, 1, 2]
            assert slow.take(0, LENT, [0, 1], wait=False, stop=False) == 2  # an answer was lost: the same again
            with servers.hosts[0].changed:
                servers.hosts[0]._lender._take_back([0])  # as when it has been silent for too long
            assert taken(fast, 0, 2) == [0, 1]
            assert covered(fast, 0, [0, 1])
            assert not covered(slow, 0, [0, 1, 2])
            assert not covered(slow, 0, [1])
            assert taken(slow, 0, 1) == [2]  # of all it had, what nobody covered is still to be computed
            assert taken(fast, 0, 2) == [3, 4]
            assert covered(slow, 0, [2])
            assert servers.hosts[0].shard.applied == servers.hosts[1].shard.applied == 0
            assert covered(fast, 0, [3, 4])
            assert slow.take(0, LENT, [], wait=True, stop=False) is None
            seen = all_at_once([lambda: slow.catch_up(1), lambda: fast.catch_up(1)])
            assert [one.finished for one in seen] == [1, 1]
            assert seen[0].told["counts"] == {"0": 1, "1": 4}
            assert seen[0].told["returned"] == {"0": 3}
            assert same(servers.whole(slow.values), everything(1))
            assert not covered(slow, 0, [2])  # a step that is closed
            assert same(servers.whole(fast.values), everything(1))
        finally:
            slow.close()
            fast.close()


@pytest.mark.usefixtures("patient")
def test_work_goes_back_at_once_when_a_line_breaks_and_a_wait_for_it_ends():
    terms = Terms(workers=2, shards=1, lease_seconds=LONG_S, lent=2)
    with Servers(terms) as servers:
        dying, other = (borrowing(servers, worker) for worker in range(2))
        try:
            assert taken(dying, 0, 1, 2) == [0]
            assert taken(other, 0, 1, 2) == [1]
            assert covered(other, 0, [1], 2)
            start = time.monotonic()

            def dies():
                time.sleep(0.1)
                dying.close()

            found, _ = all_at_once([lambda: other.take(0, 2, [], wait=True, stop=True), dies])
            assert found == 0
            assert time.monotonic() - start < 0.1 + BOUND_S
            assert covered(other, 0, [0], 2)
            seen = other.catch_up(1)
            assert seen.stop  # it was asked while it waited
        finally:
            other.close()


@pytest.mark.usefixtures("patient")
def test_a_backup_knows_what_was_lent_and_covered():
    terms = Terms(workers=1, shards=2, lease_seconds=LONG_S, lent=LENT)
    with Servers(terms, backups=True) as servers:
        client = borrowing(servers, 0)
        try:
            held = taken(client, 0, 2)
            assert covered(client, 0, held)
            assert taken(client, 0, 1) == [2]
            servers.hosts[0].close()
            assert client.take(0, LENT, [2], wait=False, stop=False) == 3
            assert covered(client, 0, [2, 3])
            assert taken(client, 0, 1) == [4]
            assert covered(client, 0, [4])
            assert client.take(0, LENT, [], wait=True, stop=False) is None
            client.catch_up(1)
            assert same(servers.whole(client.values), everything(1))
            assert servers.backups[0].seat == PRIMARY
        finally:
            client.close()


def test_whose_push_does_not_count_has_nothing_left_and_order_is_by_what_is_covered():
    made = Round(4)
    made.lent = {0: 1, 1: 0, 2: 0, 3: 1}
    assert made.claim((0, 1, 1), [1, 2])
    assert not made.claim((1, 1, 1), [0, 2, 3])
    assert made.lent == {}
    assert made.returned == {1: 2}
    assert made.claim((1, 1, 2), [0, 3])
    assert made.claim((0, 1, 1), [1, 2])  # asked again
    assert made.complete
    assert made.ordered == [(1, 1, 2), (0, 1, 1)]


@pytest.mark.parametrize("who", [("worker", 2), (PRIMARY, 0), (PRIMARY, 1), (BACKUP, 0)])
def test_a_kill_costs_nobody_a_sample(who):
    from server_processes import Processes

    terms = Terms(workers=3, shards=2, lease_seconds=LONG_S, lent=LENT)
    with Processes(terms, CLOCKS, held=(15,)) as run:
        run.until(0, 6)
        run.signal(who, signal.SIGKILL)
        run.go.set()
        left = [worker for worker in range(3) if ("worker", worker) != who]
        told = [run.rest(worker) for worker in left]
        assert [one[-1][0] for one in told] == ["done"] * len(left)
        assert same(run.values(), everything())
        assert all(longest(one) < WORK_S + BOUND_S for one in told)


def test_one_that_stands_still_is_left_out_and_comes_back():
    from server_processes import Processes

    terms = Terms(workers=3, shards=2, lease_seconds=LONG_S, lent=LENT)
    with Processes(terms, 60, pause=0.01, held=(15, 40)) as run:
        run.until(1, 5)
        run.signal(("worker", 1), signal.SIGSTOP)
        run.go.set()
        meanwhile = run.heard(0, lambda message: message[1] >= 38)
        assert longest(meanwhile) < WORK_S + BOUND_S  # and not the lease
        run.signal(("worker", 1), signal.SIGCONT)
        back = run.heard(1, lambda message: message[1] > 38 and message[3])  # it works again
        run.again.set()
        told = [run.rest(worker) for worker in range(3)]
        told[1] = back + told[1]
        assert [one[-1] for one in told] == [("done", 0)] * 3
        assert same(run.values(), everything(60))
        assert all(longest(told[worker]) < WORK_S + BOUND_S for worker in (0, 2))
        steps = [message[1] for message in told[1] if message[0] == "clock"]
        assert any(later - step > 5 for step, later in itertools.pairwise(steps)) or steps[0] > 10
