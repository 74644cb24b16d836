"""A pipeline's actions against a clock: who does what when, and how much of the workers' time is a bubble."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from sheaf.errors import PlanError
from sheaf.plans.schedule import BACKWARD, FORWARD, WEIGHTS, Action, carried_out


class Span(NamedTuple):
    """An action, who does it, and from when to when, in seconds since the pipeline began."""

    worker: int
    action: Action
    start_seconds: float
    stop_seconds: float


@dataclass(frozen=True)
class Timeline:
    """What a pipeline's clock showed: spans in an order that respects who waits for whom, and the whole's seconds.

    ``bubble`` is the share of the workers' time in which they were idle, 0 to 1.
    """

    spans: tuple[Span, ...]
    seconds: float
    bubble: float

    @property
    def rows(self) -> tuple[tuple[int, str, int, int, float, float], ...]:
        """Plain rows of worker, kind, microbatch, stage, start and stop seconds: what is recorded and drawn."""
        return tuple(
            (worker, action.kind, action.microbatch, action.stage, start_seconds, stop_seconds)
            for worker, action, start_seconds, stop_seconds in self.spans
        )


def simulate(
    listed: Sequence[Sequence[Action]],
    *,
    forward_seconds: Sequence[float],
    backward_seconds: Sequence[float],
    weight_seconds: Sequence[float] | None = None,
    transfer_seconds: float = 0.0,
) -> Timeline:
    """Play the lists against a clock: each worker takes its next action once free and once what it needs has arrived.

    Seconds are by stage, of one action: ``backward_seconds`` of a ``B``, ``weight_seconds`` of a ``W``. What comes from
    another worker arrives ``transfer_seconds`` after it is done, or after what that worker sent before in the same
    direction has arrived: messages share a link. Sending keeps nobody busy.
    Raises PlanError where the lists deadlock, or have ``W`` and ``weight_seconds`` is not given.
    """
    seconds = {FORWARD: forward_seconds, BACKWARD: backward_seconds}
    if weight_seconds is not None:
        seconds[WEIGHTS] = weight_seconds
    elif any(action.kind == WEIGHTS for given in listed for action in given):
        raise PlanError("the lists hold the backward of weights as actions of their own: give weight_seconds too")
    spans: list[Span] = []
    done: dict[Action, Span] = {}
    free = [0.0] * len(listed)
    last = max((action.stage for given in listed for action in given), default=0)
    come: dict[Action, float] = {}  # when what an action made is with another worker
    sent: dict[tuple[int, str], float] = {}
    for worker, action, needed in carried_out(listed):
        start = free[worker]
        for before in needed:
            start = max(start, come[before] if done[before].worker != worker else done[before].stop_seconds)
        free[worker] = start + seconds[action.kind][action.stage]
        spans.append(Span(worker, action, start, free[worker]))
        done[action] = spans[-1]
        if action.stage != {FORWARD: last, BACKWARD: 0}.get(action.kind, action.stage):
            way = worker, action.kind
            come[action] = sent[way] = max(free[worker], sent.get(way, 0.0)) + transfer_seconds
    whole = max(free, default=0.0)
    busy = sum(span.stop_seconds - span.start_seconds for span in spans)
    return Timeline(tuple(spans), whole, max(0.0, 1 - busy / (whole * len(listed))) if whole else 0.0)
