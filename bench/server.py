"""A parameter server under load: pushes and pulls per second, beside ZeroMQ and torch's rpc, in turn in one run.

Every contender has one process that holds the values, and workers that push a gradient, have it subtracted, and pull
the values, over TCP on this machine. Sheaf's counts each update once, checks clocks and leases, and with ``backup`` has
a second process that gets every update before it is acknowledged; the others do nothing of that kind.

Then seats of Sheaf's shards are killed, to see how long workers stand still (``bench.failover``).
"""

import hashlib
import importlib
import importlib.util
import multiprocessing
import os
import socket
import statistics
import time
import warnings
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from bench import failover
from sheaf.parallel.server.client import Client
from sheaf.parallel.server.host import Host
from sheaf.parallel.server.link import Keys
from sheaf.parallel.server.log import Terms
from sheaf.parallel.server.peers import Peers
from sheaf.parallel.server.places import Form
from sheaf.parallel.server.seats import BACKUP, PRIMARY, Throne
from sheaf.parallel.server.shard import Shard
from sheaf.plans.layout import Piece

WORKERS, SIZES = (2, 4), (16 * 1024, 4 * 2**20)
KILLS = 10
OPERATIONS = {16 * 1024: 400, 4 * 2**20: 12}  # of each worker in a round
SHEAF, MIRRORED, ZEROMQ, RPC = "Sheaf", "Sheaf with a backup", "ZeroMQ", "torch rpc"
START_S = 180.0

Push = Callable[[], None]


def run(count: int = 7) -> list[dict[str, Any]]:
    """Push and pull per second of all workers together: by size and workers, medians over ``count`` rounds.

    After them what became of at least ten kills of each seat.
    """
    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # rpc tells of every process that is ended
    results: list[dict[str, Any]] = []
    for workers in WORKERS:
        for size_bytes in SIZES:
            results += _contest(workers, size_bytes, count)
    return results + failover.run(max(KILLS, count))


def _contest(workers: int, size_bytes: int, count: int) -> list[dict[str, Any]]:
    teams = {name: _Team(name, workers, size_bytes) for name in (SHEAF, MIRRORED, *_others())}
    try:
        for team in teams.values():
            team.ready()
        operations, names = OPERATIONS[size_bytes], list(teams)
        rates: dict[str, list[float]] = {name: [] for name in names}
        for turn in range(count + 1):
            for name in names[turn % len(names) :] + names[: turn % len(names)]:
                seconds = teams[name].round(operations)
                if turn:
                    rates[name].append(workers * operations / seconds)
    finally:
        for team in teams.values():
            team.close()
    made: list[dict[str, Any]] = []
    for name, each in rates.items():
        low, median, high = statistics.quantiles(each, n=4)
        made.append(
            {
                "contender": name,
                "workers": workers,
                "size_bytes": size_bytes,
                "median": median,
                "low": low,
                "high": high,
            }
        )
    return made


def _others() -> tuple[str, ...]:
    return (ZEROMQ, RPC) if importlib.util.find_spec("zmq") else (RPC,)


class _Team:
    """One contender: processes that hold values, and workers that wait to be told how often to push and pull."""

    def __init__(self, name: str, workers: int, size_bytes: int) -> None:
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["bench.server"])
        self.store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        holders = 2 if name == MIRRORED else 1
        self.pipes, self.processes = [], []
        for place in range(holders + workers):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_member, args=(theirs, name, place, holders, workers, size_bytes, self.store.port), daemon=True
            )
            process.start()
            theirs.close()
            self.pipes.append(ours)
            self.processes.append(process)
        self.workers = self.pipes[holders:]

    def ready(self) -> None:
        for pipe in self.pipes:
            _heard(pipe)

    def round(self, operations: int) -> float:
        """Seconds until every worker has done so many."""
        start = time.perf_counter()
        for pipe in self.workers:
            pipe.send(operations)
        for pipe in self.workers:
            _heard(pipe)
        return time.perf_counter() - start

    def close(self) -> None:
        for process in self.processes:
            process.kill()
            process.join()
        for pipe in self.pipes:
            pipe.close()


def _heard(pipe: Any) -> Any:
    if not pipe.poll(START_S):
        raise TimeoutError(f"a process of the benchmark has said nothing for {START_S:g} s")
    return pipe.recv()


def _member(pipe: Any, name: str, place: int, holders: int, workers: int, size_bytes: int, port: int) -> None:
    """One process of a contender, until it is killed."""
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", port, is_master=False, timeout=timedelta(seconds=START_S))
    make = {SHEAF: _sheaf, MIRRORED: _sheaf, ZEROMQ: _zeromq, RPC: _rpc}[name]
    push = make(store, place, holders, workers, size_bytes)
    pipe.send("ready")
    while True:
        for _ in range(pipe.recv()):
            push()
        pipe.send("done")


def _sheaf(store: dist.Store, place: int, holders: int, workers: int, size_bytes: int) -> Push:
    form = Form((Piece("values", 0, size_bytes // 4, 0),), (torch.float32,))
    terms = Terms(workers=workers, shards=1, staleness=None, lease_seconds=30.0)
    keys = Keys(b"bench" * 8, hashlib.sha256(b"bench").digest())
    if place < holders:
        values = {"values": torch.zeros(size_bytes // 4)}
        shard = Shard(0, form, values, torch.optim.SGD([values["values"]], lr=1.0), terms)
        seat = PRIMARY if place == 0 else BACKUP
        host = Host(shard, seat, socket.create_server(("127.0.0.1", 0)), keys, Throne(store, "throne"), Peers(keys, 30))
        store.set(f"port/{place}", str(host.address[1]))
        backup = ("127.0.0.1", int(store.get("port/1"))) if seat == PRIMARY and holders == 2 else None
        if backup is not None:
            store.wait(["open/1"])
        host.open(backup)
        store.set(f"open/{place}", "yes")
        return lambda: time.sleep(0)
    store.wait(["open/0"])
    seats = [("127.0.0.1", int(store.get(f"port/{seat}"))) for seat in range(holders)]
    client = Client(place - holders, [seats], [form], keys, terms)
    client.join(0)
    client.out[0].views["values"].fill_(1.0)
    clock = 0

    def push() -> None:
        nonlocal clock
        client.exchange(clock, [{"used": [0]}])
        clock += 1

    return push


def _zeromq(store: dist.Store, place: int, holders: int, workers: int, size_bytes: int) -> Push:  # noqa: ARG001
    import threading

    zmq: Any = importlib.import_module("zmq")
    context = zmq.Context()
    if place == 0:
        values = torch.zeros(size_bytes // 4)
        router = context.socket(zmq.ROUTER)
        store.set("port", str(router.bind_to_random_port("tcp://127.0.0.1")))

        def serve() -> None:
            while True:
                sender, gradient = router.recv_multipart(copy=False)
                values.sub_(torch.frombuffer(gradient.buffer, dtype=torch.float32))
                router.send_multipart([sender, values.numpy().tobytes()], copy=False)

        threading.Thread(target=serve, daemon=True).start()
        return lambda: time.sleep(0)
    dealer = context.socket(zmq.DEALER)
    dealer.connect(f"tcp://127.0.0.1:{int(store.get('port'))}")
    gradient, pulled = torch.ones(size_bytes // 4), torch.zeros(size_bytes // 4)

    def push() -> None:
        dealer.send(gradient.numpy(), copy=False)
        pulled.copy_(torch.frombuffer(dealer.recv(copy=False).buffer, dtype=torch.float32))

    return push


class _Holder:
    values: Tensor = torch.zeros(0)


def _subtract(gradient: Tensor) -> Tensor:
    if not _Holder.values.numel():
        _Holder.values = torch.zeros_like(gradient)
    return _Holder.values.sub_(gradient)


def _rpc(store: dist.Store, place: int, holders: int, workers: int, size_bytes: int) -> Push:
    from torch.distributed import rpc

    warnings.simplefilter("ignore")  # rpc's own use of what torch has given up
    if place == 0:
        with socket.create_server(("127.0.0.1", 0)) as free:
            store.set("port", str(free.getsockname()[1]))
    options = rpc.TensorPipeRpcBackendOptions(
        init_method=f"tcp://127.0.0.1:{int(store.get('port'))}", rpc_timeout=START_S, _transports=["uv"]
    )
    os.environ.setdefault("TP_SOCKET_IFNAME", "lo")
    rpc.init_rpc(f"w{place}", rank=place, world_size=holders + workers, rpc_backend_options=options)
    gradient = torch.ones(size_bytes // 4)
    pulled = torch.zeros(size_bytes // 4)

    def push() -> None:
        pulled.copy_(rpc.rpc_sync("w0", _subtract, args=(gradient,)))

    return push
