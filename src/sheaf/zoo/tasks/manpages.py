"""Translation from English to French of paragraphs of manual pages, with large vocabularies: mostly tables of words.

The pages are those of Debian's packages manpages and manpages-dev, and of their French translations manpages-fr and
manpages-fr-dev. They are fetched with apt-get when they are first needed and kept in Sheaf's cache; none of their text
ships with Sheaf, as its licences vary from page to page (each package's ``copyright`` has them).
"""

import gzip
import json
import os
import re
import shutil
import subprocess
import tempfile
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from sheaf.errors import TaskError
from sheaf.task import Task
from sheaf.zoo.models.seq2seq import Seq2Seq
from sheaf.zoo.tasks.number_words import END, PADDING, START, next_word_loss, paired, read
from sheaf.zoo.tasks.troff import marked

PACKAGES = ("manpages", "manpages-dev", "manpages-fr", "manpages-fr-dev")
UNKNOWN, FIRST_WORD = 3, 4  # codes after padding, start and end
MOST_ADDED = 4  # paragraphs that a translation may have at its end: who translated it
_WORD = re.compile(r"\w+|[^\w\s]")
_FETCH_S = 600


def words(text: str) -> list[str]:
    """A text's words and signs, in lower case.

    >>> words("Use eight(2) instead.")
    ['use', 'eight', '(', '2', ')', 'instead', '.']
    """
    return _WORD.findall(text.lower())


def aligned(page: str, translated: str) -> list[tuple[str, str]]:
    """Pairs of paragraphs that say the same; none where a page and its translation are not alike.

    A translated page is made from the page paragraph by paragraph, so that the first means the first, and so on: both
    have the same headings, tags and paragraphs in the same order. A translation may have a section of up to
    ``MOST_ADDED`` more at its end. What is the same in both, such as names, is left out.
    """
    mine, theirs = marked(page), marked(translated)
    added = theirs[len(mine) :]
    alike = [kind for kind, _ in mine] == [kind for kind, _ in theirs[: len(mine)]]
    if not alike or len(added) > MOST_ADDED or (added and added[0][0] != "heading"):
        return []
    both = zip(mine, theirs, strict=False)
    return [(one, other) for (_, one), (_, other) in both if one != other]


def pairs(cache_folder: Path | None = None) -> list[tuple[str, str]]:
    """Unique pairs of an English and a French paragraph, of all pages, by page; fetched when they are not there.

    ``cache_folder`` is otherwise ``manpages`` in $SHEAF_CACHE, or in ~/.cache/sheaf. Raises TaskError where packages
    cannot be fetched.
    """
    given = os.environ.get("SHEAF_CACHE")
    folder = cache_folder or (Path(given) if given else Path.home() / ".cache" / "sheaf") / "manpages"
    kept = folder / "pairs.json"
    if not kept.is_file():
        folder.mkdir(parents=True, exist_ok=True)
        found = _aligned_pages(_fetched(folder) / "usr" / "share" / "man")
        new = kept.with_suffix(f".{os.getpid()}")
        new.write_text(json.dumps(found, ensure_ascii=False), encoding="utf-8")
        new.replace(kept)
    return [(one, other) for one, other in json.loads(kept.read_text(encoding="utf-8"))]


def _aligned_pages(man: Path) -> list[tuple[str, str]]:
    found: dict[tuple[str, str], None] = {}
    for page in sorted((man / "fr").glob("man*/*.gz")):
        original = man / page.relative_to(man / "fr")
        if original.is_file():
            found |= dict.fromkeys(aligned(_text(original), _text(page)))
    return list(found)


def _text(page: Path) -> str:
    with gzip.open(page, "rt", encoding="utf-8", errors="replace") as lines:
        return lines.read()


def _fetched(folder: Path) -> Path:
    """The folder in which the packages' files are, unpacked and not installed."""
    unpacked = folder / "packages"
    if unpacked.is_dir():
        return unpacked
    missing = [tool for tool in ("apt-get", "dpkg-deb") if shutil.which(tool) is None]
    if missing:
        raise TaskError(
            f"the manual pages are Debian's packages {', '.join(PACKAGES)}, and {' and '.join(missing)} cannot be "
            f"found: unpack them (dpkg-deb -x) into {unpacked} on another machine, or use the task `translation`, "
            "which needs nothing"
        )
    with tempfile.TemporaryDirectory(dir=folder) as made:
        _done(["apt-get", "download", *PACKAGES], Path(made))
        target = Path(made) / "packages"
        for archive in sorted(Path(made).glob("*.deb")):
            _done(["dpkg-deb", "-x", archive.name, target.name], Path(made))
        target.rename(unpacked)
    return unpacked


def _done(command: list[str], where: Path) -> None:
    try:
        done = subprocess.run(command, cwd=where, capture_output=True, text=True, check=False, timeout=_FETCH_S)
    except subprocess.TimeoutExpired:
        raise TaskError(f"`{' '.join(command)}` took more than {_FETCH_S} s: is there a network?") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or [f"exit code {done.returncode}"])[-1]
        raise TaskError(f"`{' '.join(command)}` failed: {last}. Is there a network, and has `apt-get update` been run?")


def vocabulary(texts: Iterable[Sequence[str]], size: int) -> dict[str, int]:
    """Codes of the most frequent words, of ``size`` with the four that are no words; equally frequent ones by letter.

    >>> vocabulary([["b", "a", "b"], ["c"]], 6)
    {'b': 4, 'a': 5}
    """
    counted = Counter(word for text in texts for word in text)
    ordered = sorted(counted, key=lambda word: (-counted[word], word))
    return {word: code for code, word in enumerate(ordered[: size - FIRST_WORD], FIRST_WORD)}


class Sentences:
    """Pairs as codes: each item is what is said, and START and what it is in the other language; both end in END.

    Pairs with more than ``longest`` words on either side are left out. ``sizes`` says how many words each language's
    vocabulary has in truth, of at most ``vocabulary_size``.
    """

    def __init__(self, given: Sequence[tuple[str, str]], vocabulary_size: int, longest: int) -> None:
        both = [(words(one), words(other)) for one, other in given]
        both = [pair for pair in both if 0 < len(pair[0]) <= longest and 0 < len(pair[1]) <= longest]
        self._codes = tuple(vocabulary((pair[side] for pair in both), vocabulary_size) for side in (0, 1))
        self._pairs = both

    @property
    def sizes(self) -> tuple[int, int]:
        """Codes in use, by language."""
        source, target = (FIRST_WORD + len(codes) for codes in self._codes)
        return source, target

    def __len__(self) -> int:
        return len(self._pairs)

    def __getitem__(self, index: int) -> tuple[Int[Tensor, " words"], Int[Tensor, " words_"]]:
        source, target = (
            [codes.get(word, UNKNOWN) for word in text]
            for codes, text in zip(self._codes, self._pairs[index], strict=True)
        )
        return torch.tensor([*source, END]), torch.tensor([START, *target, END])


@cache
def _sentences(folder: Path | None, vocabulary_size: int, longest: int) -> Sentences:
    return Sentences(pairs(folder), vocabulary_size, longest)


def manpages(
    *,
    vocabulary_size: int = 30_000,
    longest: int = 40,
    batch: int = 32,
    microbatch: int | None = 8,
    seed: int = 0,
    width: int = 256,
    layers: int = 1,
    dropout: float = 0.0,
    learning_rate: float = 1e-3,
    cache_folder: Path | None = None,
    **overrides: Any,
) -> Task:
    """LSTMs with attention that learn to translate paragraphs of up to ``longest`` words from English to French.

    Each language has a table of ``vocabulary_size`` words of its own, and the head writes French ones. ``overrides``
    are further fields of the Task, such as ``clip=1.0``. Raises TaskError where the pages cannot be fetched.
    """
    task = Task(
        name="manpages",
        model=partial(
            Seq2Seq,
            source_vocabulary=vocabulary_size,
            target_vocabulary=vocabulary_size,
            width=width,
            layers=layers,
            dropout=dropout,
            padding=PADDING,
        ),
        inputs=read,
        loss=next_word_loss,
        optimizer=partial(torch.optim.AdamW, lr=learning_rate, betas=(0.9, 0.98)),
        data=_sentences(cache_folder, vocabulary_size, longest),
        collate=paired,
        batch=batch,
        microbatch=microbatch,
        seed=seed,
    )
    return replace(task, **overrides)
