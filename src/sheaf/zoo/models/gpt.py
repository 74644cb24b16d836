"""A GPT: a causal transformer decoder over tokens, with tied or untied head, dropout, and padding.

The layout is GPT-2's (Radford et al., "Language Models are Unsupervised Multitask Learners", 2019): pre-norm blocks of
attention (Vaswani et al., "Attention Is All You Need", 2017) and a four times wider feed-forward part, learned
positions, a last norm. The default sizes are GPT-2 small's, 124,439,808 parameters.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

_STD = 0.02  # of every weight at the start, as in GPT-2


class Attention(nn.Module):
    """Causal self-attention with several heads; drops attention weights while training."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} does not divide among heads={heads}; use a multiple of {heads}")
        self.heads, self.dropout = heads, dropout
        self.queries_keys_values = nn.Linear(width, 3 * width)
        self.out = nn.Linear(width, width)

    def forward(
        self, hidden: Float[Tensor, "batch time width"], mask: Bool[Tensor, "batch 1 time time"] | None
    ) -> Float[Tensor, "batch time width"]:
        """``mask`` is True where a query (third axis) may see a key (fourth axis); None means every earlier token."""
        batch, time, width = hidden.shape
        split = self.queries_keys_values(hidden).view(batch, time, 3, self.heads, width // self.heads)
        queries, keys, values = split.permute(2, 0, 3, 1, 4)
        dropout = self.dropout if self.training else 0.0
        mixed = F.scaled_dot_product_attention(
            queries, keys, values, attn_mask=mask, dropout_p=dropout, is_causal=mask is None
        )
        return self.out(mixed.transpose(1, 2).reshape(batch, time, width))


class Block(nn.Module):
    """Attention, then a feed-forward part, each behind a norm and added to what came in."""

    def __init__(self, width: int, heads: int, dropout: float) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.feed_norm = nn.LayerNorm(width)
        self.feed_in = nn.Linear(width, 4 * width)
        self.feed_out = nn.Linear(4 * width, width)
        self.attention_dropout = nn.Dropout(dropout)
        self.feed_dropout = nn.Dropout(dropout)

    def forward(
        self, hidden: Float[Tensor, "batch time width"], mask: Bool[Tensor, "batch 1 time time"] | None
    ) -> Float[Tensor, "batch time width"]:
        """``mask`` as for Attention."""
        hidden = hidden + self.attention_dropout(self.attention(self.attention_norm(hidden), mask))
        wide = F.gelu(self.feed_in(self.feed_norm(hidden)), approximate="tanh")
        return hidden + self.feed_dropout(self.feed_out(wide))


class GPT(nn.Module):
    """Tokens in, logits of each next token out.

    ``tied`` shares one matrix between the token embedding and the head. ``padding`` is a token that is no text: no
    position attends to it and positions do not count it, so the logits of real tokens are the same however much
    padding stands before or after them.

    >>> sum(p.numel() for p in GPT(vocabulary=256, context=64, width=32, layers=2, heads=4).parameters())
    35712
    """

    def __init__(
        self,
        *,
        vocabulary: int = 50257,
        context: int = 1024,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        dropout: float = 0.1,
        tied: bool = True,
        padding: int | None = None,
    ) -> None:
        super().__init__()
        self.context, self.padding = context, padding
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        self.blocks = nn.ModuleList([Block(width, heads, dropout) for _ in range(layers)])
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        if tied:
            self.head.weight = self.tokens.weight
        self._initialise(layers)

    def forward(self, tokens: Int[Tensor, "batch time"]) -> Float[Tensor, "batch time vocabulary"]:
        """Logits of the token that follows each position.

        Raises ValueError when the sequence is longer than ``context``.
        """
        time = tokens.shape[1]
        if time > self.context:
            raise ValueError(f"{time} tokens in a row, and the model has positions for {self.context}: cut the text")
        positions, mask = places(tokens, self.padding)
        hidden = self.dropout(self.tokens(tokens) + self.positions(positions))
        for block in self.blocks:
            hidden = block(hidden, mask)
        return self.head(self.norm(hidden))

    def _initialise(self, layers: int) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=_STD)
            if isinstance(module, nn.Linear) and module is not self.head:
                nn.init.zeros_(module.bias)
        # Each block adds to the residual stream twice; GPT-2 scales what is added so that the sum keeps its size.
        for block in self.blocks:
            assert isinstance(block, Block)
            for last in (block.attention.out, block.feed_out):
                nn.init.normal_(last.weight, std=_STD / math.sqrt(2 * layers))


def places(
    tokens: Int[Tensor, "batch time"], padding: int | None
) -> tuple[Int[Tensor, "..."], Bool[Tensor, "batch 1 time time"] | None]:
    """Each token's position, not counting padding, and the mask for Attention; (time,) and None without padding."""
    steps = torch.arange(tokens.shape[1], device=tokens.device)
    if padding is None:
        return steps, None
    real = tokens != padding
    causal = steps[:, None] >= steps[None, :]
    # A position always sees itself: a row of a softmax with nothing to see is NaN.
    itself = steps[:, None] == steps[None, :]
    mask = (causal & real[:, None, :]) | itself
    return (real.cumsum(1) - 1).clamp(min=0), mask[:, None]
