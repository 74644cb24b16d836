"""Tasks on scikit-learn's digits: 1797 real handwritten digits of 8x8 pixels (Alpaydin and Kaynak, UCI, 1998)."""

from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.utils.data import TensorDataset

from sheaf.errors import TaskError
from sheaf.task import Loss, Task
from sheaf.zoo.models.mlp import MLP
from sheaf.zoo.models.resnet import ResNet

_INK = 16.0  # pixels are 0 to 16


@cache
def images_and_labels() -> tuple[Float[Tensor, "1797 1 8 8"], Int[Tensor, "1797"]]:
    """All digits, pixels from 0 to 1.

    Raises TaskError when scikit-learn is missing.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise TaskError('the digits come with scikit-learn, which is not installed: pip install "sheaf[zoo]"') from None
    pixels, labels = load_digits(return_X_y=True)
    images = torch.tensor(pixels, dtype=torch.float32).reshape(-1, 1, 8, 8) / _INK
    return images, torch.tensor(labels, dtype=torch.int64)


def enlarged(images: Float[Tensor, "samples 1 _ _"], side: int) -> Float[Tensor, "samples 1 side side"]:
    """Images of ``side`` by ``side`` pixels, bilinear."""
    return F.interpolate(images, size=(side, side), mode="bilinear", align_corners=False)


def class_loss(logits: Float[Tensor, "batch classes"], batch: Sequence[Tensor]) -> Loss:
    """Cross-entropy summed over samples, and how many there are."""
    _, labels = batch
    return Loss(F.cross_entropy(logits, labels, reduction="sum"), len(labels))


def digits_mlp(
    *,
    sizes: Sequence[int] = (64, 32, 10),
    batch: int = 100,
    microbatch: int | None = 20,
    seed: int = 0,
    dropout: float = 0.0,
    learning_rate: float = 0.1,
    **overrides: Any,
) -> Task:
    """A perceptron reading the digits; 1797 samples do not divide by 100, so each epoch ends in a smaller batch.

    ``overrides`` are further fields of the Task, such as ``precision="fp64"``.
    """
    images, labels = images_and_labels()
    model = partial(MLP, sizes=tuple(sizes), dropout=dropout)
    return _digits("digits_mlp", model, images, labels, batch, microbatch, seed, learning_rate, overrides)


def mlp_784(
    *, batch: int = 100, microbatch: int | None = 20, seed: int = 0, learning_rate: float = 0.1, **overrides: Any
) -> Task:
    """The classic 784-10-10 perceptron on the digits enlarged to 28x28 pixels."""
    images, labels = images_and_labels()
    return _digits("mlp_784", MLP, enlarged(images, 28), labels, batch, microbatch, seed, learning_rate, overrides)


def digits_resnet(
    *,
    blocks: int = 1,
    widths: Sequence[int] = (16, 32, 64),
    side: int = 8,
    batch: int = 64,
    microbatch: int | None = 16,
    seed: int = 0,
    learning_rate: float = 0.05,
    **overrides: Any,
) -> Task:
    """A small residual network with BatchNorm reading the digits, enlarged to ``side`` pixels."""
    images, labels = images_and_labels()
    model = partial(ResNet, blocks=blocks, channels=1, classes=10, widths=tuple(widths))
    images = images if side == images.shape[-1] else enlarged(images, side)
    return _digits("digits_resnet", model, images, labels, batch, microbatch, seed, learning_rate, overrides)


def _digits(
    name: str,
    model: Any,
    images: Tensor,
    labels: Tensor,
    batch: int,
    microbatch: int | None,
    seed: int,
    learning_rate: float,
    overrides: dict[str, Any],
) -> Task:
    task = Task(
        name=name,
        model=model,
        loss=class_loss,
        optimizer=partial(torch.optim.SGD, lr=learning_rate, momentum=0.9),
        data=TensorDataset(images, labels),
        batch=batch,
        microbatch=microbatch,
        seed=seed,
    )
    return replace(task, **overrides)
