"""An LSTM encoder-decoder with attention (Luong et al., "Effective Approaches to Attention-based Neural Machine
Translation", 2015).

Global attention with the "general" score, without input feeding, so that the decoder reads a whole target at once.
The default sizes are the paper's, four layers of 1,000 and 50,000 words a language: 217,064,000 parameters. The paper
prints no count; the model that it starts from (Sutskever et al., "Sequence to Sequence Learning", 2014) is this one
without attention and with 160,000 and 80,000 words, and prints 384 million, 64 of them recurrent.
"""

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn


class Attention(nn.Module):
    """What the decoder looks for in the source, mixed with what it has."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.score = nn.Linear(width, width, bias=False)
        self.mix = nn.Linear(2 * width, width, bias=False)

    def forward(
        self,
        hidden: Float[Tensor, "batch time width"],
        memory: Float[Tensor, "batch source_time width"],
        real: Bool[Tensor, "batch source_time"] | None,
    ) -> Float[Tensor, "batch time width"]:
        """``real`` is True where ``memory`` may be looked at; None means everywhere."""
        scores = hidden @ self.score(memory).transpose(1, 2)
        if real is not None:
            scores = scores.masked_fill(~real[:, None], -torch.inf)
        context = scores.softmax(-1) @ memory
        return torch.tanh(self.mix(torch.cat((context, hidden), dim=-1)))


class Seq2Seq(nn.Module):
    """A source and the target so far in, logits of each next target token out.

    ``padding`` is a token that stands after the text of either side. The source is read from its end, as in both
    papers, so padding comes first: the recurrence runs over it, attention never looks at it.

    >>> from torch import device
    >>> with device("meta"):
    ...     sum(p.numel() for p in Seq2Seq().parameters())
    217064000
    """

    def __init__(
        self,
        *,
        source_vocabulary: int = 50000,
        target_vocabulary: int = 50000,
        width: int = 1000,
        layers: int = 4,
        dropout: float = 0.2,
        padding: int | None = None,
    ) -> None:
        super().__init__()
        self.padding = padding
        self.source_words = nn.Embedding(source_vocabulary, width)
        self.target_words = nn.Embedding(target_vocabulary, width)
        between = dropout if layers > 1 else 0.0  # nn.LSTM drops between its layers, and warns where there is one
        self.encoder = nn.LSTM(width, width, layers, dropout=between, batch_first=True)
        self.decoder = nn.LSTM(width, width, layers, dropout=between, batch_first=True)
        self.dropout = nn.Dropout(dropout)
        self.attention = Attention(width)
        self.head = nn.Linear(width, target_vocabulary, bias=False)
        reach = (10 / width) ** 0.5  # the paper's 0.1 at its width, and as strong a start at others
        for parameter in self.parameters():
            nn.init.uniform_(parameter, -reach, reach)

    def forward(
        self, source: Int[Tensor, "batch source_time"], target: Int[Tensor, "batch time"]
    ) -> Float[Tensor, "batch time vocabulary"]:
        """Logits of the token that follows each position of ``target``."""
        source = source.flip(1)
        memory, state = self.encoder(self.dropout(self.source_words(source)))
        hidden, _ = self.decoder(self.dropout(self.target_words(target)), state)
        real = None if self.padding is None else source != self.padding
        return self.head(self.attention(hidden, memory, real))
