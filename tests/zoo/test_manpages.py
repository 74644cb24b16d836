"""Manual pages become aligned pairs of paragraphs, and a task of them trains; without any network."""

import json

import pytest
import torch

from sheaf.errors import TaskError
from sheaf.parallel import build
from sheaf.plans import Plan
from sheaf.zoo.tasks.manpages import END, START, UNKNOWN, Sentences, aligned, manpages, pairs, words
from sheaf.zoo.tasks.troff import paragraphs

PAGE = r""".\" a comment
.TH lamp 1 2020-01-01 "A sample"
.SH NAME
lamp \- light a room
.SH SYNOPSIS
.nf
.B lamp [room]
.fi
.SH DESCRIPTION
.B lamp
lights the room that is named,
as \fBcandle\fP(1) does.
.PP
It has two options:
.TP
.BR \-d ", " \-\-dim
Give little light.
.TP
.B \-o
Turn it off
.I now
\(em or \(lqlater\(rq \
with a clock.
.IP \(bu 2
A list has points.
.EX
lamp kitchen  # code is left out
.EE
.SS Notes
Read
.UR http://example.org
the guide
.UE .
"""
TRANSLATED = r""".\" un commentaire
.TH lamp 1 "1 janvier 2020" "Un exemple"
.SH NOM
lamp \- éclairer une pièce
.SH SYNOPSIS
.nf
\fBlamp [pièce]\fP
.fi
.SH DESCRIPTION
\fBlamp\fP éclaire la pièce qui est nommée, comme \fBcandle\fP(1).
.PP
Il y a deux options\ :
.TP
\fB\-d\fP, \fB\-\-dim\fP
Donner peu de lumière.
.TP
\fB\-o\fP
Éteindre \fImaintenant\fP \(em ou «\ plus tard\ » avec une horloge.
.IP \(bu 2
Une liste a des points.
.EX
lamp cuisine
.EE
.SS Notes
Lire
.UR http://example.org
le guide
.UE .
.PP
.SH TRADUCTION
Cette page a été traduite.
"""


def test_a_page_becomes_its_paragraphs():
    assert paragraphs(PAGE) == [
        "NAME",
        "lamp - light a room",
        "SYNOPSIS",
        "DESCRIPTION",
        "lamp lights the room that is named, as candle(1) does.",
        "It has two options:",
        "-d, --dim",
        "Give little light.",
        "-o",
        'Turn it off now — or "later" with a clock.',
        "A list has points.",
        "Notes",
        "Read the guide.",
    ]


def test_pairs_say_the_same_and_what_is_the_same_is_left_out():
    found = aligned(PAGE, TRANSLATED)
    assert found[:2] == [
        ("NAME", "NOM"),
        ("lamp - light a room", "lamp - éclairer une pièce"),
    ]
    assert ("Give little light.", "Donner peu de lumière.") in found
    assert found[-1] == ("Read the guide.", "Lire le guide.")
    assert len(found) == 8
    assert not any(one in ("SYNOPSIS", "-o", "Notes") for one, _ in found)


def test_pages_that_are_not_alike_give_nothing():
    assert aligned(PAGE, TRANSLATED.replace("Donner peu de lumière.", "")) == []
    assert aligned(PAGE, TRANSLATED.replace(".SH TRADUCTION\n", "")) == [], "what is added is a section"
    assert aligned(PAGE, TRANSLATED + "\n.PP\n".join(["de plus"] * 6)) == []


def test_frequent_words_have_codes_and_others_share_one():
    given = [("a b", "x y"), ("a c", "x z"), ("a " * 9, "x")]
    sentences = Sentences(given, vocabulary_size=6, longest=8)
    assert len(sentences) == 2, "nine words are too many"
    assert sentences.sizes == (6, 6)
    source, target = sentences[1]
    assert source.tolist() == [4, UNKNOWN, END]
    assert target.tolist() == [START, 4, UNKNOWN, END]


def test_a_task_of_pairs_trains(tmp_path):
    given = [(f"word{one} light", f"mot{one} lumière") for one in range(12)]
    (tmp_path / "pairs.json").write_text(json.dumps(given), encoding="utf-8")
    task = manpages(cache_folder=tmp_path, vocabulary_size=50, width=8, batch=4, microbatch=2, learning_rate=0.02)
    assert task.num_samples == len(given)
    step = build(task, Plan())
    losses = [step().loss for _ in range(12)]
    step.close()
    assert min(losses[-3:]) < min(losses[:3]) < 2 * torch.tensor(50.0).log()
    assert words("Mot1 lumière") == ["mot1", "lumière"]


def test_without_apt_it_says_what_is_missing(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(TaskError, match="apt-get and dpkg-deb cannot be found"):
        pairs(tmp_path)


def test_packages_that_cannot_be_fetched_are_told(tmp_path, monkeypatch):
    for tool in ("apt-get", "dpkg-deb"):
        (tmp_path / tool).write_text("#!/bin/sh\necho 'E: no such package' >&2\nexit 100\n")
        (tmp_path / tool).chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    with pytest.raises(TaskError, match=r"no such package.*apt-get update"):
        pairs(tmp_path)
    assert not (tmp_path / "packages").exists()
