"""A checkpoint of one plan: each worker's tensors and values, a manifest, and a rename that makes it exist."""

import json
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from sheaf.checkpoint import files
from sheaf.checkpoint.together import barrier, from_first, is_first
from sheaf.errors import RunError
from sheaf.plans import Plan


@runtime_checkable
class Saveable(Protocol):
    """What is asked of a step to save and load it."""

    index: int

    @property
    def plan(self) -> Plan: ...

    @property
    def rank(self) -> int: ...

    @property
    def workers(self) -> int: ...

    def state(self) -> tuple[dict[str, Tensor], dict[str, Any]]: ...

    def load(self, tensors: dict[str, Tensor], values: dict[str, Any]) -> None: ...


State = tuple[dict[str, Tensor], dict[str, Any]]  # as ``state`` gives it


@runtime_checkable
class Relaying(Saveable, Protocol):
    """A step that can go on from checkpoints of some other plans: of other shards, of a server or of ZeRO."""

    def relaid(self, saved: str, read: Callable[[int], State]) -> State | None: ...


def save(step: Saveable, directory: Path, *, keep: int = 2, task_digest: str = "") -> Path:
    """Save every worker's state into ``directory/checkpoints/step_NNNNNN``; all workers call this at the same step.

    A crash at any moment leaves the older checkpoints as they were, and ``keep`` of them are kept, this one included.
    One that is there already, whole and of the same plan, is left as it is. Raises RunError where it cannot be written,
    as on a full disk.
    """
    final = files.step_path(directory, step.index)
    unfinished = final.with_name(final.name + ".tmp")

    def begin() -> bool:
        if final.exists():
            if files.damage(final) is None and _same_plan(final, step):
                return False
            shutil.rmtree(final)
        shutil.rmtree(unfinished, ignore_errors=True)
        unfinished.mkdir(parents=True)
        return True

    with _told(directory):
        if not from_first(begin):
            return final
        _write_own(step, unfinished)
    barrier()
    if is_first():
        with _told(directory):
            _finish(step, unfinished, final, task_digest)
            files.prune(directory, keep)
    barrier()
    return final


def save_alone(
    step: Saveable,
    states: Sequence[tuple[dict[str, Tensor], dict[str, Any]]],
    directory: Path,
    *,
    keep: int = 2,
    task_digest: str = "",
) -> Path:
    """The same, by one worker that has every worker's state: ``states`` by worker."""
    final = files.step_path(directory, step.index)
    if final.exists() and files.damage(final) is None and _same_plan(final, step):
        return final
    unfinished = final.with_name(final.name + ".tmp")
    with _told(directory):
        for old in (final, unfinished):
            shutil.rmtree(old, ignore_errors=True)
        unfinished.mkdir(parents=True)
        for rank, (tensors, values) in enumerate(states):
            _write(unfinished, rank, tensors, values)
        _finish(step, unfinished, final, task_digest)
        files.prune(directory, keep)
    return final


@contextmanager
def _told(directory: Path) -> Iterator[None]:
    """Where something cannot be written: what remains, and what to do."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        latest = files.latest(directory).path
        remains = f"the last whole checkpoint is {latest}" if latest else "there is no checkpoint yet"
        raise RunError(
            f"no checkpoint can be written into {directory}: {error}; {remains}: make room (or give the directory back "
            "its rights), and go on with --resume"
        ) from error


def load(step: Saveable, path: Path) -> None:
    """Give every worker back what it saved; all workers call this.

    Raises RunError when the checkpoint is of a plan from which this one cannot go on, or cannot be read.
    """
    manifest = files.read_manifest(path)
    if manifest["plan"] != str(step.plan) or manifest["workers"] != step.workers:
        if isinstance(step, Relaying):
            found = step.relaid(manifest["plan"], lambda worker: _read(step, path, worker))
            if found is not None:
                step.load(*found)
                return
        raise RunError(
            f"{path} was saved under {manifest['plan']} by {manifest['workers']} workers, this run is {step.plan} on "
            f"{step.workers}; resume with that plan"
        )
    # Where every worker holds the same, one of them saves it for all.
    step.load(*_read(step, path, getattr(step, "state_owner", step.rank)))


def _read(step: Saveable, path: Path, worker: int) -> State:
    tensors_file, values_file = _names(worker)
    try:
        tensors = load_file(path / tensors_file)
        values = json.loads((path / values_file).read_text(encoding="utf-8"))
    except Exception as error:
        raise RunError(
            f"worker {step.rank} cannot read its part of {path}: {error}. "
            "The run directory must be on a file system that all workers share"
        ) from error
    return tensors, values["values"]


def _write_own(step: Saveable, directory: Path) -> None:
    if not directory.is_dir():
        raise RunError(
            f"worker {step.rank} does not see {directory}, which worker 0 made: "
            "the run directory must be on a file system that all workers share"
        )
    _write(directory, step.rank, *step.state())


def _write(directory: Path, rank: int, tensors: dict[str, Tensor], values: dict[str, Any]) -> None:
    tensors_file, values_file = _names(rank)
    files.write_tensors(directory / tensors_file, tensors)
    files.write_json(directory / values_file, {"tensors": files.described(directory / tensors_file), "values": values})


def _finish(step: Saveable, unfinished: Path, final: Path, task_digest: str) -> None:
    listed: dict[str, dict[str, int]] = {}
    for rank in range(step.workers):
        tensors_file, values_file = _names(rank)
        try:
            values = json.loads((unfinished / values_file).read_text(encoding="utf-8"))
        except OSError as error:
            raise RunError(
                f"worker 0 does not see what worker {rank} wrote ({error}): "
                "the run directory must be on a file system that all workers share"
            ) from error
        listed[tensors_file] = values["tensors"]
        listed[values_file] = files.described(unfinished / values_file)
    manifest = {
        "step": step.index,
        "plan": str(step.plan),
        "workers": step.workers,
        "task_digest": task_digest,
        "files": listed,
    }
    files.write_json(unfinished / files.MANIFEST, manifest)
    files.flush_directory(unfinished)
    files.rename(unfinished, final)


def _same_plan(path: Path, step: Saveable) -> bool:
    manifest = files.read_manifest(path)
    return manifest["plan"] == str(step.plan) and manifest["workers"] == step.workers


def _names(rank: int) -> tuple[str, str]:
    return f"worker_{rank}.safetensors", f"worker_{rank}.json"
