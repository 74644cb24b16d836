"""The 3-D U-Net for volumes (Çiçek et al., "3D U-Net: Learning Dense Volumetric Segmentation", 2016, arXiv 1606.06650).

The paper counts 19,069,955 parameters: every weight, and one bias for each channel of a 3x3x3 convolution and of the
last. Here that bias is the shift of the BatchNorm behind the convolution, where one of its own would do nothing, and
the scales of those norms, which the paper leaves out, come on top: 2,336, so 19,072,291 in all.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class Convolutions(nn.Module):
    """Two 3x3x3 convolutions, each with BatchNorm and ReLU; without padding a volume loses four voxels a side."""

    def __init__(self, inputs: int, middle: int, outputs: int, *, padded: bool) -> None:
        super().__init__()
        self.convolution_1 = nn.Conv3d(inputs, middle, 3, padding=int(padded), bias=False)
        self.norm_1 = nn.BatchNorm3d(middle)
        self.convolution_2 = nn.Conv3d(middle, outputs, 3, padding=int(padded), bias=False)
        self.norm_2 = nn.BatchNorm3d(outputs)

    def forward(
        self, volumes: Float[Tensor, "batch inputs depth height width"]
    ) -> Float[Tensor, "batch outputs less_depth less_height less_width"]:
        """The same size when padded."""
        hidden = F.relu(self.norm_1(self.convolution_1(volumes)))
        return F.relu(self.norm_2(self.convolution_2(hidden)))


class Synthesis(nn.Module):
    """Doubles the volume and joins it with the middle of what the analysis had at this size."""

    def __init__(self, below: int, beside: int, *, padded: bool) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(below, below, 2, stride=2, bias=False)
        self.convolutions = Convolutions(below + beside, beside, beside, padded=padded)

    def forward(
        self,
        volumes: Float[Tensor, "batch below _ _ _"],
        skipped: Float[Tensor, "batch beside _ _ _"],
    ) -> Float[Tensor, "batch beside depth height width"]:
        """``skipped`` is at least twice as large as ``volumes`` each way."""
        larger = self.up(volumes)
        return self.convolutions(torch.cat((_middle(skipped, larger.shape[2:]), larger), dim=1))


class UNet3d(nn.Module):
    """Volumes in, logits of each voxel's class out.

    ``widths`` are the channels at each size, from the whole volume to the smallest. With ``padded`` the logits have the
    size of the volume where it halves without rest; without, as in the paper, they are of its middle.

    >>> from torch import device
    >>> with device("meta"):
    ...     sum(p.numel() for p in UNet3d().parameters())
    19072291
    """

    def __init__(
        self, *, channels: int = 3, classes: int = 3, widths: Sequence[int] = (64, 128, 256, 512), padded: bool = False
    ) -> None:
        super().__init__()
        inputs = [channels, *widths]
        self.analysis = nn.ModuleList(
            [Convolutions(before, after // 2, after, padded=padded) for before, after in pairwise(inputs)]
        )
        self.pool = nn.MaxPool3d(2)
        self.synthesis = nn.ModuleList(
            [Synthesis(below, beside, padded=padded) for below, beside in pairwise(reversed(widths))]
        )
        self.head = nn.Conv3d(widths[0], classes, 1)
        for module in self.modules():
            if isinstance(module, nn.Conv3d | nn.ConvTranspose3d):
                nn.init.kaiming_normal_(module.weight)
        assert self.head.bias is not None
        nn.init.zeros_(self.head.bias)

    def forward(
        self, volumes: Float[Tensor, "batch channels _ _ _"]
    ) -> Float[Tensor, "batch classes depth height width"]:
        """Logits; 132x132x116 voxels give 44x44x28, the paper's example."""
        hidden, skipped = volumes, []
        for level, convolutions in enumerate(self.analysis):
            hidden = convolutions(self.pool(hidden) if level else hidden)
            skipped.append(hidden)
        for beside, synthesis in zip(reversed(skipped[:-1]), self.synthesis, strict=True):
            hidden = synthesis(hidden, beside)
        return self.head(hidden)


def _middle(
    volumes: Float[Tensor, "batch channels _ _ _"], size: Sequence[int]
) -> Float[Tensor, "batch channels _ _ _"]:
    for dimension, (have, want) in enumerate(zip(volumes.shape[2:], size, strict=True), start=2):
        volumes = volumes.narrow(dimension, (have - want) // 2, want)
    return volumes
