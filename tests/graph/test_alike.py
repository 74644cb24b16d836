"""Blocks that do the same are checked, not run; what is found must be what running every one of them finds."""

import itertools
import sys
from collections.abc import Callable
from contextlib import nullcontext
from functools import partial
from typing import Any

import pytest
import torch
from graph_cases import task, texts, token_loss, vectors
from tiny import Doubled
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.checkpoint import checkpoint

from sheaf.graph import ModelFacts, alike, kinds
from sheaf.graph.trace import trace
from sheaf.task import Task
from sheaf.zoo.models import BERT, GPT, MoE, Transformer
from sheaf.zoo.tasks.small import SMALL

WIDTH, LAYERS = 8, 8
tracing: Any = sys.modules["sheaf.graph.trace"]


def both(one: Task, monkeypatch: pytest.MonkeyPatch) -> tuple[ModelFacts, ModelFacts, int]:
    """Facts with blocks checked, with each of them run, and how many were only checked."""
    counters: list[alike.Again] = []
    settle = alike.Again._settle

    def settled(counter: alike.Again) -> None:
        counters.append(counter)
        settle(counter)

    monkeypatch.setattr(alike.Again, "_settle", settled)
    found = trace(one, 4)
    monkeypatch.setattr(tracing, "kinds", lambda *_: {})
    return found, trace(one, 4), sum(len(counter._followers) for counter in counters)


class Stack(nn.Module):
    """Layers one after the other, and one more at the end."""

    def __init__(self, layer: Callable[[int], nn.Module], through: Callable[..., Any] | None = None) -> None:
        super().__init__()
        self.layers = nn.ModuleList(layer(index) for index in range(LAYERS))
        self.last = nn.Linear(WIDTH, 3)
        self.through = through or _chain

    def forward(self, value: Tensor) -> Tensor:
        return self.last(self.through(self.layers, value))


def _chain(layers: Any, value: Tensor) -> Tensor:
    for layer in layers:
        value = layer(value)
    return value


class Layer(nn.Module):
    """A residual layer with what a case asks for."""

    def __init__(self, index: int = 0, act: Callable[..., Tensor] | None = None, p: float = 0.1) -> None:
        super().__init__()
        self.index, self.act = index, act or (lambda _layer, value: F.relu(value))
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 12), nn.Linear(12, WIDTH)
        self.drop = nn.Dropout(p)

    def forward(self, value: Tensor, *given: Tensor) -> Any:
        for one in given:
            value = value + one
        return value + self.drop(self.down(self.act(self, self.up(self.norm(value)))))


class Attends(nn.Module):
    """torch's own decoder layer, all of which look at one memory."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens = nn.Embedding(64, WIDTH)
        self.first = nn.Linear(WIDTH, WIDTH)
        self.layers = nn.ModuleList(nn.TransformerDecoderLayer(WIDTH, 2, 12, batch_first=True) for _ in range(LAYERS))
        self.last = nn.Linear(WIDTH, 64)

    def forward(self, tokens: Tensor) -> Tensor:
        value = self.tokens(tokens)
        memory = self.first(value)
        for layer in self.layers:
            value = layer(value, memory)
        return self.last(value + memory)


def stacked(layer: Callable[[int], nn.Module], through: Any = None, **options: Any) -> Task:
    return task(lambda: Stack(layer, through), vectors(WIDTH), **options)


def words(model: Callable[[], nn.Module], **options: Any) -> Task:
    return task(model, texts(), token_loss, **({"inputs": lambda batch: (batch,)} | options))


def pairs(batch: Tensor) -> tuple[Tensor, Tensor]:
    return batch, batch


def aside(layers: Any, value: Tensor) -> Tensor:
    """Layers whose second output counts for some."""
    total = value.sum() * 0
    for layer in layers:
        value, beside = layer(value), layer.index % 2
        total = total + value.mean() if beside else total
    return value + total


SIZES = {"width": WIDTH, "layers": LAYERS, "heads": 2, "wide": 12}
GPTS = {"vocabulary": 64, "context": 16, "width": WIDTH, "layers": LAYERS, "heads": 2}
ALIKE: dict[str, Callable[[], Task]] = {
    "gpt": lambda: words(lambda: GPT(**GPTS)),
    "gpt, bf16": lambda: words(lambda: GPT(**GPTS, dropout=0.0), precision="bf16"),
    "gpt, fp64, masked": lambda: words(lambda: GPT(**GPTS, padding=0), precision="fp64"),
    "bert": lambda: words(lambda: BERT(**GPTS, wide=12)),
    "encoder and decoder": lambda: words(lambda: Transformer(**SIZES, vocabulary=64), inputs=pairs),
    "one memory": lambda: words(Attends),
    "one memory, bf16": lambda: words(Attends, precision="bf16"),
    "dropout": lambda: stacked(Layer),
    "other numbers in front": lambda: stacked(lambda index: Layer(p=0.0 if index == 0 else 0.2)),
    "autocast inside": lambda: stacked(lambda index: Layer(act=_autocast)),
    "no gradient inside": lambda: stacked(lambda index: Layer(act=lambda _, value: value * _detached(value))),
    "a function of one's own": lambda: stacked(lambda index: Layer(act=lambda _, value: Doubled.apply(value))),
    "checkpoint around": lambda: stacked(Layer, _checkpointed),
    "checkpoint inside": lambda: stacked(lambda index: Layer(act=_recomputed)),
    "some outputs used again": lambda: stacked(Layer, aside),
    "experts": lambda: words(lambda: _First(MoE(**GPTS, experts=4, wide=12))),
    "writes to its own": lambda: stacked(lambda index: Layer(act=lambda _, value: value.mul(2).add_(1).relu_())),
}  # fmt: skip


RUN = ("experts", "checkpoint inside", "a function of one's own")  # of which it cannot be told what others would do


def _recomputed(_layer: nn.Module, value: Tensor) -> Tensor:
    return checkpoint(F.gelu, value, use_reentrant=False)


def _detached(value: Tensor) -> Tensor:
    with torch.no_grad():
        return value.sigmoid()


def _autocast(_layer: nn.Module, value: Tensor) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16):
        return F.relu(value @ torch.ones(12, 12))


def _checkpointed(layers: Any, value: Tensor) -> Tensor:
    for layer in layers:
        value = checkpoint(layer, value, use_reentrant=False)
    return value


def _some_checkpointed(layers: Any, value: Tensor) -> Tensor:
    for layer in layers:
        value = checkpoint(layer, value, use_reentrant=False) if layer.index % 2 else layer(value)
    return value


@pytest.mark.thinned(8)
@pytest.mark.parametrize("name", ALIKE)
def test_alike_blocks_are_counted_as_each_would_be(name: str, monkeypatch: pytest.MonkeyPatch):
    found, wanted, followed = both(ALIKE[name](), monkeypatch)
    assert found == wanted
    assert followed == 0 if name in RUN else followed >= LAYERS // 2


def _with(change: Callable[[Any], None], at: int = 4) -> Callable[[int], nn.Module]:
    """Layers of which one is changed after it was made."""

    def made(index: int) -> nn.Module:
        layer = Layer(index)
        if index == at:
            change(layer)
        return layer

    return made


def _linear(layer: Any) -> None:
    layer.act = lambda _, value: value * 2


def _hooked(layer: nn.Module) -> None:
    layer.register_forward_hook(lambda _module, _given, output: output * 2)


def _doubling(_layer: nn.Module, value: Tensor) -> Tensor:
    value.register_hook(lambda gradient: gradient * 2)
    return value.relu()


def _by_kernel(layer: Any, value: Tensor) -> Tensor:
    rows = value[None, None]
    with sdpa_kernel(SDPBackend.MATH) if layer.index == 4 else nullcontext():
        return F.scaled_dot_product_attention(rows, rows, rows)[0, 0]


def _odd(layer: Any, value: Tensor) -> Tensor:
    return value.relu() if layer.index % 2 else value.tanh() * 2


def _as_many(layer: Any, value: Tensor) -> Tensor:
    return value + value[:, : 1 + layer.index].mean(1, keepdim=True)


def _given_a_weight(layers: Any, value: Tensor) -> Tensor:
    return _chain([_Given(layer, layers[0].up) for layer in layers], value)


def _counting() -> Callable[[Any, Tensor], Tensor]:
    calls = itertools.count()
    return lambda _, value: F.relu(value).sigmoid() if next(calls) % LAYERS == 5 else F.relu(value)


def _kept(layer: Any, value: Tensor) -> Tensor:
    layer.kept = value.square().mean()
    return F.relu(value)


def _kept_are_used(layers: Any, value: Tensor) -> Tensor:
    value = _chain(layers, value)
    return value + sum(layer.kept for layer in layers)


def _from_before(layers: Any, value: Tensor) -> Tensor:
    for before, layer in itertools.pairwise([None, *layers]):
        layer.act = lambda _, own, before=before: own * (1 if before is None else before.kept)
        value = layer(value)
        layer.kept = layer.up.weight.sum()
    return value


def _tried(layer: Any, value: Tensor) -> Tensor:
    try:
        return F.relu(value) if layer.index != 4 else F.gelu(value)
    except Exception:
        return value


def _given_an_object(layers: Any, value: Tensor) -> Tensor:
    seen: list[Tensor] = []
    for layer in layers:
        layer.act = lambda _, own: (seen.append(own), F.relu(own))[1]
        value = layer(value)
    return value + torch.stack([own.mean() for own in seen]).sum()


class Normed(Layer):
    """Counts batch statistics."""

    def __init__(self, _index: int) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)


class Filled(Layer):
    """Writes what it gives into a tensor that had no history."""

    def forward(self, value: Tensor, *given: Tensor) -> Any:
        return torch.zeros_like(value).copy_(super().forward(value, *given))


class Slow(torch.autograd.Function):
    """A function of the user's own, whose backward does as much as it is told."""

    @staticmethod
    def forward(ctx: Any, value: Tensor, times: int) -> Tensor:
        ctx.times = times
        return value * 2

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        found = gradients[0] * 2
        for _ in range(ctx.times):
            found = found + 0
        return found, None


class Outer(nn.Module):
    """Another layer's weight is used too."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = Stack(Layer)
        layers: Any = self.inner.layers
        for one, other in itertools.pairwise(layers):
            one.act = lambda _, value, other=other: F.relu(value) * other.up.bias

    def forward(self, value: Tensor) -> Tensor:
        return self.inner(value)


UNLIKE: dict[str, Callable[[], Task]] = {
    "no dropout in one": lambda: stacked(_with(lambda layer: setattr(layer.drop, "p", 0.0))),
    "another eps in one": lambda: stacked(_with(lambda layer: setattr(layer.norm, "eps", 0.1))),
    "another activation in one": lambda: stacked(_with(_linear)),
    "more in odd layers": lambda: stacked(lambda index: Layer(index, _odd)),
    "another kernel in one": lambda: stacked(lambda index: Layer(index, _by_kernel)),
    "the index in a shape": lambda: stacked(lambda index: Layer(index, _as_many)),
    "a frozen layer": lambda: stacked(_with(lambda layer: layer.requires_grad_(requires_grad=False))),
    "a frozen bias": lambda: stacked(_with(lambda layer: layer.up.bias.requires_grad_(requires_grad=False))),
    "a hook on one": lambda: stacked(_with(_hooked)),
    "a hook on a tensor": lambda: stacked(lambda _: Layer(act=_doubling)),
    "a global counter": lambda: stacked(partial(Layer, act=_counting())),
    "what is kept is used": lambda: stacked(lambda index: Layer(index, _kept), _kept_are_used),
    "what the one before kept": lambda: stacked(Layer, _from_before),
    "kept in a list": lambda: stacked(Layer, _given_an_object),
    "errors are caught": lambda: stacked(lambda index: Layer(index, _tried)),
    "one norm for all": lambda: stacked(partial(_sharing, norms=[])),
    "written in place": lambda: stacked(Layer, lambda layers, x: _chain([_Writes(layer) for layer in layers], x)),
    "batch statistics": lambda: stacked(Normed),
    "checkpoint around some": lambda: stacked(Layer, _some_checkpointed),
    "filled in place": lambda: stacked(Filled),
    "more in backward": lambda: stacked(lambda index: Layer(index, lambda one, value: Slow.apply(value, one.index))),
    "a neighbour's bias": lambda: task(Outer, vectors(WIDTH)),
    "a leaf that is given": lambda: stacked(Layer, _given_a_weight),
    "one detached": lambda: stacked(Layer, lambda layers, x: _chain(layers[5:], _chain(layers[:5], x).detach())),
}  # fmt: skip


def _sharing(index: int, norms: list[Any]) -> nn.Module:
    layer = Layer(index)
    norms[:] = [layer.norm] if index == 0 else norms
    layer.norm = norms[0]
    return layer


class _Writes:
    """Calls a layer, which changes what it is given."""

    def __init__(self, layer: Any) -> None:
        self.layer = layer

    def __call__(self, value: Tensor) -> Tensor:
        value = self.layer(value)
        return value.mul_(2)


class _Given:
    """Calls a layer with a parameter of another's."""

    def __init__(self, layer: Any, other: Any) -> None:
        self.layer, self.other = layer, other

    def __call__(self, value: Tensor) -> Tensor:
        return self.layer(value, self.other.weight.mean(0))


@pytest.mark.thinned(4)
@pytest.mark.parametrize("name", UNLIKE)
def test_blocks_that_only_look_alike_are_counted_as_they_are(name: str, monkeypatch: pytest.MonkeyPatch):
    found, wanted, _ = both(UNLIKE[name](), monkeypatch)
    assert found == wanted


@pytest.mark.thinned(6)
@pytest.mark.parametrize("name", SMALL)
def test_the_zoos_models_are_counted_as_before(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(kinds, "LEAST", 2)
    monkeypatch.setattr(alike, "REAL", 1)
    if "lstm" in name:  # torch's fake tensors share its gradients when they meet it first, and later do not
        trace(SMALL[name](), 4)
    found, wanted, _ = both(SMALL[name](), monkeypatch)
    assert found == wanted


class _First(nn.Module):
    """The first of a model's outputs."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, tokens: Tensor) -> Tensor:
        return self.model(tokens)[0]
