"""Plans as text: ``dp=2,pp=4:gpipe`` taken apart into the values of a plan's keys."""

import re
from collections.abc import Collection, Sequence

from sheaf.errors import PlanError, nearest
from sheaf.plans.again import AGAIN

PARTS = ("tp", "whole", "ep", "sparse", "rows", AGAIN)  # what a plan may say of a part of the model
DEFAULT_SCHEDULE = "1f1b"
# all others are numbers
_WORDS = ("shares", "shards", "recompute", "offload", "schedule", "stages", "local", "compress", "server", "late")

Value = int | str | tuple[tuple[str, str], ...]


def pairs(text: str) -> list[tuple[str, str]]:
    """The (key, text) pairs of a plan's text; none for ``serial``.

    Raises PlanError for what is no ``key=value``.
    """
    stripped = text.strip()
    if stripped in ("", "serial"):
        return []
    found: list[tuple[str, str]] = []
    for part in stripped.split(","):
        key, equals, value = part.partition("=")
        if not equals or not value.strip():
            raise PlanError(f"{part.strip()!r} is not key=value; a plan reads like dp=4,zero=3")
        found.append((key.strip(), value.strip()))
    return found


def values(given: Sequence[tuple[str, str]], known: Collection[str]) -> tuple[dict[str, Value], list[str]]:
    """The value of each of the ``known`` keys that is given, and everything that is wrong."""
    found: dict[str, Value] = {}
    parts: list[tuple[str, str]] = []
    broken: list[str] = []
    for key, text in given:
        if (key not in known and text in PARTS) or key == "parts":
            twice = next((answer for glob, answer in parts if said_of((glob, answer)) == said_of((key, text))), None)
            if twice is not None:
                broken.append(f"{key} is given twice, as {key}={twice} and {key}={text}; keep one")
            parts.append((key, text))
        elif key not in known:
            broken.append(f"{key!r} is not a key of a plan; {nearest(key, known)}")
        elif key in found:
            broken.append(f"{key} is given twice; keep one")
        elif key in _WORDS:
            found[key] = text
        elif key == "pp" and ":" in text:
            found["pp"], found["schedule"] = _pipeline(text, broken)
        elif re.fullmatch(r"-?\d+", text):
            found[key] = int(text)
        else:
            broken.append(f"{key}={text} is not a whole number")
    if parts:
        found["parts"] = tuple(parts)
    if found.get("schedule") == "interleaved":
        found.setdefault("virtual", 2)
    return found, broken


def said_of(pair: tuple[str, str]) -> tuple[str, bool]:
    """What a (key, text) pair says something of: a key, and for parts whether it is that they run again."""
    return pair[0], pair[1] == AGAIN


def _pipeline(text: str, broken: list[str]) -> tuple[int, str]:
    count, _, schedule = text.partition(":")
    if not re.fullmatch(r"\d+", count):
        broken.append(f"pp={text}: write pp=STAGES or pp=STAGES:SCHEDULE, such as pp=4:1f1b")
        return 1, DEFAULT_SCHEDULE
    return int(count), schedule
