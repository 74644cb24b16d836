"""What a worker does from its birth: its output, its threads, its process group, the function, the answer."""

import contextlib
import faulthandler
import os
import pickle
import signal
import socket
import sys
import time
import traceback
from typing import Any

from sheaf.launch import memory, wire

STACK_SIGNAL = signal.SIGUSR1  # a worker answers it by writing its Python stacks to its stack file
_kept_open: list[Any] = []


def main(rank: int, order: dict[str, Any], call: bytes) -> None:
    """Be worker ``rank``: run the function that came, send back what it gave, stay until all are done, end."""
    answers, out, err = order["descriptors"][rank]
    connection = socket.socket(fileno=answers)
    _settle(rank, order, out, err)
    answer = _answer(rank, order, call)
    _flush()
    with contextlib.suppress(OSError):
        wire.send(connection, pickle.dumps(answer))
        connection.recv(1)  # others may still read what this one sent them, so it stays until the launcher is content
    os._exit(0)


def _settle(rank: int, order: dict[str, Any], out: int, err: int) -> None:
    """Make this process look as if the user had started it here: output, environment, search path, threads."""
    for target, descriptor in ((1, out), (2, err)):
        if descriptor != target:
            os.dup2(descriptor, target)
            os.close(descriptor)
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", errors="backslashreplace", closefd=False)
    stacks = open(order["stacks"][rank], "w", encoding="utf-8")  # noqa: SIM115, PTH123  open for as long as we live
    _kept_open.append(stacks)
    faulthandler.enable(stacks)
    faulthandler.register(STACK_SIGNAL, stacks, all_threads=True, chain=False)
    workers, threads = order["workers"], order["threads"]
    os.environ.clear()
    os.environ.update(order["environment"])
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(workers),
        LOCAL_WORLD_SIZE=str(workers),
        OMP_NUM_THREADS=str(threads),
    )
    if sys.platform in ("linux", "darwin"):
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo" if sys.platform == "linux" else "lo0")
    memory.keep()
    sys.path[:] = order["path"]
    sys.argv[:] = order["argv"]
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def _answer(rank: int, order: dict[str, Any], call: bytes) -> dict[str, Any]:
    import cloudpickle
    import torch
    import torch.distributed as dist

    from sheaf.launch.world import World, enter_group, own_device, peers, told_in

    try:
        torch.set_num_threads(order["threads"])
        workers = order["workers"]
        store = dist.PrefixStore(order["prefix"], dist.TCPStore("127.0.0.1", order["port"], is_master=False))
        told_in(store)
        enter_group(store, World(rank, workers, rank, own_device(rank, workers)))
        with peers(rank):
            function, args, kwargs = pickle.loads(call)
            return {"value": cloudpickle.dumps(function(*args, **kwargs))}
    except BaseException as raised:  # noqa: BLE001  SystemExit and KeyboardInterrupt are answers too
        return _told(raised)


def _told(raised: BaseException) -> dict[str, Any]:
    import cloudpickle

    from sheaf.errors import SheafError
    from sheaf.launch.world import is_lost_peer

    at_seconds = time.monotonic()  # one clock for all processes of a machine
    pickled = None
    if isinstance(raised, SheafError):
        try:
            pickled = cloudpickle.dumps(raised)
            pickle.loads(pickled)
        except Exception:  # noqa: BLE001  an error that does not travel is told by its text
            pickled = None
    trace = raised.__traceback__
    while trace is not None and trace.tb_frame.f_code.co_filename == __file__:
        trace = trace.tb_next
    return {
        "raised": "".join(traceback.format_exception(type(raised), raised, trace)).rstrip(),
        "what": traceback.format_exception_only(raised)[-1].strip(),
        "interrupted": isinstance(raised, KeyboardInterrupt),
        "lost_peer": is_lost_peer(raised.__cause__ or raised),
        "exception": pickled,
        "at": at_seconds,
    }


def _flush() -> None:
    for stream in (sys.stdout, sys.stderr):
        with contextlib.suppress(OSError, ValueError):
            stream.flush()
