"""Profiles kept on disk by what they depend on, so that the same blocks on the same machine are measured once."""

import hashlib
import json
import os
import platform
import tempfile
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import torch
from torch import nn

from sheaf.graph.facts import ModelFacts, Profile
from sheaf.graph.profile import accelerator, profile
from sheaf.task import Task

FORMAT = 4  # of the files; raise it when what is measured changes


def cached_profile(
    task: Task,
    facts: ModelFacts,
    *,
    threads: int,
    concurrency: int = 1,
    together: Callable[[], None] | None = None,
    budget_seconds: float = 6.0,
) -> Profile:
    """The profile of an equal task on this machine if it was measured before, else a new one, kept for the next time.

    Workers that measure together find the same file or all find none, as long as they share a host. A file that
    cannot be read is written anew; a directory that cannot be written to is done without.
    Raises what ``profile`` raises.
    """
    path = cache_folder() / f"{cache_key(task, facts, threads=threads, concurrency=concurrency)}.json"
    found = _read(path, facts)
    if found is not None:
        return found
    measured = profile(
        task, facts, threads=threads, concurrency=concurrency, together=together, budget_seconds=budget_seconds
    )
    with suppress(OSError):
        _write(path, measured)
    return measured


def cache_folder() -> Path:
    """Where profiles are kept: ``profiles`` in $SHEAF_CACHE, else in ~/.cache/sheaf."""
    given = os.environ.get("SHEAF_CACHE")
    return (Path(given) if given else Path.home() / ".cache" / "sheaf") / "profiles"


def cache_key(task: Task, facts: ModelFacts, *, threads: int, concurrency: int) -> str:
    """A name for all that a profile depends on."""
    content = {
        "format": FORMAT,
        "blocks": [(block.name, block.signature) for block in facts.blocks],
        "parameters": [(p.shape, p.dtype, p.requires_grad) for p in facts.parameters],
        "samples": facts.samples,
        "threads": threads,
        "concurrency": concurrency,
        "precision": task.precision,
        "clip": task.clip is not None,
        "optimizer": _optimizer(task),
        "data": [type(task.data).__qualname__, len(task.data)],
        "torch": torch.__version__,
        "device": _device(),
    }
    return hashlib.blake2b(json.dumps(content, default=str).encode(), digest_size=16).hexdigest()


def _optimizer(task: Task) -> str:
    """Class and settings of the task's optimizer; whatever is wrong with it is told when it is measured."""
    try:
        optimizer = task.optimizer([nn.Parameter(torch.zeros(2, 2))])
    except Exception as error:  # noqa: BLE001
        return type(error).__name__
    return f"{type(optimizer).__module__}.{type(optimizer).__qualname__} {sorted(optimizer.defaults.items())}"


def _device() -> list[Any]:
    device = accelerator()
    if device.type == "cuda":
        return [device.type, torch.cuda.get_device_name(device)]
    return [device.type, _cpu_name(), psutil.cpu_count(), psutil.virtual_memory().total]


def _cpu_name() -> str:
    with suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _read(path: Path, facts: ModelFacts) -> Profile | None:
    """The profile in a file; None when there is none, or when what is there is not whole."""
    try:
        found = Profile.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError):
        return None
    return found if set(found.blocks) == {block.name for block in facts.blocks} else None


def _write(path: Path, measured: Profile) -> None:
    """Write a whole file or none."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            json.dump(measured.to_dict(), file)
        Path(temporary).replace(path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
