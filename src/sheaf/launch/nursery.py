"""The process that workers are forked from: it imports torch and sheaf once, computes nothing, and minds its children.

Run by `local.py` as ``python -m sheaf.launch.nursery``. A process that has used OpenMP or CUDA cannot be forked safely,
and a user's own process usually has; this one never does. It ends, and takes its workers along, when its parent does.
"""

import ctypes
import gc
import importlib
import json
import os
import signal
import socket
import sys
import warnings
from selectors import EVENT_READ, DefaultSelector
from typing import Any

from sheaf.launch import wire, worker

# What a worker needs sooner or later; torch._dynamo is imported by the first optimizer step, and takes a second.
PRELOADED = (
    "numpy",
    "safetensors.torch",
    "torch",
    "torch._dynamo",
    "torch._subclasses.fake_tensor",
    "torch.distributed",
    "sheaf.training",
    "sheaf.parallel",
)


def main() -> None:
    """Take one order, fork its workers, and tell how they end until all have or the parent is gone."""
    control = socket.socket(fileno=int(sys.argv[1]))
    die_with(int(sys.argv[2]))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what an import warns of is said where a user imports it
        for name in PRELOADED:
            _preload(name)
    header, call = wire.receive(control), wire.receive(control)
    if header is None or call is None:
        os._exit(0)
    order: dict[str, Any] = json.loads(header)
    gc.collect()
    gc.freeze()  # workers share these pages as long as nobody writes to them
    # Children's ends are read from a pipe, so that none is missed between two looks.
    woken, wake = os.pipe()
    os.set_blocking(wake, False)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children = {_fork(rank, order, call, control): rank for rank in range(order["workers"])}
    for descriptors in order["descriptors"]:
        for descriptor in descriptors:
            os.close(descriptor)
    _send(control, {"pids": [pid for pid, _ in sorted(children.items(), key=lambda pair: pair[1])]})
    _mind(control, woken, children)
    for pid in children:
        os.kill(pid, signal.SIGKILL)
    os._exit(0)


def _mind(control: socket.socket, woken: int, children: dict[int, int]) -> None:
    """Report ends and pass signals on until no child is left or the parent is gone."""
    inbox = wire.Inbox(control)
    with DefaultSelector() as selector:
        selector.register(control, EVENT_READ)
        selector.register(woken, EVENT_READ)
        while children:
            for key, _ in selector.select():
                if key.fileobj == woken:
                    os.read(woken, 4096)
                elif not inbox.read():
                    return
            for message in inbox.messages:
                order = json.loads(message)
                for pid, rank in children.items():
                    if order["rank"] in (None, rank):
                        os.kill(pid, order["signal"])
            inbox.messages.clear()
            _report_ended(control, children)


def _report_ended(control: socket.socket, children: dict[int, int]) -> None:
    for pid in list(children):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            _send(control, {"ended": children.pop(pid), "status": os.waitstatus_to_exitcode(status)})


def _send(control: socket.socket, message: dict[str, Any]) -> None:
    try:
        wire.send(control, json.dumps(message).encode())
    except ConnectionError:
        os._exit(0)  # the kernel ends the workers, for they asked to die with us


def _fork(rank: int, order: dict[str, Any], call: bytes, control: socket.socket) -> int:
    parent = os.getpid()
    pid = os.fork()
    if pid:
        return pid
    try:
        die_with(parent)
        signal.set_wakeup_fd(-1)
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        control.close()
        for other, descriptors in enumerate(order["descriptors"]):
            if other != rank:  # a copy kept here would hide that worker's end
                for descriptor in descriptors:
                    os.close(descriptor)
        worker.main(rank, order, call)
    finally:
        os._exit(70)


def _preload(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError:
        if name == "torch":
            raise


def die_with(parent: int) -> None:
    """Ask the kernel to kill this process when its parent ends; elsewhere than on Linux a closed socket must do."""
    if sys.platform == "linux":
        set_parent_death_signal = 1
        ctypes.CDLL(None).prctl(set_parent_death_signal, signal.SIGKILL)
        if os.getppid() != parent:
            os._exit(0)


if __name__ == "__main__":
    main()
