"""Tables and goals as values, and the columns of ratios that several benchmarks share."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from sheaf.units import pretty_seconds


@dataclass(frozen=True)
class Goal:
    """One goal, what was found, and whether that is enough."""

    text: str
    found: str
    met: bool

    def __str__(self) -> str:
        return f"{'met' if self.met else 'NOT met'}: {self.text}; found {self.found}"


@dataclass(frozen=True)
class Table:
    """Headings and rows of text; the first ``words`` columns are words, the others numbers."""

    headings: tuple[str, ...]
    rows: list[tuple[str, ...]]
    words: int = 1

    def markdown(self) -> str:
        """The table as GitHub shows it."""
        rule = ["---" if column < self.words else "---:" for column in range(len(self.headings))]
        return "\n".join(f"| {' | '.join(cells)} |" for cells in (self.headings, rule, *self.rows))


RATIO = ("throughput ratio", "quartiles", "Sheaf, per step", "peer, per step")


def ratio_cells(one: dict[str, Any], digits: int = 3) -> tuple[str, ...]:
    """A plan, its peer, and the columns of ``RATIO``."""
    return (
        f"`{one['sheaf']}`",
        one["peer"],
        f"{one['median']:.{digits}f}",
        f"{one['low']:.{digits}f} to {one['high']:.{digits}f}",
        pretty_seconds(one["sheaf_seconds"]),
        pretty_seconds(one["peer_seconds"]),
    )


def skipped(results: Sequence[dict[str, Any]]) -> Table:
    """Why nothing was measured here."""
    return Table(("not measured", "because"), [("here", one["skipped"]) for one in results if "skipped" in one], 2)
