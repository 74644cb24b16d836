"""Lets groups of gradients out in one fixed order, each as soon as it and all before it are ready.

Collectives match by order, so every worker must start them in the same one, whatever its backward did first.
"""

from collections.abc import Callable, Sequence


class Turnstile:
    """Counts down the members of each group; ``launch(group)`` is called once per group and pass, in order.

    >>> out = []
    >>> turnstile = Turnstile([1, 2], out.append)
    >>> turnstile.arm(); turnstile.ready(1); turnstile.ready(0); out
    [0]
    >>> turnstile.flush(); out
    [0, 1]
    """

    def __init__(self, sizes: Sequence[int], launch: Callable[[int], object]) -> None:
        self._sizes, self._launch = tuple(sizes), launch
        self._missing = [0] * len(self._sizes)
        self._next = len(self._sizes)

    @property
    def armed(self) -> bool:
        """Whether a pass is under way."""
        return self._next < len(self._sizes)

    def arm(self) -> None:
        """Begin a pass: every member of every group is still to come."""
        self._missing = list(self._sizes)
        self._next = 0

    def ready(self, group: int) -> None:
        """One member of a group has come; outside a pass this means nothing."""
        if not self.armed:
            return
        self._missing[group] -= 1
        while self.armed and self._missing[self._next] <= 0:
            self._go()

    def flush(self) -> None:
        """End the pass: launch what is left, ready or not (its missing members count as zero)."""
        while self.armed:
            self._go()

    def _go(self) -> None:
        group, self._next = self._next, self._next + 1
        self._launch(group)
