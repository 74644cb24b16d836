"""Faults on real processes and on the line: whatever dies, every update counts once, and nobody waits for long."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
from proxy import Proxy
from server_cases import Servers, all_at_once, gradient, same, step, wanted

from sheaf.parallel.server.seats import BACKUP, PRIMARY
from sheaf.parallel.server.shard import Terms

CLOCKS = 40
BOUND_S = 1.0  # within which a backup takes over


@pytest.fixture(autouse=True)
def path_of_processes(monkeypatch):
    """Where new processes find the modules of these tests."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), str(here.parent.parent / "src"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    assert str(here) in sys.path


def everything(clocks=CLOCKS, workers=2):
    return wanted((worker, clock) for worker in range(workers) for clock in range(clocks))


def longest(told):
    return max(message[2] for message in told if message[0] == "clock")


@pytest.mark.parametrize("staleness", [0, 2, None])
@pytest.mark.parametrize("seat", [PRIMARY, BACKUP])
def test_a_killed_seat_is_replaced_and_no_update_is_lost_or_doubled(staleness, seat):
    from server_processes import Processes

    with Processes(Terms(workers=2, shards=2, staleness=staleness, lease_seconds=5.0), CLOCKS) as run:
        run.until(0, 8)
        killed_at = time.monotonic()
        run.signal((seat, 0), signal.SIGKILL)
        told = [run.rest(worker) for worker in range(2)]
        assert [one[-1][0] for one in told] == ["done", "done"]
        assert same(run.values(), everything())
        for one in told:
            assert longest(one) < BOUND_S
        if seat == PRIMARY:
            took_over = run.ask(BACKUP, 0)
            assert took_over["seat"] == PRIMARY
            assert took_over["took_over_at"] - killed_at < BOUND_S  # one clock for all processes of a machine
        if staleness is not None:
            assert max(message[3] for one in told for message in one[:-1]) <= staleness


def test_a_killed_worker_counts_for_what_every_shard_was_told():
    from server_processes import Processes

    lease_seconds = 0.8
    terms = Terms(workers=2, shards=2, staleness=2, lease_seconds=lease_seconds)
    with Processes(terms, CLOCKS) as run:
        run.until(1, 8)
        run.signal(("worker", 1), signal.SIGKILL)
        told, last = run.rest(0), run.rest(1)
        assert told[-1] == ("done", 0)
        assert longest(told) < lease_seconds * 1.1 + BOUND_S  # the stated bound: the lease, and a tick
        reached = 1 + max([message[1] for message in last if message[0] == "clock"], default=8)
        found = run.values()
        mine = [(0, clock) for clock in range(CLOCKS)]
        # the last push may have been told to the shards without its worker having said so
        assert any(
            same(found, wanted([*mine, *((1, clock) for clock in range(count))])) for count in (reached, reached + 1)
        )


def test_in_lock_step_a_killed_worker_is_named():
    from server_processes import Processes

    with Processes(Terms(workers=2, shards=2, lease_seconds=0.8), CLOCKS) as run:
        run.until(1, 5)
        run.signal(("worker", 1), signal.SIGKILL)
        last = run.rest(0)[-1]
        assert last[0] == "failed"
        assert (last[1]["why"], last[1]["worker"]) == ("worker", 1)


def test_a_stopped_primary_is_replaced_and_answers_nobody_when_it_wakes():
    from server_processes import Processes

    lease_seconds = 0.8
    with Processes(Terms(workers=2, shards=2, staleness=3, lease_seconds=lease_seconds), CLOCKS) as run:
        run.until(0, 8)
        run.signal((PRIMARY, 1), signal.SIGSTOP)
        told = [run.rest(worker) for worker in range(2)]
        run.signal((PRIMARY, 1), signal.SIGCONT)
        assert [one[-1][0] for one in told] == ["done", "done"]
        assert all(longest(one) < 2 * lease_seconds + BOUND_S for one in told)
        assert same(run.values(), everything())
        assert run.ask(BACKUP, 1)["seat"] == PRIMARY
        assert same(run.values(), everything())


def test_a_stopped_worker_is_left_behind_and_comes_back():
    from server_processes import Processes

    terms = Terms(workers=2, shards=2, staleness=2, lease_seconds=0.8)
    with Processes(terms, CLOCKS) as run:
        run.until(1, 8)
        run.signal(("worker", 1), signal.SIGSTOP)
        told = run.rest(0)
        assert told[-1] == ("done", 0)
        run.signal(("worker", 1), signal.SIGCONT)
        back = run.rest(1)
        assert back[-1] == ("done", 1)
        done = [*range(9), *(message[1] for message in back[:-1])]
        assert CLOCKS - 1 in done or len(done) < CLOCKS  # it goes on with the others, where they are
        assert same(run.values(), wanted([*((0, clock) for clock in range(CLOCKS)), *((1, clock) for clock in done)]))


def test_training_goes_on_without_a_worker_that_held_a_shard_and_a_backup():
    import multiprocessing

    import torch.distributed as dist
    from server_processes import started, train

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["server_processes"])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    plan, steps, lease_seconds = "dp=3,server=2:staleness=2", 40, 1.5
    team = [started(context, train, rank, 3, store.port, plan, steps, lease_seconds) for rank in range(3)]
    try:
        for _, pipe in team:
            assert pipe.poll(120)
            assert pipe.recv() == "ready"
        for _, pipe in team:
            pipe.send("go")
        while team[1][1].recv()[1] < 8:
            continue
        team[1][0].kill()
        told = {0: [], 2: []}
        for rank, messages in told.items():
            while not messages or messages[-1][0] == "clock":
                assert team[rank][1].poll(60)
                messages.append(team[rank][1].recv())
        for messages in told.values():
            assert [message[1] for message in messages[:-1]] == list(range(steps))
            assert longest(messages) < 1.1 * lease_seconds + BOUND_S
            assert messages[-2][3] < 0.8 * messages[0][3]  # it learns all the while
        assert told[2][-1][2] == {1: PRIMARY}  # the second shard's backup is where it was, and answers now
        assert told[0][-1][2] == {0: PRIMARY}
        assert told[0][-1][1].keys() == {f"{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")}
    finally:
        for process, pipe in team:
            process.kill()
            process.join(10)
            pipe.close()


@pytest.mark.parametrize("staleness", [0, 2, None])
@pytest.mark.parametrize(("seed", "shards"), [(1, 2), (2, 2), (3, 1)])
def test_on_a_faulty_line_every_update_counts_once(staleness, seed, shards):
    proxies = []

    def between(address):
        proxies.append(Proxy(address, seed + len(proxies)))
        return proxies[-1].address

    terms = Terms(workers=2, shards=shards, staleness=staleness, lease_seconds=4.0)
    clocks = 15 if shards == 2 else 30
    try:
        with Servers(terms, backups=True, between=between) as servers:
            for client in servers.clients:
                client.join(0)

            def one(worker):
                seen = []
                for clock in range(clocks):
                    whole = gradient(worker, clock)
                    seen.append(step(servers.clients[worker], clock, whole, expected=2.0).staleness)
                return max(seen)

            gaps = all_at_once([lambda worker=worker: one(worker) for worker in range(2)], 60)
            assert same(servers.read(clock=clocks), everything(clocks))
            assert staleness is None or max(gaps) <= staleness
            assert sum(client.reconnected for client in servers.clients) > 0
        assert all(sum(proxy.faults[kind] for proxy in proxies) for kind in ("delay", "twice", "cut", "drop"))
    finally:
        for proxy in proxies:
            proxy.close()
