"""How a task's layers would be split among numbers of workers worth trying, and that told in a few words."""

import hashlib
import json
import time
from collections.abc import Callable
from contextlib import suppress
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import sheaf.split
from sheaf.api.shorter import Shorter, shortened
from sheaf.errors import SheafError, first_line
from sheaf.graph import ModelFacts
from sheaf.graph import cache as profiles
from sheaf.graph.drawn import Drawn
from sheaf.plans.split import SplitFacts
from sheaf.search import Refusal
from sheaf.search.space import degrees, heavy_part, stacked
from sheaf.split.common import Common
from sheaf.split.experts import experts
from sheaf.split.listed import listed
from sheaf.split.rehearsal import rehearse
from sheaf.split.sequences import sequences
from sheaf.task import Task
from sheaf.units import pretty_bytes

EACH_UP_TO = 4  # workers that may split a layer: each number is tried; beyond, powers of two and the largest
MOST_WORKERS = 16  # that split a layer: slices get too thin for more
BUDGET_SECONDS = 40.0  # of rehearsing; what is known from earlier takes none
WIDE = 8  # hosts
GATHER = "whole for "
SUMS = ("all_reduce", "reduce_scatter")

EXPERTS = 2  # in place of the sequence: replicas send each other tokens
SEQUENCES = 3  # in its place: sequences are split, and layers are not

Splits = dict[tuple[int, int], SplitFacts]  # by (workers that split a layer, sequence 0 or 1, or EXPERTS)


def splits(
    task: Task,
    facts: ModelFacts,
    *,
    workers: int,
    per_machine: int,
    batch: int,
    fresh: bool = False,
    say: Callable[[str], None],
    drawn: Drawn | None = None,
) -> tuple[Splits, tuple[Refusal, ...]]:
    """The split facts of every number of workers worth trying, and why there are none for others.

    A layer is split within a machine (of ``per_machine`` workers), or between machines of one worker each; where most
    parameters are in a part with little work, all replicas may split that. ``fresh`` forgets what was found before.
    ``drawn`` is the task's model, where somebody has built it already.
    """
    inside = worth_trying(workers if per_machine == 1 else min(workers, per_machine))
    among = [number for number in degrees(workers, batch) if number in worth_trying(workers)]
    wanted = [(number, SEQUENCES) for number in inside]  # first: it takes two runs, where layers take many
    wanted += [(number, sequence) for number in inside for sequence in (0, 1)]
    if workers > per_machine * WIDE and inside:  # of many hosts, all workers of one come first
        wanted.sort(key=lambda one: one[0] != inside[-1] or one[1] == SEQUENCES)
    if heavy_part(facts) is not None:
        wanted += [(number, 0) for number in among if number not in inside]
    if stacked(facts):
        wanted += [(number, EXPERTS) for number in among]
    found: Splits = {}
    refused: list[Refusal] = []
    rehearsals = Rehearsals(task, facts, drawn)
    began, shut = time.process_time(), set[int]()  # ways that came to nothing, for smaller numbers
    for number, sequence in wanted:
        if sequence in shut or (sequence == 1 and (number, 0) not in found):
            continue
        path = _path(task, facts, number, sequence)
        known = None if fresh else _read(path)
        if known is None and time.process_time() - began > BUDGET_SECONDS:
            reason = f"how it would split layers was not worked out: others took {BUDGET_SECONDS:.0f} s already"
            refused.append(Refusal(_text(number, sequence), reason, "to name it yourself: it may be run, and verified"))
            continue
        if known is None:
            say(f"rehearsing {_words(number, sequence)}")
            try:
                known = rehearsals.of(number, sequence)
            except Exception as error:  # noqa: BLE001 - whatever it is, other plans may still do
                first = first_line(error)
                reason = first if isinstance(error, SheafError) else f"{type(error).__name__}: {first}"
                refused.append(Refusal(_text(number, sequence), reason, "dp or pp in place of tp"))
                continue
            with suppress(OSError):  # a folder that cannot be written to is done without
                _write(path, known)
        if not _is_idle(known, sequence, found.get((number, 0)), facts):
            found[number, sequence] = known
        elif sequence:
            shut.add(sequence)
        else:
            refused.append(Refusal(_text(number, 0), "no layer can be split", "dp or pp in place of tp"))
    return found, tuple(refused)


def worth_trying(most: int) -> tuple[int, ...]:
    """How many workers may split a layer.

    >>> worth_trying(2), worth_trying(6), worth_trying(24)
    ((2,), (2, 3, 4, 6), (2, 3, 4, 8, 16))
    """
    found = {*range(2, EACH_UP_TO + 1), *(2**power for power in range(1, most.bit_length())), most}
    return tuple(sorted(number for number in found if 1 < number <= min(most, MOST_WORKERS)))


def _is_idle(known: SplitFacts, sequence: int, plain: SplitFacts | None, facts: ModelFacts) -> bool:
    """Whether nothing comes of splitting so; ``plain`` is what it is without the sequence."""
    if sequence == 1:
        return plain is not None and known.moves == plain.moves
    return not worth_splitting(known, facts) if sequence == SEQUENCES else not known.slices


def worth_splitting(split: SplitFacts, facts: ModelFacts) -> bool:
    """Whether each worker is spared at least half of what splitting sequences could spare it."""
    flops = {block.name: block.forward_flops + block.backward_flops for block in facts.blocks}
    total = sum(flops.values())
    left = sum(split.work.get(name, 1.0) * count for name, count in flops.items())
    return total > 0 and left <= total * (1 + 1 / split.degree) / 2


def rehearsed(task: Task, facts: ModelFacts, number: int, sequence: int) -> SplitFacts:
    """How ``number`` workers split the task's layers, sequences or experts, found by running it once more.

    Of many layers in a row that do the same, three are run; all of them where that fails.
    """
    return Rehearsals(task, facts).of(number, sequence)


class Rehearsals:
    """Rehearses one task for several numbers of workers: its model is built once, and run alone once."""

    def __init__(self, task: Task, facts: ModelFacts, drawn: Drawn | None = None) -> None:
        self._task, self._facts = task, facts
        self.drawn = drawn or Drawn(task)
        self._shorter = Shorter.of(task, facts)

    def of(self, number: int, sequence: int) -> SplitFacts:
        """As ``rehearsed``."""
        samples = self._facts.samples
        if sequence == EXPERTS:
            with self.drawn.lent():
                stacks = experts(self._task, number, samples=samples, common=self._whole)
                return stacks if stacks.slices else listed(self._task, number, samples=samples, common=self._whole)
        shorter = self._shorter
        if shorter is not None:
            model = self.drawn.blueprint.model
            with (
                suppress(Exception),  # such as a model that counts its layers
                shortened(model, shorter.stack, shorter.layers),
                self.drawn.lent(),
            ):
                return shorter.lengthened(_rehearsed(shorter.task, samples, number, sequence, self._short))
        with self.drawn.lent():
            return _rehearsed(self._task, samples, number, sequence, self._whole)

    @cached_property
    def _short(self) -> Common:
        """What rehearsals of the shorter model have in common."""
        return Common(self.drawn.blueprint)

    @cached_property
    def _whole(self) -> Common:
        """What those of the whole model have."""
        return Common(self.drawn.blueprint)


def _rehearsed(task: Task, samples: int, number: int, sequence: int, common: Common) -> SplitFacts:
    if sequence == SEQUENCES:
        return sequences(task, number, samples=samples, common=common)
    return rehearse(task, number, samples=samples, sequence=bool(sequence), common=common)


def _words(number: int, sequence: int) -> str:
    if sequence == EXPERTS:
        return f"tokens sent to experts of {number} replicas"
    if sequence == SEQUENCES:
        return f"sequences split among {number}"
    return f"layers split among {number}{' and along the sequence' * sequence}"


def described(split: SplitFacts, facts: ModelFacts) -> dict[str, Any]:
    """What is split, what is gathered and what is kept whole, for JSON; bytes are of one microbatch."""
    matrices = {one.name for one in facts.parameters if len(one.shape) > 1}
    cut = {name: held for name, held in split.slices.items() if name in matrices}
    sent = [move.size_bytes for move in split.moves if move.operation == "all_to_all" and not move.backward]
    together: dict[tuple[str, str], list[int]] = {}
    for move in split.moves:
        if move.operation == "all_gather" and not move.backward and not sent:
            together.setdefault((move.block, move.why.removeprefix(GATHER)), []).append(move.size_bytes)
    sums = [move.size_bytes for move in split.moves if move.operation in SUMS and not move.backward]
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
        "modules": len(split.dealt),
        "sequences": not split.slices,
        "sent": len(sent),
        "sent_bytes": sum(sent),
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
    if values["sent"]:
        return _told_experts(values)
    if values["sequences"]:
        return _told_sequences(values, most)
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


def _told_experts(values: dict[str, Any]) -> list[str]:
    often = f"{values['sent']} times, {pretty_bytes(values['sent_bytes'])} in all"
    if values["modules"]:
        stacks = f"{values['modules']} experts in lists dealt out over {values['workers']} replicas"
    else:
        sizes = sorted({tuple(one["sizes"]) for one in values["slices"].values()})
        dealt = " and ".join(":".join(str(size) for size in one) for one in sizes)
        stacks = f"{values['split']} stacks of experts dealt out over {values['workers']} replicas, {dealt}"
    return [
        f"{stacks}; tokens travel {often} per microbatch forward, and as much backward",
        "the experts' gradients do not travel",
    ]


def _told_sequences(values: dict[str, Any], most: int) -> list[str]:
    """Of attention, what is gathered as it must be; of all else, what could not be split."""
    near = [one for one in values["gathered"] if one["for"] == "attention"]
    often = sum(one["times"] for one in near)
    lines = [
        (
            f"every weight whole, sequences split among {values['workers']}; keys and values gathered {often} times, "
            f"{pretty_bytes(sum(one['bytes'] for one in near))} per microbatch forward, and twice as much backward"
        )
    ]
    others = sorted((one for one in values["gathered"] if one not in near), key=lambda one: -one["bytes"])
    if others:
        shown = [f"{_gathered(one)} ({pretty_bytes(one['bytes'])})" for one in others[:most]]
        more = f" and {len(others) - most} more" if len(others) > most else ""
        lines.append(f"gathered, to be computed whole: {', '.join(shown)}{more}")
    return lines


def _gathered(one: dict[str, Any]) -> str:
    block = one["block"].strip("<>") or "the model"
    return f"input of {one['for']} in {block}"


def _text(number: int, sequence: int) -> str:
    if sequence == SEQUENCES:
        return f"cp={number}"
    return f"dp={number} with experts" if sequence == EXPERTS else f"tp={number}" + (",sequence=1" if sequence else "")


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
