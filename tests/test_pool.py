"""The rank pool gives values, tells which rank failed and how, and works again afterwards."""

import os
import signal
import subprocess
import sys
import textwrap
import time
import warnings
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest
import torch
import torch.distributed as dist
from torch import nn

import pool
from pool import TESTS, Pool, RankDied, RankHung, RankRaised
from zygote import STACK_SIGNAL


@dataclass(frozen=True)
class Found:
    """Something of a test module's own, to send and get back."""

    rank: int
    total: torch.Tensor


class Doubling(nn.Module):
    def forward(self, x):
        return 2 * x


def summed(value=1.0):
    total = torch.tensor(value)
    dist.all_reduce(total)
    return total.item()


@pytest.mark.parametrize("world", [1, 2, 3, 4])
def test_every_size_of_world(ranks, world):
    assert ranks(summed, world) == [world] * world


def test_arguments_closures_and_classes_of_the_test_travel(ranks):
    offset = 10

    def body(model, *, add):
        total = model(torch.tensor(dist.get_rank() + offset)) + add
        return Found(dist.get_rank(), total)

    found = ranks(body, 2, Doubling(), add=1)
    assert found == [Found(0, torch.tensor(21)), Found(1, torch.tensor(23))]
    assert isinstance(found[0], Found)


def test_a_set_is_kept_between_calls(ranks):
    first = ranks(os.getpid, 2)
    assert len(set(first)) == 2
    assert ranks(os.getpid, 2) == first == ranks.pids(2)


def test_ranks_draw_the_same_numbers_in_every_call(ranks):
    def draw():
        return torch.rand(3).tolist()

    assert ranks(draw, 2) == ranks(draw, 2)


def test_one_thread_each_and_a_zygote_without_threads(ranks):
    assert ranks(torch.get_num_threads, 2) == [1, 1]
    assert ranks.threads_of_zygote() == 1


def test_autograd_and_an_optimizer_run_in_a_rank(ranks):
    def body():
        model = nn.Linear(2, 1)
        optimizer = torch.optim.AdamW(model.parameters())
        model(torch.ones(1, 2)).sum().backward()
        for parameter in model.parameters():
            dist.all_reduce(parameter.grad)
        optimizer.step()
        return model.weight.grad.tolist()

    assert ranks(body, 2) == [[[2.0, 2.0]]] * 2


def test_process_groups_of_one_call_are_gone_in_the_next(ranks):
    def body():
        mesh = dist.device_mesh.init_device_mesh("cpu", (2, 2), mesh_dim_names=("dp", "tp"))
        total = torch.ones(())
        dist.all_reduce(total, group=mesh["tp"].get_group())
        return total.item(), len(dist.distributed_c10d._world.pg_map)

    assert ranks(body) == ranks(body)
    assert ranks(summed) == [4.0] * 4


def test_a_function_may_end_the_process_group(ranks):
    ranks(dist.destroy_process_group, 2)
    assert ranks(summed, 2) == [2.0] * 2


def test_a_rank_that_raises_is_named_with_its_traceback(ranks):
    ranks(summed, 3)
    first = ranks.worlds[3].ranks[0]

    def body(pid, stacks):
        if dist.get_rank() == 1:
            while " in barrier\n" not in stacks.read_text():
                os.kill(pid, STACK_SIGNAL)
                time.sleep(0.02)
            raise KeyError("no such parameter")
        dist.barrier()

    with pytest.raises(RankRaised, match="rank 1 of 3 raised KeyError: 'no such parameter'") as failure:
        ranks(body, 3, first.pid, first.stacks)
    assert failure.value.rank == 1
    assert isinstance(failure.value.exception, KeyError)
    message = str(failure.value)
    assert "rank 0 waits in barrier, called at tests/test_pool.py" in message
    assert 'raise KeyError("no such parameter")' in message
    assert "zygote.py" not in message
    assert ranks(summed, 3) == [3.0] * 3


def test_the_first_of_several_failures_is_the_one_told(ranks, monkeypatch):
    monkeypatch.setattr(pool, "GRACE_S", 30.0)

    def body():
        time.sleep(0.5 * (dist.get_rank() != 2))
        raise ValueError(f"from {dist.get_rank()}")

    with pytest.raises(RankRaised, match="rank 2 of 4 raised ValueError: from 2") as failure:
        ranks(body)
    assert "rank 0 raised ValueError: from 0" in str(failure.value)
    assert str(failure.value).count("Traceback") == 1


def test_a_rank_that_hangs_is_named_with_its_place(ranks):
    def body():
        if dist.get_rank() == 2:
            time.sleep(600)
        dist.barrier()

    before = ranks(os.getpid, 3)
    with pytest.raises(RankHung, match=r"rank 2 of 3 is still running, at tests/test_pool.py:\d+ in body") as failure:
        ranks(body, 3, timeout_s=2)
    assert "the time-out of 2 s is over" in str(failure.value)
    assert "stack of rank 0" in str(failure.value)
    assert not any(psutil.pid_exists(pid) for pid in before)
    assert ranks(summed, 3) == [3.0] * 3


def test_a_stopped_rank_is_named_though_it_gives_no_stack(ranks):
    ranks(summed, 2)

    def body():
        if dist.get_rank() == 1:
            os.kill(os.getpid(), signal.SIGSTOP)
        dist.barrier()

    with pytest.raises(RankHung, match="rank 1 of 2 is still running and gives no stack") as failure:
        ranks(body, 2, timeout_s=2)
    assert "rank 1" in str(failure.value)
    assert ranks(summed, 2) == [2.0] * 2


@pytest.mark.parametrize(
    ("end", "how", "status"),
    [
        (lambda: os.kill(os.getpid(), signal.SIGKILL), "SIGKILL", -9),
        (os.abort, "SIGABRT", -6),
        (lambda: os._exit(3), "exit code 3", 3),
    ],
)
def test_a_rank_that_dies_is_named_with_its_signal(ranks, end, how, status):
    def body():
        if dist.get_rank() == 1:
            end()
        dist.barrier()

    with pytest.raises(RankDied, match=f"rank 1 of 2 died: {how}") as failure:
        ranks(body, 2)
    assert (failure.value.rank, failure.value.status) == (1, status)
    assert ranks(summed, 2) == [2.0] * 2


def test_a_set_whose_rank_died_between_calls_is_told_and_replaced(ranks):
    ranks(summed, 2)
    os.kill(ranks.pids(2)[0], signal.SIGKILL)
    with pytest.raises(RankDied, match="rank 0 of 2 died: SIGKILL"):
        ranks(summed, 2)
    assert ranks(summed, 2) == [2.0] * 2


def test_a_lost_zygote_is_replaced_and_a_closed_pool_starts_again():
    own = Pool(bare=True)
    try:
        assert own(summed, 2) == [2.0] * 2
        own._zygote.kill()
        own._zygote.wait()
        own.kill(2)
        assert own(summed, 2) == [2.0] * 2
        pids, store = own.pids(2), own._store
        own.close()
        assert not any(psutil.pid_exists(pid) for pid in pids)
        own._start()  # which then serves as it did before
        assert own._zygote.poll() is None
        assert own._store is not store
        assert own._stacks.is_dir()
    finally:
        own.close()


def test_warnings_are_errors_in_ranks_as_they_are_here(ranks):
    def body():
        warnings.warn("watch out", UserWarning, stacklevel=1)

    with pytest.raises(RankRaised, match="UserWarning: watch out"):
        ranks(body, 1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert ranks(body, 1) == [None]


def test_large_values_come_back_whole(ranks):
    def body(sent):
        return sent + dist.get_rank()

    sent = torch.arange(1_000_000)
    for rank, got in enumerate(ranks(body, 2, sent)):
        assert torch.equal(got, sent + rank)


def test_shapes_are_checked_in_ranks_too(ranks):
    def body():
        return any("jaxtyping" in type(finder).__module__ for finder in sys.meta_path)

    instrumented = ranks.instrumented is not None
    assert ranks(body, 1) == [instrumented]


def test_nothing_outlives_a_session_that_is_killed(tmp_path):
    program = tmp_path / "session.py"
    program.write_text(
        textwrap.dedent(
            f"""
            import os, sys
            sys.path.insert(0, {str(TESTS)!r})
            from pool import Pool
            pool = Pool(bare=True)
            print(*pool(os.getpid, 2), flush=True)
            sys.stdin.read()
            """
        )
    )
    # Not a pipe but a file for the output: only the session's own end is to be seen.
    output = Path(tmp_path / "pids")
    with output.open("w") as out:
        environment = os.environ | {"TMPDIR": str(tmp_path)}
        session = subprocess.Popen([sys.executable, program], stdin=subprocess.PIPE, stdout=out, env=environment)
    try:
        deadline = time.monotonic() + 120
        while not output.read_text().endswith("\n") and time.monotonic() < deadline:
            time.sleep(0.05)
        pids = [int(pid) for pid in output.read_text().split()]
        assert len(pids) == 2
    finally:
        session.kill()
        session.wait()
        session.stdin.close()
    gone = [psutil.Process(pid) for pid in pids if psutil.pid_exists(pid)]
    _, alive = psutil.wait_procs(gone, timeout=60)
    assert not alive
