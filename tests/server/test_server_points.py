"""A process ends or stands still at every named place of the protocol: every update counts once, nobody waits long."""

import os
import signal
import time
from pathlib import Path

import psutil
import pytest
from server_cases import same, wanted

from sheaf.parallel.server import points
from sheaf.parallel.server.log import Terms
from sheaf.parallel.server.seats import BACKUP, PRIMARY

CLOCKS, LENT = 14, 4
HELD = (5,)  # nobody is done before it ended or stands still
LEASE_S, LONG_S, WORK_S = 1.5, 60.0, 0.5
BOUND_S = 10.0  # of a busy machine: `python -m bench server` measures how long a failover takes
STOLEN = "stolen"
WORKER = [name for name in points.NAMES if name.startswith("worker.")]
SEATS = [name for name in points.NAMES if not name.startswith("worker.")]
OF_A_CLOCK = ("primary.during_norms", "primary.before_sum")  # come to once in each clock
CLAIMS = ("worker.before_claim", "worker.after_claim")


def cases():
    """Every place under every way to meet that comes to it, and who is told to end there."""
    for mode in (STOLEN, 2, 0):
        for name in WORKER:
            comes = not name.endswith(("before_commit", "between_commits")) if mode == STOLEN else name not in CLAIMS
            if comes and mode != 0:  # in lock-step with shares of one's own no step can do without a worker
                yield mode, name, ("worker", 1)
        for name in SEATS:
            if name in OF_A_CLOCK and mode == 2:
                continue  # outside lock-step no clock's gradients meet
            seat = BACKUP if name.startswith("backup.") else PRIMARY
            for number in (0, 1) if mode == STOLEN and seat == PRIMARY else (0,):
                yield mode, name, (seat, number)


def lease_of(mode, name, who):
    """One that nobody may wait for, unless its end is what the others wait for."""
    return LEASE_S if name == "backup.at_promotion" or (who[0] == "worker" and mode != STOLEN) else LONG_S


@pytest.fixture(autouse=True)
def path_of_processes(monkeypatch):
    """Where new processes find the modules of these tests."""
    here = Path(__file__).parent
    paths = [str(here), str(here.parent), str(here.parent.parent / "src"), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))


@pytest.mark.thinned(6)
@pytest.mark.parametrize(("mode", "name", "who"), list(cases()))
def test_wherever_it_ends_every_update_counts_once(mode, name, who):
    from server_processes import Processes

    terms = Terms(
        workers=2,
        shards=2,
        staleness=0 if mode == STOLEN else mode,
        clip=1e9 if mode != 2 else None,  # never reached: norms are exchanged, and numbers stay whole
        lease_seconds=lease_of(mode, name, who),
        lent=LENT if mode == STOLEN else 0,
    )
    seldom = who[0] == "worker" or name in OF_A_CLOCK
    what = f"{name}:kill:{1 if name == 'backup.at_promotion' else 3 if seldom else 9}"
    with Processes(terms, CLOCKS, pause=0.002, fails={who: what}, held=HELD) as run:
        if name == "backup.at_promotion":
            run.until(0, 3)
            run.signal((PRIMARY, who[1]), signal.SIGKILL)
            run.go.set()
            found = run.rest(0)[-1]  # both seats of a shard are gone: that is told, and nothing is made up
            assert found[0] in ("gone", "failed")
            return
        run.all[who].join(60)
        assert run.all[who].exitcode == -signal.SIGKILL  # it did come to that place
        run.go.set()
        told = {worker: run.rest(worker) for worker in range(2) if ("worker", worker) != who}
        assert all(messages[-1][0] == "done" for messages in told.values()), told
        longest = max(message[2] for messages in told.values() for message in messages[:-1])
        assert longest < (WORK_S if mode == STOLEN else 1.1 * LEASE_S) + BOUND_S
        found = run.values()
        if mode == STOLEN:
            assert same(found, wanted((index, clock) for index in range(LENT) for clock in range(CLOCKS)))
        else:  # what a worker leaves undone another does
            assert same(found, wanted((worker, clock) for worker in range(2) for clock in range(CLOCKS)))
            if mode and who[0] != "worker":
                assert max(message[3] for messages in told.values() for message in messages[:-1]) <= mode


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("mode", "name"),
    [
        (STOLEN, "worker.after_claim"),
        (STOLEN, "worker.before_claim"),
        (2, "worker.after_push"),
        (STOLEN, "worker.before_push"),
        (2, "worker.between_commits"),
        (2, "worker.during_pull"),
    ],
)
def test_one_that_stands_still_in_the_middle_comes_back_and_nothing_counts_twice(mode, name):
    from server_processes import Processes

    lent, staleness, lease_seconds = (LENT, 0, LONG_S) if mode == STOLEN else (0, mode, LEASE_S)
    terms = Terms(workers=2, shards=2, staleness=staleness, lease_seconds=lease_seconds, lent=lent)
    with Processes(terms, CLOCKS, pause=0.002, fails={("worker", 1): f"{name}:stop:3"}, held=HELD) as run:
        until = time.monotonic() + 60
        while psutil.Process(run.all["worker", 1].pid).status() != psutil.STATUS_STOPPED:
            assert time.monotonic() < until, "it did not come to that place"
            time.sleep(0.01)
        run.go.set()
        told = run.rest(0)
        assert told[-1][0] == "done"
        assert max(message[2] for message in told[:-1]) < (WORK_S if mode == STOLEN else 1.1 * LEASE_S) + BOUND_S
        run.signal(("worker", 1), signal.SIGCONT)
        assert run.rest(1)[-1][0] == "done"
        assert same(run.values(), wanted((index, clock) for index in range(lent or 2) for clock in range(CLOCKS)))


def test_points_cost_nothing_when_absent_and_know_their_names():
    points.arm("")
    for name in points.NAMES:
        points.reached(name)
    with pytest.raises(ValueError, match=r"worker\.before_push"):
        points.arm("worker.somewhere:kill")
    with pytest.raises(ValueError, match="kill"):
        points.arm("worker.before_push:sleep")
