"""Attention with several heads, over one sequence or from one to another (Vaswani et al., 2017, section 3.2)."""

from jaxtyping import Bool, Float
from torch import Tensor, nn
from torch.nn import functional as F


class Attention(nn.Module):
    """Queries from one sequence, keys and values from another, which may be the same; drops weights in training."""

    def __init__(self, width: int, heads: int, dropout: float = 0.0) -> None:
        super().__init__()
        if width % heads:
            raise ValueError(f"width={width} does not divide among heads={heads}; use a multiple of {heads}")
        self.heads, self.dropout = heads, dropout
        self.queries = nn.Linear(width, width)
        self.keys = nn.Linear(width, width)
        self.values = nn.Linear(width, width)
        self.out = nn.Linear(width, width)

    def forward(
        self,
        hidden: Float[Tensor, "batch time width"],
        memory: Float[Tensor, "batch memory_time width"],
        mask: Bool[Tensor, "batch 1 1 memory_time"] | None = None,
        *,
        causal: bool = False,
    ) -> Float[Tensor, "batch time width"]:
        """``mask`` is True where ``memory`` may be seen; with ``causal``, which takes no mask, only what is earlier."""
        queries, keys, values = self.queries(hidden), self.keys(memory), self.values(memory)
        mixed = F.scaled_dot_product_attention(
            self._by_head(queries),
            self._by_head(keys),
            self._by_head(values),
            attn_mask=mask,
            dropout_p=self.dropout if self.training else 0.0,
            is_causal=causal,
        )
        return self.out(mixed.transpose(1, 2).flatten(2))

    def _by_head(self, each: Float[Tensor, "batch time width"]) -> Float[Tensor, "batch heads time part"]:
        return each.unflatten(2, (self.heads, -1)).transpose(1, 2)


def seen(tokens: Tensor, padding: int | None) -> Bool[Tensor, "batch 1 1 time"] | None:
    """The mask that hides padding; None when no token is padding."""
    return None if padding is None else (tokens != padding)[:, None, None]
