"""How long workers stand still when a seat of a shard is killed: real processes, SIGKILL, the lease of a run."""

import hashlib
import multiprocessing
import os
import signal
import socket
import statistics
import time
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from sheaf.parallel.server.assemble import LEASE_SECONDS
from sheaf.parallel.server.client import Client
from sheaf.parallel.server.host import Host
from sheaf.parallel.server.link import Address, Keys
from sheaf.parallel.server.log import Terms
from sheaf.parallel.server.peers import Peers
from sheaf.parallel.server.places import Form
from sheaf.parallel.server.seats import BACKUP, PRIMARY, Throne
from sheaf.parallel.server.shard import Shard
from sheaf.plans.layout import Piece

SIZE_BYTES, WORKERS = 2**20, 2
BATCH = 50  # exchanges between two words of a worker
START_S = 180.0
KEYS = Keys(b"bench" * 8, hashlib.sha256(b"bench failover").digest())
FORM = Form((Piece("values", 0, SIZE_BYTES // 4, 0),), (torch.float32,))
TERMS = Terms(workers=WORKERS, shards=1, staleness=None, lease_seconds=LEASE_SECONDS)


def run(count: int) -> list[dict[str, Any]]:
    """Seconds of the longest exchange of any worker, and until the backup had taken over, of ``count`` kills each."""
    return [_killed(seat, count) for seat in (PRIMARY, BACKUP)]


def _killed(seat: str, count: int) -> dict[str, Any]:
    found = [_once(seat) for _ in range(count)]
    stalls, took = [stall for stall, _ in found], [seconds for _, seconds in found if seconds is not None]
    return {
        "killed": seat,
        "count": count,
        "workers": WORKERS,
        "size_bytes": SIZE_BYTES,
        "stall_seconds": stalls,
        "median": statistics.median(stalls),
        "high": max(stalls),
        "took_over_seconds": statistics.median(took) if took else None,
    }


def _once(seat: str) -> tuple[float, float | None]:
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["bench.failover"])
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    processes, pipes = [], []
    try:
        for function, name in ((_seat, PRIMARY), (_seat, BACKUP), *((_work, worker) for worker in range(WORKERS))):
            ours, theirs = context.Pipe()
            process = context.Process(target=function, args=(theirs, name, store.port), daemon=True)
            process.start()
            theirs.close()
            processes.append(process)
            pipes.append(ours)
        for pipe in pipes[2:]:
            _heard(pipe)  # it has done a first batch
        victim = processes[0 if seat == PRIMARY else 1]
        assert victim.pid is not None
        killed_at = time.monotonic()
        os.kill(victim.pid, signal.SIGKILL)
        stall = max(_longest_after(pipe, killed_at) for pipe in pipes[2:])
        if seat == BACKUP:
            return stall, None
        pipes[1].send("when?")
        took_over_at = _heard(pipes[1])
        return stall, took_over_at - killed_at
    finally:
        for process in processes:
            process.kill()
            process.join()
        for pipe in pipes:
            pipe.close()


def _longest_after(pipe: Any, since: float) -> float:
    """The longest exchange of the first two batches that ended after ``since``: one of them was under way then."""
    longest, batches = 0.0, 0
    while batches < 2:
        ended_at, seconds = _heard(pipe)
        if ended_at > since:
            longest, batches = max(longest, seconds), batches + 1
    return longest


def _heard(pipe: Any) -> Any:
    if not pipe.poll(START_S):
        raise TimeoutError(f"a process of the benchmark has said nothing for {START_S:g} s")
    return pipe.recv()


def _store(port: int) -> dist.TCPStore:
    torch.set_num_threads(1)
    return dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=START_S))


def _seats(store: dist.Store) -> list[Address]:
    return [("127.0.0.1", int(store.get(f"port/{seat}"))) for seat in (PRIMARY, BACKUP)]


def _seat(pipe: Any, seat: str, port: int) -> None:
    store = _store(port)
    values = {"values": torch.zeros(SIZE_BYTES // 4)}
    shard = Shard(0, FORM, values, torch.optim.SGD([values["values"]], lr=1.0), TERMS)
    peers = Peers(KEYS, TERMS.lease_seconds)
    host = Host(shard, seat, socket.create_server(("127.0.0.1", 0)), KEYS, Throne(store, "throne"), peers)
    store.set(f"port/{seat}", str(host.address[1]))
    if seat == PRIMARY:
        store.wait(["open/backup"])
        host.open(_seats(store)[1])
    else:
        host.open()
    store.set(f"open/{seat}", "yes")
    pipe.recv()
    pipe.send(host.took_over_at)
    pipe.recv()


def _work(pipe: Any, worker: int, port: int) -> None:
    """Push and pull until the end; after each batch, when it ended and what its longest exchange took."""
    store = _store(port)
    store.wait(["open/primary"])
    client = Client(worker, [_seats(store)], [FORM], KEYS, TERMS)
    client.join(0)
    client.out[0].views["values"].fill_(1.0)
    clock = 0
    while True:
        longest = 0.0
        for _ in range(BATCH):
            start = time.monotonic()
            client.exchange(clock, [{"used": [0]}])
            longest = max(longest, time.monotonic() - start)
            clock += 1
        pipe.send((time.monotonic(), longest))
