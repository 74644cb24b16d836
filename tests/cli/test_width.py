"""How wide answers are: as the terminal, and in pipes and files as what they say."""

import io
import sys

import pytest
from rich.text import Text

from sheaf.cli.answer import console
from sheaf.cli.plan import show
from sheaf.cost.price import Price
from sheaf.plans import Plan
from sheaf.search import Entry, Ranking, Refusal

LONG = "dp=2,pp=2:interleaved,virtual=2,stages=3:4:4:2,microbatch=16," + ",".join(
    f"layers.{number}.attention=recompute" for number in range(8)
)


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def entry(text, seconds, **words):
    return Entry(Price(Plan.parse(text), {"compute": seconds}, {"parameters": 2**20}, 0.0), **words)


RANKED = (entry("dp=2", 0.2, reason="fastest"), entry(LONG, 0.4, loses_on="200 ms more " + "computing " * 20))
RANKING = Ranking(
    ranked=RANKED, refused=(Refusal(LONG, "needs room " * 20, f"use {LONG}"),), cluster="", batch=32, microbatch=4
)


def printed(monkeypatch, stdout):
    monkeypatch.setattr(sys, "stdout", stdout)
    show(RANKING, None, console())
    return [Text.from_ansi(line).plain for line in stdout.getvalue().splitlines()]


@pytest.mark.parametrize(
    "variables",
    [{}, {"COLUMNS": "80"}, {"FORCE_COLOR": "1"}, {"FORCE_COLOR": "1", "TERM": "dumb"}],
    ids=["none", "columns", "colours", "dumb"],
)
def test_in_a_pipe_every_row_is_one_line_with_all_of_its_plan(monkeypatch, variables):
    for name in ("COLUMNS", "FORCE_COLOR", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in variables.items():
        monkeypatch.setenv(name, value)
    lines = printed(monkeypatch, io.StringIO())
    (row,) = (line for line in lines if "400 ms" in line)
    assert row.startswith(f"{LONG} ")
    assert row.rstrip().endswith("computing")
    (refusal,) = (line for line in lines if "needs room" in line)
    assert refusal.rstrip().endswith(f"use {LONG}")


def test_in_a_terminal_no_line_is_wider_than_it(monkeypatch):
    monkeypatch.setenv("COLUMNS", "70")
    monkeypatch.setenv("TERM", "xterm")
    lines = printed(monkeypatch, Terminal())
    assert 60 < max(map(len, lines)) <= 70
