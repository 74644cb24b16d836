"""Run a function on several workers of this machine, from any process: a script, a notebook, a test."""

import contextlib
import json
import os
import pickle
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from selectors import EVENT_READ, DefaultSelector
from typing import Any

import torch.distributed as dist

from sheaf.errors import WorkerFailed
from sheaf.launch import failures, wire
from sheaf.launch.output import Output
from sheaf.launch.ship import packed
from sheaf.launch.worker import STACK_SIGNAL
from sheaf.launch.world import LOST

_GRACE_SECONDS = 3.0  # how long the cause of a lost connection may take to show
_END_SECONDS = 10.0  # how long workers that have answered may take to end


def run(
    function: Callable[..., Any],
    workers: int,
    *args: Any,
    threads: int | None = None,
    timeout_s: float | None = None,
    on_line: Callable[[int, str], None] | None = None,
    on_lost: Callable[[int, str], None] | None = None,
    **kwargs: Any,
) -> list[Any]:
    """What ``function(*args, **kwargs)`` returns on each of ``workers`` new processes, by rank.

    Every worker is inside a fresh default process group (``sheaf.launch.join()`` says which device is its own) and
    computes with ``threads`` threads (default: the cores shared out). Worker 0 writes where this process writes; of the
    others only stderr is shown, each line with the worker's number. With ``on_line(rank, line)`` all lines go there.
    SIGINT and SIGTERM are passed on once, for the function to end by itself; a second one kills.

    With ``on_lost(rank, why)`` the others go on when a worker dies, until none is left: it is called for each that did,
    ``sheaf.launch.lost()`` tells the others, and the result of one that died is None. What a worker raises ends all.

    Raises what the first worker to fail raised, when that is a SheafError, and otherwise WorkerFailed: for any other
    exception, for a worker that died, and after ``timeout_s`` seconds, with every worker's stack. The other workers
    are killed at once.
    """
    call = packed(function, args, kwargs)
    with contextlib.ExitStack() as stack:
        crew = _Crew(stack, workers, threads or max(1, _cores() // workers), call, on_line)
        crew.on_lost = on_lost
        stack.callback(crew.end)
        with _signals_passed_on(crew) as interrupted:
            try:
                return crew.results(None if timeout_s is None else time.monotonic() + timeout_s, timeout_s)
            except WorkerFailed:
                if not interrupted:
                    raise
                crew.end()
    # The workers died of the signal; so does the caller, unless it knows better.
    if interrupted[0] == signal.SIGINT:
        raise KeyboardInterrupt
    signal.raise_signal(interrupted[0])
    raise WorkerFailed(f"the workers ended on {signal.Signals(interrupted[0]).name}")


class _Crew:
    """The workers of one run, the process they are forked from, and all that ties them to this one."""

    def __init__(
        self,
        stack: contextlib.ExitStack,
        workers: int,
        threads: int,
        call: bytes,
        on_line: Callable[[int, str], None] | None,
    ) -> None:
        self.workers = workers
        self.answers: dict[int, dict[str, Any]] = {}
        self.gone: dict[int, int | None] = {}  # ended without an answer; the status once it is known
        self.lost: dict[int, int | None] = {}  # those of them that the others do without
        self.on_lost: Callable[[int, str], None] | None = None
        self._directory = Path(tempfile.mkdtemp(prefix="sheaf_"))
        stack.callback(shutil.rmtree, self._directory, ignore_errors=True)
        # The store lives here: in worker 0 it would end with that worker. It listens on the loopback address only.
        listener = socket.create_server(("127.0.0.1", 0))
        port = listener.getsockname()[1]
        self._store = dist.TCPStore(
            "127.0.0.1", port, is_master=True, wait_for_workers=False, master_listen_fd=listener.detach()
        )
        self._output = Output(workers, on_line)
        stack.callback(self._output.close)
        self._control, control_end = socket.socketpair()
        pairs = [socket.socketpair() for _ in range(workers)]
        self._inboxes = [wire.Inbox(ours) for ours, _ in pairs]
        self._orders = wire.Inbox(self._control)
        for open_socket in (self._control, control_end, *(end for pair in pairs for end in pair)):
            stack.callback(open_socket.close)
        theirs = [[end.fileno(), *self._output.descriptors[rank]] for rank, (_, end) in enumerate(pairs)]
        self._process = _start(threads, control_end, [descriptor for each in theirs for descriptor in each])
        for end in (control_end, *(end for _, end in pairs)):
            end.close()
        self._output.handed_over()
        self._stacks = [self._directory / f"stack_{rank}" for rank in range(workers)]
        self._prefix = f"run_{os.getpid()}_{time.monotonic_ns()}"
        order = {
            "workers": workers,
            "threads": threads,
            "descriptors": theirs,
            "port": port,
            "prefix": self._prefix,
            "stacks": [str(path) for path in self._stacks],
            "environment": dict(os.environ),
            "path": [str(Path(entry or ".").resolve()) for entry in sys.path],
            "argv": sys.argv,
        }
        with contextlib.suppress(ConnectionError):  # told by its end
            wire.send(self._control, json.dumps(order).encode())
            wire.send(self._control, call)

    def results(self, until: float | None, timeout_s: float | None) -> list[Any]:
        """What all workers returned; raises as ``run`` does."""
        failing_since: float | None = None
        with DefaultSelector() as selector:
            selector.register(self._control, EVENT_READ, self._orders)
            for inbox in self._inboxes:
                selector.register(inbox.connection, EVENT_READ, inbox)
            self._output.register(selector)
            while len(self.answers) + len(self.lost) < self.workers or failing_since is not None:
                left = None if until is None else until - time.monotonic()
                if left is not None and left < 0 and failing_since is None:
                    raise failures.late(self.workers, self.answers, self._all_stacks(), timeout_s or 0.0)
                for key, _ in selector.select(left if failing_since is None else 0.1):
                    goes_on = self._output.pump(key.fd) if key.data is None else self._take(key.data)
                    if not goes_on:
                        selector.unregister(key.fileobj)
                self._do_without()
                if self.gone or any("raised" in answer for answer in self.answers.values()):
                    failing_since = failing_since or time.monotonic()
                    waited_enough = time.monotonic() > failing_since + _GRACE_SECONDS
                    if waited_enough or failures.is_settled(self.answers, self.gone):
                        raise failures.failure(self.workers, self.answers, self.gone | self.lost)
                else:
                    failing_since = None
        return [
            pickle.loads(self.answers[rank]["value"]) if rank in self.answers else None for rank in range(self.workers)
        ]

    def _do_without(self) -> None:
        """Where the others may go on: tell them who is lost, unless nobody is left."""
        if self.on_lost is None:
            return
        known = {rank: status for rank, status in self.gone.items() if status is not None}
        if not known or len(known) + len(self.lost) == self.workers:
            return
        for rank, status in known.items():
            self.lost[rank] = status
            del self.gone[rank]
            self.on_lost(rank, failures.ending(status))
        dist.PrefixStore(self._prefix, self._store).set(LOST, json.dumps(sorted(self.lost)))

    def signal(self, number: int, rank: int | None = None) -> None:
        """Send a signal to one worker, or to all."""
        with contextlib.suppress(OSError):
            wire.send(self._control, json.dumps({"signal": number, "rank": rank}).encode())

    def end(self) -> None:
        """Let workers that have answered go, kill the others, and wait until all are gone."""
        finished = len(self.answers) + len(self.lost) == self.workers
        if not finished:
            with contextlib.suppress(OSError):
                self._control.shutdown(socket.SHUT_RDWR)  # the nursery kills what is left
        for inbox in self._inboxes:
            inbox.connection.close()
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._output.drain()

    def _take(self, inbox: wire.Inbox) -> bool:
        alive = inbox.read()
        for message in inbox.messages:
            self._heard(inbox, message)
        inbox.messages.clear()
        if inbox is self._orders and not alive and len(self.answers) + len(self.lost) < self.workers:
            status = self._process.wait(_END_SECONDS)
            if not self.gone and not self.lost:
                raise WorkerFailed(
                    f"the process that workers are forked from ended with exit code {status}; "
                    "what it wrote on stderr says why"
                )
        if inbox is not self._orders and not alive:
            rank = self._inboxes.index(inbox)
            if rank not in self.answers | self.lost:
                self.gone.setdefault(rank, None)
        return alive

    def _heard(self, inbox: wire.Inbox, message: bytes) -> None:
        if inbox is self._orders:
            news = json.loads(message)
            if "ended" in news and news["ended"] not in self.answers | self.lost:
                self.gone[news["ended"]] = news["status"]
        else:
            self.answers[self._inboxes.index(inbox)] = pickle.loads(message)
            self.gone.pop(self._inboxes.index(inbox), None)

    def _all_stacks(self) -> list[str]:
        self.signal(STACK_SIGNAL)
        sizes, before = [-1], [0]
        deadline = time.monotonic() + 2
        while time.monotonic() < deadline and (0 in before or sizes != before):
            sizes = before
            time.sleep(0.05)
            before = [path.stat().st_size if path.exists() else 0 for path in self._stacks]
        return [failures.own_frames(path.read_text(encoding="utf-8")) if path.exists() else "" for path in self._stacks]


def _start(threads: int, control: socket.socket, descriptors: list[int]) -> subprocess.Popen[bytes]:
    root = str(Path(__file__).resolve().parents[2])
    path = os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])
    # OpenBLAS starts its threads when it is imported, and a process with threads must not be forked.
    environment = os.environ | {"PYTHONPATH": path, "OMP_NUM_THREADS": str(threads), "OPENBLAS_NUM_THREADS": "1"}
    return subprocess.Popen(
        [sys.executable, "-P", "-m", "sheaf.launch.nursery", str(control.fileno()), str(os.getpid())],
        pass_fds=[control.fileno(), *descriptors],
        stdin=subprocess.DEVNULL,
        env=environment,
        start_new_session=True,  # ctrl-C in a terminal reaches this process only, which passes it on once
    )


@contextlib.contextmanager
def _signals_passed_on(crew: _Crew) -> Iterator[list[int]]:
    """Pass the first SIGINT or SIGTERM on to the workers, kill them at the second; only the main thread can."""
    seen: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield seen
        return

    def pass_on(number: int, _frame: object) -> None:
        seen.append(number)
        crew.signal(number if len(seen) == 1 else signal.SIGKILL)

    before = {number: signal.signal(number, pass_on) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield seen
    finally:
        for number, handler in before.items():
            signal.signal(number, handler if handler is not None else signal.SIG_DFL)


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
