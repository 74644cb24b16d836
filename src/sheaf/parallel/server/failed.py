"""Why a shard cannot apply a step, and the error that a user sees of it."""

import math
from collections.abc import Sequence
from typing import Any

from sheaf.errors import NonFiniteLoss, TaskError, WorkerFailed
from sheaf.parallel.server.log import Entry, losses


def missed(number: int, applied: int, clock: int) -> dict[str, Any]:
    """That a shard is to apply step ``clock`` in lock-step and has not had all those before."""
    message = f"shard {number} has the values of step {applied}, and was given gradients of step {clock}: some are lost"
    return {"why": "shard", "message": message + "; start again from the last checkpoint"}


def impossible(pushed: Sequence[Entry], number: int, clock: int) -> dict[str, Any] | None:
    """What makes a clock's step of lock-step impossible, found out alike on every shard by what pushes told of it."""
    for entry in pushed:
        if entry.clock != clock:
            return missed(number, clock, entry.clock)
    metas = [entry.meta for entry in pushed]
    told = losses(metas)
    for index, total, weight in told:
        if not math.isfinite(total) or not math.isfinite(weight):
            value = total / weight if weight else total
            return {"why": "loss", "clock": clock, "microbatch": index, "value": value}
    if not sum(weight for _, _, weight in told):
        return {"why": "weight", "clock": clock}
    if not any(meta.get("any") for meta in metas):
        return {"why": "unused", "clock": clock}
    return None


def explained(meta: dict[str, Any], index: int) -> Exception:
    """What to raise for what a shard told; of step ``index`` where it does not say which."""
    step, why = int(meta.get("clock", index)), meta.get("why")
    if why == "loss":
        return NonFiniteLoss(step, int(meta["microbatch"]), float(meta["value"]))
    if why == "weight":
        advice = "No microbatch of the step has any weight: look at the loss's weight (all padding?)."
        return NonFiniteLoss(step, 0, math.nan, advice)
    if why == "norm":
        advice = "The loss is a number but its gradient is not: look for sqrt or log at zero, or 0/0."
        return NonFiniteLoss(step, 0, float(meta["value"]), advice)
    if why == "unused":
        return TaskError(
            f"no parameter got a gradient from the loss of step {step}: look for detach(), .data, item() or "
            "no_grad() between the model's output and the loss, and for a loss that does not use the output"
        )
    if why == "worker":
        return WorkerFailed(
            f"worker {meta['worker']} is gone at step {step}, and with staleness=0 no step can do without its "
            "part: look at its output; start again from the last checkpoint"
        )
    return WorkerFailed(str(meta.get("message", meta)))
