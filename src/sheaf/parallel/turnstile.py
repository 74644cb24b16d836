"""Lets groups of gradients out in one fixed order, each as soon as it and all before it are ready.

Collectives match by order, so every worker must start them in the same one, whatever its backward did first.
"""

from collections.abc import Callable, Sequence

from sheaf.errors import PlanError


class Turnstile:
    """Waits for the named members of each group; ``launch(group)`` is called once per group and pass, in order.

    A pass lasts from ``arm`` to ``flush`` (or ``forget``, where a step was given up). While it is not ``open``, groups
    that are complete wait for a later member, or the flush.

    >>> out = []
    >>> turnstile = Turnstile([["a"], ["b", "c"]], out.append)
    >>> turnstile.arm(); turnstile.ready("b"); turnstile.ready("b"); turnstile.ready("a"); out
    [0]
    >>> turnstile.flush(); out
    [0, 1]
    """

    def __init__(
        self,
        groups: Sequence[Sequence[str]],
        launch: Callable[[int], object],
        is_open: Callable[[], bool] = lambda: True,
    ) -> None:
        self._sizes, self._launch, self._is_open = [len(group) for group in groups], launch, is_open
        self._group_of = {name: index for index, group in enumerate(groups) for name in group}
        self._missing: list[int] = []
        self._come: set[str] = set()
        self._next = self._complete = 0  # the first that was not launched, and the first that has to wait for a member
        self.armed = False

    def arm(self) -> None:
        """Begin a pass: every member of every group is still to come."""
        self._missing = self._sizes.copy()
        self._come.clear()
        self._next = self._complete = 0
        self.armed = True

    def ready(self, name: str) -> None:
        """A member has come; outside a pass this means nothing.

        Raises PlanError for one whose group has gone already: what it brings would be lost. (Or would have gone, had it
        been open: so that all workers find the same.)
        """
        if not self.armed:
            return
        group = self._group_of[name]
        if group < self._complete:
            raise PlanError(
                f"parameter {name} got a gradient after its bucket had been sent, as when backward runs within "
                "backward: use torch.utils.checkpoint with use_reentrant=False, around one block at a time, or drop "
                "it and let the plan say recompute=full"
            )
        if name in self._come:
            return
        self._come.add(name)
        self._missing[group] -= 1
        while self._complete < len(self._sizes) and not self._missing[self._complete]:
            self._complete += 1
        while self._next < self._complete and self._is_open():
            self._go()

    def catch_up(self) -> None:
        """Launch what is complete, open or not: where a backward fails, all workers have then started the same."""
        self.let_through(self._complete)

    def let_through(self, count: int) -> None:
        """Launch the first ``count`` groups now, ready or not (what is missing counts as zero)."""
        while self.armed and self._next < count:
            self._go()

    def flush(self) -> None:
        """End the pass: launch what is left, ready or not."""
        self.let_through(len(self._sizes))
        self.armed = False

    def forget(self) -> None:
        """Give up a pass that an error cut short."""
        self.armed = False

    def _go(self) -> None:
        group, self._next = self._next, self._next + 1
        self._complete = max(self._complete, self._next)
        try:
            self._launch(group)
        except BaseException:
            self.forget()
            raise
