"""Recurrent layers with their hidden units among workers: every step, each needs what all found in the last one.

The input's products with the weights are made for all steps at once; a step gathers the new hidden state, and what is
gathered is the next layer's input too, so that layers need no more than their steps do.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sheaf.plans.split import Cut
from sheaf.split.moves import sliced
from sheaf.split.registry import FALLBACK, rule
from sheaf.split.tensor import Split

_GATES = {"lstm": 4, "gru": 3, "rnn_tanh": 1, "rnn_relu": 1}


@rule("lstm", "gru", "rnn_tanh", "rnn_relu")
def recurrent(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What torch.nn.LSTM, GRU and RNN call; not packed sequences, and no projections.

    The output is cut along its features, and so are the last states.
    """
    if kwargs or len(args) != 9 or not isinstance(args[3], bool):
        return FALLBACK
    kind = function.__name__
    data, state, _, biased, layers, dropped, training, both_ways, batch_first = args
    weights: list[Tensor] = list(args[2])
    ways, each = 1 + both_ways, 4 if biased else 2
    if len(weights) != layers * ways * each:
        return FALLBACK
    cut = _hidden_cut(mode, kind, weights)
    if cut is None:
        return FALLBACK
    flowing = mode.enter(data, kind)
    if batch_first:
        flowing = flowing.transpose(0, 1)
    hidden, memory = state if kind == "lstm" else (state, None)
    hidden = mode.enter(hidden, kind)
    own_memory = None if memory is None else mode.part(memory, 2, cut, kind)
    outputs: list[Tensor] = []
    last: list[tuple[Tensor, Tensor | None]] = []
    for layer in range(layers):
        final = layer == layers - 1
        if layer and dropped and training:
            flowing = torch.dropout(flowing, dropped, True)
        outputs.clear()
        for way in range(ways):
            place = layer * ways + way
            parts = _parts(mode, kind, weights[place * each : (place + 1) * each], cut)
            start = hidden[place], None if own_memory is None else own_memory[place]
            made, ended = _run(mode, kind, flowing, start, parts, cut, backwards=way == 1, together=not final)
            outputs.append(made)
            last.append(ended)
        flowing = torch.cat(outputs, -1) if ways > 1 else outputs[0]
    output = Split(flowing.transpose(0, 1) if batch_first else flowing, 2, Cut(cut.sizes, ways))
    states = [Split(torch.stack([one[0] for one in last]), 2, cut)]
    if kind == "lstm":
        states.append(Split(torch.stack([one[1] for one in last if one[1] is not None]), 2, cut))
    return output, *states


@rule("lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell")
def cell(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """One step of one layer; the new state is cut along its features."""
    given: dict[str, Any] = dict(zip(("input", "hx", "w_ih", "w_hh", "b_ih", "b_hh"), args, strict=False)) | kwargs
    kind = function.__name__.removesuffix("_cell")
    weights: list[Tensor] = [given["w_ih"], given["w_hh"]]
    weights += [given[name] for name in ("b_ih", "b_hh") if given.get(name) is not None]
    cut = _hidden_cut(mode, kind, weights) if len(weights) != 3 else None
    if cut is None:
        return FALLBACK
    hidden, memory = given["hx"] if kind == "lstm" else (given["hx"], None)
    parts = _parts(mode, kind, weights, cut)
    flow = F.linear(mode.enter(given["input"], kind), parts[0], parts[2])
    whole = mode.enter(hidden, kind)
    if isinstance(hidden, Split) and (hidden.axis, hidden.cut) == (1, cut):
        own = hidden.local
    else:
        own = sliced(whole, 1, cut, mode.team.rank)
    own_memory = None if memory is None else mode.part(memory, 1, cut, kind)
    found, memory = _step(kind, flow, F.linear(whole, parts[1], parts[3]), own, own_memory)
    made = Split(found, 1, cut)
    return made if memory is None else (made, Split(memory, 1, cut))


def _hidden_cut(mode: Any, kind: str, weights: list[Tensor]) -> Cut | None:
    """How many hidden units each worker has, if a weight is cut by them, or the second may be, and is from here on."""
    gates, length = _GATES[kind], weights[0].shape[0]
    for weight in weights:
        if isinstance(weight, Split) and (weight.axis, weight.shape[0], weight.cut.outer) == (0, length, gates):
            return Cut(weight.cut.sizes)
    offered = mode.propose(weights[1], 0, Cut.even(length, mode.team.workers, outer=gates))
    if offered is None:
        return None
    weights[1] = offered
    return Cut(offered.cut.sizes)


def _parts(mode: Any, kind: str, weights: Sequence[Tensor], cut: Cut) -> tuple[Tensor, Tensor, Any, Any]:
    """This worker's rows of both weights, and of both biases or None."""
    rows = Cut(cut.sizes, _GATES[kind])
    parts = [mode.part(weight, 0, rows, kind) for weight in weights]
    return (*parts, None, None) if len(parts) == 2 else tuple(parts)


def _run(
    mode: Any,
    kind: str,
    data: Tensor,
    start: tuple[Tensor, Tensor | None],
    parts: tuple[Tensor, Tensor, Any, Any],
    cut: Cut,
    *,
    backwards: bool,
    together: bool,
) -> tuple[Tensor, tuple[Tensor, Tensor | None]]:
    """One layer over all steps of steps x batch x features, and its last state; the output gathered if ``together``."""
    flow = F.linear(data, parts[0], parts[2])
    whole, memory = start
    own = sliced(whole, 1, cut, mode.team.rank)
    steps = range(len(flow))
    found: list[Tensor] = []
    for count, step in enumerate(reversed(steps) if backwards else steps):
        own, memory = _step(kind, flow[step], F.linear(whole, parts[1], parts[3]), own, memory)
        if together or count < len(flow) - 1:
            whole = mode.enter(Split(own, 1, cut), kind)
        found.append(whole if together else own)
    return torch.stack(found[::-1] if backwards else found), (own, memory)


def _step(kind: str, flow: Tensor, back: Tensor, hidden: Tensor, memory: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The new state of units from what flows in, what comes back, and their last state; gates in torch's order."""
    if kind == "gru":
        (reset, update, new), (back_reset, back_update, back_new) = flow.chunk(3, -1), back.chunk(3, -1)
        reset, update = torch.sigmoid(reset + back_reset), torch.sigmoid(update + back_update)
        new = torch.tanh(new + reset * back_new)
        return (hidden - new) * update + new, None
    if memory is None:
        return (torch.tanh if kind == "rnn_tanh" else torch.relu)(flow + back), None
    enters, keeps, new, leaves = (flow + back).chunk(4, -1)
    memory = torch.sigmoid(keeps) * memory + torch.sigmoid(enters) * torch.tanh(new)
    return torch.sigmoid(leaves) * torch.tanh(memory), memory
