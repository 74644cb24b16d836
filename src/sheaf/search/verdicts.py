"""What is said of the best plan beside its price: its time taken apart, what would make others win, and money."""

from dataclasses import dataclass
from typing import Any

from sheaf.search.words import TERM_WORDS
from sheaf.units import pretty_seconds

_SAID = 1e-8  # seconds: less is what sums are off by


@dataclass(frozen=True)
class Needed:
    """What would have to change for a plan to beat the best: ``words`` of it, and the factor where there is one."""

    plan: str
    key: str  # links, inter, memory, batch, flops; empty where nothing was found
    factor: float
    words: str

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"text": self.plan, "key": self.key, "factor": self.factor, "words": self.words}


@dataclass(frozen=True)
class Explanation:
    """The best plan's time taken apart; seconds per step.

    ``compute_seconds`` (T) and ``alpha``, what is sent and nothing hides as a share of it: T (1 + alpha) is the step
    but for ``other_seconds`` of waiting, update and bookkeeping. ``efficiency`` is the share of the step that all its
    workers would need at the rate their devices reach on large matrices.
    """

    plan: str
    compute_seconds: float
    alpha: float
    other_seconds: float
    binding: str
    binding_share: float
    ideal_seconds: float
    efficiency: float
    needed: tuple[Needed, ...] = ()

    @property
    def lines(self) -> tuple[str, ...]:
        """The same in sentences."""
        sent, whole = self.alpha * self.compute_seconds, self.compute_seconds * (1 + self.alpha)
        other = (
            f", waiting and the update add {pretty_seconds(self.other_seconds)}" if self.other_seconds >= _SAID else ""
        )
        made_of = (
            f"computing takes T = {pretty_seconds(self.compute_seconds)}, sending that nothing hides "
            f"{pretty_seconds(sent)} (α = {self.alpha:.2f}): T·(1+α) = {pretty_seconds(whole)}{other}"
        )
        binds = (
            f"what binds it: {TERM_WORDS[self.binding]}, {self.binding_share:.0%} of the step; its workers need "
            f"{pretty_seconds(self.ideal_seconds)} at the most their devices reach, {self.efficiency:.0%} of the step"
        )
        return made_of, binds

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "text": self.plan,
            "T": self.compute_seconds,
            "alpha": self.alpha,
            "other_seconds": self.other_seconds,
            "binding": self.binding,
            "binding_share": self.binding_share,
            "ideal_seconds": self.ideal_seconds,
            "efficiency": self.efficiency,
            "lines": list(self.lines),
            "needed": [one.to_dict() for one in self.needed],
        }


@dataclass(frozen=True)
class Costs:
    """What the ranked plans cost, by plan, in the cluster's currency; ``target`` counts samples, 0 where none is given.

    Accelerators cost as many as a plan uses, CPU hosts whole.
    """

    currency: str
    per_hour: dict[str, float]
    per_step: dict[str, float]
    target: int = 0
    steps: int = 0
    to_target: dict[str, float] | None = None

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "currency": self.currency,
            "per_hour": self.per_hour,
            "per_step": self.per_step,
            "target_samples": self.target or None,
            "steps_to_target": self.steps or None,
            "to_target": self.to_target,
        }
