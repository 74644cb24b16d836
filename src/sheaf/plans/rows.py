"""Embedding tables whose gradients travel as rows: the two answers of a plan for them, and what these go with."""

from collections.abc import Sequence
from typing import Any

SPARSE = "sparse"  # every replica holds the table, and the touched rows of its gradient travel to all
ROWS = "rows"  # replicas hold blocks of rows for each other: rows are pulled, gradients of rows go to their owners
ANSWERS = (SPARSE, ROWS)


def named(parts: Sequence[tuple[str, str]], *answers: str) -> tuple[str, ...]:
    """The globs of the parts with one of these answers.

    >>> named((("words", "rows"), ("head", "tp")), ROWS)
    ('words',)
    """
    return tuple(glob for glob, answer in parts if answer in answers)


def unmixable(plan: Any) -> list[str]:
    """What is wrong with the parts of a ``Plan`` that travel as rows; nothing where there are none."""
    tables = named(plan.parts, *ANSWERS)
    if not tables:
        return []
    glob, answer = next((glob, answer) for glob, answer in plan.parts if answer in ANSWERS)
    dealt = named(plan.parts, ROWS)
    broken: list[str] = []
    if plan.dp == 1 or plan.computing > plan.dp:
        broken.append(
            f"{glob}={answer} lets rows travel between replicas of whole layers: use it with "
            f"dp={max(2, plan.computing)} alone, and with parts such as head=tp for what else is large"
        )
    if plan.zero:
        broken.append(
            f"{glob}={answer} goes with zero=0: drop zero ({glob}={ROWS} shards the table and its optimizer state)"
        )
    if plan.local:
        broken.append(f"{glob}={answer} says how gradients meet in each step, and local={plan.local} that they do not")
    if named(plan.parts, "ep"):
        broken.append(f"{glob}={answer} does not go with parts dealt out by expert: keep one of the two answers")
    if dealt and plan.shares in ("stolen", "balanced"):
        broken.append(
            f"{dealt[0]}={ROWS} pulls the rows of microbatches before their turn, and shares={plan.shares} does not "
            f"know whose they are: use equal or weighted shares, or {dealt[0]}={SPARSE}"
        )
    return broken
