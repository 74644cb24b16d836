"""How a task's layers would be split among numbers of workers worth trying, and that told in a few words."""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import sheaf.split
from sheaf.errors import SheafError
from sheaf.graph import ModelFacts
from sheaf.graph import cache as profiles
from sheaf.plans.split import SplitFacts
from sheaf.search import Refusal
from sheaf.search.space import degrees, heavy_part
from sheaf.split.rehearsal import rehearse
from sheaf.task import Task
from sheaf.units import pretty_bytes

EACH_UP_TO = 4  # workers that may split a layer: each number is tried; beyond, powers of two and the largest
MOST_WORKERS = 16  # that split a layer: slices get too thin for more
BUDGET_SECONDS = 40.0  # of rehearsing; what is known from earlier takes none
GATHER = "whole for "

Splits = dict[tuple[int, int], SplitFacts]  # by (workers that split a layer, sequence 0 or 1)


def splits(
    task: Task,
    facts: ModelFacts,
    *,
    workers: int,
    per_machine: int,
    batch: int,
    fresh: bool = False,
    say: Callable[[str], None],
) -> tuple[Splits, tuple[Refusal, ...]]:
    """The split facts of every number of workers worth trying, and why there are none for others.

    A layer is split within a machine (of ``per_machine`` workers), or between machines of one worker each; where most
    parameters are in a part with little work, all replicas may split that. ``fresh`` forgets what was found before.
    """
    inside = worth_trying(workers if per_machine == 1 else min(workers, per_machine))
    among = [number for number in degrees(workers, batch) if number in worth_trying(workers)]
    wanted = [(number, sequence) for number in inside for sequence in (0, 1)]
    if heavy_part(facts) is not None:
        wanted += [(number, 0) for number in among if number not in inside]
    found: Splits = {}
    refused: list[Refusal] = []
    began, plain = time.monotonic(), False
    for number, sequence in wanted:
        if sequence and (plain or (number, 0) not in found):
            continue
        path = _path(task, facts, number, sequence)
        known = None if fresh else _read(path)
        if known is None and time.monotonic() - began > BUDGET_SECONDS:
            reason = (
                f"how it would split layers was not worked out: smaller numbers took {BUDGET_SECONDS:.0f} s already"
            )
            refused.append(Refusal(_text(number, sequence), reason, "to name it yourself: it may be run, and verified"))
            continue
        if known is None:
            say(f"rehearsing layers split among {number}{' and along the sequence' * sequence}")
            try:
                known = rehearse(task, number, samples=facts.samples, sequence=bool(sequence))
            except Exception as error:  # noqa: BLE001 - whatever it is, other plans may still do
                first = (str(error).splitlines() or [""])[0]
                reason = first if isinstance(error, SheafError) else f"{type(error).__name__}: {first}"
                refused.append(Refusal(_text(number, sequence), reason, "dp or pp in place of tp"))
                continue
            with suppress(OSError):  # a folder that cannot be written to is done without
                _write(path, known)
        if sequence and known.moves == found[number, 0].moves:
            plain = True  # nothing runs along a sequence here
            continue
        if known.slices:
            found[number, sequence] = known
        elif not sequence:
            refused.append(Refusal(_text(number, 0), "no layer can be split", "dp or pp in place of tp"))
    return found, tuple(refused)


def worth_trying(most: int) -> tuple[int, ...]:
    """How many workers may split a layer.

    >>> worth_trying(2), worth_trying(6), worth_trying(24)
    ((2,), (2, 3, 4, 6), (2, 3, 4, 8, 16))
    """
    found = {*range(2, EACH_UP_TO + 1), *(2**power for power in range(1, most.bit_length())), most}
    return tuple(sorted(number for number in found if 1 < number <= min(most, MOST_WORKERS)))


def described(split: SplitFacts, facts: ModelFacts) -> dict[str, Any]:
    """What is split, what is gathered and what is kept whole, for JSON; bytes are of one microbatch."""
    matrices = {one.name for one in facts.parameters if len(one.shape) > 1}
    cut = {name: held for name, held in split.slices.items() if name in matrices}
    together: dict[tuple[str, str], list[int]] = {}
    for move in split.moves:
        if move.operation == "all_gather" and not move.backward:
            together.setdefault((move.block, move.why.removeprefix(GATHER)), []).append(move.size_bytes)
    sums = [move.size_bytes for move in split.moves if move.operation != "all_gather" and not move.backward]
    return {
        "workers": split.degree,
        "samples": split.samples,
        "matrices": len(matrices),
        "split": len(cut),
        "by_output": sum(held.dim == 0 for held in cut.values()),
        "by_input": sum(held.dim != 0 for held in cut.values()),
        "slices": {
            name: {"dim": held.dim, "sizes": list(held.cut.sizes), "outer": held.cut.outer}
            for name, held in split.slices.items()
        },
        "sums": len(sums),
        "sums_bytes": sum(sums),
        "gathered": [
            {"block": block, "for": why, "times": len(sizes), "bytes": sum(sizes)}
            for (block, why), sizes in together.items()
        ],
        "whole": dict(split.closed),
    }


def told(values: dict[str, Any], *, most: int = 3) -> list[str]:
    """``described`` in lines of text; of what is gathered, the ``most`` largest."""
    count = f"{values['split']} of {values['matrices']} weight matrices split among {values['workers']}"
    pairs = f"{values['by_output']} by outputs, {values['by_input']} by inputs"
    several = "s" * (values["sums"] != 1)
    sums = f"{values['sums']} sum{several} of {pretty_bytes(values['sums_bytes'])} per microbatch"
    gathered = sorted(values["gathered"], key=lambda one: -one["bytes"])
    lines = [f"{count} ({pairs}), {sums}"]
    if gathered:
        shown = [f"{_gathered(one)} ({pretty_bytes(one['bytes'])})" for one in gathered[:most]]
        more = f" and {len(gathered) - most} more" if len(gathered) > most else ""
        lines.append(f"gathered, as no pair was found: {', '.join(shown)}{more}")
    else:
        lines.append("nothing is gathered")
    lines += [f"kept whole: {name or 'the model'}: {reason}" for name, reason in values["whole"].items()]
    return lines


def _gathered(one: dict[str, Any]) -> str:
    block = one["block"].strip("<>") or "the model"
    return f"input of {one['for']} in {block}"


def _text(number: int, sequence: int) -> str:
    return f"tp={number}" + (",sequence=1" if sequence else "")


def _path(task: Task, facts: ModelFacts, number: int, sequence: int) -> Path:
    name = profiles.cache_key(task, facts, threads=number, concurrency=sequence)
    return profiles.cache_folder().with_name("splits") / f"{name}-{_rules()}.json"


@cache
def _rules() -> str:
    """A fingerprint of everything that decides how layers are split."""
    sources = sorted(path for folder in sheaf.split.__path__ for path in Path(folder).rglob("*.py"))
    return hashlib.blake2b(b"".join(path.read_bytes() for path in sources), digest_size=8).hexdigest()


def _write(path: Path, split: SplitFacts) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(split.to_dict()), encoding="utf-8")
    beside.replace(path)


def _read(path: Path) -> SplitFacts | None:
    """The facts in a file; None when there is none, or when what is there is not whole."""
    try:
        return SplitFacts.from_dict(json.loads(path.read_text(encoding="utf-8")))
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None
