"""The rank pool: real gloo ranks, kept for the whole pytest session, so that a test on four ranks costs milliseconds.

    def test_sum(ranks):
        def total():
            one = torch.ones(())
            dist.all_reduce(one)
            return one.item()

        assert ranks(total, world=4) == [4.0] * 4

Each world size has its own set of processes, forked on first use from one zygote (`zygote.py`). A set in which a rank
raised, hung or died is killed; the next call gets a new one. `CONTRIBUTING.md` tells what a rank function may do.
"""

import contextlib
import json
import os
import pickle
import selectors
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cloudpickle
import psutil
import torch.distributed as dist

from nurseries import Nursery, Program
from stacks import TESTS, Stack, read_stack
from zygote import HEADER, STACK_SIGNAL

GRACE_S = 0.3  # after a first failure, how long the other ranks may take to tell theirs
STACKS_S = 10.0  # how long ranks may take to write their stacks
GROUP_SLACK_S = 30.0  # gloo's own time-out comes this much later than ours, which says more


class RankError(Exception):
    """A function did not come back from every rank; `rank` is the one to look at first."""

    def __init__(self, rank: int, message: str):
        super().__init__(message)
        self.rank = rank


class RankRaised(RankError):
    """A rank raised; `exception` is what it raised, or None where that could not be pickled."""

    exception: BaseException | None = None


class RankHung(RankError):
    """A rank did not come back in time."""


class RankDied(RankError):
    """A rank's process ended; `status` is its exit code, or minus the signal that ended it."""

    status: int | None = None


@dataclass(eq=False)
class Rank:
    """One process of a set, as the pool sees it, during one call."""

    number: int
    pid: int
    connection: socket.socket
    stacks: Path
    received: bytearray = field(default_factory=bytearray)
    answer: dict[str, Any] | None = None
    gone: bool = False

    @property
    def running(self) -> bool:
        return self.answer is None and not self.gone

    def read(self) -> None:
        """Take what has arrived; fills `answer` once it is whole."""
        try:
            piece = self.connection.recv(1 << 20)
        except ConnectionError:
            piece = b""
        if not piece:
            self.gone = True
            return
        self.received += piece
        if len(self.received) >= HEADER.size:
            (size,) = HEADER.unpack_from(self.received)
            if len(self.received) == HEADER.size + size:
                self.answer = pickle.loads(bytes(self.received[HEADER.size :]))
                self.received.clear()


@dataclass
class World:
    """The set of ranks of one size."""

    ranks: list[Rank]
    prefix: str  # where in the store its process group met; a new prefix means a new group
    group_timeout_s: float
    clean: bool = True  # no rank made or destroyed a process group since the last one was set up


class Pool:
    """Calls functions on sets of ranks; makes the sets when they are first needed and again when they broke."""

    def __init__(self, instrumented: str | None = None, *, bare: bool = False):
        self.instrumented, self.bare = instrumented, bare  # a bare one imports torch alone: it starts sooner
        self.worlds: dict[int, World] = {}
        self.nurseries: list[int] = []  # the numbers of all these processes
        self._zygote: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None
        self._store: dist.TCPStore | None = None
        self._stacks: Path | None = None
        self._prefixes = 0
        self._modules_seen: set[str] = set()

    def __call__(
        self, function: Callable[..., Any], world: int = 4, *args: Any, timeout_s: float = 100.0, **kwargs: Any
    ):
        """Each rank's `function(*args, **kwargs)`, in rank order."""
        __tracebackhide__ = True
        call = self._pickled(function, args, kwargs)
        try:
            return self._call(call, world, timeout_s)
        except BaseException:  # a test's own time-out and ctrl-C leave ranks at work, too
            self.kill(world)
            raise

    def pids(self, world: int) -> list[int]:
        """The processes of a set, in rank order; empty while there is none."""
        return [rank.pid for rank in self.worlds[world].ranks] if world in self.worlds else []

    def nursery(self, threads: int, control: socket.socket, descriptors: list[int]) -> Nursery:
        """In the place of `sheaf.launch.local._start`, which takes three seconds of a core to import what it needs."""
        numbers = [1, 2, control.fileno(), *descriptors]
        environment = dict(os.environ) | {"OMP_NUM_THREADS": str(threads)}
        request = {
            "do": "nursery",
            "numbers": numbers,
            "control": control.fileno(),
            "environment": environment,
            "directory": os.getcwd(),
        }
        self.nurseries.append(self._ask(request, numbers))
        return Nursery(self.nurseries[-1], self._reaped)

    def program(self, file: Path, arguments: list[str], path: list[str], directory: Path) -> Program:
        """In the place of starting Python with ``file``, which would import what is imported here; it writes there."""
        written = [directory / "stdout", directory / "stderr"]
        request = {"do": "program", "argv": [str(file), *arguments], "path": path, "environment": dict(os.environ)}
        with written[0].open("w") as out, written[1].open("w") as err:
            return Program(self._ask(request, [out.fileno(), err.fileno()]), self._reaped, written)

    def _reaped(self, pid: int) -> int | None:
        (status,) = self._ask({"do": "wait", "pids": [pid]})
        return status

    def threads_of_zygote(self) -> int:
        """How many threads the process has that ranks are forked from: it must be one."""
        return self._ask({"do": "threads"})

    def kill(self, world: int) -> None:
        """End the set of this size, whatever its ranks are at."""
        if (broken := self.worlds.pop(world, None)) is None:
            return
        for rank in broken.ranks:
            rank.connection.close()
        if self._zygote_lives():  # one that is gone has taken its ranks along
            with contextlib.suppress(OSError):
                self._ask({"do": "kill", "pids": [rank.pid for rank in broken.ranks]})

    def close(self) -> None:
        """End every process of the pool."""
        for world in list(self.worlds):
            self.kill(world)
        if self._zygote is not None:
            self._zygote.kill()
            self._zygote.wait()
            self._control.close()
            self._zygote = None
        if self._stacks is not None:
            shutil.rmtree(self._stacks, ignore_errors=True)
            self._stacks = None
        self._store = None

    def _call(self, call: bytes, world: int, timeout_s: float) -> list[Any]:
        __tracebackhide__ = True
        ranks = self._set(world, timeout_s)
        started = time.monotonic()
        self._order(self.worlds[world], call, timeout_s)
        _gather(ranks, until=started + timeout_s, first_failure_ends=True)
        if all(rank.answer is not None and "value" in rank.answer for rank in ranks):
            self.worlds[world].clean = all(rank.answer["clean"] for rank in ranks)
            return [pickle.loads(rank.answer["value"]) for rank in ranks]
        if time.monotonic() < started + timeout_s:
            _gather(ranks, until=time.monotonic() + GRACE_S, first_failure_ends=False)
        raise self._failure(ranks, started, timeout_s)

    def _failure(self, ranks: list[Rank], started: float, timeout_s: float) -> RankError:
        dead = [rank for rank in ranks if rank.gone]
        raised = sorted((rank for rank in ranks if _raised(rank)), key=lambda rank: rank.answer["at"])
        stacks = _stacks([rank for rank in ranks if rank.running])
        statuses = (
            dict(zip(dead, self._ask({"do": "wait", "pids": [r.pid for r in dead]}), strict=True)) if dead else {}
        )
        rest = {rank.number: _outcome(rank, started, stacks, statuses) for rank in ranks}

        def told(first: Rank, *details: str) -> str:
            headline = f"rank {first.number} of {len(ranks)} {rest.pop(first.number)}"
            others = [f"rank {number} {outcome}" for number, outcome in sorted(rest.items())]
            return "\n".join([headline, *others, *(detail for detail in details if detail)])

        if dead:  # what the others raised is then only that they lost a peer
            first = dead[0]
            left = first.stacks.read_text().strip() if first.stacks.exists() else ""
            failure = RankDied(first.number, told(first, left and f"\nits last stack:\n{left}"))
            failure.status = statuses[first]
            return failure
        if raised:
            first = raised[0]
            failure = RankRaised(first.number, told(first, "\n" + first.answer["raised"]))
            if first.answer["exception"] is not None:
                failure.exception = failure.__cause__ = pickle.loads(first.answer["exception"])
            return failure
        # A rank that is inside a collective waits for the others; the one to look at is elsewhere.
        late = sorted(
            (rank for rank in ranks if rank.running), key=lambda rank: (stacks[rank.number].waits, rank.number)
        )
        details = [f"\nstack of rank {rank.number}:\n{stacks[rank.number].text}" for rank in late]
        return RankHung(late[0].number, told(late[0], f"(the time-out of {timeout_s:g} s is over)", *details))

    def _order(self, world: World, call: bytes, timeout_s: float) -> None:
        if not world.clean or timeout_s + GROUP_SLACK_S > world.group_timeout_s:
            world.prefix = self._new_prefix(len(world.ranks))
            world.group_timeout_s = timeout_s + GROUP_SLACK_S
        order = pickle.dumps(
            {
                "call": call,
                "prefix": world.prefix,
                "group_timeout_s": world.group_timeout_s,
                "warnings": list(warnings.filters),
            }
        )
        message = HEADER.pack(len(order)) + order
        for rank in world.ranks:
            rank.answer = None
            rank.connection.settimeout(timeout_s)
            try:
                rank.connection.sendall(message)
            except ConnectionError:
                rank.gone = True

    def _set(self, world: int, timeout_s: float) -> list[Rank]:
        if world not in self.worlds:
            ours, theirs = zip(*(socket.socketpair() for _ in range(world)), strict=True)
            self._start()
            prefix = self._new_prefix(world)
            stacks = [self._stacks / f"{prefix}.{rank}" for rank in range(world)]
            request = {"do": "fork", "world": world, "port": self._store.port, "stacks": [str(path) for path in stacks]}
            pids = self._ask(request, [end.fileno() for end in theirs])
            for end in theirs:
                end.close()
            ranks = [Rank(number, *parts) for number, parts in enumerate(zip(pids, ours, stacks, strict=True))]
            self.worlds[world] = World(ranks, prefix, timeout_s + GROUP_SLACK_S)
        return self.worlds[world].ranks

    def _new_prefix(self, world: int) -> str:
        self._prefixes += 1  # used once: addresses left in the store by an earlier group would be found by a later one
        return f"{world}_ranks_{self._prefixes}"

    def _zygote_lives(self) -> bool:
        return self._zygote is not None and self._zygote.poll() is None

    def _start(self) -> None:
        if self._zygote_lives():
            return
        for world in list(self.worlds):
            self.kill(world)
        if self._control is not None:
            self._control.close()
        self._stacks = self._stacks or Path(tempfile.mkdtemp(prefix="sheaf_ranks_"))
        # The store lives here: in a rank it would end with that rank, and the zygote must not have its threads.
        self._store = self._store or dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        self._control, other_end = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        settings = {"parent": os.getpid(), "instrumented": self.instrumented, "bare": self.bare, "path": sys.path}
        environment = os.environ | {f"{name}_NUM_THREADS": "1" for name in ("OMP", "OPENBLAS", "MKL")}
        if sys.platform == "linux":
            environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
        self._zygote = subprocess.Popen(
            [sys.executable, str(TESTS / "zygote.py"), str(other_end.fileno()), json.dumps(settings)],
            pass_fds=[other_end.fileno()],
            stdin=subprocess.DEVNULL,
            env=environment,
        )
        other_end.close()

    def _ask(self, request: dict[str, Any], descriptors: list[int] | None = None) -> Any:
        self._start()
        socket.send_fds(self._control, [json.dumps(request).encode()], descriptors or [])
        answer = self._control.recv(1 << 16)
        if not answer:
            raise ConnectionError("the process that ranks are forked from has ended; its output says why")
        return json.loads(answer)

    def _pickled(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
        # Test modules travel by value: a rank must not import them, and with them pytest's fixtures, again.
        for name in sys.modules.keys() - self._modules_seen:
            self._modules_seen.add(name)
            file = getattr(sys.modules[name], "__dict__", {}).get("__file__")  # getattr would wake lazy modules
            if isinstance(file, str) and Path(file).is_relative_to(TESTS):
                cloudpickle.register_pickle_by_value(sys.modules[name])
        return cloudpickle.dumps((function, args, kwargs))


def _gather(ranks: list[Rank], *, until: float, first_failure_ends: bool) -> None:
    with selectors.DefaultSelector() as selector:
        for rank in ranks:
            if rank.running:
                selector.register(rank.connection, selectors.EVENT_READ, rank)
        while selector.get_map() and (left := until - time.monotonic()) > 0:
            for key, _ in selector.select(left):
                rank: Rank = key.data
                rank.read()
                if not rank.running:
                    selector.unregister(rank.connection)
                if first_failure_ends and (rank.gone or _raised(rank)):
                    return


def _raised(rank: Rank) -> bool:
    return rank.answer is not None and "raised" in rank.answer


def _outcome(rank: Rank, started: float, stacks: dict[int, Stack], statuses: dict[Rank, int | None]) -> str:
    if rank.gone:
        status = statuses[rank]
        if status is None:
            return "closed its connection"
        return f"died: exit code {status}" if status >= 0 else f"died: {signal.Signals(-status).name}"
    if rank.running:
        return stacks[rank.number].summary
    seconds = rank.answer["at"] - started
    did = f"raised {rank.answer['what'].splitlines()[0]}" if _raised(rank) else "returned"
    return f"{did}, after {seconds:.2f} s"


def _stacks(ranks: list[Rank]) -> dict[int, Stack]:
    """Ask ranks for their stacks, and read them; a stopped process cannot answer, and is not waited for."""
    for rank in ranks:
        rank.stacks.write_text("")
        with contextlib.suppress(ProcessLookupError):
            os.kill(rank.pid, STACK_SIGNAL)
    deadline = time.monotonic() + STACKS_S
    sizes, before = [], [0]
    while time.monotonic() < deadline and (0 in before or sizes != before):
        sizes = before
        time.sleep(0.03)
        before = [rank.stacks.stat().st_size for rank in ranks if not _is_stopped(rank.pid)]
    return {rank.number: read_stack(rank.stacks.read_text()) for rank in ranks}


def _is_stopped(pid: int) -> bool:
    try:
        return psutil.Process(pid).status() in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return True
