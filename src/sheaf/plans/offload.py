"""Where the optimizer keeps its state and steps: on each worker's device, or in the memory of its host."""

from typing import Any

from sheaf.errors import nearest
from sheaf.plans.rows import ANSWERS

ON_DEVICE, OPTIMIZER = "none", "optimizer"
OFFLOADS = (ON_DEVICE, OPTIMIZER)


def unoffloadable(plan: Any) -> list[str]:
    """Every rule that a ``Plan`` with this ``offload`` breaks, each with the nearest plan that works."""
    if plan.offload not in OFFLOADS:
        return [f"offload={plan.offload}: {nearest(plan.offload, OFFLOADS)}"]
    if plan.offload == ON_DEVICE:
        return []
    said, broken = f"offload={plan.offload}", list[str]()
    if plan.server:
        broken.append(
            f"{said} lets each worker's host step what it holds, and the shards of server={plan.server} do that "
            "already: drop one of the two"
        )
    if plan.local:
        broken.append(
            f"{said} copies to the device what the host has stepped, and the meetings of local={plan.local} change "
            "weights between steps: drop one of the two"
        )
    tables = [(glob, answer) for glob, answer in plan.parts if answer in ANSWERS]
    if tables:
        glob, answer = tables[0]
        broken.append(
            f"{said} takes whole gradients to the host, and {glob}={answer} keeps the rows that were touched only: "
            "drop one of the two"
        )
    return broken
