"""VGG-16 (Simonyan and Zisserman, "Very Deep Convolutional Networks for Large-Scale Image Recognition", 2014).

The default sizes are the paper's configuration D, 138,357,544 parameters; 123,642,856 of them are in the three fully
connected layers, so that ``features`` and ``classifier`` ask for different plans.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn


class VGG(nn.Module):
    """Stages of 3x3 convolutions that each end by halving the image (``features``), then ``classifier``.

    ``widths`` are the channels of each stage, ``depths`` how many convolutions it has: (1, 1, 2, 2, 2) is the paper's
    VGG-11, (2, 2, 4, 4, 4) VGG-19. ``side`` by ``side`` pixels go to the classifier, whatever size the images have.

    >>> from torch import device
    >>> with device("meta"):
    ...     sum(p.numel() for p in VGG().parameters())
    138357544
    """

    def __init__(
        self,
        *,
        channels: int = 3,
        classes: int = 1000,
        widths: Sequence[int] = (64, 128, 256, 512, 512),
        depths: Sequence[int] = (2, 2, 3, 3, 3),
        hidden: int = 4096,
        side: int = 7,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        layers: list[nn.Module] = []
        inputs = channels
        for outputs, depth in zip(widths, depths, strict=True):
            for _ in range(depth):
                layers += [nn.Conv2d(inputs, outputs, 3, padding=1), nn.ReLU()]
                inputs = outputs
            layers.append(nn.MaxPool2d(2))
        self.features = nn.Sequential(*layers)
        self.pool = nn.AdaptiveAvgPool2d(side)
        self.classifier = nn.Sequential(
            nn.Linear(inputs * side * side, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, classes),
        )
        # Thirteen layers without a norm need the start of He et al., "Delving Deep into Rectifiers", 2015.
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        head = self.classifier[-1]
        assert isinstance(head, nn.Linear)
        nn.init.normal_(head.weight, std=0.01)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits; images of at least 2 ** stages pixels a side, 224 in the paper."""
        return self.classifier(self.pool(self.features(images)).flatten(1))
