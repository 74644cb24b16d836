"""Functions that launched workers run; a module that they can import, unlike those that tests load from files."""

import os
import signal
import sys
import time

import torch
import torch.distributed as dist

from sheaf import launch
from sheaf.errors import NonFiniteLoss


def place(scale):
    """Everything a worker can tell about where it is."""
    total = torch.tensor([float(dist.get_rank() + 1)])
    dist.all_reduce(total)
    print("out of", dist.get_rank())
    print("err of", dist.get_rank(), file=sys.stderr)
    world = launch.join()
    return {
        "rank": world.rank,
        "workers": world.workers,
        "device": str(world.device),
        "sum": total.item() * scale,
        "threads": torch.get_num_threads(),
        "omp": os.environ["OMP_NUM_THREADS"],
        "pid": os.getpid(),
        "parent": os.getppid(),
        "main_threads": len(os.listdir("/proc/self/task")) if sys.platform == "linux" else 0,
    }


def fail(kind):
    """Worker 1 fails in some way while worker 0 waits for it."""
    if dist.get_rank() == 1:
        if kind == "sheaf":
            raise NonFiniteLoss(7, 3, float("nan"))
        if kind == "other":
            raise KeyError("missing")
        if kind == "exit":
            os._exit(5)
        if kind == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if kind == "hang":
            time.sleep(300)
    dist.barrier()


def until_asked(path):
    """Write this process's number, then wait for a signal and answer it as training does: by returning."""
    asked = []
    signal.signal(signal.SIGTERM, lambda *_: asked.append("SIGTERM"))
    signal.signal(signal.SIGINT, lambda *_: asked.append("SIGINT"))
    (path / f"pid_{dist.get_rank()}").write_text(str(os.getpid()))
    while not asked:
        time.sleep(0.02)
    time.sleep(0.2)
    return asked


def for_ever(path):
    """Write this process's number, then do nothing about signals."""
    (path / f"pid_{dist.get_rank()}").write_text(str(os.getpid()))
    time.sleep(300)
