"""From departures and measured noise to a verdict: identical, rounding, or wrong and where."""

import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from sheaf.parity.compare import BUFFER, GRADIENT, JUDGED, LOSS, MISSING, OUTPUT, WEIGHT, Key
from sheaf.parity.observation import START

IDENTICAL, ROUNDING, WRONG, RELAXED = "identical", "rounding", "wrong", "relaxed"

# A plan may come this many times as far from the serial run as the reordered serial runs did. Of four runs whose
# departures are as large as the plan's, even for a tensor of one number, the farthest is nearer than a tenth of the
# plan's departure in fewer than one case of a thousand.
FACTOR = 10.0
FLOOR = 8.0  # roundings of its own size that any tensor may be off by, however quiet the reordered runs were
UPDATE_FLOOR = 64.0  # roundings of its update that a weight may be off by: an optimizer is a few operations per element
FLOAT64_EPSILON, FLOAT32_EPSILON = 2.0**-52, 2.0**-23


@dataclass(frozen=True, kw_only=True)
class Step:
    """What is known of one step under the plan, as L2 norms and absolute values.

    ``apart``       how far the plan is from the serial run
    ``noise``       how far reordered serial runs are from the serial run, at most
    ``size``        of what the serial run has
    ``background``  what a gradient, weight or buffer of that shape would be, were its elements as large as all are
    ``moves``       by how much each weight was updated
    ``epsilon``     the rounding of one operation (per key where it departs from the step's)
    """

    step: int
    apart: Mapping[Key, float]
    noise: Mapping[Key, float]
    size: Mapping[Key, float]
    background: Mapping[Key, float] = field(default_factory=dict[Key, float])
    moves: Mapping[str, float] = field(default_factory=dict[str, float])
    epsilon: float = FLOAT32_EPSILON
    epsilons: Mapping[Key, float] = field(default_factory=dict[Key, float])

    @property
    def identical(self) -> bool:
        """Whether every loss, gradient, buffer and weight is the same to the last bit."""
        return not any(value for key, value in self.apart.items() if key.kind in JUDGED)

    def allowed(self, key: Key) -> float:
        """How far apart the plan may be here and still only round differently."""
        size, epsilon = self.size.get(key, 0.0), self.epsilons.get(key, self.epsilon)
        noise = max(self.noise.get(key, 0.0), self._typical(key) * size)
        if not math.isfinite(noise):
            return 0.0  # the reordered runs do not agree that there is anything here
        if key.kind == WEIGHT:
            return FACTOR * noise + epsilon * (size + UPDATE_FLOOR * self.moves.get(key.name, 0.0))
        return FACTOR * noise + epsilon * (FLOOR * size + self.background.get(key, 0.0))

    def departing(self, *kinds: str) -> list[Key]:
        """What of these kinds is further apart than rounding explains, in the order of ``apart``."""
        return [key for key, value in self.apart.items() if key.kind in kinds and value > self.allowed(key)]

    def relative(self, values: Mapping[Key, float], key: Key) -> float:
        """A departure as a fraction of the tensor, or of a typical tensor where this one is next to nothing.

        1.0 stands for one that is missing or not finite, too.
        """
        value = values.get(key, 0.0)
        if value == MISSING:
            return 1.0
        scale = max(self.size.get(key, 0.0), self.background.get(key, 0.0) / 10)
        return value / scale if scale else float(value > 0)

    def worst(self, values: Mapping[Key, float], kind: str) -> float:
        """The largest relative departure among all of a kind."""
        return max((self.relative(values, key) for key in self.apart if key.kind == kind), default=0.0)

    def _typical(self, key: Key) -> float:
        """The usual relative noise of things like this: few numbers may have come out equal by chance."""
        typical = self.__dict__.get("_typicals")
        if typical is None:
            ratios: dict[tuple[str, str], list[float]] = {}
            for other, noise in self.noise.items():
                if self.size.get(other, 0.0) > 0 and math.isfinite(noise):
                    ratios.setdefault(_family(other), []).append(noise / self.size[other])
            typical = {
                family: max(found) if family[0] in (OUTPUT, LOSS) else statistics.median(found)
                for family, found in ratios.items()
            }
            object.__setattr__(self, "_typicals", typical)
        return typical.get(_family(key), 0.0)


def _family(key: Key) -> tuple[str, str]:
    # One block's outputs over all microbatches, and all microbatches' losses, are single numbers: taken together.
    return (key.kind, key.name) if key.kind in (OUTPUT, LOSS) else (key.kind, "")


@dataclass(frozen=True, kw_only=True)
class Verdict:
    """Whether a plan computes the serial answer.

    ``verdict`` is ``identical`` (to the last bit), ``rounding`` (no further off than re-ordering one process's own sums
    explains) or ``wrong``; then ``first_departure`` names step, kind, module, microbatch, error and noise. What would
    be wrong of an exact plan is ``relaxed`` of one that is not.

    ``max_*_error`` compare two whole trainings: the largest relative L2 departure of a loss, gradient, weight or buffer
    over all steps; ``noise`` is the same of the reordered serial trainings. Both grow with the steps, since an
    optimizer such as Adam turns the rounding of a gradient next to zero into a whole update. So it is each step by
    itself that is judged, started from the plan's own weights: ``step_errors``, ``step_noise``, where nothing grows.
    """

    verdict: str
    max_loss_error: float
    max_gradient_error: float
    max_weight_error: float
    max_buffer_error: float
    noise: dict[str, float]
    step_errors: dict[str, float]
    step_noise: dict[str, float]
    first_departure: dict[str, Any] | None
    steps: int
    plan: str

    @property
    def exact(self) -> bool:
        """Whether the plan computes the serial answer, bit for bit or up to rounding."""
        return self.verdict in (IDENTICAL, ROUNDING)

    def of(self, *, exact: bool) -> "Verdict":
        """The verdict on a plan that claims to be exact, or does not."""
        return self if exact or self.verdict != WRONG else replace(self, verdict=RELAXED)

    def to_dict(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)

    def __str__(self) -> str:
        told = {
            IDENTICAL: "the same as one process, to the last bit",
            ROUNDING: "the same as one process, up to rounding",
            WRONG: "not what one process computes",
            RELAXED: "not what one process computes, and a relaxed plan does not claim it",
        }
        errors = {LOSS: self.max_loss_error, GRADIENT: self.max_gradient_error, WEIGHT: self.max_weight_error}
        lines = [
            f"{self.verdict}: {self.plan}, {self.steps} {'step' if self.steps == 1 else 'steps'}: {told[self.verdict]}"
        ]
        lines.append(
            "relative error "
            + ", ".join(f"{kind} {error:.2g} (noise {self.noise[kind]:.2g})" for kind, error in errors.items())
        )
        first = self.first_departure
        if first is None:
            lines.append(
                "each step by itself: "
                + ", ".join(
                    f"{kind} {self.step_errors[kind]:.2g} (noise {self.step_noise[kind]:.2g})" for kind in errors
                )
            )
        else:
            where = f", microbatch {first['microbatch']}" if first["microbatch"] is not None else ""
            when = "before the first step" if first["step"] == START else f"at step {first['step']}"
            lines.append(
                f"departs first {when}{where}: {first['kind']} of {first['module'] or 'the model'}, "
                f"relative error {first['error']:.2g}, noise {first['noise']:.2g}"
                + (f" ({first['departing']} of {first['compared']} depart)" if first["compared"] > 1 else "")
            )
        return "\n".join(lines)


def judge(trainings: Sequence[Step], steps: Sequence[Step], plan: str) -> Verdict:
    """The verdict over ``steps``, each judged by itself; ``trainings`` are the same steps of uninterrupted runs.

    Identical trainings need no steps.
    """
    first = next((found for step in steps if (found := first_departure(step)) is not None), None)
    identical = all(step.identical for step in trainings)
    if not identical and not steps:
        raise ValueError("trainings that differ are judged step by step, and no steps were given")

    def worst(of: Sequence[Step], which: str, kind: str) -> float:
        return max((step.worst(getattr(step, which), kind) for step in of), default=0.0)

    return Verdict(
        verdict=WRONG if first else IDENTICAL if identical else ROUNDING,
        max_loss_error=worst(trainings, "apart", LOSS),
        max_gradient_error=worst(trainings, "apart", GRADIENT),
        max_weight_error=worst(trainings, "apart", WEIGHT),
        max_buffer_error=worst(trainings, "apart", BUFFER),
        noise={kind: worst(trainings, "noise", kind) for kind in JUDGED},
        step_errors={kind: worst(steps, "apart", kind) for kind in JUDGED},
        step_noise={kind: worst(steps, "noise", kind) for kind in JUDGED},
        first_departure=first,
        steps=sum(step.step != START for step in trainings),
        plan=plan,
    )


def first_departure(step: Step) -> dict[str, Any] | None:
    """Where a wrong step departs first, or None when it is right.

    A step is wrong when a loss, gradient, buffer or weight departs. What is named then is the first block, in forward
    order, of the first microbatch whose output departs; else the first loss, gradient, buffer or weight, in this
    order and the model's.
    """
    wrong = step.departing(*JUDGED)
    if not wrong:
        return None
    microbatches = sorted(step.departing(OUTPUT), key=lambda key: -1 if key.microbatch is None else key.microbatch)
    losses = [key for key in wrong if key.kind == LOSS and key.microbatch is not None]
    first = (microbatches or losses or sorted(wrong, key=lambda key: JUDGED.index(key.kind)))[0]
    departing = step.departing(first.kind)
    return {
        "step": step.step,
        "kind": first.kind,
        "module": first.name,
        "microbatch": first.microbatch,
        "error": step.relative(step.apart, first),
        "noise": step.relative(step.noise, first),
        "allowed": step.relative({first: step.allowed(first)}, first),
        "missing": step.apart[first] == MISSING,
        "departing": len(departing),
        "compared": sum(key.kind == first.kind for key in step.apart),
    }
