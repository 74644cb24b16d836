"""One call for those who have a model and two arrays: builds the task, plans, trains."""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from sheaf.api.run import Run
from sheaf.api.train import train
from sheaf.cost.price import Price
from sheaf.errors import DataError, TaskError
from sheaf.plans import Plan
from sheaf.task import Loss, Task
from sheaf.task.batches import steps_per_epoch
from sheaf.training.directory import MODEL


def fit(
    model: nn.Module | Callable[[], nn.Module],
    inputs: Any,
    targets: Any,
    *,
    loss: Callable[[Any, Any], Loss | Tensor],
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    batch: int,
    workers: int | None = None,
    steps: int | None = None,
    epochs: int = 1,
    microbatch: int | None = None,
    seed: int = 0,
    shuffle: bool = True,
    plan: Plan | Price | str | None = None,
    scheduler: Callable[[torch.optim.Optimizer], torch.optim.lr_scheduler.LRScheduler] | None = None,
    clip: float | None = None,
    precision: str = "fp32",
    out: str | Path | None = None,
    quiet: bool = False,
    predict: bool = True,
) -> Run:
    """Train ``model`` on (inputs[i], targets[i]) and return the run.

    ``model``      a function that builds it, or a built module: training starts from its weights, and they are
                   replaced by the trained ones
    ``inputs``, ``targets``  tensors or arrays with as many rows
    ``loss``       (output, targets of the batch) -> a mean over them, or a sheaf.Loss; a torch.nn loss will do
    ``optimizer``  (parameters) -> torch.optim.Optimizer
    ``steps``      how many; ``epochs`` over all rows when left out

    Everything else is as in ``sheaf.train``, and so is what is raised.
    """
    if not callable(loss) or isinstance(loss, type):
        raise TaskError(
            f"loss is {loss!r:.60}; it must be callable: (output, targets) -> a mean or a sheaf.Loss, "
            "such as nn.MSELoss()"
        )
    pairs = Pairs(_rows("inputs", inputs), _rows("targets", targets))
    task = Task(
        model=Copies(model) if isinstance(model, nn.Module) else model,
        loss=OnTargets(loss),
        optimizer=optimizer,
        data=pairs,
        batch=batch,
        microbatch=microbatch,
        seed=seed,
        shuffle=shuffle,
        scheduler=scheduler,
        clip=clip,
        precision=precision,
        name="fit",
    )
    total = steps if steps is not None else epochs * steps_per_epoch(len(pairs), batch)
    run = train(task, plan, steps=total, workers=workers, out=out, quiet=quiet, predict=predict)
    if isinstance(model, nn.Module):
        model.load_state_dict(load_file(run.directory / MODEL), strict=False)
    return run


@dataclass(frozen=True)
class Pairs:
    """A data set of rows: item i is (inputs[i], targets[i]).

    Raises DataError when the two differ in length.
    """

    inputs: Tensor
    targets: Tensor

    def __post_init__(self) -> None:
        if len(self.inputs) != len(self.targets):
            raise DataError(
                f"{len(self.inputs)} inputs and {len(self.targets)} targets: give one target for each input"
            )

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return self.inputs[index], self.targets[index]


@dataclass(frozen=True)
class OnTargets:
    """A loss of (output, targets) as one of (output, batch)."""

    loss: Callable[[Any, Any], Loss | Tensor]

    def __call__(self, output: Any, batch: Any) -> Loss | Tensor:
        try:
            return self.loss(output, batch[1])
        except (TypeError, AttributeError) as error:
            raise TaskError(
                f"the loss raised {type(error).__name__}: {error}; it is called with (output, targets of the batch)"
            ) from error


@dataclass(frozen=True)
class Copies:
    """A built module as a builder: each call gives a copy, weights included."""

    module: nn.Module

    def __call__(self) -> nn.Module:
        return copy.deepcopy(self.module)


def _rows(name: str, values: Any) -> Tensor:
    try:
        rows = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(f"{name} cannot become a tensor: {error}; give a tensor or an array") from error
    if rows.dim() == 0:
        raise DataError(f"{name} is one number; give a tensor or an array with one row per sample")
    return rows.detach()
