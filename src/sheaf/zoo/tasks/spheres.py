"""Segmentation of volumes: bright and hollow spheres in noise, told apart by a 3-D U-Net from a few labelled slices."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sheaf.task import Loss, Task
from sheaf.zoo.models.unet3d import UNet3d

NOTHING, SOLID, HOLLOW = 0, 1, 2  # the classes
UNLABELLED = -100
_NOISE = 0.3  # standard deviation; spheres have brightness 1


class Spheres:
    """Volumes of ``side`` voxels each way, each with one solid and one hollow sphere; made when asked for.

    An item is the same whenever it is made. ``slices`` of each volume are labelled, the others UNLABELLED, as in Çiçek
    et al., 2016; None labels all.
    """

    def __init__(self, count: int, side: int, slices: int | None = None, seed: int = 0) -> None:
        self.count, self.side, self.slices, self.seed = count, side, slices, seed

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Float[Tensor, "1 side side side"], Int[Tensor, "side side side"]]:
        """The volume, and each voxel's class."""
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + range(self.count)[index])
        labels = torch.zeros(self.side, self.side, self.side, dtype=torch.int64)
        axis = torch.arange(self.side)
        grid = torch.stack(torch.meshgrid(axis, axis, axis, indexing="ij"))
        bright = torch.zeros(labels.shape)
        for kind in (SOLID, HOLLOW):
            centre = torch.rand(3, generator=generator) * self.side
            radius = (0.2 + 0.15 * float(torch.rand((), generator=generator))) * self.side
            distance = (grid - centre[:, None, None, None]).square().sum(0).sqrt()
            inside = distance < radius
            labels[inside] = kind
            bright[inside] = 1.0
            if kind == HOLLOW:
                bright[distance < 0.6 * radius] = 0.0
        volume = bright + _NOISE * torch.randn(labels.shape, generator=generator)
        if self.slices is not None:
            unlabelled = torch.randperm(self.side, generator=generator)[self.slices :]
            labels[unlabelled] = UNLABELLED
        return volume[None], labels


def voxel_loss(logits: Float[Tensor, "batch classes _ _ _"], batch: Sequence[Tensor]) -> Loss:
    """Cross-entropy summed over labelled voxels, and how many there are."""
    _, labels = batch
    total = F.cross_entropy(logits, labels, ignore_index=UNLABELLED, reduction="sum")
    return Loss(total, (labels != UNLABELLED).sum())


def volumes(
    *,
    count: int = 256,
    side: int = 24,
    slices: int | None = 6,
    widths: Sequence[int] = (8, 16, 32),
    batch: int = 16,
    microbatch: int | None = 4,
    seed: int = 0,
    learning_rate: float = 0.01,
    **overrides: Any,
) -> Task:
    """A 3-D U-Net that finds spheres in ``count`` volumes of ``side`` voxels each way.

    Each width after the first halves the volume. ``slices=None`` labels every voxel. ``overrides`` are further fields
    of the Task, such as ``precision="bf16"``.
    """
    task = Task(
        name="volumes",
        model=partial(UNet3d, channels=1, classes=3, widths=tuple(widths), padded=True),
        loss=voxel_loss,
        optimizer=partial(torch.optim.AdamW, lr=learning_rate),
        data=Spheres(count, side, slices),
        batch=batch,
        microbatch=microbatch,
        seed=seed,
    )
    return replace(task, **overrides)
