"""AlexNet in one tower (Krizhevsky, "One weird trick for parallelizing convolutional neural networks", 2014).

Nearly all its work is in the convolutions and nearly all its parameters in the fully connected layers: the reason for
that paper, which splits the first by samples and the second by neurons. The default sizes have 61,100,840 parameters.
"""

from collections.abc import Sequence

from jaxtyping import Float
from torch import Tensor, nn


class AlexNet(nn.Module):
    """Five convolutions (``features``), then three fully connected layers (``classifier``) with dropout before two.

    ``widths`` are the channels after each convolution; whatever size the images have, ``side`` by ``side`` pixels of
    the last go to the classifier.

    >>> from torch import device
    >>> with device("meta"):
    ...     sum(p.numel() for p in AlexNet().parameters())
    61100840
    """

    def __init__(
        self,
        *,
        channels: int = 3,
        classes: int = 1000,
        widths: Sequence[int] = (64, 192, 384, 256, 256),
        hidden: int = 4096,
        side: int = 6,
        dropout: float = 0.5,
    ) -> None:
        super().__init__()
        if len(widths) != 5:
            raise ValueError(f"widths={tuple(widths)}: there are five convolutions, so give five widths")
        first, second, third, fourth, fifth = widths
        self.features = nn.Sequential(
            nn.Conv2d(channels, first, 11, stride=4, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(first, second, 5, padding=2),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
            nn.Conv2d(second, third, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(third, fourth, 3, padding=1),
            nn.ReLU(),
            nn.Conv2d(fourth, fifth, 3, padding=1),
            nn.ReLU(),
            nn.MaxPool2d(3, stride=2),
        )
        self.pool = nn.AdaptiveAvgPool2d(side)
        self.classifier = nn.Sequential(
            nn.Dropout(dropout),
            nn.Linear(fifth * side * side, hidden),
            nn.ReLU(),
            nn.Dropout(dropout),
            nn.Linear(hidden, hidden),
            nn.ReLU(),
            nn.Linear(hidden, classes),
        )
        for module in self.modules():
            if isinstance(module, nn.Conv2d | nn.Linear):
                nn.init.kaiming_normal_(module.weight)
                assert module.bias is not None
                nn.init.zeros_(module.bias)
        head = self.classifier[-1]
        assert isinstance(head, nn.Linear)
        nn.init.normal_(head.weight, std=0.01)

    def forward(self, images: Float[Tensor, "batch channels height width"]) -> Float[Tensor, "batch classes"]:
        """Logits; images have at least 63 by 63 pixels, 224 by 224 in the paper."""
        return self.classifier(self.pool(self.features(images)).flatten(1))
