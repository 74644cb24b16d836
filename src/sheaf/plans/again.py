"""Blocks that run forward again in backward: all of them, or those that a plan's parts name."""

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from fnmatch import fnmatchcase
from functools import lru_cache
from itertools import product
from typing import Any

AGAIN = "recompute"  # what a plan says of such parts
_NUMBER = "(?:0|[1-9][0-9]*)"
_RANGE = f"{_NUMBER}(?:-{_NUMBER})?"
_RANGES = re.compile(rf"\{{({_RANGE}(?::{_RANGE})*)\}}")
_LAST_NUMBER = re.compile(rf"(.*?)({_NUMBER})([^0-9]*)")


@lru_cache(maxsize=2**16)
def matches(glob: str, module: str) -> bool:
    """Whether a glob of a plan names a module, or one that it is in; ``{0-2:10}`` is any number of 0, 1, 2 and 10.

    >>> [matches("h.{0-2:10-12}", name) for name in ("h.1", "h.11.mlp", "h.3", "h.111")]
    [True, True, False, False]
    """
    return any(fnmatchcase(module, one) or fnmatchcase(module, one + ".*") for one in _meant(glob, module))


def _meant(glob: str, module: str) -> Iterator[str]:
    """A glob with each of its ranges as any number that a module's name has and that lies in it."""
    parts = _RANGES.split(glob)  # every second one is what is between braces
    return map("".join, product(*(_within(one, module) if at % 2 else [one] for at, one in enumerate(parts))))


def _within(ranges: str, module: str) -> list[str]:
    digits = re.findall("[0-9]+", module)
    there = {run[low:high] for run in digits for low in range(len(run)) for high in range(low + 1, len(run) + 1)}
    ends = [(low, high or low) for low, _, high in (one.partition("-") for one in ranges.split(":"))]
    return [
        number
        for number in there
        if re.fullmatch(_NUMBER, number) and any(_size(low) <= _size(number) <= _size(high) for low, high in ends)
    ]


def _size(number: str) -> tuple[int, str]:
    """By what whole numbers without leading zeros are ordered, however long."""
    return len(number), number


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
    ('head', 'h.{7-10:12}')
    """
    found: dict[tuple[str, str], list[str]] = {}
    made: list[str] = []
    for name in (one for one in known if one in names):
        parts = _LAST_NUMBER.fullmatch(name)
        if parts is None:
            made.append(name)
            continue
        key = parts[1], parts[3]
        if key not in found:
            made.append("")
        found.setdefault(key, []).append(parts[2])
    written = iter(f"{before}{_either(numbers)}{after}" for (before, after), numbers in found.items())
    return tuple(one or next(written) for one in made)


def _either(numbers: list[str]) -> str:
    """One of several numbers.

    >>> _either(["3"]), _either(["3", "4"]), _either(["0", "1", "2", "10"])
    ('3', '{3-4}', '{0-2:10}')
    """
    runs: list[list[int]] = []
    for number in sorted({int(one) for one in numbers}):
        if runs and number == runs[-1][-1] + 1:
            runs[-1].append(number)
        else:
            runs.append([number])
    said = ":".join(f"{run[0]}-{run[-1]}" if len(run) > 1 else f"{run[0]}" for run in runs)
    return f"{{{said}}}" if len(runs) > 1 or len(runs[0]) > 1 else said


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
