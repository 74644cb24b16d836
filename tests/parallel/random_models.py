"""Small random models, their tasks, and plans that are legal for them.

A model is a list of values, each computed from earlier ones: ``Op("linear", (3,), (5, 7))`` puts value 3, of 5
features, through a linear layer to 7. Value 0 is the model's input. Everything is in float64, so that a mistake shows.
"""

import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from sheaf import Loss, Task
from sheaf.graph import cut

WORDS, CLASSES, IGNORED = 11, 5, -100
ACTIVATIONS: dict[str, Callable[[], nn.Module]] = {
    "tanh": nn.Tanh,
    "gelu": nn.GELU,
    "relu": nn.ReLU,
    "silu": nn.SiLU,
    "relu in place": lambda: nn.ReLU(inplace=True),
    "prelu": nn.PReLU,
}


@dataclass(frozen=True)
class Op:
    """One value: of which kind, from which values, with which sizes; ``module`` is an earlier op's, used again."""

    kind: str
    sources: tuple[int, ...]
    given: tuple[Any, ...] = ()
    module: int | None = None
    frozen: bool = False


@dataclass(frozen=True)
class Spec:
    """A model and its data. ``kind`` of input: tokens, series (length x features), vector, image."""

    kind: str
    shape: tuple[int, ...]
    layers: tuple[Op, ...]  # not `ops`: cloudpickle would take torch.ops along
    output: str = "tensor"
    aside: int | None = None
    second: int = 0
    named: bool = False
    ragged: bool = False
    unused: bool = False
    loss: str = "mean"
    samples: int = 9
    batch: int = 5
    microbatch: int = 2
    optimizer: str = "adamw"
    clip: float | None = None
    seed: int = 0


class Block(nn.Module):
    """A transformer's wide layers, normed before and added."""

    def __init__(self, width: int, wide: int, drop: float) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, wide), nn.Linear(wide, width)
        self.drop = nn.Dropout(drop)

    def forward(self, given: Tensor) -> Tensor:
        return given + self.drop(self.down(F.gelu(self.up(self.norm(given)))))


class Fused(nn.Module):
    """Attention with queries, keys and values from one matrix."""

    def __init__(self, width: int, heads: int, causal: bool, drop: float) -> None:
        super().__init__()
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.heads, self.causal, self.drop = heads, causal, drop

    def forward(self, given: Tensor) -> Tensor:
        batch, length, width = given.shape
        parts = self.qkv(given).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        query, key, value = parts.unbind(0)
        mixed = F.scaled_dot_product_attention(query, key, value, dropout_p=self.drop, is_causal=self.causal)
        return self.out(mixed.transpose(1, 2).reshape(batch, length, width))


class ByHand(nn.Module):
    """Attention with separate matrices, softmax and dropout written out, and grouped keys."""

    def __init__(self, width: int, heads: int, groups: int, drop: float) -> None:
        super().__init__()
        self.size, self.groups, self.heads = width // heads, groups, heads
        self.query, self.out = nn.Linear(width, width), nn.Linear(width, width, bias=False)
        self.key, self.value = nn.Linear(width, groups * self.size), nn.Linear(width, groups * self.size)
        self.drop = nn.Dropout(drop)

    def forward(self, given: Tensor) -> Tensor:
        batch, length, width = given.shape

        def heads(tensor: Tensor) -> Tensor:
            return tensor.view(batch, length, -1, self.size).transpose(1, 2)

        query, key, value = heads(self.query(given)), heads(self.key(given)), heads(self.value(given))
        if self.groups < self.heads:
            key = key.repeat_interleave(self.heads // self.groups, dim=1)
            value = value.repeat_interleave(self.heads // self.groups, dim=1)
        scores = query @ key.transpose(-2, -1) / self.size**0.5
        hidden = torch.triu(torch.ones(length, length, dtype=torch.bool), diagonal=1)
        weights = self.drop(scores.masked_fill(hidden, -1e9).softmax(-1))
        return self.out((weights @ value).transpose(1, 2).contiguous().view(batch, length, width))


class Gated(nn.Module):
    """A matrix whose halves gate each other."""

    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.both, self.out = nn.Linear(width, 2 * wide), nn.Linear(wide, width)

    def forward(self, given: Tensor) -> Tensor:
        gate, value = self.both(given).chunk(2, dim=-1)
        return self.out(F.silu(gate) * value)


class Recurrent(nn.Module):
    """An LSTM or a GRU over a series, its state forgotten."""

    def __init__(self, cell: str, width: int, hidden: int, layers: int, both: bool, drop: float) -> None:
        super().__init__()
        made = nn.LSTM if cell == "lstm" else nn.GRU
        self.cell = made(
            width, hidden, layers, batch_first=True, bidirectional=both, dropout=drop if layers > 1 else 0.0
        )

    def forward(self, given: Tensor) -> Tensor:
        return self.cell(given)[0]


class Attention(nn.Module):
    """torch's own, of a series to itself."""

    def __init__(self, width: int, heads: int, drop: float, weights: bool) -> None:
        super().__init__()
        self.inner, self.weights = nn.MultiheadAttention(width, heads, dropout=drop, batch_first=True), weights

    def forward(self, given: Tensor) -> Tensor:
        return self.inner(given, given, given, need_weights=self.weights)[0]


class Along(nn.Module):
    """A convolution over the length of a series."""

    def __init__(self, width: int, wide: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(width, wide, 3, padding=1)

    def forward(self, given: Tensor) -> Tensor:
        return self.conv(given.transpose(1, 2)).transpose(1, 2)


class Constants(nn.Module):
    """Buffers, one of them counting."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.register_buffer("factor", torch.linspace(0.5, 1.5, size))
        self.register_buffer("calls", torch.zeros((), dtype=torch.long))
        self.calls: Tensor
        self.factor: Tensor

    def forward(self, given: Tensor) -> Tensor:
        return given * self.factor


MODULES: dict[str, Callable[..., nn.Module]] = {
    "linear": lambda size, out, bias: nn.Linear(size, out, bias=bias),
    "activation": lambda name: ACTIVATIONS[name](),
    "dropout": nn.Dropout,
    "dropout2d": nn.Dropout2d,
    "layer norm": nn.LayerNorm,
    "rms norm": nn.RMSNorm,
    "batch norm": nn.BatchNorm1d,
    "batch norm 2d": nn.BatchNorm2d,
    "group norm": nn.GroupNorm,
    "block": Block,
    "fused": Fused,
    "by hand": ByHand,
    "gated": Gated,
    "recurrent": Recurrent,
    "attention": Attention,
    "encoder": lambda width, heads, wide, drop, first: nn.TransformerEncoderLayer(
        width, heads, wide, dropout=drop, batch_first=True, norm_first=first
    ),
    "along": Along,
    "constants": Constants,
    "embedding": lambda words, width, padding: nn.Embedding(words, width, padding_idx=0 if padding else None),
    "second": nn.Linear,
    "conv": lambda size, out, kernel, stride, groups, bias: nn.Conv2d(
        size, out, kernel, stride=stride, padding=kernel // 2, groups=groups, bias=bias
    ),
    "transposed": lambda size, out: nn.ConvTranspose2d(size, out, 2, stride=2),
    "max pool": nn.MaxPool2d,
    "average pool": nn.AvgPool2d,
}


class Model(nn.Module):
    """Interprets a spec."""

    def __init__(self, spec: Spec) -> None:
        super().__init__()
        self.spec = spec
        self.parts = nn.ModuleDict()
        for number, op in enumerate(spec.layers, start=1):
            if op.kind in MODULES and op.module is None:
                self.parts[f"part{number}"] = MODULES[op.kind](*op.given)
                if op.frozen:
                    self.parts[f"part{number}"].requires_grad_(requires_grad=False)
            if op.kind == "scale":
                setattr(self, f"scale{number}", nn.Parameter(torch.linspace(0.8, 1.2, op.given[0])))
        for number, op in enumerate(spec.layers, start=1):
            if op.kind == "tied":
                self.parts[f"part{number}"] = nn.Linear(*op.given[:2])
                self.parts[f"part{number}"].weight = self.parts[f"part{op.given[2]}"].weight
        if spec.unused:
            self.unused = nn.Linear(3, 5)

    def forward(self, first: Tensor, second: Tensor | None = None) -> Any:
        values = [first]
        for number, op in enumerate(self.spec.layers, start=1):
            values.append(self._value(number, op, [values[source] for source in op.sources], second))
        if self.spec.output == "tensor" or self.spec.aside is None:
            return values[-1]
        aside = values[self.spec.aside]
        return (values[-1], aside) if self.spec.output == "tuple" else {"main": values[-1], "aside": aside}

    def _value(self, number: int, op: Op, given: list[Tensor], second: Tensor | None) -> Tensor:
        if op.kind == "second":
            assert second is not None
            added = self.parts[f"part{number}"](second)
            return given[0] + added.view(*added.shape[:1], *op.sources[1:1], *_spread(added, given[0]))
        if op.kind == "activation" and "in place" in op.given[0]:
            given = [given[0].clone()]
        if op.kind in MODULES or op.kind == "tied":
            return self.parts[f"part{op.module or number}"](*given)
        if op.kind == "scale":
            return given[0] * getattr(self, f"scale{number}")
        if op.kind == "back":  # a product with the transposed weight of an earlier layer
            return F.linear(given[0], self.parts[f"part{op.given[0]}"].weight.t())
        return GLUE[op.kind](*given, *op.given)


def _spread(added: Tensor, target: Tensor) -> tuple[int, ...]:
    if target.ndim == 4:
        return (added.shape[1], 1, 1)
    return (1, added.shape[1]) if target.ndim == 3 else (added.shape[1],)


GLUE: dict[str, Callable[..., Tensor]] = {
    "add": lambda one, other: one + other,
    "gate": lambda one, other: one * torch.sigmoid(other),
    "join": lambda one, other: torch.cat([one, other], dim=-1),
    "join channels": lambda one, other: torch.cat([one, other], dim=1),
    "functional dropout": lambda one, p: F.dropout(one, p, training=True),
    "mean of series": lambda one: one.mean(dim=1),
    "last of series": lambda one: one[:, -1],
    "flat": lambda one: one.flatten(1),
    "mean of image": lambda one: one.mean(dim=(2, 3)),
    "series of image": lambda one: one.flatten(2).transpose(1, 2),
    "half": lambda one: one[..., : one.shape[-1] // 2],
    "softmax": lambda one: one.softmax(dim=-1),
    "detached": lambda one, other: one + 0.5 * other.detach(),
}


def task_of(spec: Spec) -> Task:
    """Its training task."""
    per_word = spec.loss in ("words", "words weighted")

    def loss(output: Any, batch: dict[str, Tensor]) -> Any:
        aside: Any = 0.0
        if spec.output != "tensor" and spec.aside is not None:
            output, beside = output if spec.output == "tuple" else (output["main"], output["aside"])
            aside = 0.1 * beside.square().flatten(1).mean(dim=1).sum()
        logits, wanted = output, batch["labels"]
        if per_word:
            logits, wanted = logits.flatten(0, 1), wanted.flatten()
        if spec.loss == "squares":
            return (logits - F.one_hot(wanted, CLASSES)).square().mean() + aside / len(wanted)
        if spec.loss == "mean":
            return F.cross_entropy(logits, wanted) + aside / len(wanted)
        total = F.cross_entropy(logits, wanted, ignore_index=IGNORED, reduction="sum")
        return Loss(total + aside, (wanted != IGNORED).sum())

    def collate(items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        return {
            key: pad_sequence(
                [item[key] for item in items], batch_first=True, padding_value=IGNORED if key == "labels" else 0
            )
            if items[0][key].ndim
            else torch.stack([item[key] for item in items])
            for key in items[0]
        }

    def inputs(batch: dict[str, Tensor]) -> Any:
        given = {"first": batch["first"]} | ({"second": batch["second"]} if spec.second else {})
        return given if spec.named else tuple(given.values())

    return Task(
        model=lambda: Model(spec),
        loss=loss,
        optimizer=OPTIMIZERS[spec.optimizer],
        data=_data(spec, per_word),
        collate=collate,
        inputs=inputs,
        batch=spec.batch,
        microbatch=spec.microbatch,
        precision="fp64",
        clip=spec.clip,
        seed=spec.seed,
    )


OPTIMIZERS: dict[str, Any] = {
    # a large eps: a gradient that is zero but for rounding must stay so
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, eps=1e-4),
    "sgd": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=0.01),
}


def _data(spec: Spec, per_word: bool) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(spec.seed + 1)
    items: list[dict[str, Tensor]] = []
    for number in range(spec.samples):
        shape = spec.shape
        if spec.ragged:
            shape = (max(2, shape[0] - int(torch.randint(3, (), generator=generator))), *shape[1:])
        if spec.kind == "tokens":
            first = torch.randint(0, WORDS, shape, generator=generator)
        else:
            first = torch.randn(shape, generator=generator, dtype=torch.float64)
        labels = torch.randint(0, CLASSES, shape[:1] if per_word else (), generator=generator)
        if spec.loss == "words weighted":
            alone = (spec.samples % spec.batch or spec.batch) == 1  # a step may be one sample, and needs some weight
            labels[: len(labels) if number == 2 and not alone else min(number % 3, len(labels) - 1)] = IGNORED
        items.append({"first": first, "labels": labels})
        if spec.second:
            items[-1]["second"] = torch.randn(spec.second, generator=generator, dtype=torch.float64)
    return items


# What Hypothesis draws ------------------------------------------------------------------------------------------------


class _Drawing:
    """Draws ops one after the other and keeps the shapes of their values, without the batch."""

    def __init__(self, draw: Any, shape: tuple[int, ...]) -> None:
        self.draw, self.ops, self.shapes = draw, [], [shape]
        self.linears: dict[int, tuple[int, int]] = {}
        self.has_batch_norm = self.mixes_length = False

    @property
    def shape(self) -> tuple[int, ...]:
        return self.shapes[-1]

    def pick(self, *options: Any) -> Any:
        return self.draw(st.sampled_from(options))

    def size(self) -> int:
        return self.draw(st.integers(2, 9))

    def drop(self) -> float:
        return self.pick(0.0, 0.1, 0.5)

    def put(self, kind: str, *given: Any, shape: tuple[int, ...] | None = None, other: int | None = None) -> None:
        sources = (len(self.shapes) - 1,) if other is None else (len(self.shapes) - 1, other)
        frozen = kind in ("linear", "layer norm", "block", "conv") and self.draw(st.integers(0, 7)) == 0
        self.ops.append(Op(kind, sources, given, frozen=frozen))
        self.shapes.append(self.shape if shape is None else shape)
        if kind == "linear":
            self.linears[len(self.ops)] = (given[0], given[1])

    def earlier(self, fits: Callable[[tuple[int, ...]], bool]) -> int | None:
        """An earlier float value whose shape fits."""
        first = 1 if self.ops and self.ops[0].kind == "embedding" else 0
        found = [place for place in range(first, len(self.shapes) - 1) if fits(self.shapes[place])]
        return self.pick(*found) if found else None

    def step(self) -> None:
        """One more value, whatever the shape of the last."""
        kinds = {1: self.on_vector, 2: self.on_series, 3: self.on_image}
        common = self.draw(st.integers(0, 9))
        if common < 4:
            self.on_any()
        else:
            kinds[len(self.shape)]()

    def on_any(self) -> None:
        last = self.shape[-1]
        kind = self.pick("activation", "dropout", "functional dropout", "add", "gate", "scale", "constants", "again")
        other = self.earlier(lambda shape: shape == self.shape)
        if kind in ("add", "gate") and other is not None:
            self.put(self.pick(kind, kind, "detached"), other=other)
        elif kind in ("scale", "constants"):
            self.put(kind, last)
        elif kind == "functional dropout":
            self.put(kind, 0.2)
        elif kind == "dropout":
            self.put(kind, self.drop())
        elif kind == "again" and self.ops:
            same = [
                number
                for number, op in enumerate(self.ops, start=1)
                if op.kind in ("block", "linear", "layer norm", "fused", "gated", "attention")
                and op.module is None
                and self.shapes[op.sources[0]] == self.shapes[number] == self.shape
            ]
            if same:
                number = self.pick(*same)
                self.ops.append(replace(self.ops[number - 1], sources=(len(self.shapes) - 1,), module=number))
                self.shapes.append(self.shape)
        else:
            self.put("activation", self.pick(*(name for name in ACTIVATIONS if name != "prelu" or len(self.shape) > 1)))

    def features(self) -> None:
        """Layers over the last dimension, of vectors and series."""
        *lead, width = self.shape
        kind = self.pick("linear", "linear", "norm", "block", "gated", "join", "tied", "back", "half", "softmax")
        if kind == "norm":
            self.put(self.pick("layer norm", "rms norm"), width)
        elif kind == "block":
            self.put("block", width, self.size(), self.drop())
        elif kind == "gated":
            self.put("gated", width, self.size())
        elif kind == "join" and width < 12:
            other = self.earlier(lambda shape: shape[:-1] == self.shape[:-1] and shape[-1] < 12)
            if other is not None:
                self.put("join", other=other, shape=(*lead, width + self.shapes[other][-1]))
        elif kind == "tied":
            fits = [(number, sizes) for number, sizes in self.linears.items() if sizes[0] == width]
            if fits:
                number, (size, out) = self.pick(*fits)
                self.put("tied", size, out, number, shape=(*lead, out))
        elif kind == "back":
            fits = [(number, sizes) for number, sizes in self.linears.items() if sizes[1] == width]
            if fits:
                number, (size, _) = self.pick(*fits)
                self.put("back", number, shape=(*lead, size))
        elif kind == "half" and width >= 4:
            self.put("half", shape=(*lead, width // 2))
        elif kind == "softmax":
            self.put("softmax")
        else:
            out = self.pick(width, self.size())
            self.put("linear", width, out, self.draw(st.booleans()), shape=(*lead, out))

    def on_vector(self) -> None:
        if self.draw(st.integers(0, 4)) == 0:
            self.has_batch_norm = True
            self.put("batch norm", self.shape[0])
        else:
            self.features()

    def on_series(self) -> None:
        length, width = self.shape
        heads = self.pick(*(heads for heads in (1, 2, 3, 4) if width % heads == 0))
        kind = self.pick("features", "features", "fused", "by hand", "attention", "encoder", "recurrent", "along")
        if kind == "fused":
            self.put("fused", width, heads, self.draw(st.booleans()), self.pick(0.0, 0.2))
        elif kind == "by hand":
            groups = self.pick(*(groups for groups in (1, heads) if heads % groups == 0))
            self.put("by hand", width, heads, groups, self.drop())
        elif kind == "attention":
            self.put("attention", width, heads, self.drop(), self.draw(st.booleans()))
        elif kind == "encoder":
            self.put("encoder", width, heads, self.size(), self.drop(), self.draw(st.booleans()))
        elif kind == "recurrent":
            hidden, both = self.size(), self.draw(st.booleans())
            given = (self.pick("lstm", "gru"), width, hidden, self.pick(1, 2), both, self.drop())
            self.put("recurrent", *given, shape=(length, hidden * (2 if both else 1)))
        elif kind == "along":
            wide = self.size()
            self.put("along", width, wide, shape=(length, wide))
        else:
            self.features()

    def on_image(self) -> None:
        channels, height, width = self.shape
        kind = self.pick("conv", "conv", "conv", "norm", "pool", "dropout2d", "transposed", "join", "groups")
        if kind == "norm":
            self.has_batch_norm = True
            self.put("batch norm 2d", channels)
        elif kind == "groups" and channels * height * width > 1:
            least = 2 if height * width == 1 else 1  # torch refuses to norm a group of one number
            groups = self.pick(*(groups for groups in range(1, channels // least + 1) if channels % groups == 0))
            self.put("group norm", groups, channels)
        elif kind == "pool" and min(height, width) >= 2:
            self.put(self.pick("max pool", "average pool"), 2, shape=(channels, height // 2, width // 2))
        elif kind == "dropout2d":
            self.put("dropout2d", self.drop())
        elif kind == "transposed" and max(height, width) <= 4:
            out = self.size()
            self.put("transposed", channels, out, shape=(out, 2 * height, 2 * width))
        elif kind == "join" and channels < 10:
            other = self.earlier(lambda shape: len(shape) == 3 and shape[1:] == self.shape[1:] and shape[0] < 10)
            if other is not None:
                shape = (channels + self.shapes[other][0], height, width)
                self.put("join channels", other=other, shape=shape)
        else:
            groups = self.pick(1, 1, *(groups for groups in (2, 3, channels) if channels % groups == 0))
            out, kernel, stride = groups * self.pick(1, 2, 3), self.pick(1, 3), self.pick(1, 1, 2)
            shape = (out, (height - 1) // stride + 1, (width - 1) // stride + 1)
            self.put("conv", channels, out, kernel, stride, groups, self.draw(st.booleans()), shape=shape)


@st.composite
def specs(draw: Any) -> Spec:
    """Models of up to a dozen layers."""
    kind = draw(st.sampled_from(["tokens", "series", "vector", "image"]))
    small = st.integers(2, 6)
    shapes: dict[str, Any] = {"tokens": (small,), "series": (small, st.integers(2, 9)), "vector": (st.integers(2, 9),)}
    shape = tuple(draw(one) for one in shapes.get(kind, (st.integers(1, 6), small, small)))
    drawing = _Drawing(draw, shape)
    if kind == "tokens":
        width = drawing.size()
        drawing.put("embedding", WORDS, width, draw(st.booleans()), shape=(*shape, width))
    second = draw(st.sampled_from([0, 0, 4]))
    join_at = draw(st.integers(0, 3))
    for number in range(draw(st.integers(2, 8))):
        if second and number == join_at:
            _second(drawing, second)
        drawing.step()
    if second and not any(op.kind == "second" for op in drawing.ops):
        _second(drawing, second)
    loss = _end(drawing, fixed=True)
    batch, microbatch = draw(st.sampled_from([(4, 2), (6, 2), (6, 3), (5, 3), (7, 2), (5, 1), (3, 3)]))
    samples = draw(st.integers(batch, 2 * batch + 1))
    if drawing.has_batch_norm:
        batch, microbatch = draw(st.sampled_from([(4, 2), (6, 2), (6, 3), (5, 3), (8, 4)]))
        samples = 2 * batch
    floats = list(range(1, len(drawing.shapes) - 1))
    output = draw(st.sampled_from(["tensor", "tensor", "tuple", "dict"])) if floats else "tensor"
    flat = any(op.kind == "flat" and len(drawing.shapes[op.sources[0]]) == 2 for op in drawing.ops)
    ragged = kind in ("tokens", "series") and not flat and draw(st.booleans())
    return Spec(
        kind,
        shape,
        tuple(drawing.ops),
        output=output,
        aside=draw(st.sampled_from(floats)) if output != "tensor" else None,
        second=second,
        named=draw(st.booleans()),
        ragged=ragged,
        unused=draw(st.booleans()),
        loss="words weighted" if ragged and loss == "words" else loss,
        samples=samples,
        batch=batch,
        microbatch=microbatch,
        optimizer=draw(st.sampled_from(["adamw", "sgd"])),
        clip=draw(st.sampled_from([None, 0.5])),
        seed=draw(st.integers(0, 3)),
    )


def _second(drawing: _Drawing, size: int) -> None:
    out = drawing.shape[0] if len(drawing.shape) == 3 else drawing.shape[-1]
    drawing.put("second", size, out)


def _end(drawing: _Drawing, *, fixed: bool) -> str:
    """Down to scores of classes; the loss."""
    if len(drawing.shape) == 3:
        channels, height, width = drawing.shape
        if drawing.draw(st.booleans()):
            drawing.put("mean of image", shape=(channels,))
        else:
            drawing.put("flat", shape=(channels * height * width,))
    loss = drawing.pick("mean", "sum", "squares")
    if len(drawing.shape) == 2:
        length, width = drawing.shape
        way = drawing.pick("words", "mean of series", "last of series", "flat")
        if way == "words":
            loss = drawing.pick("words", "words weighted")
        else:
            drawing.put(way, shape=(length * width if way == "flat" else width,))
    *lead, width = drawing.shape
    drawing.put("linear", width, CLASSES, drawing.draw(st.booleans()), shape=(*lead, CLASSES))
    drawing.ops[-1] = replace(drawing.ops[-1], frozen=False)
    return loss


@st.composite
def plans(draw: Any, spec: Spec) -> str:
    """A plan for up to 4 workers that is legal for the model."""
    state = random.getstate()  # beartype draws from it to pick what it checks, and Hypothesis minds
    with torch.device("meta"):
        model = Model(spec)
    blocks = len([name for name in cut(model) if name != "unused"])
    random.setstate(state)
    meshes = [
        (dp, tp, pp)
        for dp in range(1, 5)
        for tp in range(1, 5)
        for pp in range(1, 5)
        if 1 < dp * tp * pp <= 4 and pp <= blocks
    ]
    dp, tp, pp = draw(st.sampled_from(meshes))
    words: list[str] = [f"{key}={value}" for key, value in (("dp", dp), ("tp", tp)) if value > 1]
    if pp > 1:
        schedules = ["1f1b", "gpipe", "zero-bubble"] + (["interleaved"] if blocks >= 2 * pp else [])
        words.append(f"pp={pp}:{draw(st.sampled_from(schedules))}")
    zero = 0
    if dp > 1:
        zero = draw(st.sampled_from([0, 1, 2, 3] if pp == 1 else [0, 1]))
        shares = draw(st.sampled_from(["equal", "weights", "stolen"]))
        if shares == "weights":
            words.append("shares=" + ":".join(str(draw(st.integers(1, 4))) for _ in range(dp)))
        elif shares == "stolen" and tp * pp == 1 and zero < 2:
            words.append("shares=stolen")
    if zero:
        words.append(f"zero={zero}")
    if draw(st.booleans()):
        words.append("recompute=full")
    if tp > 1 and spec.kind in ("tokens", "series") and draw(st.booleans()):
        words.append("sequence=1")
    if draw(st.booleans()):
        words.append("bucket_bytes=1024")
    if tp > 1 and draw(st.integers(0, 3)) == 0:
        name = draw(st.sampled_from([name for name in dict(model.named_modules()) if name.startswith("parts.")]))
        words.append(f"{name}=whole")
    return ",".join(words)


@st.composite
def cases(draw: Any) -> tuple[Spec, str]:
    """A model and a plan."""
    spec = draw(specs())
    return spec, draw(plans(spec))
