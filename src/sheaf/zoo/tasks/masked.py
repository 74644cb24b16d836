"""Masked language modelling, BERT's task, on the bytes of text that ships with Python."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F

from sheaf.task import Loss, Task
from sheaf.zoo.models.bert import BERT
from sheaf.zoo.tasks.text import Paragraphs, reference_text

PADDING, MASK = 256, 257  # the two tokens that are no bytes
VOCABULARY = 258
NO_TARGET = -100


def hidden(
    paragraphs: Sequence[Int[Tensor, "_"]], share: float
) -> tuple[Int[Tensor, "batch time"], Int[Tensor, "batch time"]]:
    """Paragraphs as one (tokens, targets) batch, padded; ``share`` of the bytes, drawn at random, are to be told.

    Of these, eight in ten are hidden behind MASK, one is replaced by a random byte and one is left as it is.
    """
    whole = torch.nn.utils.rnn.pad_sequence(list(paragraphs), batch_first=True, padding_value=PADDING)
    asked = (torch.rand(whole.shape) < share) & (whole != PADDING)
    lot = torch.rand(whole.shape)
    tokens = torch.where(asked & (lot < 0.8), MASK, whole)
    tokens = torch.where(asked & (lot >= 0.9), torch.randint(256, whole.shape), tokens)
    return tokens, whole.masked_fill(~asked, NO_TARGET)


def hidden_loss(logits: Float[Tensor, "batch time vocabulary"], batch: Sequence[Int[Tensor, "batch time"]]) -> Loss:
    """Cross-entropy summed over the bytes to be told, and how many there are: another number in every microbatch."""
    _, targets = batch
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=NO_TARGET, reduction="sum")
    return Loss(total, (targets != NO_TARGET).sum())


def bert_text(
    *,
    text: str | None = None,
    share: float = 0.15,
    batch: int = 32,
    microbatch: int | None = 4,
    seed: int = 0,
    context: int = 96,
    width: int = 128,
    layers: int = 4,
    heads: int = 4,
    dropout: float = 0.1,
    learning_rate: float = 1e-3,
    **overrides: Any,
) -> Task:
    """A BERT learning which bytes are hidden in paragraphs of ``text`` (default: the Python language reference).

    Paragraphs are at most ``context`` bytes and padded within a microbatch. ``overrides`` are further fields of the
    Task, such as ``clip=1.0``.
    """
    sizes = {"context": context, "width": width, "layers": layers, "heads": heads, "wide": 4 * width}
    task = Task(
        name="bert_text",
        model=partial(BERT, vocabulary=VOCABULARY, dropout=dropout, padding=PADDING, **sizes),
        loss=hidden_loss,
        optimizer=partial(torch.optim.AdamW, lr=learning_rate, eps=1e-6, weight_decay=0.01),
        data=Paragraphs(reference_text() if text is None else text, context - 1),
        collate=partial(hidden, share=share),
        batch=batch,
        microbatch=microbatch,
        seed=seed,
    )
    return replace(task, **overrides)
