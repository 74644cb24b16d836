"""Models that `bench.pipeline` cuts into stages, each with the cut by equal layer counts that people write by hand."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from bench.tensor import BATCH, LAYERS, adamw, task
from sheaf import Loss, Task
from sheaf.zoo.models.transformer import DecoderLayer, EncoderLayer, sinusoids
from sheaf.zoo.models.vgg import VGG

SIDE, CLASSES = 32, 10  # of the images
WORDS, TIME, WIDTH, EACH = 8000, 32, 256, 4  # of the translation: its encoder and its decoder have EACH layers


@dataclass(frozen=True)
class Case:
    """A task of ``layers`` layers. ``stage`` makes a stage of the whole model, of layers from the first to before the
    last; ``given`` says of a batch what the first stage gets, what is the target, and what a stage that starts at a
    layer gets by name.
    """

    name: str
    task: Callable[[], Task]
    layers: int
    stage: Callable[[Any, int, int], nn.Module]
    given: Callable[[Any], tuple[Tensor, Tensor]]
    named: Callable[[Any, int, int], dict[str, Tensor]] = lambda _batch, _first, _last: {}


class GPTStage(nn.Module):
    """Some of the GPT's layers; the embeddings with the first, norm and head with the last."""

    def __init__(self, whole: Any, first: int, last: int) -> None:
        super().__init__()
        self.tokens, self.positions = (whole.tokens, whole.positions) if first == 0 else (None, None)
        self.layers = nn.Sequential(*whole.blocks[first:last])
        self.end = nn.Sequential(whole.norm, whole.head) if last == LAYERS else nn.Identity()

    def forward(self, given: Tensor) -> Tensor:
        if self.tokens is not None and self.positions is not None:
            given = self.tokens(given) + self.positions(torch.arange(given.shape[1]))
        return self.end(self.layers(given))


def pixels() -> Task:
    """VGG-16 on images of 32 by 32 pixels, without dropout, so that losses can be compared."""

    def model() -> nn.Module:
        return VGG(classes=CLASSES, hidden=512, side=1, dropout=0.0)

    draw = torch.Generator().manual_seed(0)
    images, labels = torch.randn(256, 3, SIDE, SIDE, generator=draw), torch.randint(0, CLASSES, (256,), generator=draw)
    data = list(zip(images, labels, strict=True))
    return Task(model=model, loss=summed, optimizer=adamw, data=data, batch=2 * BATCH)


def vgg_stage(whole: Any, first: int, last: int) -> nn.Module:
    """Some of the sixteen layers with weights, each with the functions behind it."""
    modules = [*whole.features, whole.pool, nn.Flatten(), *whole.classifier]
    starts = [place for place, module in enumerate(modules) if isinstance(module, nn.Conv2d | nn.Linear)]
    starts[starts.index(len(whole.features) + 2)] -= 2  # pool and flatten belong to the linear layer behind them
    return nn.Sequential(*modules[starts[first] : starts[last] if last < len(starts) else None])


class Translation(nn.Module):
    """The transformer encoder-decoder with an embedding for each language, for shared ones fit in no hand-made cut."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.target = nn.Embedding(WORDS, WIDTH), nn.Embedding(WORDS, WIDTH)
        self.encoder = nn.ModuleList([EncoderLayer(WIDTH, 4, 4 * WIDTH, 0.0) for _ in range(EACH)])
        self.decoder = nn.ModuleList([DecoderLayer(WIDTH, 4, 4 * WIDTH, 0.0) for _ in range(EACH)])
        self.head = nn.Linear(WIDTH, WORDS, bias=False)

    def forward(self, source: Tensor, target: Tensor) -> Tensor:
        read = placed(self.source, source)
        for layer in self.encoder:
            read = layer(read, None)
        written = placed(self.target, target)
        for layer in self.decoder:
            written = layer(written, read, None)
        return self.head(written)


def placed(words: nn.Embedding, tokens: Tensor) -> Tensor:
    """Embeddings with their positions."""
    vectors = words(tokens)
    return vectors * WIDTH**0.5 + sinusoids(tokens.shape[1], WIDTH).to(vectors)


class TranslationStage(nn.Module):
    """Some of the encoder's and the decoder's layers: hands on what was read, and what is written, if anything is."""

    def __init__(self, whole: Any, first: int, last: int) -> None:
        super().__init__()
        self.first, self.last = first, last
        self.source = whole.source if first == 0 else None
        self.target = whole.target if first <= EACH < last else None
        self.encoder = nn.ModuleList(whole.encoder[first:last])
        self.decoder = nn.ModuleList(whole.decoder[max(first - EACH, 0) : max(last - EACH, 0)])
        self.head = whole.head if last == 2 * EACH else None

    def forward(self, *given: Tensor, so_far: Tensor | None = None) -> Any:
        written, read = given if len(given) == 2 else (None, given[0])
        read = read if self.source is None else placed(self.source, read)
        for layer in self.encoder:
            read = layer(read, None)
        if self.target is not None:
            assert so_far is not None
            written = placed(self.target, so_far)
        for layer in self.decoder:
            written = layer(written, read, None)
        if self.head is not None:
            return self.head(written)
        return read if written is None else (written, read)


def sentences() -> Task:
    """Random sentences of 32 words, and the next word as the answer."""
    data = torch.randint(0, WORDS, (512, 2 * TIME + 1), generator=torch.Generator().manual_seed(0))
    inputs: Callable[[Any], Any] = lambda batch: (batch[:, :TIME], batch[:, TIME:-1])  # noqa: E731
    return Task(model=Translation, loss=next_word, optimizer=adamw, data=data, batch=BATCH, inputs=inputs)


def summed(output: Tensor, batch: Any) -> Loss:
    """Cross-entropy over samples."""
    return Loss(F.cross_entropy(output, batch[1], reduction="sum"), len(output))


def next_word(output: Tensor, batch: Any) -> Loss:
    """Cross-entropy over words."""
    words = batch[:, TIME + 1 :].flatten()
    return Loss(F.cross_entropy(output.flatten(0, 1), words, reduction="sum"), len(words))


def target_of(batch: Any, first: int, last: int) -> dict[str, Tensor]:
    """The stage with the decoder's first layer embeds what is written so far."""
    return {"so_far": batch[:, TIME:-1]} if first <= EACH < last else {}


CASES = {
    "gpt": Case("gpt", task, LAYERS, GPTStage, lambda batch: (batch[0], batch[1])),
    "vgg16": Case("vgg16", pixels, 16, vgg_stage, lambda batch: (batch[0], batch[1])),
    "translation": Case(
        "translation",
        sentences,
        2 * EACH,
        TranslationStage,
        lambda batch: (batch[:, :TIME], batch[:, TIME + 1 :]),
        target_of,
    ),
}
