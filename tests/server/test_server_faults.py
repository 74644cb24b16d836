"""Faults on real processes and on the line: whatever dies, every update counts once, and nobody waits for long."""

import os
import signal
import sys
import time
from pathlib import Path

import pytest
import torch
from proxy import Proxy
from server_cases import Servers, all_at_once, forms, gradient, put, same, shard_of, step, wanted

from sheaf.parallel.server.frame import Kind
from sheaf.parallel.server.log import Entry, Terms
from sheaf.parallel.server.moving import packed_shard, unpacked_shard
from sheaf.parallel.server.seats import BACKUP, PRIMARY

CLOCKS, HELD = 40, (20,)
BOUND_S = 10.0  # of a busy machine; `python -m bench server` measures how long a failover takes
LONG_S = 30.0  # a lease that nobody may wait for
SHORT_S = 1.5  # one that runs out, yet not because the machine is busy


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

    with Processes(Terms(workers=2, shards=2, staleness=staleness, lease_seconds=LONG_S), CLOCKS, held=HELD) as run:
        run.until(0, 8)
        killed_at = time.monotonic()
        run.signal((seat, 0), signal.SIGKILL)
        run.go.set()
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


def test_samples_of_a_killed_worker_are_used_once_by_another():
    from server_processes import Processes

    lease_seconds = SHORT_S
    terms = Terms(workers=2, shards=2, staleness=2, lease_seconds=lease_seconds)
    with Processes(terms, CLOCKS, held=HELD) as run:
        run.until(1, 8)
        run.signal(("worker", 1), signal.SIGKILL)
        run.go.set()
        told = run.rest(0)
        assert told[-1] == ("done", 0)
        assert len(told) > CLOCKS + 1  # beside "done": it did its own, and what the other left
        assert longest(told) < lease_seconds * 1.1 + BOUND_S  # the stated bound: the lease, and a tick
        assert same(run.values(), everything())


def test_in_lock_step_a_killed_worker_is_named():
    from server_processes import Processes

    with Processes(Terms(workers=2, shards=2, lease_seconds=SHORT_S), CLOCKS, held=HELD) as run:
        run.until(1, 5)
        run.signal(("worker", 1), signal.SIGKILL)
        run.go.set()
        last = run.rest(0)[-1]
        assert last[0] == "failed"
        assert (last[1]["why"], last[1]["worker"]) == ("worker", 1)


def test_a_stopped_primary_is_replaced_and_answers_nobody_when_it_wakes():
    from server_processes import Processes

    lease_seconds = SHORT_S
    with Processes(Terms(workers=2, shards=2, staleness=3, lease_seconds=lease_seconds), CLOCKS, held=HELD) as run:
        run.until(0, 8)
        run.signal((PRIMARY, 1), signal.SIGSTOP)
        run.go.set()
        told = [run.rest(worker) for worker in range(2)]
        run.signal((PRIMARY, 1), signal.SIGCONT)
        assert [one[-1][0] for one in told] == ["done", "done"]
        assert all(longest(one) < 2 * lease_seconds + BOUND_S for one in told)
        assert same(run.values(), everything())
        assert run.ask(BACKUP, 1)["seat"] == PRIMARY
        assert same(run.values(), everything())


def test_a_stopped_worker_comes_back_and_what_it_held_counts_once():
    from server_processes import Processes

    terms = Terms(workers=2, shards=2, staleness=2, lease_seconds=SHORT_S)
    with Processes(terms, CLOCKS, held=HELD) as run:
        run.until(1, 8)
        run.signal(("worker", 1), signal.SIGSTOP)
        run.go.set()
        told = run.rest(0)
        assert told[-1] == ("done", 0)
        assert same(run.values(), everything())  # without it
        run.signal(("worker", 1), signal.SIGCONT)
        assert run.rest(1)[-1] == ("done", 1)
        assert same(run.values(), everything())


def test_training_goes_on_without_workers_that_held_shards_and_backups_one_after_the_other():
    import multiprocessing

    import torch.distributed as dist
    from server_processes import Gate, started, train

    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["server_processes"])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    plan, steps, first, second = "dp=3,server=2:staleness=2", 60, Gate(context), Gate(context)
    holds = [(15, first.theirs), (40, second.theirs)]
    team = [started(context, train, rank, 3, store.port, plan, steps, SHORT_S, (0, 1), holds) for rank in range(3)]
    told = [[], [], []]

    def heard(rank):
        assert team[rank][1].poll(60), f"worker {rank} stands still"
        told[rank].append(team[rank][1].recv())
        return told[rank][-1]

    def answers_for(rank):
        """Once it is at the second gate: the shards it answers for, and whether they have a backup."""
        if heard(rank)[0] != "held" or not any(message[:2] == ("clock", 39) for message in told[rank]):
            return {}
        return {shard: backed for shard, (seat, backed) in told[rank][-1][1].items() if seat == PRIMARY}

    try:
        for _, pipe in team:
            assert pipe.poll(120)
            assert pipe.recv() == "ready"
        for _, pipe in team:
            pipe.send("go")
        while heard(1)[:2] != ("clock", 8):
            continue
        team[1][0].kill()
        first.set()
        while answers_for(0) | answers_for(2) != {0: True, 1: True}:  # both shards that lost a seat have another
            continue
        team[0][0].kill()
        second.set()
        while heard(2)[0] != "done":
            continue
        messages = [message for message in told[2] if message[0] == "clock"]
        assert [message[1] for message in messages] == list(range(steps))
        assert longest(messages) < 1.1 * SHORT_S + BOUND_S
        assert messages[-1][3] < 0.8 * messages[0][3]  # it learns all the while
        _, values, seats = told[2][-1]
        assert seats == {0: PRIMARY, 1: PRIMARY}  # all that is left answers for all
        assert values.keys() == {f"{layer}.{kind}" for layer in (0, 2, 4) for kind in ("weight", "bias")}
    finally:
        for process, pipe in team:
            process.kill()
            process.join(30)
            pipe.close()


@pytest.mark.thinned(3)
@pytest.mark.parametrize("staleness", [0, 2, None])
@pytest.mark.parametrize(("seed", "shards"), [(1, 2), (2, 2), (3, 1)])
def test_on_a_faulty_line_every_update_counts_once(staleness, seed, shards):
    proxies = []

    def between(address):
        proxies.append(Proxy(address, seed + len(proxies)))
        return proxies[-1].address

    terms = Terms(workers=2, shards=shards, staleness=staleness, lease_seconds=LONG_S)
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

            gaps = all_at_once([lambda worker=worker: one(worker) for worker in range(2)])
            assert same(servers.read(clock=clocks), everything(clocks))
            assert staleness is None or max(gaps) <= staleness
            assert sum(client.reconnected for client in servers.clients) > 0
        assert all(sum(proxy.faults[kind] for proxy in proxies) for kind in proxies[0].faults)
    finally:
        for proxy in proxies:
            proxy.close()


@pytest.mark.parametrize(("seed", "shards"), [(4, 2), (5, 1)])
def test_on_a_faulty_line_every_stolen_microbatch_counts_once(seed, shards):
    proxies = []

    def between(address):
        proxies.append(Proxy(address, seed + len(proxies)))
        return proxies[-1].address

    lent, clocks = 4, 12
    terms = Terms(workers=2, shards=shards, lease_seconds=LONG_S, lent=lent)
    try:
        with Servers(terms, backups=True, between=between) as servers:
            for client in servers.clients:
                client.join(0)

            def one(worker):
                client, clock = servers.clients[worker], 0
                while clock < clocks:
                    held = []
                    while (found := client.take(clock, lent, held, wait=not held, stop=False)) is not None:
                        held.append(found)
                        if len(held) == 2 or held[0] % 2:
                            told = {"losses": [[index, 1.0, 1.0] for index in held], "expected": float(lent)}
                            whole = gradient(held[0], clock)
                            for other in held[1:]:
                                whole = {name: value + gradient(other, clock)[name] for name, value in whole.items()}
                            client.cover(clock, lent, [{**meta, **told} for meta in put(client, whole)])
                            held = []
                    if held:
                        told = {"losses": [[held[0], 1.0, 1.0]], "expected": float(lent)}
                        metas = put(client, gradient(held[0], clock))
                        client.cover(clock, lent, [{**meta, **told} for meta in metas])
                        continue
                    clock = client.catch_up(clock + 1).finished

            all_at_once([lambda worker=worker: one(worker) for worker in range(2)])
            assert same(servers.read(clock=clocks), everything(clocks, lent))
            assert sum(client.reconnected for client in servers.clients) > 0
    finally:
        for proxy in proxies:
            proxy.close()


def backed(run, seat, number, timeout_s=60):
    """Wait until a seat answers for its shard and has a backup again."""
    until = time.monotonic() + timeout_s
    while time.monotonic() < until:
        told = run.ask(seat, number)
        if told["seat"] == PRIMARY and told["backed"]:
            return
        time.sleep(0.02)
    raise AssertionError(f"{seat} of shard {number} is alone: {told}")


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("staleness", "lent"), [(0, 0), (2, 0), (0, 4)])
def test_killed_again_after_a_next_backup_was_found_nothing_is_lost(staleness, lent):
    from server_processes import Processes

    clocks = 150
    terms = Terms(
        workers=2, shards=2, staleness=staleness, clip=None if staleness else 1e9, lease_seconds=LONG_S, lent=lent
    )
    with Processes(terms, clocks, pause=0.004, spares=2, held=HELD) as run:
        run.until(0, 5)
        run.signal((PRIMARY, 0), signal.SIGKILL)
        backed(run, BACKUP, 0)
        run.signal((BACKUP, 0), signal.SIGKILL)
        backed(run, "spare 0", 0)
        run.signal(("spare 0", 0), signal.SIGKILL)
        run.signal((BACKUP, 1), signal.SIGKILL)
        run.go.set()
        told = [run.rest(worker) for worker in range(2)]
        assert [one[-1][0] for one in told] == ["done", "done"]
        assert same(run.values(), everything(clocks, lent or 2))
        assert all(longest(one) < BOUND_S for one in told)
        assert run.ask("spare 1", 0)["seat"] == PRIMARY
        backed(run, PRIMARY, 1)


@pytest.mark.parametrize(
    ("terms", "momentum"), [(Terms(3, 1, None, "compensated"), 0.5), (Terms(3, 1, 2, "buffered"), 0.9)]
)
def test_a_moved_shard_goes_on_to_the_same_bits(terms, momentum):
    made, copies = forms(1)[0], []

    def make():
        def optimizer(values):
            return torch.optim.SGD(values, lr=0.1, momentum=momentum)

        return shard_of(0, made, terms, optimizer, lambda one: torch.optim.lr_scheduler.StepLR(one, 2, 0.5))

    def push(shard, worker, sequence, *, commit=True):
        arena = made.arena()
        for view in arena.views.values():
            view.copy_(torch.randn(view.shape, generator=torch.Generator().manual_seed(10 * worker + sequence)))
        meta = {"used": list(range(len(made.pieces))), "losses": [[worker, 0.5, 2.0]]}
        base = shard.version if sequence == 1 else 1
        shard.do(Entry(Kind.PUSH, worker, 1, sequence, sequence - 1, base, meta, arena))
        if commit:
            shard.do(Entry(Kind.COMMIT, worker, 1, sequence))

    shard = make()
    for worker in range(3):
        shard.do(Entry(Kind.JOIN, worker, 1))
    for worker in (0, 1):
        push(shard, worker, 1)
    shard.do(Entry(Kind.PULLED, 0, 1, sequence=5))
    push(shard, 2, 1, commit=False)
    other = make()
    unpacked_shard(other, packed_shard(shard))
    for one in (shard, other):
        one.do(Entry(Kind.COMMIT, 2, 1, 1))
        for worker in (2, 0, 1):
            push(one, worker, 2)
        copies.append({name: value.clone() for name, value in one.values.items()})
    assert all(torch.equal(copies[0][name], copies[1][name]) for name in copies[0])
    assert (shard.version, shard.scheduled, shard.told) == (other.version, other.scheduled, other.told)
    assert packed_shard(shard) == packed_shard(other)
