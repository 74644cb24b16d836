"""Translation between two ways to write a number, ``four thousand and two`` and ``4002``, word by word."""

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from itertools import count as counted
from math import gcd
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from sheaf.errors import TaskError
from sheaf.task import Loss, Task
from sheaf.zoo.models.seq2seq import Seq2Seq
from sheaf.zoo.models.transformer import Transformer

# fmt: off
_TEENS = (
    "zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten", "eleven", "twelve",
    "thirteen", "fourteen", "fifteen", "sixteen", "seventeen", "eighteen", "nineteen",
)
# fmt: on
_TENS = ("twenty", "thirty", "forty", "fifty", "sixty", "seventy", "eighty", "ninety")
_DIGITS = "0123456789"
WORDS = ("<padding>", "<start>", "<end>", *_DIGITS, *_TEENS, *_TENS, "hundred", "thousand", "and")
PADDING, START, END = 0, 1, 2
MOST = 10**6
_CODES = {word: code for code, word in enumerate(WORDS)}


def in_words(number: int) -> list[str]:
    """How a number below a million is said.

    >>> " ".join(in_words(40_217))
    'forty thousand two hundred and seventeen'
    """
    if number < 20:
        return [_TEENS[number]]
    if number < 100:
        tens, rest = divmod(number, 10)
        return [_TENS[tens - 2], *_rest(rest)]
    if number < 1000:
        hundreds, rest = divmod(number, 100)
        return [_TEENS[hundreds], "hundred", *(["and"] if rest else []), *_rest(rest)]
    thousands, rest = divmod(number, 1000)
    return [*in_words(thousands), "thousand", *(["and"] if 0 < rest < 100 else []), *_rest(rest)]


def _rest(number: int) -> list[str]:
    return in_words(number) if number else []


class Numbers:
    """``count`` numbers spread over those below ``most``: each item is a number in words and in digits, as codes."""

    def __init__(self, count: int, most: int) -> None:
        if not 1 <= most <= MOST:
            raise TaskError(f"most={most}: numbers below {MOST} can be written; give 1 to {MOST}")
        self.count, self.most = count, most
        # Steps of a golden section are far apart, and with no common factor they come to every number.
        self._step = next(step for step in counted(round(0.618 * most)) if gcd(step, most) == 1)

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, index: int) -> tuple[Int[Tensor, " words"], Int[Tensor, " digits"]]:
        """Both end in END; the digits begin with START."""
        place = range(self.count)[index]
        number = place * self._step % self.most
        return (
            torch.tensor([*(_CODES[word] for word in in_words(number)), END]),
            torch.tensor([START, *(_CODES[digit] for digit in str(number)), END]),
        )


def paired(items: Sequence[tuple[Int[Tensor, "_"], Int[Tensor, "_"]]]) -> dict[str, Int[Tensor, "batch _"]]:
    """``source``, ``target`` (what the decoder reads) and ``wanted`` (what follows it), padded."""
    sources, targets = zip(*items, strict=True)
    whole = pad_sequence(list(targets), batch_first=True, padding_value=PADDING)
    source = pad_sequence(list(sources), batch_first=True, padding_value=PADDING)
    return {"source": source, "target": whole[:, :-1], "wanted": whole[:, 1:]}


def read(batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    """What the model is given."""
    return batch["source"], batch["target"]


def next_word_loss(
    logits: Float[Tensor, "batch time vocabulary"], batch: dict[str, Int[Tensor, "batch _"]], smoothing: float = 0.0
) -> Loss:
    """Cross-entropy summed over real targets, and how many there are; ``smoothing`` as in Vaswani et al., 2017."""
    wanted = batch["wanted"]
    total = F.cross_entropy(
        logits.flatten(0, 1), wanted.flatten(), ignore_index=PADDING, reduction="sum", label_smoothing=smoothing
    )
    return Loss(total, (wanted != PADDING).sum())


def translation(
    *,
    recurrent: bool = False,
    count: int = 20_000,
    most: int = MOST,
    vocabulary: int = len(WORDS),
    batch: int = 64,
    microbatch: int | None = 16,
    seed: int = 0,
    width: int = 64,
    layers: int = 2,
    heads: int = 4,
    dropout: float = 0.1,
    smoothing: float = 0.1,
    learning_rate: float = 2e-3,
    **overrides: Any,
) -> Task:
    """A transformer encoder-decoder that learns to write ``count`` numbers below ``most`` in digits.

    ``recurrent`` takes LSTMs with attention instead. ``vocabulary`` may be larger than the words there are, for the
    weight of a real one. ``overrides`` are further fields of the Task, such as ``clip=1.0``.
    """
    if vocabulary < len(WORDS):
        raise TaskError(f"vocabulary={vocabulary}: there are {len(WORDS)} words; give that or more")
    common = {"width": width, "layers": layers, "padding": PADDING}
    if recurrent:
        vocabularies = {"source_vocabulary": vocabulary, "target_vocabulary": vocabulary}
        model = partial(Seq2Seq, dropout=dropout, **vocabularies, **common)
    else:
        model = partial(Transformer, vocabulary=vocabulary, heads=heads, wide=4 * width, dropout=dropout, **common)
    task = Task(
        name="translation_recurrent" if recurrent else "translation",
        model=model,
        inputs=read,
        loss=partial(next_word_loss, smoothing=smoothing),
        optimizer=partial(torch.optim.AdamW, lr=learning_rate, betas=(0.9, 0.98)),
        data=Numbers(count, most),
        collate=paired,
        batch=batch,
        microbatch=microbatch,
        seed=seed,
    )
    return replace(task, **overrides)
