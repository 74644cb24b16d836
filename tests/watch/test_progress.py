"""Live progress tells where the time goes, and nothing that happens to it reaches the run."""

import contextlib
import io
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from sheaf.record import StepReport
from sheaf.watch import Progress
from sheaf.watch.progress import cells_of, sparkline


def report(step, **changes):
    values = {
        "step": step, "loss": 4.0 - step / 10, "weight": 64.0, "samples": 32, "seconds": 0.2,
        "terms": {"compute": 0.1, "communicate": 0.04, "wait": 0.02, "optimizer": 0.03, "host": 0.01},
        "memory_bytes": 312 * 2**20,
    }  # fmt: skip
    return StepReport(**(values | changes))


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_a_plain_line_tells_everything():
    file = io.StringIO()
    with Progress(10, file=file) as progress:
        progress(report(0))
    assert file.getvalue() == (
        "step  1/10  loss 4  160 samples/s  200 ms/step  "
        "computing 50%, communicating 20%, waiting 10%, other 20%  312 MiB  1.80 s left\n"
    )


def test_plain_lines_come_now_and_then_with_the_first_and_the_last():
    file = io.StringIO()
    with Progress(50, file=file, every_seconds=1000) as progress:
        for step in range(50):
            progress(report(step))
    lines = file.getvalue().splitlines()
    assert [line.split()[1] for line in lines] == ["1/50", "50/50"]
    assert lines[-1].endswith("done")


def test_a_stopped_run_shows_its_last_step():
    file = io.StringIO()
    with Progress(50, file=file, every_seconds=1000) as progress:
        for step in range(3):
            progress(report(step))
    assert [line.split()[1] for line in file.getvalue().splitlines()] == ["1/50", "3/50"]


def test_a_terminal_gets_a_display_that_is_drawn_over(monkeypatch):
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "80")
    file = Terminal()
    with Progress(5, title="dp=2", file=file) as progress:
        for step in range(5):
            progress(report(step, skipped=step == 4))
    written = file.getvalue()
    assert "\x1b[1A" in written  # up one line
    for word in (
        "dp=2",
        "5/5",
        "done",
        "computing 50%",
        "communicating 20%",
        "waiting 10%",
        "160 samples/s",
        "skipped",
    ):
        assert word in written, word
    assert written.endswith(("\n", "\x1b[?25h"))  # the cursor is shown again


class Torn(io.StringIO):
    def write(self, text):
        raise OSError("no space left on device")


@pytest.mark.parametrize("live", [True, False])
def test_a_file_that_cannot_be_written_stops_nothing(live):
    progress = Progress(3, file=Torn(), live=live)
    for step in range(3):
        progress(report(step))
    progress.close()
    assert progress.silent


@pytest.mark.parametrize("live", [True, False])
def test_a_reader_that_went_away_stops_nothing(live):
    reading, writing = os.pipe()
    os.close(reading)
    file = os.fdopen(writing, "w")
    progress = Progress(3, file=file, live=live, every_seconds=0)
    for step in range(3):
        progress(report(step))
    progress.close()
    assert progress.silent
    with contextlib.suppress(BrokenPipeError):  # what is left in its buffer
        file.close()


@pytest.mark.parametrize("live", [True, False])
def test_strange_reports_stop_nothing(live):
    with Progress(4, file=io.StringIO(), live=live, every_seconds=0) as progress:
        progress(report(0, loss=float("nan")))
        progress(report(1, loss=float("inf"), terms={}, seconds=0.0))
        progress(report(2, terms={"compute": float("nan")}))
        progress(report(9))
        assert progress.silent is False or live


def test_closing_twice_is_harmless():
    progress = Progress(1, file=io.StringIO())
    progress.close()
    progress.close()
    progress(report(0))


@given(values=st.lists(st.floats(-1e6, 1e6), max_size=200), width=st.integers(1, 40))
def test_a_sparkline_fits_and_spans_its_range(values, width):
    line = sparkline(values, width)
    assert len(line) <= width
    if 1 < len(values) <= width and max(values) > min(values):
        assert {line[values.index(max(values))], line[values.index(min(values))]} == {"█", "▁"}


@given(shares=st.lists(st.floats(0, 1), min_size=1, max_size=6), width=st.integers(1, 50))
def test_cells_fill_the_bar_exactly(shares, width):
    cells = cells_of(shares, width)
    assert sum(cells) == (width if sum(shares) > 0 else 0)
    assert all(
        abs(cell - share / sum(shares) * width) < 1 for cell, share in zip(cells, shares, strict=True) if sum(shares)
    )
