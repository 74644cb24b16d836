"""Steps between meetings: what a plan's ``local`` says."""

import re
from dataclasses import dataclass

from sheaf.errors import PlanError, nearest

# learning rate and momentum of the outer optimizer, of the papers
KINDS = {
    "average": (1.0, 0.0),
    "slowmo": (1.0, 0.7),
    "diloco": (0.7, 0.9),
    "adasum": (1.0, 0.0),
    "ring": (1.0, 0.0),
    "exponential": (1.0, 0.0),
    "backup": (1.0, 0.0),
}
OUTER = ("slowmo", "diloco")  # with an optimizer over what meets
GRAPHS = ("ring", "exponential")  # a worker meets its neighbours, not all
LATE = ("merge", "drop")
STEPS = ("equal", "speed")
_NUMBERS = ("lr", "momentum", "grace")
_COUNTS = ("after", "fragments", "overlap", "quorum")
_WORDS = {"late": LATE, "steps": STEPS}


@dataclass(frozen=True)
class Local:
    """Each worker steps alone, and every ``every`` steps weights meet; 0: gradients meet in every step.

    ``kind``       what becomes of weights that meet: ``average``, ``slowmo``, ``diloco``, ``adasum``; or who meets
                   whom: ``ring``, ``exponential``; or ``backup``: gradients of the first ``quorum``, in every step
    ``lr, momentum``  of the outer optimizer
    ``after``      steps at the start in which gradients meet (post-local SGD: Lin et al., "Don't Use Large
                   Mini-Batches, Use Local SGD", 2020)
    ``fragments``  parts of the model that meet at different steps, ``overlap`` the steps that a part may travel while
                   workers go on (Douillard et al., "Streaming DiLoCo", 2025)
    ``quorum``     workers that are enough for a meeting (0: all), ``grace`` the seconds for which it then still waits,
                   ``late`` what becomes of who comes later: ``merge`` next time, or ``drop``
    ``steps``      ``equal``, or ``speed``: a faster worker makes more of the steps between two meetings

    >>> Local.parse("16:diloco:lr=0.5:after=100").lr
    0.5
    >>> Local.parse("8:quorum=3:grace=0.5:steps=speed").rounds
    True
    """

    every: int = 0
    kind: str = "average"
    lr: float = 1.0
    momentum: float = 0.0
    after: int = 0
    fragments: int = 1
    overlap: int = 0
    quorum: int = 0
    grace: float = 0.0
    late: str = "merge"
    steps: str = "equal"

    @classmethod
    def parse(cls, text: str) -> "Local":
        """Read what ``local=`` says. Raises PlanError listing everything wrong with it."""
        every, *rest = text.split(":")
        broken: list[str] = []
        if not re.fullmatch(r"\d+", every):
            broken.append(f"local={text}: write the steps between meetings first, such as local=16:diloco")
        kind = rest.pop(0) if rest and "=" not in rest[0] else "average"
        if kind not in KINDS:
            broken.append(f"local={text}: {kind!r} is no way to meet; {nearest(kind, KINDS)}")
        lr, momentum = KINDS.get(kind, (1.0, 0.0))
        numbers: dict[str, float] = {"lr": lr, "momentum": momentum}
        counts: dict[str, int] = {}
        words: dict[str, str] = {"late": "drop"} if kind == "backup" else {}
        for setting in rest:
            key, _, value = setting.partition("=")
            if key in _NUMBERS and re.fullmatch(r"\d+(\.\d+)?", value):
                numbers[key] = float(value)
            elif key in _COUNTS and re.fullmatch(r"\d+", value):
                counts[key] = int(value)
            elif key in _WORDS and value in _WORDS[key]:
                words[key] = value
            elif key in _WORDS:
                broken.append(f"local={text}: {key}={value}: {nearest(value, _WORDS[key])}")
            elif key in (*_NUMBERS, *_COUNTS):
                broken.append(f"local={text}: {key}={value} is not a number it takes")
            else:
                broken.append(f"local={text}: {key!r} is no setting; {nearest(key, (*_NUMBERS, *_COUNTS, *_WORDS))}")
        if broken:
            raise PlanError(broken)
        made = cls(int(every), kind, **numbers, **counts, **words)  # pyright: ignore[reportArgumentType]
        wrong = made._broken(text)
        if wrong:
            raise PlanError(wrong)
        return made

    @property
    def rounds(self) -> bool:
        """Whether each worker goes from meeting to meeting by its own clock, and nobody is waited for in between."""
        return self.quorum > 0 or self.steps == "speed"

    @property
    def graph(self) -> bool:
        """Whether a worker meets some of the others only, so that weights differ for good."""
        return self.kind in GRAPHS

    def _broken(self, text: str) -> list[str]:
        broken: list[str] = []
        if self.kind not in OUTER and (self.lr, self.momentum) != KINDS[self.kind]:
            broken.append(f"local={text}: {self.kind} has neither lr nor momentum: use slowmo or diloco, or drop them")
        if self.momentum >= 1:
            broken.append(f"local={text}: momentum must be below 1, or it grows without end")
        if self.every and not 1 <= self.fragments <= self.every:
            broken.append(f"local={text}: fragments meet at different steps: use 1 to {self.every}")
        if self.every and self.overlap >= self.every:
            broken.append(f"local={text}: what travels must arrive before the next meeting: overlap below {self.every}")
        if not self.every and self != Local():
            broken.append(f"local={text}: with 0 steps between meetings nothing is to be set: raise it, or drop local")
        alone = self.every == 1 and self.quorum > 0 and self.late == "drop" and self.steps == "equal"
        if self.kind == "backup" and not alone:
            broken.append(
                f"local={text}: with backup workers gradients of the first that come meet in every step, and late ones "
                "are dropped: write local=1:backup:quorum=K"
            )
        if self.overlap and (self.graph or self.kind == "adasum"):
            broken.append(f"local={text}: {self.kind} needs an answer before it goes on: drop overlap")
        if self.rounds and (self.graph or self.kind == "adasum"):
            broken.append(f"local={text}: {self.kind} is between workers that are all there: drop quorum and steps")
        if self.rounds and (self.after or self.fragments > 1 or self.overlap):
            broken.append(
                f"local={text}: between meetings with a quorum or steps by speed nobody knows where the others are: "
                "drop after, fragments and overlap"
            )
        if not self.quorum and (self.grace or (self.late != "merge" and self.kind != "backup")):
            broken.append(
                f"local={text}: grace and late are of a meeting that some may miss: add quorum=K, or drop them"
            )
        return broken


def of_two(text: str, every: int) -> str:
    """The same way to meet for two workers, every so many steps where it may be so.

    >>> of_two("16:diloco:quorum=3", 2), of_two("16:diloco:fragments=4:overlap=8", 2), of_two("1:backup:quorum=7", 2)
    ('2:diloco:quorum=2', '2:diloco:fragments=2:overlap=1', '1:backup:quorum=2')
    """
    if Local.parse(text).kind == "backup":
        every = 1
    most = {"quorum": 2, "fragments": every, "overlap": every - 1}
    parts = text.split(":")[1:]
    for place, part in enumerate(parts):
        key, _, value = part.partition("=")
        if key in most:
            parts[place] = f"{key}={min(int(value), most[key])}"
    return ":".join([str(every), *parts])


def unmeetable(
    text: str, *, dp: int, tp: int, pp: int, cp: int, zero: int, parts: bool, shares: str, compress: str
) -> list[str]:
    """Every rule that a plan with this ``local`` and these other keys breaks; ``parts``: some are split over ``dp``."""
    if not text:
        return []
    try:
        local = Local.parse(text)
    except PlanError as error:
        return list(error.broken)
    if not local.every:
        return []
    several = tp > 1 or pp > 1
    rules = (
        (dp == 1, "lets replicas step alone, and dp=1: use dp=2 or more"),
        (
            zero > 0,
            (
                f"lets weights of replicas differ, and zero={zero} gives each a shard of one state: use zero=0, "
                "and tp or pp to hold a replica on several workers"
            ),
        ),
        (
            cp > 1,
            (
                f"lets weights of replicas differ, and workers that split sequences (cp={cp}) sum gradients together "
                f"with replicas: use tp={cp},sequence=1 in place of cp"
            ),
        ),
        (parts, "needs whole replicas, and parts of them are split over dp: use tp in place of parts"),
        (local.quorum > dp > 1, f"asks for a quorum of more than there are replicas: use 1 to {dp}"),
        (
            local.rounds and several,
            "lets a replica come late or make more steps, as one worker: drop tp and pp, or quorum and steps",
        ),
        (
            local.rounds and shares in ("stolen", "balanced"),
            f"waits for nobody, and shares={shares} needs the others in every step: use steps=speed, or drop shares",
        ),
        (local.steps == "speed" and ":" in shares, f"deals steps of equal size by speed: drop shares={shares}"),
        (
            compress != "none" and (local.rounds or local.graph or local.kind == "adasum"),
            f"meets otherwise than as a sum over all, which is what compress={compress} codes: drop compress",
        ),
    )
    return [f"local={text} {why}" for is_broken, why in rules if is_broken]
