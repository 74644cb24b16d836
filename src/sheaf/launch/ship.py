"""What travels to workers: functions and their arguments, those of notebooks, scripts and loaded files included."""

import contextlib
import importlib.util
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import cloudpickle

from sheaf.errors import RunError, TaskError, nearest

_INSTALLED = tuple(
    str(Path(sysconfig.get_path(kind)).resolve()) for kind in ("stdlib", "platstdlib", "purelib", "platlib")
)


@dataclass(frozen=True)
class FromFile:
    """A value that each worker finds by itself: the one called ``name`` in a Python file.

    For what cannot be pickled (open files, locks), or is better not sent (large data that the file reads).
    """

    file: str
    name: str

    def load(self) -> Any:
        """The value.

        Raises TaskError when there is no such file or name; what the file itself raises comes through.
        """
        path = Path(self.file).resolve()
        known = sys.modules.get(f"sheaf_file_{path.stem}")
        module = known if known is not None and known.__file__ == str(path) else _module(path)
        if not hasattr(module, self.name):
            names = [name for name in vars(module) if not name.startswith("_")]
            raise TaskError(f"{self.file} has no {self.name!r}; {nearest(self.name, names)}")
        return getattr(module, self.name)


def _module(path: Path) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"sheaf_file_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise TaskError(f"{path} is not a Python file; give FILE.py or FILE.py:NAME")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    if str(path.parent) not in sys.path:
        sys.path.insert(0, str(path.parent))
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[spec.name]
        raise
    return module


def packed(function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> bytes:
    """A call as bytes for our own child processes. What a fresh process could not import travels by value.

    Raises RunError naming what cannot be pickled.
    """
    registered = [module for module in _cannot_be_imported() if module.__name__ not in _by_value()]
    for module in registered:
        cloudpickle.register_pickle_by_value(module)
    try:
        return cloudpickle.dumps((function, args, kwargs))
    except Exception as error:
        raise RunError(
            f"what workers need cannot be sent to them: {type(error).__name__}: {error}. Open files, locks and "
            "connections cannot travel: open them where they are used, or put the task into a file (FILE.py:NAME), "
            "which each worker loads by itself"
        ) from error
    finally:
        for module in registered:
            cloudpickle.unregister_pickle_by_value(module)


def _by_value() -> set[str]:
    return cloudpickle.list_registry_pickle_by_value()


def _cannot_be_imported() -> list[ModuleType]:
    """Loaded modules that a process with the same search path would not find, or would find elsewhere."""
    importable: dict[str, bool] = {}
    found: list[ModuleType] = []
    for name, module in list(sys.modules.items()):
        if getattr(module, "__name__", None) != name or name == "__main__":
            continue
        file = getattr(module, "__file__", None)
        if file is None or str(file).startswith(_INSTALLED):  # built in, a namespace, or installed
            continue
        root = name.partition(".")[0]
        if root not in importable:
            importable[root] = _is_importable(sys.modules.get(root, module))
        if not importable[root]:
            found.append(module)
    return found


def _is_importable(module: ModuleType) -> bool:
    file = getattr(module, "__file__", None)
    for finder in sys.meta_path:
        spec = None
        with contextlib.suppress(Exception):  # a finder of somebody else's is no reason not to start
            spec = finder.find_spec(module.__name__, None)
        if spec is not None:
            return file is None or spec.origin is None or Path(spec.origin).resolve() == Path(file).resolve()
    return False
