"""Recurrent layers with their hidden units among workers, against plain torch."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from cases import Given, check, check_threads, cut, held, whole
from torch import Tensor, nn

GATES = {"LSTM": 4, "GRU": 3, "RNN": 1}


def layer(
    made: nn.Module, sizes: tuple[int, ...], *inputs: Given, keep: tuple[str, ...] = (), state: int = 0
) -> tuple[Callable[..., Any], tuple[Given, ...]]:
    """A function of inputs and parameters, and what is given to it; the last ``state`` inputs are the first state."""
    made = made.double()
    gates = GATES[type(made).__name__.removesuffix("Cell")]
    names = dict(made.named_parameters())
    givens = [
        whole(*value.shape) if name in keep else held(tuple(value.shape), 0, sizes, gates)
        for name, value in names.items()
    ]
    plain = len(inputs) - state

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(5)
        values = dict(zip(names, tensors[len(inputs) :], strict=True))
        begins = tensors[plain : len(inputs)]
        first = (begins if state > 1 else begins[0],) if state else ()
        found = torch.func.functional_call(copy.deepcopy(made), values, (*tensors[:plain], *first))
        if isinstance(found, Tensor):
            return (found,)
        return tuple(one for part in found for one in (part if isinstance(part, tuple) else (part,)))

    return run, (*inputs, *givens)


@pytest.mark.thinned(5)
@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("both_ways", [False, True])
@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("batch_first", [False, True])
@pytest.mark.parametrize("bias", [False, True])
def test_whole_layers(kind: str, both_ways: bool, layers: int, batch_first: bool, bias: bool) -> None:
    made = getattr(nn, kind)(4, 5, layers, bidirectional=both_ways, batch_first=batch_first, bias=bias)
    for sizes in ((3, 2), (0, 5)):
        run, givens = layer(made, sizes, whole(3, 2, 4))
        check_threads(run, *givens)


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
def test_on_real_ranks_with_dropout_and_a_first_state(ranks, kind: str) -> None:
    made = getattr(nn, kind)(4, 5, 3, bidirectional=True, batch_first=True, dropout=0.4)
    states = [whole(6, 2, 5)] * (1 + (kind == "LSTM"))
    run, givens = layer(made, (3, 0, 2), whole(2, 3, 4), *states, state=len(states))
    check(ranks, run, *givens, workers=3)


def test_what_moves_is_the_steps() -> None:
    made = nn.LSTM(4, 5, 2)
    run, givens = layer(made, (3, 2), whole(4, 2, 4))
    moved = [operation for operation, _ in check_threads(run, *givens).moves]
    assert moved.count("all_gather") == 4 + 3
    assert moved.count("reduce_scatter") == 4 + 3


def test_inputs_and_states_that_are_cut() -> None:
    for place, sizes in ((0, (3, 1)), (1, (1, 1)), (2, (1, 3))):
        made = nn.LSTM(4, 5)
        run, givens = layer(
            made, (3, 2), cut((4, 2, 4), place, sizes), cut((1, 2, 5), 2, (3, 2)), cut((1, 2, 5), 2, (1, 4)), state=2
        )
        check_threads(run, *givens)
    run, givens = layer(nn.RNN(4, 5, nonlinearity="relu"), (3, 2), whole(4, 4))
    assert [found.dim for found in check_threads(run, *givens).cuts if found is not None] == [1, 1]


def test_one_layer_flows_into_the_next() -> None:
    one, two = nn.LSTM(4, 5, batch_first=True), nn.GRU(5, 3, batch_first=True)
    first, givens = layer(one, (3, 2), whole(2, 3, 4))
    second, more = layer(two, (2, 1), whole(2, 3, 5))

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        return second(first(*tensors[: len(givens)])[0], *tensors[len(givens) :])

    check_threads(run, *givens, *more[1:])


def test_some_weights_whole_and_some_cut_elsewhere() -> None:
    for keep in (("weight_ih_l0", "bias_ih_l0", "bias_hh_l0"), ("weight_hh_l0",), ("bias_ih_l0",)):
        run, givens = layer(nn.LSTM(4, 5), (3, 2), whole(3, 2, 4), keep=keep)
        check_threads(run, *givens)
    run, givens = layer(nn.GRU(4, 5), (3, 2), whole(3, 2, 4))
    check_threads(run, givens[0], held((15, 4), 1, (3, 1)), held((15, 5), 0, (7, 8)), *givens[3:])


def test_projections_and_packed_sequences_are_whole() -> None:
    made = nn.LSTM(4, 5, proj_size=3, bias=False)
    run, givens = layer(made, (3, 2), whole(3, 2, 4), keep=("weight_hr_l0",))
    check_threads(run, *givens)
    inner = nn.GRU(4, 5)

    def packed(tensor: Tensor, *parameters: Tensor) -> Tensor:
        names = [name for name, _ in inner.named_parameters()]
        sequence = nn.utils.rnn.pack_padded_sequence(tensor, torch.tensor([3, 2]))
        values = dict(zip(names, parameters, strict=True))
        return torch.func.functional_call(copy.deepcopy(inner), values, (sequence,))[0].data

    check_threads(packed, *layer(inner, (3, 2), whole(3, 2, 4))[1])


@pytest.mark.parametrize("kind", ["LSTM", "GRU", "RNN"])
@pytest.mark.parametrize("bias", [False, True])
def test_cells(kind: str, bias: bool) -> None:
    made = getattr(nn, f"{kind}Cell")(4, 5, bias=bias)
    states = [whole(2, 5)] * (1 + (kind == "LSTM"))
    step, givens = layer(made, (3, 0, 2), whole(2, 4), *states, state=len(states))

    def run(*tensors: Tensor) -> tuple[Tensor, ...]:
        given, first, rest = tensors[0], tensors[1 : 1 + len(states)], tensors[1 + len(states) :]
        for _ in range(3):
            first = step(given, *first, *rest)
        return first

    check_threads(run, *givens, workers=3)
    step, givens = layer(made, (3, 0, 2), whole(4))
    check_threads(step, *givens, workers=3)
