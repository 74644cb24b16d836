"""A GPT with mixtures of experts: every other feed-forward part is many, and each token goes to two of them.

Gated experts after Shazeer et al., "Outrageously Large Neural Networks", 2017; places by capacity and the balance term
after Fedus et al., "Switch Transformers", 2021; every other layer as in Du et al., "GLaM", 2021, whose smallest model,
0.1B/64E with 1.9 billion parameters, the default sizes follow: 1,909,814,016 with GPT-2's vocabulary and positions.

Which token goes where depends on its microbatch alone, and nothing is drawn: no noise is added to the gate.
"""

import math
from typing import NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn
from torch.nn import functional as F

from sheaf.zoo.models.gpt import Attention, Block, places

_STD = 0.02  # of every weight at the start, as in GPT-2


class Output(NamedTuple):
    """``logits`` of each next token, and ``balance``: 1 where experts are used evenly, larger where they are not."""

    logits: Float[Tensor, "batch time vocabulary"]
    balance: Float[Tensor, ""]


class Experts(nn.Module):
    """Feed-forward parts in one stack; a gate sends each token to ``chosen`` of them.

    Shapes are static: every expert has ``capacity`` times the places that an even use would need. First choices take
    places before second ones and earlier tokens before later ones; who finds none is not fed by that expert.
    """

    def __init__(self, width: int, wide: int, experts: int, chosen: int, capacity: float) -> None:
        super().__init__()
        if not 1 <= chosen <= experts:
            raise ValueError(f"chosen={chosen} of experts={experts}: choose at least one and at most all")
        self.chosen, self.capacity = chosen, capacity
        self.gate = nn.Linear(width, experts, bias=False)
        self.feed_in = nn.Parameter(torch.empty(experts, width, wide))
        self.feed_in_bias = nn.Parameter(torch.zeros(experts, wide))
        self.feed_out = nn.Parameter(torch.empty(experts, wide, width))
        self.feed_out_bias = nn.Parameter(torch.zeros(experts, width))
        for weight in (self.feed_in, self.feed_out):
            nn.init.normal_(weight, std=_STD)

    def forward(
        self, hidden: Float[Tensor, "batch time width"], real: Bool[Tensor, "batch time"] | None
    ) -> tuple[Float[Tensor, "batch time width"], Float[Tensor, ""]]:
        """What the experts made of each token, and their balance; tokens that are not ``real`` take no place."""
        tokens = hidden.flatten(0, 1)
        counted = torch.ones_like(tokens[:, 0], dtype=torch.bool) if real is None else real.flatten()
        chances = self.gate(tokens).softmax(-1)
        shares, choices = chances.topk(self.chosen, dim=-1)
        shares = shares / shares.sum(-1, keepdim=True)
        # From here on, one row for each (choice, token): all first choices, then all second ones.
        named = torch.arange(chances.shape[1], device=tokens.device)
        goes = (choices.T.reshape(-1, 1) == named) & counted.repeat(self.chosen)[:, None]
        slots, capacity = self._slots(goes)
        sent = tokens.new_zeros(goes.shape[1] * capacity + 1, tokens.shape[1])
        sent = sent.index_add(0, slots, tokens.repeat(self.chosen, 1))
        made = F.pad(self._fed(sent[:-1].unflatten(0, (-1, capacity))).flatten(0, 1), (0, 0, 0, 1))
        back = made[slots].unflatten(0, (self.chosen, -1))
        mixed = (back * shares.T[:, :, None]).sum(0)
        return mixed.view_as(hidden), _balance(chances, goes[: len(tokens)], counted)

    def _slots(self, goes: Bool[Tensor, "rows experts"]) -> tuple[Int[Tensor, " rows"], int]:
        """Which place each row takes, counted through all experts (the one past the end: none), and places each."""
        rows, experts = goes.shape
        capacity = math.ceil(self.capacity * rows / experts)
        place = goes.cumsum(0) - 1
        fits = goes & (place < capacity)
        slots = torch.where(fits, place + capacity * torch.arange(experts, device=goes.device), 0).sum(-1)
        return torch.where(fits.any(-1), slots, experts * capacity), capacity

    def _fed(self, given: Float[Tensor, "experts places width"]) -> Float[Tensor, "experts places width"]:
        wide = F.gelu(torch.bmm(given, self.feed_in) + self.feed_in_bias[:, None], approximate="tanh")
        return torch.bmm(wide, self.feed_out) + self.feed_out_bias[:, None]


class ExpertBlock(nn.Module):
    """GPT's block with experts for its feed-forward part."""

    def __init__(
        self, width: int, heads: int, dropout: float, *, wide: int, experts: int, chosen: int, capacity: float
    ) -> None:
        super().__init__()
        self.attention_norm = nn.LayerNorm(width)
        self.attention = Attention(width, heads, dropout)
        self.feed_norm = nn.LayerNorm(width)
        self.experts = Experts(width, wide, experts, chosen, capacity)
        self.attention_dropout = nn.Dropout(dropout)
        self.feed_dropout = nn.Dropout(dropout)

    def forward(
        self,
        hidden: Float[Tensor, "batch time width"],
        mask: Bool[Tensor, "batch 1 time time"] | None,
        real: Bool[Tensor, "batch time"] | None,
    ) -> tuple[Float[Tensor, "batch time width"], Float[Tensor, ""]]:
        """What leaves the block, and the balance of its experts; ``mask`` as for Attention, ``real`` for Experts."""
        hidden = hidden + self.attention_dropout(self.attention(self.attention_norm(hidden), mask))
        fed, balance = self.experts(self.feed_norm(hidden), real)
        return hidden + self.feed_dropout(fed), balance


class MoE(nn.Module):
    """Tokens in, logits of each next token and the experts' balance out; tied head, padding as in GPT.

    Add a hundredth of the balance to the mean loss, as in Switch, or a few experts get every token.

    >>> sum(p.numel() for p in MoE(vocabulary=41, context=16, width=32, layers=2, heads=4, experts=4).parameters())
    52480
    """

    def __init__(
        self,
        *,
        vocabulary: int = 50257,
        context: int = 1024,
        width: int = 768,
        layers: int = 12,
        heads: int = 12,
        wide: int | None = None,
        experts: int = 64,
        chosen: int = 2,
        capacity: float = 1.25,
        every: int = 2,
        dropout: float = 0.1,
        padding: int | None = None,
    ) -> None:
        super().__init__()
        self.context, self.padding = context, padding
        self.tokens = nn.Embedding(vocabulary, width)
        self.positions = nn.Embedding(context, width)
        self.dropout = nn.Dropout(dropout)
        blocks: list[nn.Module] = []
        for layer in range(layers):
            if (layer + 1) % every:
                blocks.append(Block(width, heads, dropout))
                continue
            sizes = {"wide": wide or 4 * width, "experts": experts, "chosen": chosen}
            blocks.append(ExpertBlock(width, heads, dropout, **sizes, capacity=capacity))
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, vocabulary, bias=False)
        self.head.weight = self.tokens.weight
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=_STD)
        for name, parameter in self.named_parameters():
            if name.endswith(".bias"):
                nn.init.zeros_(parameter)

    def forward(self, tokens: Int[Tensor, "batch time"]) -> Output:
        """Logits of the token that follows each position, and the mean balance of the layers with experts.

        Raises ValueError when the sequence is longer than ``context``.
        """
        time = tokens.shape[1]
        if time > self.context:
            raise ValueError(f"{time} tokens in a row, and the model has positions for {self.context}: cut the text")
        positions, mask = places(tokens, self.padding)
        real = None if self.padding is None else tokens != self.padding
        hidden = self.dropout(self.tokens(tokens) + self.positions(positions))
        balances: list[Tensor] = []
        for block in self.blocks:
            if isinstance(block, ExpertBlock):
                hidden, balance = block(hidden, mask, real)
                balances.append(balance)
            else:
                hidden = block(hidden, mask)
        balance = torch.stack(balances).mean() if balances else hidden.new_ones(())
        return Output(self.head(self.norm(hidden)), balance)


def _balance(
    chances: Float[Tensor, "tokens experts"], first: Bool[Tensor, "tokens experts"], counted: Bool[Tensor, " tokens"]
) -> Float[Tensor, ""]:
    """Switch's term: experts times the sum over them of (tokens that chose it first) times (its mean chance)."""
    total = counted.sum().clamp(min=1)
    used = first.sum(0) / total
    wanted = (chances * counted[:, None]).sum(0) / total
    return chances.shape[1] * (used * wanted).sum()
