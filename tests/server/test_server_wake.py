"""A worker whose replica is lost and that has not noticed: that it is let be, and when it ends."""

import threading
import time
from types import SimpleNamespace

import pytest
import torch.distributed as dist

from pool import RankDied
from sheaf.errors import WorkerFailed
from sheaf.parallel.server import wake as module
from sheaf.parallel.server.client import GivenUp
from sheaf.parallel.server.wake import Wake
from sheaf.plans.mesh import Mesh

MESH = Mesh(pp=3, dp=2, tp=1)  # replicas of workers 0, 2, 4 and 1, 3, 5


def woken(store, rank, lease_seconds=10.0):
    """As worker ``rank`` sees it."""
    spread = SimpleNamespace(mesh=MESH, world=SimpleNamespace(rank=rank), place=MESH.place(rank))
    return Wake(store, "replicas", spread, lease_seconds)


class Ended(Exception):
    """In place of the end of a process; with its exit code."""


@pytest.fixture
def clock(monkeypatch):
    """A clock that a test sets, and processes that only say that they end."""

    def end(code):
        raise Ended(code)

    now = [100.0]
    monkeypatch.setattr(module, "time", SimpleNamespace(monotonic=lambda: now[0], sleep=lambda _: None))
    monkeypatch.setattr(module, "os", SimpleNamespace(_exit=end))
    return now


def test_who_has_not_noticed_serves_however_long_it_takes_and_ends_when_the_others_are_done(clock, capfd):
    store = dist.HashStore()
    waiting, others = woken(store, 3), [woken(store, rank) for rank in (0, 2, 4)]
    waiting.look({0})  # of the other replica
    for other in others:
        clock[0] += 1000.0
        waiting.look({1})  # one of its workers may need a shard yet
        other.done()
    with pytest.raises(Ended, match="0"):
        waiting.look({1})
    said = "sheaf: worker 3 is of a replica that is lost, with workers 1, 5; it ends, as the others are done\n"
    assert capfd.readouterr().err == said


def test_when_no_replica_is_left_who_has_not_noticed_lets_the_others_say_so_first(clock, capfd):
    waiting = woken(dist.HashStore(), 3)
    waiting.look({0, 1})
    clock[0] += 9.99
    waiting.look({0, 1})
    clock[0] += 0.02
    with pytest.raises(Ended, match="1"):
        waiting.look({0, 1})
    assert "with workers 1, 5; it ends, as no other replica is left" in capfd.readouterr().err


def test_who_found_out_tells_the_others_of_its_replica_and_serves_until_all_others_are_done(clock, capfd, monkeypatch):
    store = dist.HashStore()
    serving, waiting, others = woken(store, 1), woken(store, 3), [woken(store, rank) for rank in (0, 2, 4)]
    others[0].done()
    others[0].look({0})
    left, hung_up = others[1:], []
    monkeypatch.setattr(module.time, "sleep", lambda _: left.pop().done())
    assert serving.stays(GivenUp("silent"), serving.given_up, lambda: hung_up.append(True))
    assert (left, hung_up) == ([], [True])
    assert waiting.given_up() == {1}
    for one in (serving, *others):
        one.look(())  # whoever computes no more does not wait
    with pytest.raises(Ended, match="0"):
        waiting.look(())
    assert "worker 1 is of a replica that is lost, with workers 3, 5; it computes no more" in capfd.readouterr().err


def test_when_no_replica_is_left_nobody_serves_on(clock):
    serving = woken(dist.HashStore(), 1)
    with pytest.raises(WorkerFailed, match="each of the 2 replicas has lost a worker"):
        serving.stays(WorkerFailed("gone"), lambda: {0, 1}, lambda: None)


def test_an_error_of_another_kind_is_told_when_nobody_turns_out_to_be_lost(clock):
    def gone():
        clock[0] += 4.0
        return ()

    hung_up = []
    assert not woken(dist.HashStore(), 1).stays(WorkerFailed("another"), gone, lambda: hung_up.append(True))
    assert not hung_up


def waits_for_ever():
    """As a worker in a collective whose other one serves; what looks at who is lost is a thread of its own."""
    if dist.get_rank() == 0:
        threading.Event().wait()
    store = dist.HashStore()
    waiting = woken(store, 3)
    for rank in (0, 2, 4):
        woken(store, rank).done()

    def look():
        while True:
            waiting.look({1})
            time.sleep(0.01)

    threading.Thread(target=look, daemon=True).start()
    dist.barrier()


def test_a_worker_that_waits_in_a_collective_for_one_that_serves_ends_with_the_run(ranks):
    with pytest.raises(RankDied, match="rank 1") as died:
        ranks(waits_for_ever, 2)
    assert died.value.status == 0
