"""The task: what is computed, and nothing about who computes it."""

from collections.abc import Callable, Collection, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from sheaf.errors import DataError, TaskError, nearest
from sheaf.task.built import instead
from sheaf.task.loss import Loss

PRECISIONS: dict[str, torch.dtype] = {
    "fp32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
    "fp64": torch.float64,
}

_LONGEST = 100  # characters of a value that is shown


@dataclass(frozen=True, kw_only=True)
class Task:
    """A model, a loss, an optimizer and data: all that decides the answer.

    ``model``       () -> nn.Module; called without memory, then filled tensor by tensor
    ``loss``        (output, batch) -> sheaf.Loss(sum, weight), or a scalar mean over the batch's samples
    ``optimizer``   (list of parameters) -> torch.optim.Optimizer
    ``data``        anything with len() and [i]
    ``batch``       samples per step
    ``microbatch``  samples per microbatch; None lets the plan choose, where the answer cannot depend on it
    ``inputs``      batch -> tuple of positional or dict of keyword arguments (default: the first item of a pair)
    ``collate``     list of items -> batch (default: torch's default_collate)
    ``weights``     a safetensors file to start from
    ``scheduler``   optimizer -> torch.optim.lr_scheduler, stepped once per step
    ``clip``        largest global gradient norm
    ``precision``   fp32, bf16, fp16 (both by autocast over float32 weights; fp16 with loss scaling) or fp64

    Raises TaskError listing fields that it does not know or lacks, or everything that contradicts itself, and DataError
    for data without len(), [i] or items.
    """

    model: Callable[[], nn.Module]
    loss: Callable[[Any, Any], Loss | Tensor]
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]
    data: Any
    batch: int
    microbatch: int | None = None
    seed: int = 0
    inputs: Callable[[Any], Sequence[Any] | dict[str, Any]] | None = None
    collate: Callable[[list[Any]], Any] | None = None
    shuffle: bool = True
    weights: str | Path | None = None
    scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None
    clip: float | None = None
    precision: str = "fp32"
    name: str = "task"

    def __new__(cls, *unnamed: object, **given: object) -> "Task":  # noqa: PYI034 - beartype knows no Self
        """Looks at the names of what is given: the constructor of a dataclass tells of one only, and not what is like
        it.
        """
        if cls is Task and (unnamed or given):  # a copy is given nothing
            broken = _misnamed(len(unnamed), given)
            if broken:
                raise TaskError(broken)
        return super().__new__(cls)

    def __post_init__(self) -> None:
        broken = self._broken()
        if broken:
            raise TaskError(broken)
        if isinstance(self.data, DataLoader):
            raise DataError(
                "data is a DataLoader, which makes batches of its own; Sheaf makes them: give its dataset as data, and "
                "batch, shuffle and collate here"
            )
        if not (hasattr(self.data, "__len__") and hasattr(self.data, "__getitem__")):
            raise DataError(
                f"data is a {type(self.data).__name__} without len() and [i]; "
                "a stream has no order to split: wrap it in a list or a map-style dataset"
            )
        if len(self.data) == 0:
            raise DataError(f"data ({type(self.data).__name__}) is empty; training needs at least one sample")

    @property
    def num_samples(self) -> int:
        """How many samples one epoch holds."""
        return len(self.data)

    def _broken(self) -> list[str]:
        mistyped = self._mistyped()
        return [*self._uncallable(), *mistyped.values(), *self._contradicting(frozenset(mistyped))]

    def _mistyped(self) -> dict[str, str]:
        """What is wrong with the type of a field, by the field's name."""
        samples, number = "a whole number of samples", "a number"
        wanted: tuple[tuple[str, Any, Any, str], ...] = (
            ("batch", self.batch, int, samples),
            ("microbatch", self.microbatch, int | None, f"{samples}, or None"),
            ("seed", self.seed, int, "a whole number"),
            ("clip", self.clip, int | float | None, f"{number}, or None"),
            ("shuffle", self.shuffle, bool, "True or False"),
            ("weights", self.weights, str | Path | None, "the path of a safetensors file, or None"),
            ("precision", self.precision, str, f"one of {', '.join(PRECISIONS)}"),
            ("name", self.name, str, "a text"),
        )
        return {
            name: f"{name}={value!r} is {_a(type(value).__name__)}; give {want}"
            for name, value, kinds, want in wanted
            if not isinstance(value, kinds) or (isinstance(value, bool) and kinds is not bool)
        }

    def _uncallable(self) -> list[str]:
        """What is wrong with the fields that are functions."""
        wanted = (
            ("model", "a function that builds the model, such as lambda: Net()"),
            ("loss", "(output, batch) -> sheaf.Loss or a scalar mean"),
            ("optimizer", "(parameters) -> torch.optim.Optimizer"),
            ("inputs", ""),
            ("collate", ""),
            ("scheduler", ""),
        )
        broken: list[str] = []
        for name, want in wanted:
            value: object = getattr(self, name)
            if told := instead(name, value):
                broken.append(told)
            elif not callable(value) and (want or value is not None):
                broken.append(f"{name} is {_shown(value)}; it must be callable{f': {want}' if want else ', or None'}")
        return broken

    def _contradicting(self, mistyped: Collection[str]) -> list[str]:
        """What is wrong with the values of fields, except of those whose type is wrong."""
        batch = 1 if "batch" in mistyped else self.batch
        microbatch = None if "microbatch" in mistyped else self.microbatch
        broken: list[str] = []
        if batch < 1:
            broken.append(f"batch={batch}: at least one sample per step is needed")
        if microbatch is not None and not microbatch >= 1:
            broken.append(f"microbatch={microbatch}: at least one sample is needed")
        if microbatch is not None and "batch" not in mistyped and microbatch > batch >= 1:
            broken.append(f"microbatch={microbatch} is larger than batch={batch}: lower it or raise batch")
        if "precision" not in mistyped and self.precision not in PRECISIONS:
            broken.append(f"precision={self.precision!r}: {nearest(self.precision, PRECISIONS)}")
        if "clip" not in mistyped and self.clip is not None and not self.clip > 0:
            broken.append(f"clip={self.clip}: the largest gradient norm must be above zero")
        if "weights" not in mistyped and self.weights is not None and not Path(self.weights).is_file():
            broken.append(f"weights={str(self.weights)!r}: no such file; give a safetensors file")
        return broken


def _misnamed(unnamed: int, given: Collection[str]) -> list[str]:
    """What is wrong with the names of fields."""
    names = {field.name: field.default is MISSING for field in fields(Task)}
    broken = [f"{unnamed} of its fields have no name: give each as NAME=..., such as model=..."] if unnamed else []
    broken += [f"{name!r} is not a field of a task; {nearest(name, names)}" for name in given if name not in names]
    missing = [name for name, is_needed in names.items() if is_needed and name not in given]
    if missing and not unnamed:
        broken.append(f"{', '.join(missing)} {'is' if len(missing) == 1 else 'are'} missing; see help(sheaf.Task)")
    return broken


def _shown(value: Any) -> str:
    """A value in a line."""
    text = repr(value)
    return _a(type(value).__name__) if "\n" in text or len(text) > _LONGEST else text


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
