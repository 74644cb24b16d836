"""Attention of split heads and split lengths, and torch's own transformer layers, against plain torch."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Given, check, check_threads, cut, held, whole
from torch import Tensor, nn
from torch.nn import functional as F


def attended(**named: Any) -> Callable[..., Tensor]:
    return lambda *tensors: F.scaled_dot_product_attention(*tensors, **named)


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("causal", [False, True])
def test_heads_or_samples_among_workers(place: int, causal: bool) -> None:
    for sizes in ((2, 1), (0, 3), (3, 0)):
        given = cut((3, 3, 5, 4), place, sizes)
        found = check_threads(attended(is_causal=causal, scale=0.3), given, given, given)
        assert found.moves == ()


@pytest.mark.parametrize("shape", [(5, 6), (3, 1, 6), (1, 3, 5, 6), (2, 3, 5, 6), (2, 1, 1, 6)])
def test_masks_come_along(shape: tuple[int, ...]) -> None:
    query, key = cut((2, 3, 5, 4), 1, (2, 0, 1)), cut((2, 3, 6, 4), 1, (2, 0, 1))
    check_threads(attended(), query, key, key, whole(*shape), workers=3)
    check_threads(attended(), query, key, key, whole(*shape, kind="mask"), workers=3)
    check_threads(attended(), cut((2, 3, 5, 4), 2, (2, 0, 3)), key, key, whole(*shape), workers=3)


def test_the_others_follow_one_that_is_cut() -> None:
    one = cut((2, 3, 5, 4), 1, (2, 1))
    for givens in ((one, whole(2, 3, 5, 4), whole(2, 3, 5, 4)), (whole(2, 3, 5, 4), whole(2, 3, 5, 4), one)):
        check_threads(attended(is_causal=True), *givens)
    check_threads(attended(), one, cut((2, 3, 5, 4), 1, (1, 2)), cut((2, 3, 5, 4), 2, (3, 2)))
    check_threads(attended(), whole(1, 3, 5, 4), cut((2, 3, 5, 4), 0, (1, 1)), whole(2, 3, 5, 4))


@pytest.mark.parametrize("causal", [False, True])
def test_queries_cut_along_their_length(causal: bool) -> None:
    for sizes, outer in (((3, 2, 1), 1), ((0, 6, 0), 1), ((1, 1, 1), 2)):
        query, key = cut((2, 3, 6, 4), 2, sizes, outer), cut((2, 3, 6, 4), 2, (2, 2, 2))
        found = check_threads(attended(is_causal=causal), query, key, key, workers=3)
        assert found.cuts[0] == query.slice
        check_threads(attended(is_causal=causal), query, whole(2, 3, 6, 4), whole(2, 3, 6, 5), workers=3)
    check_threads(attended(is_causal=True), cut((6, 4), 0, (4, 2)), whole(3, 4), whole(3, 4))


def test_keys_cut_along_their_length_are_gathered() -> None:
    key = cut((2, 3, 6, 4), 2, (4, 2))
    assert check_threads(attended(is_causal=True), whole(2, 3, 5, 4), key, key).cuts == (None,)


@pytest.mark.parametrize("causal", [False, True])
def test_grouped_queries(causal: bool) -> None:
    run = attended(is_causal=causal, enable_gqa=True)
    key = cut((2, 3, 5, 4), 1, (2, 1))
    assert check_threads(run, cut((2, 6, 5, 4), 1, (4, 2)), key, key).moves == ()
    check_threads(run, cut((2, 6, 5, 4), 1, (3, 3)), key, key)
    check_threads(run, cut((2, 6, 5, 4), 1, (3, 3)), whole(2, 3, 5, 4), whole(2, 3, 5, 4))
    check_threads(run, cut((2, 6, 5, 4), 1, (4, 2)), whole(2, 3, 5, 4), whole(2, 3, 5, 4))
    check_threads(run, whole(2, 6, 5, 4), key, key)
    check_threads(run, cut((2, 6, 5, 4), 1, (2, 1), 2), key, key)
    check_threads(run, cut((2, 6, 5, 4), 2, (4, 1)), whole(2, 3, 5, 4), whole(2, 3, 5, 4))
    none = cut((2, 3, 5, 4), 1, (3, 0))
    check_threads(run, cut((2, 6, 5, 4), 1, (6, 0)), none, none)
    check_threads(run, cut((2, 6, 5, 4), 1, (5, 1)), whole(2, 1, 5, 4), whole(2, 1, 5, 4))


def test_dropout_is_that_of_the_whole(ranks) -> None:
    def seeded(**named: Any) -> Callable[..., Tensor]:
        def run(*tensors: Tensor) -> Tensor:
            torch.manual_seed(11)
            return F.scaled_dot_product_attention(*tensors, dropout_p=0.4, **named)

        return run

    for place, sizes in ((1, (2, 0, 1)), (0, (1, 0, 1)), (2, (1, 3, 2))):
        given = cut((2, 3, 6, 4), place, sizes)
        check(ranks, seeded(is_causal=True), given, given, given, workers=3)
        check(ranks, seeded(), given, given, given, whole(2, 1, 6, 6), workers=3)
    key = cut((2, 2, 6, 4), 1, (1, 1))
    check(ranks, seeded(enable_gqa=True), cut((2, 4, 6, 4), 1, (2, 2)), key, key)
    check(ranks, seeded(enable_gqa=True), cut((2, 4, 6, 4), 1, (3, 1)), key, key)


# torch.nn.MultiheadAttention ----------------------------------------------------------------------------------------


def multi_head(heads: int, embed: int = 12, **named: Any) -> Callable[..., Any]:
    """Over query, key, value, weight and bias in and out."""

    def run(query: Tensor, key: Tensor, value: Tensor, *parameters: Tensor) -> Any:
        weight, bias, out_weight, out_bias = parameters
        torch.manual_seed(11)
        rest = (None, None, False, named.get("dropout", 0.0), out_weight, out_bias)
        more = {key: value for key, value in named.items() if key != "dropout"}
        found = F.multi_head_attention_forward(query, key, value, embed, heads, weight, bias, *rest, **more)
        return found if found[1] is not None else found[0]

    return run


def parameters(sizes: tuple[int, ...], embed: int = 12) -> tuple[Given, ...]:
    return (
        held((3 * embed, embed), 0, sizes, 3),
        held((3 * embed,), 0, sizes, 3),
        held((embed, embed), 1, sizes),
        whole(embed),
    )


MASKS: dict[str, dict[str, Any]] = {
    "none": {},
    "plain": {"attn_mask": torch.randn(5, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)},
    "heads": {"attn_mask": torch.randn(6, 5, 6, generator=torch.Generator().manual_seed(2), dtype=torch.float64)},
    "hidden": {"attn_mask": torch.ones(5, 6).triu(2).bool()},
    "padding": {"key_padding_mask": torch.tensor([[False] * 4 + [True] * 2, [False] * 6])},
    "both": {
        "key_padding_mask": torch.tensor([[False] * 4 + [True] * 2, [False] * 6]),
        "attn_mask": torch.ones(5, 6).triu(2).bool(),
    },
}


@pytest.mark.parametrize("masks", MASKS)
@pytest.mark.parametrize("weights", [False, True])
@pytest.mark.parametrize("sizes", [(8, 4), (12, 0)])
def test_multi_head_attention(masks: str, weights: bool, sizes: tuple[int, ...]) -> None:
    run = multi_head(3, need_weights=weights, **MASKS[masks])
    check_threads(run, whole(5, 2, 12), whole(6, 2, 12), whole(6, 2, 12), *parameters(sizes))


@pytest.mark.parametrize("weights", [False, True])
def test_attention_to_itself_is_one_product(weights: bool) -> None:
    for average in (False, True):
        run = multi_head(3, need_weights=weights, average_attn_weights=average)
        found = check_threads(lambda x, *rest, run=run: run(x, x, x, *rest), whole(5, 2, 12), *parameters((4, 8)))
        moved = [operation for operation, _ in found.moves]
        assert moved == ["all_reduce"] * (2 + (weights and average))
    causal = {"is_causal": True, "attn_mask": nn.Transformer.generate_square_subsequent_mask(5, dtype=torch.float64)}
    run = multi_head(3, need_weights=weights, **causal)
    check_threads(lambda x, *rest: run(x, x, x, *rest), whole(5, 2, 12), *parameters((4, 8)))
    check_threads(lambda x, y, *rest: run(x, y, y, *rest), whole(5, 2, 12), whole(5, 2, 12), *parameters((4, 8)))


def test_a_single_sample_and_one_head_on_two_workers() -> None:
    for weights in (False, True):
        for average in (False, True):
            run = multi_head(3, need_weights=weights, average_attn_weights=average)
            check_threads(lambda x, *rest, run=run: run(x, x, x, *rest), whole(5, 12), *parameters((4, 8)))
    padding = torch.tensor([False, False, True, False, False])
    run = multi_head(1, key_padding_mask=padding)
    check_threads(lambda x, *rest: run(x, x, x, *rest), whole(5, 12), *parameters((0, 12)))


def test_the_output_is_cut_as_the_queries_are() -> None:
    run = multi_head(3, need_weights=False)
    for place in (0, 1):
        query = cut((4, 4, 12), place, (3, 1))
        found = check_threads(lambda x, *rest: run(x, x, x, *rest), query, *parameters((4, 8)))
        assert found.cuts == (query.slice,)
        assert {operation for operation, _ in found.moves} <= {"all_gather", "reduce_scatter", "all_reduce"}
    check_threads(lambda x, *rest: run(x, x, x, *rest), cut((4, 12), 0, (3, 1)), *parameters((4, 8)))
    check_threads(lambda x, *rest: run(x, x, x, *rest), cut((4, 2, 12), 2, (3, 9)), *parameters((4, 8)))


def test_dropped_out_shares_are_those_of_the_whole(ranks) -> None:
    for weights in (False, True):
        run = multi_head(3, need_weights=weights, dropout=0.4)
        given = (whole(5, 2, 12), whole(6, 2, 12), whole(6, 2, 12), *parameters((4, 0, 8)))
        check(ranks, run, *given, workers=3)


@pytest.mark.parametrize("changed", ["bias", "zero", "cuts", "separate"])
def test_unusual_arguments(changed: str) -> None:
    def run(x: Tensor, weight: Tensor, bias: Tensor, out: Tensor, out_bias: Tensor, more: Tensor) -> Tensor:
        extra = more if changed == "bias" else None
        rest = (extra, extra, changed == "zero", 0.0, out, out_bias)
        return F.multi_head_attention_forward(x, x, x, 12, 3, weight, bias, *rest, need_weights=False)[0]

    def separate(x: Tensor, y: Tensor, query: Tensor, key: Tensor, value: Tensor, *rest: Tensor) -> Tensor:
        named = {"q_proj_weight": query, "k_proj_weight": key, "v_proj_weight": value}
        bias, out, out_bias = rest
        return F.multi_head_attention_forward(
            x, y, y, 12, 3, None, bias, None, None, False, 0.0, out, out_bias, use_separate_proj_weight=True, **named
        )[0]

    if changed == "separate":
        for sizes in ((8, 4), (0, 12)):
            weights = held((12, 12), 0, sizes), held((12, 7), 0, sizes), held((12, 7), 0, sizes)
            check_threads(separate, whole(5, 2, 12), whole(6, 2, 7), *weights, *parameters(sizes)[1:])
        return
    weight, bias, out, out_bias = parameters((4, 8))
    if changed == "cuts":  # between heads, and along other dimensions
        out = held((12, 12), 0, (5, 7))
        check_threads(run, whole(5, 2, 12), weight, whole(36), out, out_bias, whole(1, 1, 12))
        weight = held((36, 12), 0, (5, 7), 3)
    check_threads(run, whole(5, 2, 12), weight, bias, out, out_bias, whole(1, 1, 12))


# Whole layers -------------------------------------------------------------------------------------------------------


def layer(made: nn.Module, cuts: dict[str, tuple[int, tuple[int, ...], int]], *inputs: Given, **named: Any) -> Any:
    """A function of inputs and parameters, and what is given to it."""
    names = dict(made.named_parameters())
    givens = [held(tuple(p.shape), *cuts[n]) if n in cuts else whole(*p.shape) for n, p in names.items()]

    def run(*tensors: Tensor) -> Any:
        torch.manual_seed(5)
        values = dict(zip(names, tensors[len(inputs) :], strict=True))
        return torch.func.functional_call(made, values, tensors[: len(inputs)], named)

    return run, (*inputs, *givens)


@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("norm_first", [False, True])
def test_encoder_layer(ranks, batch_first: bool, norm_first: bool) -> None:
    made = nn.TransformerEncoderLayer(12, 3, 20, 0.2, F.gelu, batch_first=batch_first, norm_first=norm_first).double()
    cuts = {
        "self_attn.in_proj_weight": (0, (8, 4), 3),
        "self_attn.in_proj_bias": (0, (8, 4), 3),
        "self_attn.out_proj.weight": (1, (8, 4), 1),
        "linear1.weight": (0, (9, 11), 1),
        "linear1.bias": (0, (9, 11), 1),
        "linear2.weight": (1, (9, 11), 1),
    }
    run, givens = layer(made, cuts, whole(4, 5, 12))
    found = check(ranks, run, *givens)
    assert not found.gathered
    assert [why for operation, why in found.moves if operation != "all_reduce"] == []


def test_decoder_layer_and_a_model_in_evaluation(ranks) -> None:
    made = nn.TransformerDecoderLayer(12, 3, 20, 0.2, batch_first=True).double()
    cuts = {}
    for name in ("self_attn", "multihead_attn"):
        cuts |= {f"{name}.in_proj_weight": (0, (4, 0, 8), 3), f"{name}.out_proj.weight": (1, (4, 0, 8), 1)}
    mask = nn.Transformer.generate_square_subsequent_mask(4, dtype=torch.float64)
    run, givens = layer(made, cuts, whole(2, 4, 12), whole(2, 5, 12), tgt_mask=mask, tgt_is_causal=True)
    check(ranks, run, *givens, workers=3)
    encoder = nn.TransformerEncoder(nn.TransformerEncoderLayer(12, 4, 20, batch_first=True).double(), 2).eval()
    cuts = {"layers.0.self_attn.in_proj_weight": (0, (3, 9), 3), "layers.1.self_attn.in_proj_weight": (0, (3, 9), 3)}
    padding = torch.tensor([[False, False, True], [False] * 3])
    run, givens = layer(encoder, cuts, whole(2, 3, 12), src_key_padding_mask=padding)
    check(ranks, run, *givens)
