"""Which samples are in which microbatch of which step, and how they are fetched. No worker count enters here."""

import copy
import random
from collections.abc import Mapping, MutableMapping, Sequence
from dataclasses import dataclass, fields, is_dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import default_collate

from sheaf.errors import DataError, TaskError
from sheaf.task.reach import tensors_in
from sheaf.task.streams import key
from sheaf.task.task import Task


@dataclass(frozen=True)
class Microbatch:
    """The atom of a step: ``index`` within the step, and its samples' indices into the data."""

    index: int
    samples: tuple[int, ...]


def steps_per_epoch(num_samples: int, batch: int) -> int:
    """Steps that use every sample once; the last may be smaller.

    >>> steps_per_epoch(10, 4)
    3
    """
    return -(-num_samples // batch)


class Order:
    """The order of samples: a function of (seed, epoch), whoever computes and however many they are."""

    def __init__(self, num_samples: int, batch: int, microbatch: int, seed: int, *, shuffle: bool) -> None:
        self.num_samples, self.batch, self.microbatch = num_samples, batch, microbatch
        self._seed, self._shuffle = seed, shuffle
        self._epoch, self._indices = -1, torch.empty(0, dtype=torch.int64)

    @property
    def steps_per_epoch(self) -> int:
        """Steps that use every sample once."""
        return steps_per_epoch(self.num_samples, self.batch)

    def step(self, step: int) -> tuple[Microbatch, ...]:
        """The microbatches of a global step; ragged at the end of an epoch, never dropped or padded."""
        epoch, within = divmod(step, self.steps_per_epoch)
        indices = self.epoch(epoch)[within * self.batch : (within + 1) * self.batch].tolist()
        return tuple(
            Microbatch(index, tuple(indices[start : start + self.microbatch]))
            for index, start in enumerate(range(0, len(indices), self.microbatch))
        )

    def epoch(self, epoch: int) -> Tensor:
        """All sample indices of an epoch in the order they are used."""
        if epoch != self._epoch:
            generator = torch.Generator().manual_seed(key(self._seed, "order", epoch))
            self._indices = (
                torch.randperm(self.num_samples, generator=generator)
                if self._shuffle
                else torch.arange(self.num_samples)
            )
            self._epoch = epoch
        return self._indices


def fetch(task: Task, samples: Sequence[int], stream: int) -> Any:
    """The collated batch of these samples; items that draw random numbers draw them from ``stream``.

    Raises DataError naming the index of an item that cannot be had, and TaskError when collating fails.
    """
    random.seed(stream)
    np.random.seed(stream % 2**32)
    torch.default_generator.manual_seed(stream)
    items: list[Any] = []
    for index in samples:
        try:
            items.append(task.data[index])
        except Exception as error:
            raise DataError(f"data[{index}] raised {type(error).__name__}: {error}") from error
    try:
        return (task.collate or default_collate)(items)
    except Exception as error:
        remedy = (
            "items of different shapes need collate=, a function from a list of items to a batch"
            if task.collate is None
            else "collate= is given a list of items, and must return a batch"
        )
        raise TaskError(
            f"collating samples {list(samples)[:8]} raised {type(error).__name__}: {error}; {remedy}"
        ) from error


def arguments(task: Task, batch: Any) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The positional and keyword arguments with which the model is called for this batch.

    Raises TaskError when the batch is no (input, target) pair and the task has no ``inputs``.
    """
    if task.inputs is not None:
        given = task.inputs(batch)
        if isinstance(given, dict):
            return (), given
        return tuple(given) if isinstance(given, tuple | list) else (given,), {}
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return (batch[0],), {}
    raise TaskError(
        f"a batch is a {type(batch).__name__}, not an (input, target) pair, so Sheaf cannot tell what the model takes: "
        "give inputs=, a function from a batch to a tuple of positional or a dict of keyword arguments"
    )


def moved(value: Any, device: torch.device, floating: torch.dtype | None = None) -> Any:  # noqa: PLR0911 - one a kind
    """A batch on ``device``; its floating-point tensors as ``floating`` when given.

    Goes into sequences, sets, mappings and dataclasses, whose types are kept, and uses the ``to`` of other objects.
    Raises TaskError for an object that holds tensors and has no ``to``.
    """
    if isinstance(value, Tensor):
        dtype = floating if floating is not None and value.is_floating_point() else value.dtype
        return value.to(device=device, dtype=dtype, non_blocking=True)
    if isinstance(value, Mapping):
        items = {name: moved(item, device, floating) for name, item in value.items()}
        if isinstance(value, MutableMapping):
            made: Any = copy.copy(value)
            made.update(items)
            return made
        return items
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return type(value)(*(moved(item, device, floating) for item in value))
    if isinstance(value, tuple | list | set | frozenset):
        return type(value)(moved(item, device, floating) for item in value)
    if is_dataclass(value) and not isinstance(value, type):
        made = copy.copy(value)
        for field in fields(value):
            object.__setattr__(made, field.name, moved(getattr(value, field.name), device, floating))
        return made
    if value is None or isinstance(value, str | bytes | int | float) or next(tensors_in(value), None) is None:
        return value
    return _told_to_move(value, device, floating)


def _told_to_move(value: Any, device: torch.device, floating: torch.dtype | None) -> Any:
    """An object with a ``to``, moved by it."""
    if not callable(getattr(value, "to", None)):
        raise TaskError(
            f"a batch holds a {type(value).__name__}, which has tensors but no .to(device): "
            "give collate= a function that returns tensors in tuples, dicts or dataclasses"
        )
    made = value.to(device)
    if floating is None or all(not one.is_floating_point() or one.dtype == floating for one in tensors_in(made)):
        return made
    try:
        made = made.to(floating)
    except Exception as error:
        raise TaskError(f"{type(value).__name__}.to({floating}) raised {type(error).__name__}: {error}") from error
    return made
