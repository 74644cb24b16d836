"""The small residual network for small images, with BatchNorm (He et al., "Deep Residual Learning", 2015, section 4.2).

``blocks=3`` is the paper's ResNet-20 (0.27 M parameters), 5, 7, 9 and 18 are ResNet-32, 44, 56 and 110.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F


class ResidualBlock(nn.Module):
    """Two 3x3 convolutions added to what came in; the shortcut has no parameters (the paper's option A)."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.stride, self.added = stride, outputs - inputs
        self.convolution_1 = nn.Conv2d(inputs, outputs, 3, stride=stride, padding=1, bias=False)
        self.norm_1 = nn.BatchNorm2d(outputs)
        self.convolution_2 = nn.Conv2d(outputs, outputs, 3, padding=1, bias=False)
        self.norm_2 = nn.BatchNorm2d(outputs)

    def forward(
        self, images: Float[Tensor, "batch inputs height width"]
    ) -> Float[Tensor, "batch outputs less_height less_width"]:
        """Height and width shrink by ``stride``; new channels start at zero."""
        hidden = F.relu(self.norm_1(self.convolution_1(images)))
        hidden = self.norm_2(self.convolution_2(hidden))
        shortcut = images[:, :, :: self.stride, :: self.stride]
        before = self.added // 2
        shortcut = F.pad(shortcut, (0, 0, 0, 0, before, self.added - before))
        return F.relu(hidden + shortcut)


class ResNet(nn.Module):
    """A 3x3 stem, stages of residual blocks (each after the first halves the image), average pooling, a linear head.

    >>> sum(p.numel() for p in ResNet(blocks=3).parameters())  # ResNet-20 on CIFAR-10
    269722
    """

    def __init__(
        self, *, blocks: int = 3, channels: int = 3, classes: int = 10, widths: Sequence[int] = (16, 32, 64)
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, widths[0], 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        stages: list[nn.Module] = []
        inputs = widths[0]
        for stage, outputs in enumerate(widths):
            for block in range(blocks):
                stages.append(ResidualBlock(inputs, outputs, stride=2 if stage and not block else 1))
                inputs = outputs
        self.blocks = nn.ModuleList(stages)
        self.head = nn.Linear(widths[-1], classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits of images of any size that the stages can halve."""
        hidden = F.relu(self.norm(self.stem(images)))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.mean((2, 3)))
