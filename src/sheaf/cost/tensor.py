"""What the workers that split a layer send each other for one microbatch; nothing hides it."""

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from functools import cached_property

from sheaf.cost.communication import ALL_REDUCE, TRADE, Fabric
from sheaf.plans.split import Move


@dataclass(frozen=True)
class Crossing:
    """The collectives of one microbatch of ``samples`` samples, over the links of a fabric.

    Blocks named in ``repeated`` run forward a second time under recomputation, and their collectives with them.
    """

    fabric: Fabric
    moves: tuple[Move, ...] = ()
    samples: int = 1
    repeated: frozenset[str] = frozenset()
    _known: dict[tuple[int, int], float] = field(default_factory=dict[tuple[int, int], float], compare=False)

    def forward(self, size: int) -> float:
        """Seconds of those before the loss, for a microbatch of ``size`` samples."""
        return self._seconds(0, size)

    def backward(self, size: int, *, again: bool = False) -> float:
        """Seconds of those after the loss; with ``again``, of those that recomputation repeats too."""
        return self._seconds(1, size) + (self._seconds(2, size) if again else 0.0)

    def seconds(self, size: int, *, again: bool = False) -> float:
        """Seconds of all of them."""
        return self.forward(size) + self.backward(size, again=again) if self.moves else 0.0

    def sent_bytes(self, size: int, *, again: bool = False) -> float:
        """What one worker sends for one microbatch."""
        return self._summed(4 + again, size, self.fabric.sent_bytes, again=again)

    def messages(self, size: int, *, again: bool = False) -> float:
        """In how many messages of gloo."""
        return self._summed(6 + again, size, self.fabric.messages, again=again)

    def _summed(self, key: int, size: int, what: Callable[[str, int], float], *, again: bool) -> float:
        if (key, size) not in self._known:
            swapped = self.fabric.gloo and self.fabric.workers == 2  # two workers trade, and each adds
            self._known[key, size] = sum(
                times * what(TRADE if swapped and operation == ALL_REDUCE else operation, self._scaled(one, size))
                for kind in (self._kinds if again else self._kinds[:2])
                for (operation, one), times in kind.items()
            )
        return self._known[key, size]

    def of(self, block: str) -> "Crossing":
        """Those of one block alone."""
        return Crossing(self.fabric, self.by_block.get(block, ()), self.samples, self.repeated)

    @cached_property
    def by_block(self) -> dict[str, tuple[Move, ...]]:
        """The moves of each block, in order."""
        found: dict[str, list[Move]] = {}
        for move in self.moves:
            found.setdefault(move.block, []).append(move)
        return {block: tuple(moves) for block, moves in found.items()}

    @cached_property
    def _kinds(self) -> tuple[Counter[tuple[str, int]], ...]:
        """How many of which operation and size: forward, backward, and forward again."""

        def counted(moves: Iterable[Move]) -> Counter[tuple[str, int]]:
            return Counter((move.operation, move.size_bytes) for move in moves)

        ahead = [move for move in self.moves if not move.backward]
        return (
            counted(ahead),
            counted(move for move in self.moves if move.backward),
            counted(move for move in ahead if move.block in self.repeated),
        )

    def _seconds(self, kind: int, size: int) -> float:
        if not self.moves:
            return 0.0
        if (kind, size) not in self._known:
            self._known[kind, size] = sum(
                times * self.fabric.seconds(operation, self._scaled(size_bytes, size))
                for (operation, size_bytes), times in self._kinds[kind].items()
            )
        return self._known[kind, size]

    def _scaled(self, size_bytes: int, size: int) -> int:
        return round(size_bytes * size / self.samples)


NOTHING = Crossing(Fabric((), 1))
