"""What a search found: plans in order with reasons, and what was refused, and why."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from sheaf.cost.price import Price
from sheaf.errors import PlanError
from sheaf.plans import Plan
from sheaf.search.question import Question
from sheaf.search.verdicts import Costs, Explanation


@dataclass(frozen=True)
class Entry:
    """One plan that can run: its price, and why it leads (``reason``) or what it loses on (``loses_on``).

    ``caution`` is what is known of the effect of a relaxed plan on training; empty for an exact one.
    """

    price: Price
    reason: str = ""
    loses_on: str = ""
    caution: str = ""

    @property
    def plan(self) -> Plan:
        """The plan that is priced."""
        return self.price.plan

    def to_dict(self) -> dict[str, Any]:
        """The entry for JSON; times in seconds, sizes in bytes. ``stages`` counts the blocks of a pipeline's,
        ``begins`` names the first of each.
        """
        words = {"reason": self.reason} if self.reason else {"loses_on": self.loses_on}
        return {
            "text": str(self.plan),
            "exact": self.plan.exact,
            "seconds": dict(self.price.seconds),
            "step_seconds": self.price.step_seconds,
            "hidden_seconds": self.price.hidden_seconds,
            "memory": dict(self.price.memory),
            "peak_bytes": self.price.peak_bytes,
            "traffic_bytes": self.price.traffic_bytes,
            "stages": list(self.price.stages),
            "begins": list(self.price.begins),
            **words,
            **({"caution": self.caution} if self.caution else {}),
        }


@dataclass(frozen=True)
class Remedy:
    """A plan that fits in the place of one that does not; its step takes ``times`` as long as that one's would."""

    plan: str
    step_seconds: float
    times: float

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {"text": self.plan, "step_seconds": self.step_seconds, "times": self.times}


@dataclass(frozen=True)
class Refusal:
    """A plan that is not proposed, why not, and the cheapest change that helps.

    ``remedies`` are all changes that make a plan fit which is short of memory, the fastest first.
    """

    plan: str
    reason: str
    remedy: str
    remedies: tuple[Remedy, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """For JSON."""
        return {
            "text": self.plan,
            "reason": self.reason,
            "remedy": self.remedy,
            "remedies": [one.to_dict() for one in self.remedies],
        }


@dataclass(frozen=True)
class Ranking:
    """Plans from best to worst, and the refused ones. ``cluster`` is its name; ``batch`` counts samples per step.

    ``splits`` describes what splitting layers does, by (workers, sequence 0 or 1, 2 for experts, 3 for
    sequences alone), for JSON.
    """

    ranked: tuple[Entry, ...]
    refused: tuple[Refusal, ...]
    cluster: str
    batch: int
    microbatch: int | None  # the task's; None where each plan says its own
    splits: Mapping[tuple[int, int], dict[str, Any]] = field(default_factory=dict[tuple[int, int], dict[str, Any]])
    looked_at: int = 0  # plans that were priced
    seconds: float = field(default=0.0, compare=False)  # that the search took
    least_seconds: float | None = None  # what no plan goes below that was not looked at; None: the best is proven
    starved: tuple[Price, ...] = ()  # plans that do not fit, as far as memory goes: without seconds
    asked: Question | None = field(default=None, repr=False, compare=False)
    explanation: Explanation | None = None
    costs: Costs | None = None
    workers_needed: int | None = None  # how many of the cluster's last kind would do, where no plan fits

    @property
    def best(self) -> Price:
        """The plan that leads, with its price.

        Raises PlanError with every reason when all plans were refused.
        """
        if not self.ranked:
            broken = [f"{reason} ({', '.join(plans[:3])}): {remedy}" for reason, remedy, plans in self.refusals()]
            if self.workers_needed:
                broken.append(f"{self.workers_needed} workers of this kind would do")
            raise PlanError(broken or ["there is no plan to choose from: give at least one worker"])
        return self.ranked[0].price

    @property
    def cores_taken(self) -> float:
        """Cores that other programs took, of those that the workers wanted, while what is ranked by was measured."""
        profiles = self.asked.profiles.values() if self.asked is not None else ()
        return max((one.cores_taken for one in profiles), default=0.0)

    def entry(self, plan: Plan | str) -> Entry | None:
        """The entry of a plan, if it was ranked."""
        return next((entry for entry in self.ranked if str(entry.plan) == str(plan)), None)

    def split(self, plan: Plan) -> dict[str, Any] | None:
        """What splitting layers does under a plan; None for one that splits none."""
        return self.splits.get(plan.split_kind)

    def refusals(self) -> tuple[tuple[str, str, tuple[str, ...]], ...]:
        """(reason, remedy, plans) with the plans of one reason together, for showing."""
        together: dict[tuple[str, str], list[str]] = {}
        for refusal in self.refused:
            together.setdefault((refusal.reason, refusal.remedy), []).append(refusal.plan)
        return tuple((reason, remedy, tuple(plans)) for (reason, remedy), plans in together.items())

    def to_dict(self) -> dict[str, Any]:
        """Everything for ``--json``."""
        return {
            "plans": [entry.to_dict() for entry in self.ranked],
            "refused": [refusal.to_dict() for refusal in self.refused],
            "splits": [{**split, "sequence": sequence} for (_, sequence), split in self.splits.items()],
            "cluster": self.cluster,
            "batch": self.batch,
            "microbatch": self.microbatch or (self.ranked[0].plan.microbatch if self.ranked else None),
            "looked_at": self.looked_at,
            "search_seconds": self.seconds,
            "proven": self.least_seconds is None,
            "least_seconds": self.least_seconds,
            "explanation": self.explanation and self.explanation.to_dict(),
            "costs": self.costs and self.costs.to_dict(),
            "workers_needed": self.workers_needed,
            "cores_taken": self.cores_taken,
        }
