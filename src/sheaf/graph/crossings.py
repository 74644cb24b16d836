"""What has to cross between two pieces of a model: tensors that were made before, and are used after."""

from collections.abc import Iterable, Mapping
from itertools import accumulate
from typing import Any

from torch import nn

from sheaf.graph import ops


class Crossings:
    """Notes of each storage that a forward makes when it was made and when it was last used, by how many blocks had
    begun then. The model's parameters and buffers cross nowhere, nor does what follows from the batch alone.
    """

    def __init__(self, model: nn.Module) -> None:
        self._trained = set(ops.storage_bytes([*model.parameters()]))
        self._lasting = self._trained | set(ops.storage_bytes([*model.buffers()]))
        self._made: dict[int, tuple[int, int]] = {}  # storage -> (blocks begun, bytes)
        self._used: dict[int, int] = {}
        self._apart: list[Any] = []  # keeps storages' identities from being used again

    def note(self, given: Any, result: Any, begun: int) -> None:
        """One operator has run."""
        keys = ops.storage_bytes(ops.tensors(given)).keys()
        before = keys & self._made.keys()
        self._used |= dict.fromkeys(before, begun)
        if not before and keys.isdisjoint(self._trained):
            return
        made = ops.tensors(result)
        storages = ops.storage_bytes(made)
        if fresh := storages.keys() - self._made.keys() - self._lasting:
            self._made |= {key: (begun, storages[key]) for key in storages if key in fresh}
            self._apart += ops.kept_apart(made)

    def follows(self, key: int) -> bool:
        """Whether a storage was made of what is trained."""
        return key in self._made

    def repeat(self, used: Iterable[int], made: Mapping[int, int], begun: int) -> None:
        """A block that was not run would have used these storages, and made these, with their bytes."""
        self._used |= {key: begun for key in used if key in self._made}
        self._made |= {key: (begun, size_bytes) for key, size_bytes in made.items()}

    def behind(self, count: int) -> list[int]:
        """Bytes that cross behind each of ``count`` blocks, in the order in which they began, to any later one."""
        changes = [0] * (count + 2)
        for key, (begun, size_bytes) in self._made.items():
            used = min(self._used.get(key, 0), count + 1)
            if begun < used:
                changes[begun] += size_bytes
                changes[used] -= size_bytes
        return list(accumulate(changes))[1 : count + 1]
