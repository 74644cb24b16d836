"""A multilayer perceptron: 784-10-10 unless told otherwise (the size of the classic MNIST example)."""

from collections.abc import Sequence
from itertools import pairwise

from jaxtyping import Float
from torch import Tensor, nn


class MLP(nn.Module):
    """Linear layers with ReLU between them; weights start as in He et al., "Delving Deep into Rectifiers", 2015.

    >>> sum(p.numel() for p in MLP().parameters())
    7960
    """

    def __init__(self, sizes: Sequence[int] = (784, 10, 10), dropout: float = 0.0) -> None:
        super().__init__()
        if len(sizes) < 2:
            raise ValueError(f"sizes={tuple(sizes)}: give at least how many numbers go in and how many come out")
        self.layers = nn.ModuleList([nn.Linear(inputs, outputs) for inputs, outputs in pairwise(sizes)])
        self.activation = nn.ReLU()
        self.dropout = nn.Dropout(dropout)
        for layer in self.layers:
            assert isinstance(layer, nn.Linear)
            nn.init.kaiming_normal_(layer.weight, nonlinearity="linear" if layer is self.layers[-1] else "relu")
            nn.init.zeros_(layer.bias)

    def forward(self, inputs: Float[Tensor, "batch *features"]) -> Float[Tensor, "batch classes"]:
        """Logits; inputs of any shape are flattened after the first axis."""
        hidden = inputs.flatten(1)
        for layer in self.layers[:-1]:
            hidden = self.dropout(self.activation(layer(hidden)))
        return self.layers[-1](hidden)
