"""One small task for each model of the zoo, of odd sizes, on random data: `SMALL["gpt"]()` builds it.

Batches of 6 or 8 in microbatches of 2; an epoch's last batch is smaller, and in the text tasks ends in a microbatch of
one. Texts are ragged: their losses are weighted by real tokens.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from sheaf.task import Loss, Task
from sheaf.zoo.models import (
    BERT,
    GPT,
    MLP,
    VGG,
    AlexNet,
    BottleneckResNet,
    MoE,
    ResNet,
    Seq2Seq,
    Transformer,
    UNet3d,
)

WORDS = 41  # words 1 to 38, and the three below
PADDING, START, HIDDEN = 0, 39, 40
NO_TARGET = -100
# The bias of attention's keys has no gradient but rounding, which AdamW would make large with a small eps.
ADAMW = partial(torch.optim.AdamW, lr=3e-3, eps=1e-5)
SGD = partial(torch.optim.SGD, lr=0.005, momentum=0.9)


def gpt() -> Task:
    """Tied embeddings, dropout, padding."""
    model = partial(GPT, vocabulary=WORDS, context=12, width=30, layers=2, heads=3, padding=PADDING)
    return _text("gpt", model, _next_word, _sentences(13), inputs=_without_last)


def mlp() -> Task:
    """Odd widths, dropout."""
    return _images("mlp", partial(MLP, (75, 33, 17, 7), dropout=0.2), _pictures(14, 3, 5), SGD)


def resnet() -> Task:
    """Basic blocks, BatchNorm, shortcuts without parameters."""
    return _images("resnet", partial(ResNet, blocks=2, classes=7, widths=(5, 9, 13)), _pictures(14, 3, 12), SGD)


def alexnet() -> Task:
    """Convolutions with large strides, wide fully connected layers, dropout."""
    model = partial(AlexNet, classes=7, widths=(6, 9, 11, 10, 9), hidden=51, side=1)
    return _images("alexnet", model, _pictures(14, 3, 63), SGD)


def vgg16() -> Task:
    """Thirteen convolutions and wide fully connected layers, dropout."""
    model = partial(VGG, classes=7, widths=(5, 6, 9, 10, 11), hidden=51, side=1)
    return _images("vgg16", model, _pictures(14, 3, 32), SGD, batch=8)


def resnet50() -> Task:
    """Bottlenecks with projections, BatchNorm."""
    model = partial(BottleneckResNet, classes=7, blocks=(2, 1, 1), widths=(5, 7, 9))
    return _images("resnet50", model, _pictures(14, 3, 32), SGD, batch=8)


def bert() -> Task:
    """Masked words, a head tied to the embedding, two positional arguments."""
    sizes = {"vocabulary": WORDS, "context": 11, "width": 30, "layers": 2, "heads": 3, "wide": 57}
    model = partial(BERT, **sizes, padding=PADDING)
    return _text("bert", model, _hidden_word, _sentences(13), collate=_hide, inputs=_tokens_and_types)


def lstm_seq2seq() -> Task:
    """Two layers of LSTM a side with dropout between them, vocabularies of different size."""
    sizes = {"source_vocabulary": WORDS, "target_vocabulary": 37, "width": 30, "layers": 2}
    model = partial(Seq2Seq, **sizes, padding=PADDING)
    return _text("lstm_seq2seq", model, _next_word_of_pair, _pairs(13, 37), collate=_pad_pairs, inputs=_pair_inputs)


def transformer_seq2seq() -> Task:
    """Attention between sequences, one matrix in three places, keyword arguments."""
    model = partial(Transformer, vocabulary=WORDS, width=30, layers=2, heads=3, wide=57, padding=PADDING)
    return _text(
        "transformer_seq2seq", model, _next_word_of_pair, _pairs(13, 39), collate=_pad_pairs, inputs=_pair_keywords
    )


def unet3d() -> Task:
    """Skips between distant blocks, transposed convolutions, BatchNorm, voxels without a label."""
    generator = torch.Generator().manual_seed(5)
    volumes = torch.randn(14, 2, 8, 8, 8, generator=generator)
    labels = torch.randint(3, (14, 8, 8, 8), generator=generator)
    labels[torch.rand(labels.shape, generator=generator) < 0.3] = NO_TARGET
    model = partial(UNet3d, channels=2, classes=3, widths=(6, 10, 14), padded=True)
    return _task("unet3d", model, _voxels, list(zip(volumes, labels, strict=True)), ADAMW)


def moe() -> Task:
    """Routed tokens, stacked experts, two outputs."""
    sizes = {"vocabulary": WORDS, "context": 12, "width": 30, "layers": 2, "heads": 3, "wide": 49, "experts": 5}
    model = partial(MoE, **sizes, padding=PADDING)
    return _text("moe", model, _next_word_and_balance, _sentences(13), inputs=_without_last)


SMALL: dict[str, Callable[[], Task]] = {
    build.__name__: build
    for build in (
        gpt,
        mlp,
        resnet,
        alexnet,
        vgg16,
        resnet50,
        bert,
        lstm_seq2seq,
        transformer_seq2seq,
        unet3d,
        moe,
    )
}


def _task(name: str, model: Any, loss: Any, data: Any, optimizer: Any, **options: Any) -> Task:
    given: dict[str, Any] = {"batch": 6, "microbatch": 2, "seed": 7} | options
    return Task(name=name, model=model, loss=loss, data=data, optimizer=optimizer, **given)


def _images(name: str, model: Any, data: Any, optimizer: Any, **options: Any) -> Task:
    return _task(name, model, _classes, data, optimizer, **options)


def _text(name: str, model: Any, loss: Any, data: Any, **options: Any) -> Task:
    return _task(name, model, loss, data, ADAMW, **({"collate": _pad} | options))


def _pictures(count: int, channels: int, side: int) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(count, channels, side, side, generator=generator)
    return list(zip(images, torch.randint(7, (count,), generator=generator), strict=True))


def _sentences(count: int, words: int = 39, seed: int = 2) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(3, 12, (count,), generator=generator).tolist()
    return [torch.randint(1, words, (length,), generator=generator) for length in lengths]


def _pairs(count: int, words: int) -> list[tuple[Tensor, Tensor]]:
    return list(zip(_sentences(count), _sentences(count, words, seed=3), strict=True))


def _pad(items: list[Tensor]) -> Tensor:
    return pad_sequence(items, batch_first=True, padding_value=PADDING)


def _pad_pairs(items: list[tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    sources, targets = zip(*items, strict=True)
    return {"source": _pad(list(sources)), "target": _pad(list(targets))}


def _hide(items: list[Tensor]) -> dict[str, Tensor]:
    whole = _pad(items)
    asked = (torch.rand(whole.shape) < 0.3) & (whole != PADDING)
    asked[:, 1] = True
    types = (torch.arange(whole.shape[1]) > 2).long().expand_as(whole).clone()
    return {"tokens": whole.masked_fill(asked, HIDDEN), "types": types, "wanted": whole.masked_fill(~asked, NO_TARGET)}


def _without_last(batch: Tensor) -> tuple[Tensor]:
    return (batch[:, :-1],)


def _tokens_and_types(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return batch["tokens"], batch["types"]


def _pair_inputs(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    return batch["source"], batch["target"][:, :-1]


def _pair_keywords(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"source": batch["source"], "target": batch["target"][:, :-1]}


def _classes(logits: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(logits, batch[1])


def _voxels(logits: Tensor, batch: Any) -> Loss:
    total = F.cross_entropy(logits, batch[1], ignore_index=NO_TARGET, reduction="sum")
    return Loss(total, (batch[1] != NO_TARGET).sum())


def _next_word(logits: Tensor, tokens: Tensor) -> Loss:
    wanted = tokens[:, 1:]
    total = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=PADDING, reduction="sum")
    return Loss(total, (wanted != PADDING).sum())


def _next_word_of_pair(logits: Tensor, batch: dict[str, Tensor]) -> Loss:
    return _next_word(logits, batch["target"])


def _next_word_and_balance(output: Any, tokens: Tensor) -> Loss:
    loss = _next_word(output.logits, tokens)
    return Loss(loss.sum + 0.01 * output.balance * loss.weight, loss.weight)


def _hidden_word(logits: Tensor, batch: dict[str, Tensor]) -> Loss:
    wanted = batch["wanted"]
    total = F.cross_entropy(logits.flatten(0, 1), wanted.flatten(), ignore_index=NO_TARGET, reduction="sum")
    return Loss(total, (wanted != NO_TARGET).sum())
