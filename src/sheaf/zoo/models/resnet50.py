"""ResNet-50 and its deeper kin (He et al., "Deep Residual Learning for Image Recognition", 2015, table 1).

The default sizes have 25,557,032 parameters. As in Goyal et al., "Accurate, Large Minibatch SGD", 2017, the 3x3
convolution of a block halves the image, not the first 1x1; the parameters are the same.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn
from torch.nn import functional as F

_WIDER = 4  # what a block gives, over what its 3x3 convolution works on


class Bottleneck(nn.Module):
    """1x1, 3x3 and 1x1 convolutions, each with BatchNorm, added to what came in."""

    def __init__(self, inputs: int, width: int, stride: int) -> None:
        super().__init__()
        outputs = _WIDER * width
        self.convolution_1 = nn.Conv2d(inputs, width, 1, bias=False)
        self.norm_1 = nn.BatchNorm2d(width)
        self.convolution_2 = nn.Conv2d(width, width, 3, stride=stride, padding=1, bias=False)
        self.norm_2 = nn.BatchNorm2d(width)
        self.convolution_3 = nn.Conv2d(width, outputs, 1, bias=False)
        self.norm_3 = nn.BatchNorm2d(outputs)
        # The paper's option B: a projection where the shape changes.
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or inputs != outputs:
            projection = nn.Conv2d(inputs, outputs, 1, stride=stride, bias=False)
            self.shortcut = nn.Sequential(projection, nn.BatchNorm2d(outputs))

    def forward(
        self, images: Float[Tensor, "batch inputs height width"]
    ) -> Float[Tensor, "batch outputs less_height less_width"]:
        """Height and width shrink by ``stride``."""
        hidden = F.relu(self.norm_1(self.convolution_1(images)))
        hidden = F.relu(self.norm_2(self.convolution_2(hidden)))
        return F.relu(self.norm_3(self.convolution_3(hidden)) + self.shortcut(images))


class BottleneckResNet(nn.Module):
    """A 7x7 stem and max pooling, stages of bottleneck blocks, average pooling, a linear head.

    ``blocks`` is how many each stage has: (3, 4, 23, 3) is ResNet-101, (3, 8, 36, 3) ResNet-152.

    >>> from torch import device
    >>> with device("meta"):
    ...     sum(p.numel() for p in BottleneckResNet().parameters())
    25557032
    """

    def __init__(
        self,
        *,
        channels: int = 3,
        classes: int = 1000,
        blocks: Sequence[int] = (3, 4, 6, 3),
        widths: Sequence[int] = (64, 128, 256, 512),
    ) -> None:
        super().__init__()
        self.stem = nn.Conv2d(channels, widths[0], 7, stride=2, padding=3, bias=False)
        self.norm = nn.BatchNorm2d(widths[0])
        self.pool = nn.MaxPool2d(3, stride=2, padding=1)
        stages: list[nn.Module] = []
        inputs = widths[0]
        for stage, (count, width) in enumerate(zip(blocks, widths, strict=True)):
            for block in range(count):
                stages.append(Bottleneck(inputs, width, stride=2 if stage and not block else 1))
                inputs = _WIDER * width
        self.blocks = nn.ModuleList(stages)
        self.head = nn.Linear(inputs, classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.head.weight, std=0.01)
        nn.init.zeros_(self.head.bias)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits of images of any size that the stages can halve, 224 by 224 in the paper."""
        hidden = self.pool(F.relu(self.norm(self.stem(images))))
        for block in self.blocks:
            hidden = block(hidden)
        return self.head(hidden.mean((2, 3)))
