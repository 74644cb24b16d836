"""Language modelling on text that ships with Python, byte by byte; packed windows or ragged paragraphs."""

import importlib
from collections.abc import Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float, Int, UInt8
from torch import Tensor
from torch.nn import functional as F

from sheaf.task import Loss, Task
from sheaf.zoo.models.gpt import GPT

PADDING = 256  # the one token that is no byte
VOCABULARY = 257


@cache
def reference_text() -> str:
    """The Python language reference, as ``help()`` shows it: about half a million characters of English.

    Where a distribution left it out, the standard library's own source instead.
    """
    try:
        topics: dict[str, str] = importlib.import_module("pydoc_data.topics").topics
    except ImportError:
        library = Path(str(importlib.import_module("os").__file__)).parent
        sources = sorted(library.glob("*.py"))[:60]
        return "\n\n".join(path.read_text(encoding="utf-8", errors="ignore") for path in sources)
    return "\n\n\n".join(topics[name].strip() for name in sorted(topics))


def as_bytes(text: str) -> UInt8[Tensor, " bytes"]:
    """A text's UTF-8 bytes."""
    return torch.tensor(bytearray(text, "utf-8"), dtype=torch.uint8)


class Windows:
    """A text cut into windows of ``context`` bytes; each item is (bytes, the bytes that follow them).

    >>> windows = Windows("what follows what", context=4)
    >>> len(windows), bytes(windows[0][0].tolist()), bytes(windows[0][1].tolist())
    (4, b'what', b'hat ')
    """

    def __init__(self, text: str, context: int) -> None:
        self.context = context
        self._bytes = as_bytes(text)

    def __len__(self) -> int:
        """How many whole windows there are."""
        return (len(self._bytes) - 1) // self.context

    def __getitem__(self, index: int) -> tuple[Int[Tensor, " time"], Int[Tensor, " time"]]:
        """The window and the same window one byte later."""
        start = range(len(self))[index] * self.context
        span = self._bytes[start : start + self.context + 1].long()
        return span[:-1], span[1:]


class Paragraphs:
    """A text's paragraphs, each of its own length: one item is one paragraph's bytes, at most ``context + 1``."""

    def __init__(self, text: str, context: int, shortest: int = 8) -> None:
        paragraphs = (part.strip() for part in text.split("\n\n"))
        self._paragraphs = [as_bytes(part)[: context + 1] for part in paragraphs if len(part) >= shortest]

    def __len__(self) -> int:
        return len(self._paragraphs)

    def __getitem__(self, index: int) -> Int[Tensor, " length"]:
        """The paragraph's bytes."""
        return self._paragraphs[index].long()


def padded(items: Sequence[Int[Tensor, "_"]]) -> tuple[Int[Tensor, "batch time"], Int[Tensor, "batch time"]]:
    """Paragraphs as one (tokens, targets) batch, the short ones filled up with PADDING.

    >>> tokens, targets = padded([torch.tensor([7, 8, 9]), torch.tensor([1, 2])])
    >>> tokens.tolist(), targets.tolist()
    ([[7, 8], [1, 256]], [[8, 9], [2, 256]])
    """
    longest = max(len(item) for item in items) - 1
    tokens = torch.full((len(items), longest), PADDING)
    targets = torch.full((len(items), longest), PADDING)
    for row, item in enumerate(items):
        tokens[row, : len(item) - 1] = item[:-1]
        targets[row, : len(item) - 1] = item[1:]
    return tokens, targets


def next_byte_loss(logits: Float[Tensor, "batch time vocabulary"], batch: Sequence[Int[Tensor, "batch time"]]) -> Loss:
    """Cross-entropy summed over real targets, and how many of them there are."""
    _, targets = batch
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), ignore_index=PADDING, reduction="sum")
    return Loss(total, (targets != PADDING).sum())


def text_gpt(
    *,
    text: str | None = None,
    ragged: bool = False,
    batch: int = 32,
    microbatch: int | None = 4,
    seed: int = 0,
    context: int = 64,
    width: int = 160,
    layers: int = 4,
    heads: int = 5,
    dropout: float = 0.1,
    tied: bool = True,
    learning_rate: float = 1e-3,
    **overrides: Any,
) -> Task:
    """A GPT learning to write ``text`` (default: the Python language reference), byte by byte.

    ``ragged`` gives paragraphs of different lengths, padded within a microbatch, instead of windows of ``context``
    bytes; the loss is over real bytes only. ``overrides`` are further fields of the Task, such as ``clip=1.0``.
    """
    text = reference_text() if text is None else text
    task = Task(
        name="text_gpt_ragged" if ragged else "text_gpt",
        model=partial(
            GPT,
            vocabulary=VOCABULARY,
            context=context,
            width=width,
            layers=layers,
            heads=heads,
            dropout=dropout,
            tied=tied,
            padding=PADDING if ragged else None,
        ),
        loss=next_byte_loss,
        optimizer=partial(torch.optim.AdamW, lr=learning_rate, betas=(0.9, 0.95), weight_decay=0.1),
        data=Paragraphs(text, context) if ragged else Windows(text, context),
        collate=padded if ragged else None,
        batch=batch,
        microbatch=microbatch,
        seed=seed,
    )
    return replace(task, **overrides)
