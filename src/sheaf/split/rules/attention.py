"""Attention: heads among workers, or queries along their length; each worker attends for itself.

A GPT or BERT that is cut by heads needs nothing moved here (Shoeybi et al., 2019, arXiv:1909.08053).
"""

import inspect
import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sheaf.plans.split import Cut
from sheaf.split.moves import TotalPart, sliced
from sheaf.split.registry import FALLBACK, rule
from sheaf.split.rules.elementwise import bring_along, drawn
from sheaf.split.rules.lengths import attend, in_the_open
from sheaf.split.rules.products import biased
from sheaf.split.tensor import Split

_NAMES = ("query", "key", "value", "attn_mask", "dropout_p", "is_causal", "scale", "enable_gqa")
_HEADS = -3  # of ... x heads x length x features
_LENGTH = -2


@rule(F.scaled_dot_product_attention)
def attention(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Of queries, keys and values that are cut along heads or batch alike, or of queries cut along their length.

    What is dropped out is what the whole would drop where torch draws it in the open, which it does on a CPU only.
    """
    given: dict[str, Any] = dict.fromkeys(_NAMES) | dict(zip(_NAMES, args, strict=False)) | kwargs
    query, key, value = given["query"], given["key"], given["value"]
    mask, causal, scale = given["attn_mask"], bool(given["is_causal"]), given["scale"]
    dropped = given["dropout_p"] or 0.0
    groups = _groups(query, key) if given["enable_gqa"] else 1
    lead = _lead((query, key, value), groups)
    if lead is None or (mask is not None and causal) or (dropped and query.device.type != "cpu"):
        return FALLBACK
    back, cut = lead
    if back == _LENGTH:
        return attend(mode, query, key, value, mask, causal=causal, scale=scale, dropped=dropped, groups=groups)
    own_mask = None if mask is None else bring_along(mode, mask, back, cut, "attention")
    own_query = bring_along(mode, query, back, cut, "attention")
    if back == _HEADS and groups > 1:
        own_key, own_value = (_of_heads(mode, one, query, cut, groups) for one in (key, value))
    else:
        own_key, own_value = (bring_along(mode, one, back, cut, "attention") for one in (key, value))
    if dropped or not own_query.numel():
        if own_query.shape[_HEADS:-2] != own_key.shape[_HEADS:-2] and groups > 1:
            own_key, own_value = (one.repeat_interleave(groups, _HEADS) for one in (own_key, own_value))
        if causal:
            own_mask = own_query.new_ones((query.shape[_LENGTH], key.shape[_LENGTH]), dtype=torch.bool).tril()

        def drop(shares: Tensor) -> Tensor:
            whole = Split(shares, shares.ndim + back, cut)
            return drawn(mode, torch.dropout, (whole, dropped, True), {}).local

        made = in_the_open(own_query, own_key, own_value, own_mask, scale, drop if dropped else None)
    else:
        named: dict[str, Any] = {"attn_mask": own_mask, "is_causal": causal, "scale": scale, "enable_gqa": groups > 1}
        made = F.scaled_dot_product_attention(own_query, own_key, own_value, **named)
    if isinstance(query, Split) and query.cut == cut:
        return query.like(made, dim=made.ndim + back)
    return Split(made, made.ndim + back, cut)


def _groups(query: Tensor, key: Tensor) -> int:
    """How many heads of queries share one of keys."""
    return query.shape[_HEADS] // key.shape[_HEADS] if query.ndim > 2 and key.ndim > 2 else 1


def _lead(tensors: Sequence[Tensor], groups: int) -> tuple[int, Cut] | None:
    """The dimension that the work is cut along, from the end, and how."""
    for place, one in enumerate(tensors):
        if isinstance(one, Split) and one.cut.length > 1 and one.axis < one.ndim - 2:
            back = one.axis - one.ndim
            times = groups if place and back == _HEADS else 1
            if times == 1 or one.cut.outer == 1:
                return back, Cut(tuple(size * times for size in one.cut.sizes), one.cut.outer)
    query = tensors[0]
    if isinstance(query, Split) and query.cut.length > 1 and query.axis == query.ndim - 2:
        return _LENGTH, query.cut
    return None


def _of_heads(mode: Any, tensor: Tensor, query: Tensor, cut: Cut, groups: int) -> Tensor:
    """Keys or values for the heads of queries that this worker has: one for each group, or one for each."""
    follows = Cut(tuple(size // groups for size in cut.sizes))
    if cut.outer == 1 and all(size % groups == 0 for size in cut.sizes):
        return bring_along(mode, tensor, _HEADS, follows, "attention")
    if isinstance(query, Split) and isinstance(tensor, Split) and tensor.shape[_HEADS] >= mode.team.workers:
        mode.refine(query, 1, groups)
    heads = sliced(torch.arange(cut.length, device=tensor.device), 0, cut, mode.team.rank)
    return mode.enter(tensor, "attention").index_select(tensor.ndim + _HEADS, heads // groups)


# torch.nn.MultiheadAttention ----------------------------------------------------------------------------------------

_PARAMETERS = inspect.signature(F.multi_head_attention_forward)
_SEPARATE = ("q_proj_weight", "k_proj_weight", "v_proj_weight")


@rule(F.multi_head_attention_forward)
def multi_head(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What torch.nn.MultiheadAttention does, with its heads among workers: in-projections by columns, out- by rows."""
    bound = _PARAMETERS.bind(*args, **kwargs)
    bound.apply_defaults()
    given = dict(bound.arguments)
    if not _usual(given):
        return FALLBACK
    heads, features = given["num_heads"], given["embed_dim_to_check"] // given["num_heads"]
    cut = _heads_cut(mode, given, features)
    if cut is None:
        return _by_rows(mode, given, features)
    batched = given["query"].ndim == 3
    query, key, value = _projected(mode, given, cut, features)
    mask, causal = _mask(mode, given)
    dropped = given["dropout_p"] if given["training"] else 0.0
    weights = None
    if given["need_weights"]:
        shares = _shares(mode, query, key, mask, dropped)
        made = shares.local @ value.local
        if not given["average_attn_weights"]:
            weights = shares if batched else Split(shares.local.squeeze(0), 0, cut)
        else:
            weights = mode.total(shares.local.sum(1), "attention's weights") / heads
            weights = weights if batched else weights.squeeze(0)
    else:
        asked = (query, key, value, mask, dropped, causal)
        found = attention(mode, F.scaled_dot_product_attention, asked, {})
        if found is FALLBACK:
            found = mode.fallback(F.scaled_dot_product_attention, asked, {})
        made = mode.part(found, 1, cut, "attention")
    return _out(mode, given, made, cut, features), weights


def _usual(given: dict[str, Any]) -> bool:
    """Whether this is worked out here; torch itself tells what is wrong with arguments that do not fit."""
    query, key, value, mask = (given[name] for name in ("query", "key", "value", "attn_mask"))
    if any(given[name] is not None for name in ("bias_k", "bias_v", "static_k", "static_v")) or given["add_zero_attn"]:
        return False
    embed, heads = given["embed_dim_to_check"], given["num_heads"]
    if not query.ndim == key.ndim == value.ndim or query.ndim not in (2, 3) or embed % heads:
        return False
    if query.shape[-1] != embed or key.shape[:-1] != value.shape[:-1] or (mask is None and given["is_causal"]):
        return False
    batch, length = query.shape[1] if query.ndim == 3 else 1, (query.shape[0], key.shape[0])
    padding, padded = given["key_padding_mask"], (batch, length[1]) if query.ndim == 3 else (length[1],)
    if padding is not None and tuple(padding.shape) != padded:
        return False
    return mask is None or tuple(mask.shape) in (length, (batch * heads, *length))


def _by_rows(mode: Any, given: dict[str, Any], features: int) -> Any:
    """With queries cut along their length, in the first dimension, and weights that are whole."""
    query, heads = given["query"], given["num_heads"]
    if not isinstance(query, Split) or query.axis != 0 or query.cut.length < 2:
        return FALLBACK
    names = _SEPARATE if given["use_separate_proj_weight"] else ("in_proj_weight",)
    if any(isinstance(given[name], Split) for name in (*names, "in_proj_bias", "out_proj_weight", "out_proj_bias")):
        return FALLBACK
    if any(isinstance(one, Split) and one.axis != 0 for one in (given["key"], given["value"])):
        return FALLBACK

    def used(name: str, *, split: bool) -> Tensor:
        """A parameter as split work or whole work uses it."""
        return mode.enter(given[name], "attention") if split else given[name]

    def projected(place: int) -> Tensor:
        tensor = given[("query", "key", "value")[place]]
        split = isinstance(tensor, Split)
        bias = None if given["in_proj_bias"] is None else used("in_proj_bias", split=split).chunk(3)[place]
        if given["use_separate_proj_weight"]:
            weight = used(_SEPARATE[place], split=split)
        else:
            weight = used("in_proj_weight", split=split).chunk(3)[place]
        flat = F.linear(tensor.local if split else tensor, weight, bias)
        laid = flat.reshape(flat.shape[0], flat.shape[1] if flat.ndim == 3 else 1, heads, features).permute(1, 2, 0, 3)
        return Split(laid, 2, tensor.cut) if split else laid

    query, key, value = projected(0), projected(1), projected(2)
    assert isinstance(query, Split)
    mask, causal = _mask(mode, given)
    dropped = given["dropout_p"] if given["training"] else 0.0
    weights = None
    if given["need_weights"]:
        whole = [mode.enter(one, "attention") for one in (key, value)]
        scores = query.local * math.sqrt(1.0 / features) @ whole[0].transpose(-2, -1)
        if mask is not None:
            scores = scores + bring_along(mode, mask, _LENGTH, query.cut, "attention")
        shares = Split(torch.softmax(scores, -1), 2, query.cut)
        shares = drawn(mode, F.dropout, (shares, dropped, True), {}) if dropped else shares
        made = shares.local @ whole[1]
        averaged = given["average_attn_weights"]
        weights = Split(shares.local.mean(1), 1, query.cut) if averaged else shares
        if given["query"].ndim == 2:
            weights = Split(weights.local.squeeze(0), weights.axis - 1, query.cut)
    else:
        found = attention(mode, F.scaled_dot_product_attention, (query, key, value, mask, dropped, causal), {})
        if not isinstance(found, Split):
            return FALLBACK
        made = found.local
    rows = made.permute(2, 0, 1, 3).flatten(2)
    bias = None if given["out_proj_bias"] is None else used("out_proj_bias", split=True)
    out = F.linear(rows if given["query"].ndim == 3 else rows.squeeze(1), used("out_proj_weight", split=True), bias)
    return given["query"].like(out, dim=0), weights


def _heads_cut(mode: Any, given: dict[str, Any], features: int) -> Cut | None:
    """How many heads each worker has, if one of the projections in is cut by heads, or may be, and is from here on."""
    names, outer = (_SEPARATE, 1) if given["use_separate_proj_weight"] else (("in_proj_weight",), 3)
    even = Cut.even(outer * features * given["num_heads"], mode.team.workers, outer=outer, unit=features)
    for name in names:
        split = given[name]
        if not isinstance(split, Split) and given["num_heads"] > 1:
            split = mode.propose(split, 0, even)
        if not isinstance(split, Split) or split.axis != 0 or split.cut.outer != outer:
            continue
        given[name] = split
        if all(size % features == 0 for size in split.cut.sizes):
            return Cut(tuple(size // features for size in split.cut.sizes))
    return None


def _projected(mode: Any, given: dict[str, Any], cut: Cut, features: int) -> list[Split]:
    """Queries, keys and values as batch x heads x length x features; one product for those that come of one tensor."""
    inputs = [given["query"], given["key"], given["value"]]
    whole = [mode.enter(one, "attention") for one in inputs]
    sizes = tuple(size * features for size in cut.sizes)
    width, heads = sizes[mode.team.rank], cut.sizes[mode.team.rank]
    bias = given["in_proj_bias"]
    if bias is not None:
        bias = mode.part(bias, 0, Cut(sizes, 3), "attention")
    if given["use_separate_proj_weight"]:
        weights = [mode.part(given[name], 0, Cut(sizes), "attention") for name in _SEPARATE]
        biases = [None] * 3 if bias is None else bias.split(width) if width else [bias] * 3
        flat = [F.linear(*three) for three in zip(whole, weights, biases, strict=True)]
    else:
        weight = mode.part(given["in_proj_weight"], 0, Cut(sizes, 3), "attention")
        flat: list[Tensor] = []
        while len(flat) < 3:  # what comes of one tensor is one product
            first = len(flat)
            alike = next((place for place in range(first, 3) if inputs[place] is not inputs[first]), 3) - first
            rows = slice(first * width, (first + alike) * width)
            made = F.linear(whole[first], weight[rows], None if bias is None else bias[rows])
            flat.extend(made.split([width] * alike, -1))
    laid = [one.reshape(one.shape[0], one.shape[1] if one.ndim == 3 else 1, heads, features) for one in flat]
    return [Split(one.permute(1, 2, 0, 3), 1, cut) for one in laid]


def _mask(mode: Any, given: dict[str, Any]) -> tuple[Tensor | None, bool]:
    """What is added to the scores of batch x heads x queries x keys, and whether it stands for causal instead."""
    mask, padding, query = given["attn_mask"], given["key_padding_mask"], given["query"]
    kept = F._none_or_dtype(mask)
    mask, padding = mode.whole(mask, "attention"), mode.whole(padding, "attention")
    padding = F._canonical_mask(padding, "key_padding_mask", kept, "attn_mask", query.dtype)
    if given["is_causal"] and padding is None and not given["need_weights"]:
        return None, True
    mask = F._canonical_mask(mask, "attn_mask", None, "", query.dtype, check_other=False)
    if mask is not None:
        mask = mask.view(1 if mask.ndim == 2 else -1, 1 if mask.ndim == 2 else given["num_heads"], *mask.shape[-2:])
    if padding is not None:
        padding = padding.view(-1, 1, 1, padding.shape[-1])
        mask = padding if mask is None else mask + padding
    return mask, False


def _shares(mode: Any, query: Split, key: Split, mask: Tensor | None, dropped: float) -> Split:
    """How much each query attends to each key, as torch computes it where the shares are asked for."""
    scores = query.local * math.sqrt(1.0 / query.shape[-1]) @ key.local.transpose(-2, -1)
    if mask is not None:
        scores = scores + bring_along(mode, mask, _HEADS, query.cut, "attention")
    shares = Split(torch.softmax(scores, -1), 1, query.cut)
    return drawn(mode, F.dropout, (shares, dropped, True), {}) if dropped else shares


def _out(mode: Any, given: dict[str, Any], made: Tensor, cut: Cut, features: int) -> Any:
    """The projection out of what this worker's heads found, added up; cut as the queries were, if along another."""
    weight = mode.part(given["out_proj_weight"], 1, Cut(tuple(size * features for size in cut.sizes)), "attention")
    rows = made.permute(2, 0, 1, 3).flatten(2)
    query = given["query"]
    partial = F.linear(rows if query.ndim == 3 else rows.squeeze(1), weight)
    if isinstance(query, Split) and query.axis < query.ndim - 1:
        why = f"partial sums of attention{mode.place}"
        out: Any = Split(TotalPart.apply(partial, query.axis, query.cut, mode.team, why), query.axis, query.cut)
    else:
        out = mode.total(partial, "attention")
    return out if given["out_proj_bias"] is None else biased(mode, out, given["out_proj_bias"])
