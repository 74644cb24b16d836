"""The samples of each microbatch of a step: many and mostly alike, so what is asked of all is worked out once."""

from collections.abc import Sequence
from functools import cached_property, lru_cache


class Sizes(tuple[int, ...]):  # noqa: SLOT001  it keeps what was worked out
    """Samples of each microbatch, in order."""

    @cached_property
    def largest(self) -> int:
        """The most samples of any."""
        return max(self)

    @cached_property
    def even(self) -> bool:
        """Whether all have as many but perhaps the last."""
        return self.count(self[0]) >= len(self) - (self[-1] != self[0])

    @classmethod
    def of(cls, sizes: Sequence[int]) -> "Sizes":
        """These; the same ones where they are already."""
        return sizes if isinstance(sizes, Sizes) else cls(sizes)


@lru_cache(maxsize=256)
def microbatch_sizes(batch: int, microbatch: int) -> Sizes:
    """Samples of each microbatch of a full step; the last may be smaller.

    >>> microbatch_sizes(10, 4), microbatch_sizes(10, 4).even
    ((4, 4, 2), True)
    """
    return Sizes(min(microbatch, batch - start) for start in range(0, batch, microbatch))
