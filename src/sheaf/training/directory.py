"""A run's directory: what is in it, who may write to it, what a resumed run must agree with."""

import fcntl
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sheaf.errors import PlanError, RunError
from sheaf.plans import Plan
from sheaf.record import read_record
from sheaf.training.description import differences, digest

TASK, PLAN, RECORD, MODEL = "task.json", "plan.toml", "record.jsonl", "model.safetensors"
_OURS = (TASK, PLAN, RECORD, MODEL, "checkpoints")


def in_use(out: Path) -> bool:
    """Whether a directory holds a run, or files that a run would overwrite."""
    return any((out / name).exists() for name in _OURS)


def check(out: Path, values: dict[str, Any], *, resume: bool) -> None:
    """Refuse a directory that holds another run; touches nothing.

    Raises RunError: for one whose run is still going on; for one in use without ``resume``, saying how its run ended;
    and with it for one whose task differs, listing what does.
    """
    if out.exists() and not out.is_dir():
        raise RunError(f"{out} is a file; choose another --out")
    if not in_use(out):
        return
    if (out / RECORD).exists():
        with claimed(out):
            pass
    if not resume:
        ended, further = _ended(out)
        raise RunError(
            f"{out} already holds a run{ended}; choose another --out, or continue that run with --resume{further}"
        )
    saved = read_task(out)
    if saved is None:
        raise RunError(f"{out} holds files of a run but no {TASK}, so it cannot be resumed; choose another --out")
    different = differences(saved, values)
    if different:
        raise RunError(
            f"{out} holds a run of another task; resume with the same settings, or choose another --out:\n"
            + "\n".join(f"- {line}" for line in different)
        )


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
                f"{out} holds a run that is still going on{_so_far(out)}; choose another --out, wait for its end, or "
                "stop it (Ctrl-C where it was started, which saves) and continue it with --resume"
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


def _so_far(out: Path) -> str:
    """How far a run came, in words, as far as its record tells."""
    told = _last(out)
    if "start" not in told:
        return ""
    done = told["step"]["step"] + 1 if "step" in told else told["start"]["step"]
    return f", {done} of {told['start']['steps']} steps done"


def _ended(out: Path) -> tuple[str, str]:
    """How the run of a directory that nobody writes to ended, and what goes with --resume, in words."""
    told, so_far = _last(out), _so_far(out)
    if not so_far:
        return "", ""
    if "failed" in told:
        message: str = told["failed"]["message"]
        return f" that failed{so_far} ({message.partition(chr(10))[0]})", ""
    if "end" not in told:
        return f" that broke off{so_far}", ""
    if told["end"]["stopped"]:
        return f" that was stopped{so_far}", ""
    return f" that came to its end{so_far}", " and more --steps"


def _last(out: Path) -> dict[str, dict[str, Any]]:
    """The last line of each kind that the record has since the run was started last."""
    told: dict[str, dict[str, Any]] = {}
    for line in read_record(out / RECORD) if (out / RECORD).exists() else ():
        if line.get("kind") == "start":
            told.clear()
        told[str(line.get("kind"))] = line
    return told


def _whole(path: Path, text: str) -> None:
    beside = path.with_name(path.name + ".tmp")
    beside.write_text(text, encoding="utf-8")
    beside.replace(path)


def _unwritable(out: Path, error: OSError) -> RunError:
    return RunError(f"{out} cannot be written to: {error}; choose another --out")
