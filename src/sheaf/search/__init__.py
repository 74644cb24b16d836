"""Every plan worth pricing, ranked, with reasons."""

from sheaf.search.ranking import Entry, Ranking, Refusal
from sheaf.search.rules import broken, unmergeable
from sheaf.search.search import Question, candidates, search

__all__ = ["Entry", "Question", "Ranking", "Refusal", "broken", "candidates", "search", "unmergeable"]
