"""Finds the task that ``FILE.py`` or ``FILE.py:NAME`` names."""

import importlib.util
import inspect
import re
import sys
import traceback
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, NoReturn

from sheaf.errors import RunError, SheafError, TaskError, nearest
from sheaf.launch.ship import FromFile, packed
from sheaf.task import Task

DEFAULT = "task"
UNNAMED = Task.name  # of tasks that nobody gave one


def load(reference: str) -> Task:
    """The task called NAME (``task`` unless named) in a Python file: a Task, or a function that returns one.

    One without a name of its own takes the file's. The file's folder is put on ``sys.path``, so it may import its
    neighbours. Raises TaskError: no such file, the file or function raises (with the lines of the user's own code),
    nothing of that name, or a thing of another type.
    """
    path, name = _parts(reference)
    if not path.is_file():
        raise TaskError(f"{path}: no such file{_neighbour(path)}")
    module = _module(path.resolve())
    if not hasattr(module, name):
        raise TaskError(f"{path} has no {name!r}; {_offers(module, path, name)}")
    found: object = getattr(module, name)
    if callable(found) and not isinstance(found, Task):
        found = _called(found, path, name)
        what = f"{path}:{name}() returned"
    else:
        what = f"{path}:{name} is"
    if isinstance(found, Task):
        return replace(found, name=_named(path, name)) if found.name == UNNAMED else found
    raise TaskError(f"{what} {_a(found)}; wanted a sheaf.Task, or a function that returns one")


def own_source(task: Task, reference: str) -> FromFile | None:
    """Where workers find the task by themselves, when it cannot be sent to them (open files, locks); else None."""
    try:
        packed(load, (task,), {})
    except RunError:
        path, name = _parts(reference)
        return FromFile(str(path.resolve()), name)
    return None


def _parts(reference: str) -> tuple[Path, str]:
    match = re.fullmatch(r"(.+?\.py)(?::(.*))?", reference)
    if match is None:
        raise TaskError(f"{reference!r} names no Python file; write FILE.py or FILE.py:NAME")
    return Path(match[1]), match[2] or DEFAULT


def _module(path: Path) -> ModuleType:
    # The name that workers look under, and one that no installed module has.
    name = f"sheaf_file_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except SheafError:
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001  whatever the user's file does, the user is told
        del sys.modules[name]
        _explain(error, path, f"reading {path.name}")
    return module


def _called(function: Callable[..., Any], path: Path, name: str) -> object:
    try:
        signature = inspect.signature(function)
        needed = [
            each.name
            for each in signature.parameters.values()
            if each.default is each.empty and each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)
        ]
    except (TypeError, ValueError):
        needed = []
    if needed:
        raise TaskError(f"{path}:{name} needs arguments ({', '.join(needed)}); give them defaults, Sheaf passes none")
    try:
        return function()
    except SheafError:
        raise
    except (Exception, SystemExit) as error:  # noqa: BLE001
        _explain(error, path.resolve(), f"{name}() of {path.name}")


def _explain(error: BaseException, path: Path, doing: str) -> NoReturn:
    """Raise a TaskError with what the user's own code did, from its first line in the file on."""
    frames = traceback.extract_tb(error.__traceback__)
    first = next((index for index, frame in enumerate(frames) if frame.filename == str(path)), len(frames))
    lines = traceback.format_list(list(frames[first:])) + traceback.format_exception_only(error)
    raise TaskError(f"{doing} raised {type(error).__name__}:\n{''.join(lines).rstrip()}") from None


def _offers(module: ModuleType, path: Path, name: str) -> str:
    tasks = [key for key, value in vars(module).items() if isinstance(value, Task)]
    functions = [
        key
        for key, value in vars(module).items()
        if inspect.isfunction(value) and value.__module__ == module.__name__ and not key.startswith("_")
    ]
    if not tasks and not functions:
        return "it holds no Task and no function: define `def task(): return sheaf.Task(...)`"
    lists = [f"{kind} {', '.join(names)}" for kind, names in (("Tasks", tasks), ("functions", functions)) if names]
    close = nearest(name, tasks + functions) if name != DEFAULT else ""
    close = f"{close} " if close.startswith("did you mean") else ""
    return f"{close}it holds {' and '.join(lists)}: write {path}:NAME"


def _named(path: Path, name: str) -> str:
    return path.stem if name == DEFAULT else f"{path.stem}_{name}"


def _neighbour(path: Path) -> str:
    others = [other.name for other in path.parent.glob("*.py")] if path.parent.is_dir() else []
    hint = nearest(path.name, others) if others else ""
    return f"; {hint}" if hint.startswith("did you mean") else ""


def _a(value: object) -> str:
    name = type(value).__name__
    return "None" if value is None else f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
