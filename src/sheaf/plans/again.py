"""Blocks that run forward again in backward: all of them, or those that a plan's parts name."""

import re
from collections.abc import Collection, Iterable, Mapping
from fnmatch import fnmatchcase
from typing import Any

AGAIN = "recompute"  # what a plan says of such parts
_LAST_DIGIT = re.compile(r"(.*)(\d)(\D*)")


def matches(glob: str, module: str) -> bool:
    """Whether a glob of a plan names a module, or one that it is in."""
    return fnmatchcase(module, glob) or fnmatchcase(module, glob + ".*")


def is_again(plan: Any, block: str) -> bool:
    """Whether a ``Plan`` recomputes the block of this name, if it is one that keeps more than its input."""
    return plan.recompute == "full" or any(answer == AGAIN and matches(glob, block) for glob, answer in plan.parts)


def unrepeatable(plan: Any) -> list[str]:
    """What is wrong with the parts of a ``Plan`` that run again; nothing where there are none."""
    named = [glob for glob, answer in plan.parts if answer == AGAIN]
    if not named or plan.recompute != "full":
        return []
    return [f"{named[0]}={AGAIN} names blocks that recompute=full runs again anyway: drop one of the two"]


def globs(names: Collection[str], known: Iterable[str]) -> tuple[str, ...]:
    """Globs that match these of the known blocks, and no other of them.

    >>> globs([f"h.{number}" for number in (7, 8, 9, 10, 12)] + ["head"], ["head", *(f"h.{n}" for n in range(24))])
    ('head', 'h.[7-9]', 'h.1[02]')
    """
    found: dict[tuple[str, str], list[str]] = {}
    made: list[str] = []
    for name in (one for one in known if one in names):
        parts = _LAST_DIGIT.fullmatch(name)
        if parts is None:
            made.append(name)
            continue
        key = parts[1], parts[3]
        if key not in found:
            made.append("")
        found.setdefault(key, []).append(parts[2])
    written = iter(f"{before}{_either(digits)}{after}" for (before, after), digits in found.items())
    return tuple(one or next(written) for one in made)


def _either(digits: list[str]) -> str:
    """One of several digits.

    >>> _either(["3"]), _either(["3", "4"]), _either(["0", "1", "2", "5"])
    ('3', '[34]', '[0-25]')
    """
    if len(digits) == 1:
        return digits[0]
    runs: list[list[str]] = []
    for digit in sorted(set(digits)):
        if runs and int(digit) == int(runs[-1][-1]) + 1:
            runs[-1].append(digit)
        else:
            runs.append([digit])
    said = (f"{run[0]}-{run[-1]}" if len(run) > 2 else "".join(run) for run in runs)
    return f"[{''.join(said)}]"


def as_text(parts: Iterable[tuple[str, str]]) -> Mapping[str, Any]:
    """Parts as TOML has them: a glob's one answer, or its answers.

    >>> as_text([("head", "tp"), ("h.*", "tp"), ("h.*", "recompute")])
    {'head': 'tp', 'h.*': ['tp', 'recompute']}
    >>> as_text([("h.*", "recompute"), ("h.1", "whole"), ("h.*", "tp")])
    {'h.1': 'whole', 'h.*': ['recompute', 'tp']}
    """
    said: dict[str, list[str]] = {}
    for glob, answer in parts:
        known = said.get(glob, [])
        if answer != AGAIN and set(known) == {AGAIN}:  # of other answers the first that matches counts: its place does
            del said[glob]
        said[glob] = [*known, answer]
    return {glob: answers[0] if len(answers) == 1 else answers for glob, answers in said.items()}


def from_text(table: Mapping[str, Any]) -> list[tuple[str, str]]:
    """What ``as_text`` gave, as pairs.

    >>> from_text({"head": "tp", "h.*": ["tp", "recompute"]})
    [('head', 'tp'), ('h.*', 'tp'), ('h.*', 'recompute')]
    """
    return [
        (glob, str(answer))
        for glob, answers in table.items()
        for answer in (answers if isinstance(answers, list) else [answers])
    ]
