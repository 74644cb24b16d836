"""What faulthandler wrote of a rank that has not come back: where it is, and whether it waits for another."""

import contextlib
import os
import re
from dataclasses import dataclass
from pathlib import Path

TESTS = Path(__file__).parent
FRAME = re.compile(r'  File "(?P<file>.*)", line (?P<line>\d+) in (?P<name>.*)')


@dataclass(frozen=True)
class Stack:
    """Where a rank is that has not come back."""

    text: str
    summary: str
    waits: bool = False  # inside torch.distributed, that is: for another rank


def read_stack(dump: str) -> Stack:
    """Make sense of what faulthandler wrote: the thread that runs the function, and where in it."""
    dump = dump.replace("\0", "")  # the rank goes on writing where it was before the file was emptied
    mine = next((thread for thread in dump.split("\n\n") if " in _run\n" in thread), None)
    if mine is None:
        return Stack(dump, "is still running and gives no stack (stopped, or not yet in the function)")
    frames = [frame for line in mine.splitlines() if (frame := FRAME.match(line))]
    frames = frames[: next(i for i, frame in enumerate(frames) if frame["name"] == "_run")]
    if not frames:
        return Stack(mine, "is still running, and was just starting or ending the function")
    own = next((frame for frame in frames if not _of_library(frame["file"])), frames[0])
    place = f"{_short(own['file'])}:{own['line']} in {own['name']}"
    waits = "/torch/distributed/" in frames[0]["file"]
    summary = f"waits in {frames[0]['name']}, called at {place}" if waits else f"is still running, at {place}"
    return Stack("\n".join(frame[0] for frame in frames), summary, waits)


def _of_library(file: str) -> bool:
    return "site-packages" in file or file.startswith(("<", str(Path(os.__file__).parent)))


def _short(file: str) -> str:
    with contextlib.suppress(ValueError):
        return str(Path(file).relative_to(TESTS.parent))
    return file
