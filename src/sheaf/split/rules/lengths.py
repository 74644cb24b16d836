"""Attention of queries cut along their length: each worker computes its rows, against the keys that they may see.

Keys and values are gathered for it and let go again. Where the mask leaves some rows much and others little to see,
as a causal one does, workers first trade half their queries, so that all have alike to do (``sheaf.split.sight``).
"""

import math
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sheaf.plans.split import Cut
from sheaf.split.loan import Loan
from sheaf.split.moves import Trade
from sheaf.split.sight import Range, Sight, halves, mirror, traded, worth_trading
from sheaf.split.tensor import Split

_LENGTH = -2  # of ... x length x features


def attend(
    mode: Any,
    query: Split,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    *,
    causal: bool,
    scale: float | None,
    dropped: float,
    groups: int,
) -> Split:
    """Scaled dot-product attention of ``query``, ... x length x features, cut along the length.

    ``groups`` heads of queries share one of keys. Masks of dropout are slices of the whole's.
    """
    cut, length, keys = query.cut, query.shape[_LENGTH], key.shape[_LENGTH]
    own_mask = isinstance(mask, Split) and (mask.axis - mask.ndim, mask.cut) == (_LENGTH, cut)  # has own rows only
    if mask is not None:
        mask = mask.local if own_mask and isinstance(mask, Split) else mode.enter(mask, "attention")
    sight = Sight.causal(length, keys) if causal else None
    if mask is not None and not own_mask:
        sight = Sight.of(mask, length)
    trades = sight is not None and worth_trading(sight, cut)
    rows, parts = _rows(mode, query, trades=trades, narrow=sight is not None)
    keep = _kept(query, key, dropped, groups) if dropped else None
    part = _Part(keys, mask, own_mask, causal, sight, keep, scale, groups)
    loaned = [one for one in (key, value) if isinstance(one, Split)]
    loan = Loan(loaned, mode.team, f"whole for attention{mode.place}", keep=not mode.lends) if loaned else None
    wholes = iter(loan.take() if loan else ())
    near = [next(wholes) if isinstance(one, Split) else mode.enter(one, "attention") for one in (key, value)]
    offset = 0
    made: list[Tensor] = []
    with loan.using() if loan else nullcontext():
        for own, here in zip(parts, rows, strict=True):
            made.append(part.attend(own, near[0], near[1], here, offset))
            offset += here[1] - here[0]
    if trades:
        made[1] = _trade(mode, made[1], cut)
    out = made[0] if len(made) == 1 else torch.cat(made, _LENGTH)
    return query.like(loan.give_back(out) if loan else out, dim=out.ndim + _LENGTH)


@dataclass(frozen=True)
class _Part:
    """What a run of queries needs to know. ``keep`` has what dropout leaves of the whole's scores."""

    keys: int
    mask: Tensor | None
    own_mask: bool  # it has this worker's rows only
    causal: bool
    sight: Sight | None
    keep: Tensor | None
    scale: float | None
    groups: int

    def attend(self, query: Tensor, key: Tensor, value: Tensor, rows: Range, offset: int) -> Tensor:
        """Of the queries that are ``rows`` of the whole and begin at ``offset`` of this worker's."""
        low, high = (0, self.keys) if self.sight is None else self.sight.window(rows)
        key, value = key[..., low:high, :], value[..., low:high, :]
        seen = self._seen(rows, offset, low, high, query.device)
        if self.keep is None and query.numel():
            named: dict[str, Any] = {"attn_mask": seen, "scale": self.scale, "enable_gqa": self.groups > 1}
            return F.scaled_dot_product_attention(query, key, value, **named)
        if self.groups > 1:
            key, value = key.repeat_interleave(self.groups, -3), value.repeat_interleave(self.groups, -3)
        keep = None if self.keep is None else self.keep[..., rows[0] : rows[1], low:high]
        return in_the_open(query, key, value, seen, self.scale, None if keep is None else keep.mul)

    def _seen(self, rows: Range, offset: int, low: int, high: int, device: torch.device) -> Tensor | None:
        """The mask of these queries and keys."""
        if self.causal:
            numbers = torch.arange(rows[0], rows[1], device=device)
            return numbers[:, None] >= torch.arange(low, high, device=device)
        mask = self.mask
        if mask is None:
            return None
        if mask.ndim > 1 and mask.shape[_LENGTH] > 1:
            mask = mask.narrow(_LENGTH, offset if self.own_mask else rows[0], rows[1] - rows[0])
        return mask if mask.shape[-1] == 1 else mask[..., low:high]


def _kept(query: Split, key: Tensor, dropped: float, groups: int) -> Tensor:
    """What dropout leaves of the whole's scores: 0, or what makes up for those that are dropped."""
    batch = query.shape[:_LENGTH]
    if groups == 1:
        batch = torch.broadcast_shapes(batch, key.shape[:_LENGTH])
    wide = torch.float32 if query.dtype.itemsize < 4 else query.dtype
    shape = (*batch, query.shape[_LENGTH], key.shape[_LENGTH])
    return torch.dropout(torch.ones(shape, dtype=wide, device=query.device), dropped, True)


def _rows(mode: Any, query: Split, *, trades: bool, narrow: bool) -> tuple[list[Range], list[Tensor]]:
    """Runs of queries for this worker to compute, and where they are in the whole."""
    cut, worker = query.cut, mode.team.rank
    if cut.outer > 1:
        rows = list(cut.ranges(worker))
        return rows, list(query.local.split([stop - start for start, stop in rows], _LENGTH))
    own = halves(cut, worker)
    if not narrow:
        return [(own[0][0], own[1][1])], [query.local]
    parts = list(query.local.split([stop - start for start, stop in own], _LENGTH))
    if trades:
        return list(traded(cut, worker)), [parts[0], _trade(mode, parts[1], cut)]
    return list(own), parts


def _trade(mode: Any, later: Tensor, cut: Cut) -> Tensor:
    """The later half of this worker's rows for that of its mirror, or back again."""
    worker = mode.team.rank
    other = mirror(cut, worker)
    both = sum(stop - start for start, stop in (halves(cut, worker)[1], halves(cut, other)[1]))
    shape = (*later.shape[:_LENGTH], both - later.shape[_LENGTH], later.shape[-1])
    return Trade.apply(later, other, shape, mode.team, f"queries for attention{mode.place}")


def in_the_open(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scale: float | None,
    drop: Callable[[Tensor], Tensor] | None,
) -> Tensor:
    """As torch computes it where it drops something: half precision in float32, a row without keys is zero."""
    dtype = query.dtype
    if dtype in (torch.float16, torch.bfloat16):
        query, key, value = query.float(), key.float(), value.float()
    scores = query * (1.0 / math.sqrt(query.shape[-1]) if scale is None else scale) @ key.transpose(-2, -1)
    if mask is not None:
        scores = scores.masked_fill(~mask, -math.inf) if mask.dtype == torch.bool else scores + mask
    shares = torch._safe_softmax(scores, -1)
    return ((drop(shares) if drop else shares) @ value).to(dtype)
