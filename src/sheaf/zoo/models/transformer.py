"""The transformer encoder-decoder (Vaswani et al., "Attention Is All You Need", 2017), with its norms after the sums.

The default sizes are the paper's base model with one 37,000-token vocabulary for both languages and the output:
63,082,496 parameters, where the paper's table 3 says 65 million; its big model (``width=1024, heads=16, wide=4096``)
has 214,245,376, where it says 213 million. Sinusoidal positions have no parameters.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sheaf.zoo.models.attention import Attention, seen


class Feed(nn.Module):
    """Two linear layers with ReLU between them, each position for itself."""

    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.into = nn.Linear(width, wide)
        self.out = nn.Linear(wide, width)

    def forward(self, hidden: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch time width"]:
        """The same shape."""
        return self.out(F.relu(self.into(hidden)))


class EncoderLayer(nn.Module):
    """Attention within the source, then a feed-forward part; each is added to what came in, then normalised."""

    def __init__(self, width: int, heads: int, wide: int, dropout: float) -> None:
        super().__init__()
        self.attention, self.attention_norm = Attention(width, heads), nn.LayerNorm(width)
        self.feed, self.feed_norm = Feed(width, wide), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, source: Float[Tensor, "batch time width"], mask: Bool[Tensor, "batch 1 1 time"] | None
    ) -> Float[Tensor, "batch time width"]:
        """``mask`` is True where the source is no padding."""
        source = self.attention_norm(source + self.dropout(self.attention(source, source, mask)))
        return self.feed_norm(source + self.dropout(self.feed(source)))


class DecoderLayer(nn.Module):
    """Attention to earlier targets, attention to the source, then a feed-forward part."""

    def __init__(self, width: int, heads: int, wide: int, dropout: float) -> None:
        super().__init__()
        self.attention, self.attention_norm = Attention(width, heads), nn.LayerNorm(width)
        self.look, self.look_norm = Attention(width, heads), nn.LayerNorm(width)
        self.feed, self.feed_norm = Feed(width, wide), nn.LayerNorm(width)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        target: Float[Tensor, "batch time width"],
        source: Float[Tensor, "batch source_time width"],
        mask: Bool[Tensor, "batch 1 1 source_time"] | None,
    ) -> Float[Tensor, "batch time width"]:
        """``source`` is what the encoder gave, and ``mask`` True where it is no padding."""
        target = self.attention_norm(target + self.dropout(self.attention(target, target, causal=True)))
        target = self.look_norm(target + self.dropout(self.look(target, source, mask)))
        return self.feed_norm(target + self.dropout(self.feed(target)))


class Transformer(nn.Module):
    """A source and the target so far in, logits of each next target token out.

    ``padding`` is a token that is no text and stands after it, in the source and in the target: nothing attends to it.

    >>> from torch import device
    >>> with device("meta"):
    ...     sum(p.numel() for p in Transformer().parameters())
    63082496
    """

    def __init__(
        self,
        *,
        vocabulary: int = 37000,
        width: int = 512,
        layers: int = 6,
        heads: int = 8,
        wide: int = 2048,
        dropout: float = 0.1,
        padding: int | None = None,
    ) -> None:
        super().__init__()
        self.padding = padding
        self.tokens = nn.Embedding(vocabulary, width)
        self.dropout = nn.Dropout(dropout)
        self.encoder = nn.ModuleList([EncoderLayer(width, heads, wide, dropout) for _ in range(layers)])
        self.decoder = nn.ModuleList([DecoderLayer(width, heads, wide, dropout) for _ in range(layers)])
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for module in self.modules():
            if isinstance(module, nn.Linear) and module is not self.head:
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.tokens.weight, std=width**-0.5)

    def forward(
        self, source: Int[Tensor, "batch source_time"], target: Int[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time vocabulary"]:
        """Logits of the token that follows each position of ``target``."""
        mask = seen(source, self.padding)
        read = self._embedded(source)
        for layer in self.encoder:
            read = layer(read, mask)
        written = self._embedded(target)
        for layer in self.decoder:
            written = layer(written, read, mask)
        return self.head(written)

    def _embedded(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time width"]:
        vectors = self.tokens(tokens)
        time, width = vectors.shape[1:]
        return self.dropout(vectors * math.sqrt(width) + sinusoids(time, width).to(vectors))


def sinusoids(time: int, width: int) -> Float[Tensor, "time width"]:
    """The paper's positions: sines in the even places, cosines in the odd ones, of wavelengths from 2π to 20,000π.

    >>> sinusoids(2, 3)[:, :2].tolist()
    [[0.0, 1.0], [0.8414709848078965, 0.5403023058681398]]
    """
    places = torch.arange(width, dtype=torch.float64)
    turns = 10_000 ** (-(places - places % 2) / width)
    angles = torch.arange(time, dtype=torch.float64)[:, None] * turns
    return torch.where(places % 2 == 0, angles.sin(), angles.cos())
