"""Every plan worth pricing, ranked, with reasons."""

from sheaf.search.families import candidates
from sheaf.search.question import Question
from sheaf.search.ranking import Entry, Ranking, Refusal
from sheaf.search.rules import broken, unmergeable
from sheaf.search.search import Progress, exchanged, search

__all__ = [
    "Entry",
    "Progress",
    "Question",
    "Ranking",
    "Refusal",
    "broken",
    "candidates",
    "exchanged",
    "search",
    "unmergeable",
]
