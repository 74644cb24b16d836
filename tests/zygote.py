"""The clean process that the rank pool forks its ranks from: it has imported torch and sheaf and has used neither.

Run by `pool.py` with one socket. Forking a process that has started threads (OpenMP's, the autograd engine's) copies
their locks and not the threads, so this process computes nothing. What a rank does is here too: `serve`.
"""

import contextlib
import ctypes
import datetime as dt
import faulthandler
import fcntl
import functools
import gc
import importlib
import json
import os
import pickle
import pkgutil
import random
import runpy
import signal
import socket
import struct
import sys
import time
import traceback
import warnings
from collections.abc import Callable

HEADER = struct.Struct("!Q")
STACK_SIGNAL = signal.SIGUSR1  # a rank answers it by writing its Python stacks to its stack file
BARE = ("cloudpickle", "numpy", "torch", "torch.distributed")
PRELOADED = (
    "cloudpickle",
    "numpy",
    "torch",
    "torch._dynamo",  # the first optimizer step imports it, and takes a second or two for that
    "torch.distributed",
    "torch.distributed.checkpoint",
    "torch.distributed.fsdp",
    "torch.distributed.pipelining",
    "torch.distributed.tensor.parallel",
    "_pytest.assertion.rewrite",  # asserts in the test modules refer to it
)
PRELOADED_IF_THERE = tuple(
    f"transformers.models.{name}.modeling_{name}" for name in ("bert", "gpt2", "llama", "mixtral", "t5")
)  # each rank would take a second and a half
NOT_PRELOADED = {"__main__", "cli", "watch"}  # rooms that no rank function needs at once
ABOVE_ALL = 512  # descriptors that came are put out of the way here before each gets the number it is to have


def send(connection: socket.socket, payload: bytes) -> None:
    """Write one message, its length first."""
    connection.sendall(HEADER.pack(len(payload)) + payload)


def receive(connection: socket.socket) -> bytes | None:
    """Read one message; None when the other side is gone."""
    header = _exactly(connection, HEADER.size)
    return None if header is None else _exactly(connection, HEADER.unpack(header)[0])


def _exactly(connection: socket.socket, size: int) -> bytes | None:
    received = bytearray()
    while len(received) < size:
        piece = connection.recv(min(size - len(received), 1 << 20))
        if not piece:
            return None
        received += piece
    return bytes(received)


@functools.cache
def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None)


def die_with_parent(parent: int) -> None:
    """Ask the kernel to kill this process when its parent ends; elsewhere than on Linux a closed socket must do."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        _libc().prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(1)


def preload(package: str) -> None:
    """Import what ranks will need, so that no rank imports it again. A module that fails is left to the tests."""
    for name in PRELOADED if package else BARE:
        importlib.import_module(name)
    if not package:
        return
    for name in PRELOADED_IF_THERE:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    with contextlib.suppress(Exception):
        root = importlib.import_module(package)
        for found in pkgutil.walk_packages(root.__path__, f"{package}.", onerror=lambda _: None):
            if not NOT_PRELOADED & set(found.name.split(".")):
                with contextlib.suppress(Exception):
                    importlib.import_module(found.name)


def main() -> None:
    """Fork ranks, kill ranks and tell how ranks ended, as the pool asks, until the pool is gone."""
    control = socket.socket(fileno=int(sys.argv[1]))
    settings = json.loads(sys.argv[2])
    die_with_parent(settings["parent"])
    sys.path[:0] = [path for path in settings["path"] if path not in sys.path]
    if settings["instrumented"]:
        from jaxtyping import install_import_hook

        *packages, checker = settings["instrumented"].split(",")
        install_import_hook(packages, checker)
    gc.disable()  # nearly all that imports make stays
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what a module warns of on import is for the tests that import it to say
        preload("" if settings["bare"] else "sheaf")
    gc.collect()
    gc.freeze()  # the ranks share these pages as long as nobody writes to them
    gc.enable()
    while True:
        message, descriptors, _, _ = socket.recv_fds(control, 1 << 18, 128)
        if not message:
            os._exit(0)
        request = json.loads(message)
        match request["do"]:
            case "fork":
                answer = [
                    _forked(functools.partial(_rank, control, rank, descriptors, request))
                    for rank in range(len(descriptors))
                ]
                for descriptor in descriptors:
                    os.close(descriptor)
            case "nursery":
                answer = _forked(functools.partial(_nursery, control, descriptors, request))
                for descriptor in descriptors:
                    os.close(descriptor)
            case "program":
                answer = _forked(functools.partial(_program, control, descriptors, request))
                for descriptor in descriptors:
                    os.close(descriptor)
            case "kill":
                answer = [_ended(pid, kill=True) for pid in request["pids"]]
            case "wait":
                answer = [_ended(pid, kill=False) for pid in request["pids"]]
            case "threads":
                answer = len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 1
        control.send(json.dumps(answer).encode())


def _forked(child: Callable[[int], None]) -> int:
    """Run ``child`` in a process of its own, which is told who its parent is; its number."""
    parent = os.getpid()
    pid = os.fork()
    if pid:
        _children[pid] = None
        return pid
    try:
        child(parent)
    except BaseException:  # nothing may climb back into the zygote's loop
        traceback.print_exc()
        sys.stderr.flush()
    finally:
        os._exit(70)


def _rank(control: socket.socket, rank: int, descriptors: list[int], request: dict, parent: int) -> None:
    """Be one rank of the pool."""
    die_with_parent(parent)
    control.close()
    for other, descriptor in enumerate(descriptors):
        if other != rank:  # a copy kept here would hide that rank's end
            os.close(descriptor)
    serve(rank, socket.socket(fileno=descriptors[rank]), request)


def _nursery(control: socket.socket, descriptors: list[int], request: dict, parent: int) -> None:
    """Be what `sheaf.launch` starts as a program: nothing is left to import here."""
    from sheaf.launch import nursery

    os.setsid()
    control.close()
    out_of_the_way = [fcntl.fcntl(descriptor, fcntl.F_DUPFD, ABOVE_ALL) for descriptor in descriptors]
    for descriptor in descriptors:
        os.close(descriptor)
    for descriptor, number in zip(out_of_the_way, request["numbers"], strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    os.chdir(request["directory"])
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv[:] = ["nursery", str(request["control"]), str(parent)]
    nursery.main()


def _program(control: socket.socket, descriptors: list[int], request: dict, parent: int) -> None:
    """Be Python that was given a file. A child stands by to be the nursery: this process will have threads by then."""
    from nurseries import Nursery
    from sheaf.launch import local

    die_with_parent(parent)
    control.close()
    for descriptor, number in zip(descriptors, (1, 2), strict=True):
        os.dup2(descriptor, number)
        os.close(descriptor)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    stands_by = _forked(functools.partial(_stand_by, ours, theirs))
    theirs.close()

    def start(threads: int, control: socket.socket, descriptors: list[int]) -> Nursery:
        numbers = [1, 2, control.fileno(), *descriptors]
        more = {"environment": dict(os.environ) | {"OMP_NUM_THREADS": str(threads)}, "directory": os.getcwd()}
        order = json.dumps({"numbers": numbers, "control": control.fileno(), **more})
        socket.send_fds(ours, [order.encode()], numbers)
        return Nursery(stands_by, lambda pid: os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))

    local._start = start  # pyright: ignore[reportAttributeAccessIssue]
    os.environ.clear()
    os.environ.update(request["environment"])
    sys.argv[:] = request["argv"]
    sys.path[:0] = [os.path.dirname(sys.argv[0]), *request["path"]]
    status = 0
    try:
        runpy.run_path(sys.argv[0], run_name="__main__")
    except SystemExit as ended:
        status = ended.code if isinstance(ended.code, int) else int(ended.code is not None)
    except BaseException:
        traceback.print_exc()
        status = 1
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def _stand_by(parents: socket.socket, own: socket.socket, parent: int) -> None:
    """Wait for the program's order to be its nursery, and be that."""
    die_with_parent(parent)
    parents.close()
    message, descriptors, _, _ = socket.recv_fds(own, 1 << 18, 128)
    if not message:
        os._exit(0)
    _nursery(own, descriptors, json.loads(message), parent)


_children: dict[int, int | None] = {}  # how each ended, None while it runs


def _ended(pid: int, *, kill: bool) -> int | None:
    """How a rank ended: its exit code, or minus the signal; None while it runs, or where it is no child of ours."""
    deadline = time.monotonic() + 10
    running = pid in _children and _children[pid] is None
    if kill and running:
        os.kill(pid, signal.SIGKILL)
    while running and time.monotonic() < deadline:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            _children[pid] = os.waitstatus_to_exitcode(status)
            break
        time.sleep(0.002)
    return _children.get(pid)


def serve(rank: int, connection: socket.socket, request: dict) -> None:
    """Be one rank: run each function that comes in inside the default process group, and send back what it gave."""
    import torch
    import torch.distributed as dist

    world, stack_path = request["world"], request["stacks"][rank]
    stacks = open(stack_path, "w")  # noqa: SIM115  kept open for the handlers as long as the rank lives
    faulthandler.enable(stacks)
    faulthandler.register(STACK_SIGNAL, stacks, all_threads=True, chain=False)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is pytest's; it ends us when it ends
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
    torch.set_num_threads(1)
    store = dist.TCPStore("127.0.0.1", request["port"], is_master=False)
    prefix = None
    while (message := receive(connection)) is not None:
        order = pickle.loads(message)
        if order["prefix"] != prefix:
            if dist.is_initialized():
                dist.destroy_process_group()
            prefix = order["prefix"]
            dist.init_process_group(
                "gloo",
                store=dist.PrefixStore(prefix, store),
                rank=rank,
                world_size=world,
                timeout=dt.timedelta(seconds=order["group_timeout_s"]),
            )
        answer = _run(order)
        answer["clean"] = len(dist.distributed_c10d._world.pg_map) == 1
        send(connection, pickle.dumps(answer))


def _run(order: dict) -> dict:
    import cloudpickle
    import numpy as np
    import torch

    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)
    directory = os.getcwd()
    with warnings.catch_warnings():
        warnings.resetwarnings()
        warnings.filters.extend(order["warnings"])  # the same warnings are errors here as in the test itself
        try:
            function, args, kwargs = pickle.loads(order["call"])
            answer = {"value": cloudpickle.dumps(function(*args, **kwargs))}
        except BaseException as raised:  # SystemExit and KeyboardInterrupt are the test's to see too
            answer = {"raised": _told(raised), "what": _what(raised), "exception": _picklable(raised)}
    answer["at"] = time.monotonic()  # one clock for all processes of a machine
    sys.stdout.flush()
    sys.stderr.flush()
    os.chdir(directory)
    torch.set_grad_enabled(True)
    torch.set_default_dtype(torch.float32)
    return answer


def _told(raised: BaseException) -> str:
    trace = raised.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return "".join(traceback.format_exception(type(raised), raised, trace)).rstrip()


def _what(raised: BaseException) -> str:
    return traceback.format_exception_only(type(raised), raised)[-1].strip()


def _picklable(raised: BaseException) -> bytes | None:
    import cloudpickle

    with contextlib.suppress(Exception):
        pickled = cloudpickle.dumps(raised)
        pickle.loads(pickled)
        return pickled
    return None


if __name__ == "__main__":
    main()
