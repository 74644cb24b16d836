"""Which rows the next microbatch needs, known before its turn: its batch is fetched one ahead, and its indices read.

Which of a batch's integers are looked up in which table is learned from the lookups seen so far. A wrong guess costs
time alone: what a lookup does not find is asked for then and there.
"""

import random
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from sheaf.parallel.rows.store import Store
from sheaf.task import Microbatch

Fetch = Callable[[int, Microbatch], Any]
_MOST_MISSED = 4096  # rows of a table that no batch tells of, such as positions, which are asked for ahead all the same


class Guess:
    """Which leaves of a batch hold the ids of one table."""

    def __init__(self, rows: int) -> None:
        self._rows = rows
        self._single: set[int] | None = None  # leaves each of which alone has held all ids; None: nothing seen yet
        self._all_do = True  # whether all leaves together have
        self._missed = torch.empty(0, dtype=torch.int64)

    def wanted(self, leaves: Sequence[Tensor]) -> Tensor:
        """Ids that a batch of these integer leaves may look up, each once, rising; on the CPU."""
        if self._single:
            known = min((self._ids(leaves[place]) for place in self._single if place < len(leaves)), key=len)
            return torch.cat((known, self._missed)).unique()
        found = [self._ids(leaf) for leaf in leaves] if self._all_do else []
        return torch.cat([*found, self._missed]).unique()

    def learn(self, leaves: Sequence[Tensor], ids: Tensor) -> None:
        """A lookup of ``ids`` in the forward of such a batch."""
        ids = ids.cpu()
        held = [self._ids(leaf) for leaf in leaves] if self._single is None or self._single or self._all_do else []
        covering = {place for place, known in enumerate(held) if bool(torch.isin(ids, known).all())}
        self._single = covering if self._single is None else self._single & covering
        if self._single:
            return
        rest = ids[~torch.isin(ids, torch.cat(held).unique())] if held and self._all_do else ids
        if rest.numel() and held:
            self._all_do = False
            rest = ids
        if rest.numel() and self._missed.numel() < _MOST_MISSED:
            self._missed = torch.cat((self._missed, rest)).unique()

    def _ids(self, leaf: Tensor) -> Tensor:
        ids = leaf.reshape(-1).unique().long()
        return ids[(ids >= 0) & (ids < self._rows)].cpu()


class Ahead:
    """Fetches a worker's microbatches one ahead; ``mine`` gives those of a step in their order."""

    def __init__(self, store: Store, mine: Callable[[int], Sequence[Microbatch]]) -> None:
        self._store, self._mine = store, mine
        self._guesses = {form.name: Guess(form.rows) for form in store.forms}
        self._kept: dict[tuple[int, int], tuple[Any, Any]] = {}  # batch and random states by step and microbatch
        self._leaves: list[Tensor] = []
        self._dealt: tuple[int, Sequence[Microbatch]] = (-1, ())

    def fetched(self, step: int, microbatch: Microbatch, fetch: Fetch) -> Any:
        """A microbatch's batch; that of the one after it is fetched too, and rows of both are asked for."""
        if self._dealt[0] != step:
            self._dealt = (step, self._mine(step))
            self._kept = {key: value for key, value in self._kept.items() if key[0] == step}
        own = [one.index for one in self._dealt[1]]
        if microbatch.index not in own:
            return fetch(step, microbatch)
        kept = self._kept.pop((step, microbatch.index), None)
        if kept is None:
            batch = fetch(step, microbatch)
            states = _states()
        else:
            batch, states = kept
        self._leaves = _integers(batch)
        self._ask(self._leaves, ahead=False)
        self._prepare(step, own.index(microbatch.index) + 1, fetch)
        _restore(states)  # random numbers of items, and what the forward draws, do not depend on who is fetched when
        return batch

    def looked_up(self, name: str, ids: Tensor) -> None:
        """Learn from a lookup in the forward of the microbatch that was fetched last."""
        self._guesses[name].learn(self._leaves, ids)

    def _prepare(self, step: int, place: int, fetch: Fetch) -> None:
        here = place < len(self._dealt[1])
        following = self._dealt[1] if here else self._mine(step + 1)
        if not following:
            return
        at, microbatch = (step, following[place]) if here else (step + 1, following[0])
        if (at, microbatch.index) not in self._kept:
            try:
                batch = fetch(at, microbatch)
            except Exception:  # noqa: BLE001 - it is raised in its turn, if that comes
                return
            self._kept[at, microbatch.index] = batch, _states()
        self._ask(_integers(self._kept[at, microbatch.index][0]), ahead=not here)

    def _ask(self, leaves: Sequence[Tensor], *, ahead: bool) -> None:
        device = self._store.device
        self._store.ask({name: guess.wanted(leaves).to(device) for name, guess in self._guesses.items()}, ahead=ahead)


def _integers(batch: Any) -> list[Tensor]:
    leaves = tree_leaves(batch)
    return [leaf for leaf in leaves if isinstance(leaf, Tensor) and leaf.dtype in (torch.int64, torch.int32)]


def _states() -> tuple[Any, Any, Tensor]:
    return random.getstate(), np.random.get_state(), torch.default_generator.get_state()


def _restore(states: tuple[Any, Any, Tensor]) -> None:
    random.setstate(states[0])
    np.random.set_state(states[1])
    torch.default_generator.set_state(states[2])
