"""A run's directory: what is in it, who may write to it, what a resumed run must agree with."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sheaf.errors import PlanError, RunError
from sheaf.plans import Plan
from sheaf.training.description import differences, digest

TASK, PLAN, RECORD, MODEL = "task.json", "plan.toml", "record.jsonl", "model.safetensors"
_OURS = (TASK, PLAN, RECORD, MODEL, "checkpoints")


def in_use(out: Path) -> bool:
    """Whether a directory holds a run, or files that a run would overwrite."""
    return any((out / name).exists() for name in _OURS)


def check(out: Path, values: dict[str, Any], *, resume: bool) -> None:
    """Refuse a directory that holds another run; touches nothing.

    Raises RunError: for one in use without ``resume``, and with it for one whose task differs, listing what does, and
    for one whose run is still going on.
    """
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; choose another --out")
    if not in_use(out):
        return
    if not resume:
        raise RunError(f"{out} already holds a run; choose another --out, or continue that run with --resume")
    saved = read_task(out)
    if saved is None:
        raise RunError(f"{out} holds files of a run but no {TASK}, so it cannot be resumed; choose another --out")
    different = differences(saved, values)
    if different:
        raise RunError(
            f"{out} holds a run of another task; resume with the same settings, or choose another --out:\n"
            + "\n".join(f"- {line}" for line in different)
        )
    if (out / RECORD).exists():
        with claimed(out):
            return


@contextmanager
def claimed(out: Path) -> Iterator[None]:
    """Be the only one to write to a run's directory; the claim ends with the block, or with the process.

    Raises RunError while another process has it. Where the file system knows no locks, nothing is claimed.
    """
    with (out / RECORD).open("ab") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"{out} holds a run that is still going on; wait for its end, or choose another --out"
            ) from None
        except OSError:
            pass
        yield


def prepare(out: Path, values: dict[str, Any], plan: Plan, *, resume: bool) -> str:
    """Check the directory, make it, write the resolved task and plan into it; returns the task's digest.

    A plan that is there stays, until what was saved has been found to go on under another (``keep_plan``).

    Raises RunError as ``check`` does, and when it cannot be written to.
    """
    check(out, values, resume=resume)
    try:
        out.mkdir(parents=True, exist_ok=True)
        if not (out / TASK).exists():
            _whole(out / TASK, json.dumps(values, indent=1) + "\n")
        if read_plan(out) is None:
            _whole(out / PLAN, plan.to_toml())
    except OSError as error:
        raise _unwritable(out, error) from error
    return digest(values)


def keep_plan(out: Path, plan: Plan) -> None:
    """The run goes on under this plan. Raises RunError where that cannot be written down."""
    if read_plan(out) == plan:
        return
    try:
        _whole(out / PLAN, plan.to_toml())
    except OSError as error:
        raise _unwritable(out, error) from error


def read_task(out: Path) -> dict[str, Any] | None:
    """The description that a run directory keeps; None when it has none that can be read."""
    try:
        values = json.loads((out / TASK).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return values if isinstance(values, dict) else None


def read_plan(out: Path) -> Plan | None:
    """The plan that a run directory keeps; None when it has none that can be read."""
    try:
        return Plan.from_toml((out / PLAN).read_text(encoding="utf-8"))
    except (OSError, PlanError):
        return None


def _whole(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _unwritable(out: Path, error: OSError) -> RunError:
    return RunError(f"{out} cannot be written to: {error}; choose another --out")
