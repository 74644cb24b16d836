"""BERT with its masked language model head (Devlin et al., "BERT: Pre-training of Deep Bidirectional Transformers",
2018).

The default sizes are bert-base-uncased's. With the head, whose output matrix is the word embedding, there are
109,514,298 parameters; the often quoted 109,482,240 ("110 M") are those of the encoder and the pooler, a 768x768
layer over the first token (590,592 parameters), which masked language modelling has no use for and which is not here.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sheaf.zoo.models.attention import Attention, seen

_STD = 0.02  # of every weight at the start
_EPSILON = 1e-12  # of every norm


class EncoderLayer(nn.Module):
    """Attention, then a feed-forward part, each added to what came in and then normalised."""

    def __init__(self, width: int, heads: int, wide: int, dropout: float) -> None:
        super().__init__()
        self.attention = Attention(width, heads, dropout)
        self.attention_norm = nn.LayerNorm(width, eps=_EPSILON)
        self.feed_in = nn.Linear(width, wide)
        self.feed_out = nn.Linear(wide, width)
        self.feed_norm = nn.LayerNorm(width, eps=_EPSILON)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self, hidden: Float[Tensor, "batch time width"], mask: Bool[Tensor, "batch 1 1 time"] | None
    ) -> Float[Tensor, "batch time width"]:
        """``mask`` as for Attention."""
        hidden = self.attention_norm(hidden + self.dropout(self.attention(hidden, hidden, mask)))
        fed = self.feed_out(F.gelu(self.feed_in(hidden)))
        return self.feed_norm(hidden + self.dropout(fed))


class BERT(nn.Module):
    """Tokens in, logits of the token that stands at each position out.

    ``padding`` is a token that no position attends to. ``types`` is how many kinds of segment there are: the paper
    trains on pairs of sentences and marks which of the two a token is of.

    >>> from torch import device
    >>> with device("meta"):
    ...     sum(p.numel() for p in BERT().parameters())
    109514298
    """

    def __init__(
        self,
        *,
        vocabulary: int = 30522,
        context: int = 512,
        types: int = 2,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        wide: int = 3072,
        dropout: float = 0.1,
        padding: int | None = None,
    ) -> None:
        super().__init__()
        self.context, self.padding = context, padding
        self.words = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.types = nn.Embedding(types, width)
        self.norm = nn.LayerNorm(width, eps=_EPSILON)
        self.dropout = nn.Dropout(dropout)
        self.layers = nn.ModuleList([EncoderLayer(width, heads, wide, dropout) for _ in range(layers)])
        self.transform = nn.Linear(width, width)
        self.transform_norm = nn.LayerNorm(width, eps=_EPSILON)
        self.head = nn.Linear(width, vocabulary)
        self.head.weight = self.words.weight
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=_STD)
            if isinstance(module, nn.Linear):
                nn.init.zeros_(module.bias)

    def forward(
        self, tokens: Int[Tensor, "batch time"], types: Int[Tensor, "batch time"] | None = None
    ) -> Float[Tensor, "batch time vocabulary"]:
        """``types`` is each token's kind of segment, 0 where not given.

        Raises ValueError when the sequence is longer than ``context``.
        """
        time = tokens.shape[1]
        if time > self.context:
            raise ValueError(f"{time} tokens in a row, and the model has positions for {self.context}: cut the text")
        positions = torch.arange(time, device=tokens.device)
        kinds = torch.zeros_like(tokens) if types is None else types
        hidden = self.dropout(self.norm(self.words(tokens) + self.positions(positions) + self.types(kinds)))
        mask = seen(tokens, self.padding)
        for layer in self.layers:
            hidden = layer(hidden, mask)
        return self.head(self.transform_norm(F.gelu(self.transform(hidden))))
