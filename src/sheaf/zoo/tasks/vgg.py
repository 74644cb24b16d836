"""VGG-16 on scikit-learn's digits: a model whose fully connected layers hold nearly all parameters, in any size."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from sheaf.task import Task
from sheaf.zoo.models.vgg import VGG
from sheaf.zoo.tasks.digits import class_loss, enlarged, images_and_labels


class Enlarged:
    """Images of ``side`` by ``side`` pixels with their labels, each enlarged when it is asked for."""

    def __init__(self, images: Float[Tensor, "samples 1 _ _"], labels: Int[Tensor, " samples"], side: int) -> None:
        self._images, self._labels, self.side = images, labels, side

    def __len__(self) -> int:
        return len(self._labels)

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "1 side side"], Int[Tensor, ""]]:
        """An image and its label."""
        return enlarged(self._images[index, None], self.side)[0], self._labels[index]


def vgg_digits(
    *,
    width: int = 8,
    hidden: int = 128,
    side: int = 32,
    batch: int = 64,
    microbatch: int | None = 16,
    seed: int = 0,
    dropout: float = 0.5,
    learning_rate: float = 0.05,
    **overrides: Any,
) -> Task:
    """A VGG-16 reading the digits, enlarged to ``side`` pixels (at least 32).

    ``width`` is the channels of its first stage; the others have 2, 4, 8 and 8 times as many. ``width=64, hidden=4096,
    side=224`` is the paper's size. ``overrides`` are further fields of the Task, such as ``precision="bf16"``.
    """
    images, labels = images_and_labels()
    widths: Sequence[int] = (width, 2 * width, 4 * width, 8 * width, 8 * width)
    model = partial(VGG, channels=1, classes=10, widths=widths, hidden=hidden, side=max(side // 32, 1), dropout=dropout)
    task = Task(
        name="vgg_digits",
        model=model,
        loss=class_loss,
        optimizer=partial(torch.optim.SGD, lr=learning_rate, momentum=0.9),
        data=Enlarged(images, labels, side),
        batch=batch,
        microbatch=microbatch,
        seed=seed,
        clip=1.0,
    )
    return replace(task, **overrides)
