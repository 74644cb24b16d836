"""Which failure is told, messages over sockets, and who this process is: without starting workers."""

import pickle
import signal
import socket
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from hypothesis import given
from hypothesis import strategies as st

from sheaf.errors import NonFiniteLoss, WorkerFailed
from sheaf.launch import World, failures, join, peers, wire
from sheaf.launch.world import is_lost_peer


def raised(at, what, *, lost_peer=False, exception=None):
    return {"raised": what, "what": what, "lost_peer": lost_peer, "exception": exception, "at": at}


def test_the_first_exception_by_time_is_told():
    answers = {0: raised(2.0, "ValueError: late"), 1: raised(1.0, "ValueError: early"), 2: {"value": b""}}
    assert "worker 1 of 3 raised ValueError: early" in str(failures.failure(3, answers, {}))


def test_a_lost_connection_is_told_only_when_nothing_explains_it():
    lost = raised(1.0, "RuntimeError: Connection closed by peer", lost_peer=True)
    assert not failures.is_settled({0: lost}, {1: None})
    assert failures.is_settled({0: lost}, {1: -signal.SIGSEGV})
    assert "worker 1 of 2 was killed by SIGSEGV" in str(failures.failure(2, {0: lost}, {1: -signal.SIGSEGV}))
    assert "ValueError" in str(failures.failure(2, {0: lost, 1: raised(3.0, "ValueError: x")}, {}))
    assert "Connection closed" in str(failures.failure(2, {0: lost}, {}))


def test_a_sheaf_error_is_the_same_error():
    error = failures.failure(2, {1: raised(1.0, "told", exception=pickle.dumps(NonFiniteLoss(1, 2, 3.0)))}, {})
    assert isinstance(error, NonFiniteLoss)
    assert error.__notes__ == ["raised by worker 1 of 2:\ntold"]


def test_a_time_out_tells_the_one_to_look_at_first():
    waits = 'File "/x/torch/distributed/distributed_c10d.py", line 1 in all_reduce\nFile "mine.py", line 2 in f'
    late = str(failures.late(3, {2: {"value": b""}}, [waits, 'File "mine.py", line 9 in g', ""], 5.0))
    assert "5 s (1 of 3 had returned); look at worker 1 first" in late


@given(st.lists(st.binary(max_size=3000), max_size=6), st.integers(1, 4000))
def test_messages_survive_any_cutting(messages, size):
    ours, theirs = socket.socketpair()
    with ours, theirs:
        sender, receiver = socket.socketpair()
        with sender, receiver:
            for message in messages:
                wire.send(sender, message)
            sender.shutdown(socket.SHUT_WR)
            stream = b"".join(iter(lambda: receiver.recv(1 << 16), b""))
        inbox = wire.Inbox(theirs)
        for start in range(0, len(stream), size):
            ours.sendall(stream[start : start + size])
            assert inbox.read()
        ours.shutdown(socket.SHUT_WR)
        while inbox.read():
            pass
        assert inbox.messages == messages


def test_receive_takes_one_message_and_leaves_the_next():
    ours, theirs = socket.socketpair()
    with ours, theirs:
        wire.send(ours, b"one")
        wire.send(ours, b"")
        ours.close()
        assert [wire.receive(theirs) for _ in range(3)] == [b"one", b"", None]


def test_nobody_started_this_process(monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    assert join() is None
    assert World.alone().workers == 1


def test_torchruns_environment_is_joined(monkeypatch):
    for name, value in {
        "RANK": 0,
        "WORLD_SIZE": 1,
        "LOCAL_RANK": 0,
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": 0,  # any that is free
    }.items():
        monkeypatch.setenv(name, str(value))
    try:
        world = join()
        assert world is not None
        assert (world.rank, world.workers, world.local_rank) == (0, 1, 0)
        assert join() == world
        one = torch.ones(1)
        dist.all_reduce(one)
        assert one.item() == 1
    finally:
        dist.destroy_process_group()


def test_a_time_out_among_workers_says_who_waited_and_where(ranks):
    def wait():
        group = dist.new_group()  # with time enough to meet
        dist.distributed_c10d._set_pg_timeout(timedelta(seconds=0.5), group)
        if dist.get_rank() == 1:
            dist.barrier()
            return None
        with (
            pytest.raises(WorkerFailed, match=r"worker 0 lost another worker.* at all_reduce \(.*in wait") as caught,
            peers(0),
        ):
            dist.all_reduce(torch.ones(1), group=group)
        dist.barrier()
        return is_lost_peer(caught.value.__cause__)

    assert ranks(wait, 2) == [True, None]


def test_other_errors_pass_through():
    with pytest.raises(RuntimeError, match="shapes"), peers(0):
        raise RuntimeError("shapes differ")
    with pytest.raises(WorkerFailed, match="as it is"), peers(0):
        raise WorkerFailed("as it is: connection closed")
