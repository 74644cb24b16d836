"""What other programs take of the cores is seen, whatever else goes on; what is taken by the workers is not."""

import os
import subprocess
import sys
import time

from sheaf.cluster import others


def test_another_program_is_seen():
    cores = len(os.sched_getaffinity(0))
    start = others.now()
    burning = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(cores)]
    try:
        limit = time.monotonic() + 30
        while not others.disturbed(found := others.taken_since(start, cores)):  # each look burns a little here, too
            assert time.monotonic() < limit, f"{found:.2f} cores seen of {cores} that others keep busy"
        assert not others.quiet()
    finally:
        for one in burning:
            one.kill()
            one.wait()


def test_a_workers_own_cores_and_those_that_are_free_are_not_taken_by_others():
    span = others.Moment(2.0, {0: 2.0, 1: 2.0, 2: 1.0, 3: 0.0}, 4.0)
    assert others.taken([span], 4) == 0.5
    assert others.taken([span], 3) == 0, "three of four cores are wanted, and one of two that are left was used"
    half = others.Moment(2.0, {0: 2.0, 1: 1.0, 2: 1.0, 3: 0.0}, 2.0)
    assert others.taken([span, half], 2) == 0, "of cores, what either worker saw"
    busier = others.Moment(2.0, dict.fromkeys(range(4), 2.0), 2.0)
    assert others.taken([busier, busier], 2) == 2.0
