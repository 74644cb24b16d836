"""The zoo's models in small, of odd sizes, on random data: `SMALL["gpt"]()` builds a task."""

from sheaf.zoo.tasks.small import SMALL

__all__ = ["SMALL"]
