"""The plan: one frozen, readable value that says who computes what, and how gradients meet."""

import re
import tomllib
from dataclasses import dataclass, fields, replace

import tomli_w

from sheaf.errors import PlanError, nearest

EQUAL = "equal"
STOLEN = "stolen"
RECOMPUTE = ("none", "full")
DEFAULT_BUCKET_BYTES = 8 * 2**20


@dataclass(frozen=True, kw_only=True)
class Plan:
    """Who computes which part of a step, when, and how the gradients meet. It never changes what is computed.

    ``dp``          workers among which the batch is split (data parallel)
    ``shares``      how: ``equal``, weights such as ``11:5`` (one per worker), or ``stolen`` from a common queue
    ``zero``        0: all state on every worker; 1: optimizer state sharded; 2: gradients too; 3: parameters too
    ``recompute``   ``none``, or ``full``: each block keeps only its input and runs forward again in backward
    ``microbatch``  samples per microbatch where the task leaves it open
    ``bucket_bytes``  gradients travel in buckets of about this size

    >>> Plan.parse("dp=4,zero=3")
    Plan(dp=4,zero=3)
    >>> Plan.parse("dp=2,shares=11:5").weights
    (11, 5)
    >>> Plan.parse("serial") == Plan()
    True
    """

    dp: int = 1
    shares: str = EQUAL
    zero: int = 0
    recompute: str = "none"
    microbatch: int | None = None
    bucket_bytes: int = DEFAULT_BUCKET_BYTES

    def __post_init__(self) -> None:
        broken = self._broken()
        if broken:
            raise PlanError(broken)

    @property
    def workers(self) -> int:
        """How many workers the plan runs on."""
        return self.dp

    @property
    def weights(self) -> tuple[int, ...]:
        """The share of each worker, for equal and weighted shares."""
        return tuple(int(part) for part in self.shares.split(":")) if ":" in self.shares else (1,) * self.dp

    @property
    def stolen(self) -> bool:
        """Whether workers take microbatches from a common queue."""
        return self.shares == STOLEN

    @property
    def serial(self) -> bool:
        """Whether one worker does everything."""
        return self.workers == 1

    def __str__(self) -> str:
        """The plan as text: only what departs from the default; ``serial`` when nothing does."""
        parts = [
            f"{field.name}={getattr(self, field.name)}"
            for field in fields(self)
            if getattr(self, field.name) != field.default
        ]
        return ",".join(parts) or "serial"

    def __repr__(self) -> str:
        return f"Plan({self})"

    @classmethod
    def parse(cls, text: str) -> "Plan":
        """Read a plan from text such as ``dp=4,zero=3`` or ``serial``.

        Raises PlanError listing every unknown key (with the nearest known one) and every bad value.
        """
        return cls.from_pairs(_pairs(text))

    @classmethod
    def from_toml(cls, text: str) -> "Plan":
        """Read a plan from TOML (``dp = 4``), as ``to_toml`` writes it."""
        try:
            table = tomllib.loads(text)
        except tomllib.TOMLDecodeError as error:
            raise PlanError(f"the plan is not TOML: {error}") from None
        return cls.from_pairs([(key, str(value)) for key, value in table.items()])

    @classmethod
    def from_pairs(cls, pairs: list[tuple[str, str]]) -> "Plan":
        """Read a plan from (key, text) pairs; raises PlanError listing everything wrong with them."""
        known = {field.name: field for field in fields(cls)}
        values: dict[str, int | str] = {}
        broken: list[str] = []
        for key, text in pairs:
            if key not in known:
                broken.append(f"{key!r} is not a key of a plan; {nearest(key, known)}")
            elif key in values:
                broken.append(f"{key} is given twice; keep one")
            elif key in ("shares", "recompute"):
                values[key] = text
            elif re.fullmatch(r"-?\d+", text):
                values[key] = int(text)
            else:
                broken.append(f"{key}={text} is not a whole number")
        try:
            plan = cls(**values)  # pyright: ignore[reportArgumentType]
        except PlanError as error:
            raise PlanError((*broken, *error.broken)) from None
        if broken:
            raise PlanError(broken)
        return plan

    def to_toml(self) -> str:
        """Every key of the plan as TOML, defaults included (an open microbatch is left out)."""
        table = {field.name: getattr(self, field.name) for field in fields(self)}
        return tomli_w.dumps({key: value for key, value in table.items() if value is not None})

    def with_microbatch(self, microbatch: int) -> "Plan":
        """The same plan with the microbatch written in."""
        return replace(self, microbatch=microbatch)

    def _broken(self) -> list[str]:
        broken: list[str] = []
        if self.dp < 1:
            broken.append(f"dp={self.dp}: at least one worker is needed")
        if self.zero not in (0, 1, 2, 3):
            broken.append(f"zero={self.zero}: ZeRO has stages 0, 1, 2 and 3")
        if self.recompute not in RECOMPUTE:
            broken.append(f"recompute={self.recompute}: {nearest(self.recompute, RECOMPUTE)}")
        if self.microbatch is not None and self.microbatch < 1:
            broken.append(f"microbatch={self.microbatch}: at least one sample is needed")
        if self.bucket_bytes < 1024:
            broken.append(f"bucket_bytes={self.bucket_bytes}: use at least 1024")
        if self.shares not in (EQUAL, STOLEN):
            if not re.fullmatch(r"\d+(:\d+)*", self.shares):
                broken.append(
                    f"shares={self.shares}: write {EQUAL}, {STOLEN}, or one whole weight per worker such as 11:5"
                )
            elif len(self.shares.split(":")) != self.dp:
                broken.append(
                    f"shares={self.shares} gives {len(self.shares.split(':'))} weights for dp={self.dp} workers: "
                    "write one per worker"
                )
            elif not any(int(part) for part in self.shares.split(":")):
                broken.append(f"shares={self.shares}: at least one weight must be above zero")
        return broken + _illegal_mixes(self)


def _illegal_mixes(plan: Plan) -> list[str]:
    """Combinations that cannot work, each with the reason and the nearest one that does."""
    broken: list[str] = []
    if plan.zero >= 2 and plan.stolen:
        broken.append(
            f"zero={plan.zero} moves every worker through the layers in lockstep, so there is nothing to steal: "
            f"use zero=1,shares=stolen, or zero={plan.zero} with weighted shares"
        )
    if plan.dp == 1 and plan.zero:
        broken.append(f"zero={plan.zero} shards state among dp workers, and dp=1: raise dp or drop zero")
    if plan.dp == 1 and plan.stolen:
        broken.append("shares=stolen needs someone to steal from, and dp=1: raise dp or drop shares")
    return broken


def _pairs(text: str) -> list[tuple[str, str]]:
    stripped = text.strip()
    if stripped in ("", "serial"):
        return []
    pairs: list[tuple[str, str]] = []
    for part in stripped.split(","):
        key, equals, value = part.partition("=")
        if not equals or not value.strip():
            raise PlanError(f"{part.strip()!r} is not key=value; a plan reads like dp=4,zero=3")
        pairs.append((key.strip(), value.strip()))
    return pairs
