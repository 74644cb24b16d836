"""Live progress of a run on the terminal, and plain lines where there is none; it can never stop the run."""

import math
import sys
import time
from collections import deque
from contextlib import suppress
from types import TracebackType
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from sheaf.record import StepReport
from sheaf.units import pretty_bytes, pretty_number, pretty_seconds

_RECENT = 20  # steps over which speed and shares are averaged
_REFRESH_SECONDS = 0.1
_SPARK = "▁▂▃▄▅▆▇█"
_WIDTH = 20  # characters of each bar
_TERMS = {"compute": "computing", "communicate": "communicating", "wait": "waiting"}
_OTHER = "other"  # the optimizer, the host, and what no term covers
_COLOURS = {"computing": "green", "communicating": "blue", "waiting": "yellow", _OTHER: "bright_black"}


class Progress:
    """Shows each StepReport it is called with: loss, samples/s, where the time goes, memory, time left.

    A live display where ``file`` (default: standard output) is a terminal; elsewhere one plain line at the first and
    last step and about every ``every_seconds`` between. Nothing it meets (a closed pipe, a terminal that cannot draw)
    is raised: it falls silent and the run goes on.

    ``first_step`` is the step a resumed run starts at; ``title`` is shown in front, such as the plan's text.
    """

    def __init__(
        self,
        total_steps: int,
        *,
        title: str = "",
        first_step: int = 0,
        file: Any = None,  # a text stream: a terminal, a notebook's, a file
        live: bool | None = None,
        every_seconds: float = 2.0,
    ) -> None:
        self.total_steps, self.title, self.first_step = total_steps, title, first_step
        self.silent = False
        self._file = sys.stdout if file is None else file
        self._every_seconds = every_seconds
        self._recent: deque[StepReport] = deque(maxlen=_RECENT)
        self._losses: list[float] = []
        self._shown = -math.inf
        self._last: StepReport | None = None
        self._last_is_shown = True
        self._live: Live | None = None
        self._console: Console | None = None
        try:
            self._console = _PatientConsole(file=self._file, highlight=False)
            if self._console.is_terminal if live is None else live:
                self._live = Live(console=self._console, auto_refresh=False, transient=False)
                self._live.start()
        except Exception:  # noqa: BLE001
            self._fall_silent()

    def __call__(self, report: StepReport) -> None:
        """Take in one finished step."""
        if self.silent:
            return
        try:
            self._recent.append(report)
            self._losses.append(report.loss)
            self._last, self._last_is_shown = report, False
            now = time.monotonic()
            ends = report.step + 1 >= self.total_steps or len(self._losses) == 1
            if ends or now - self._shown >= (self._every_seconds if self._live is None else _REFRESH_SECONDS):
                self._show(report, now)
        except Exception:  # noqa: BLE001
            self._fall_silent()

    def close(self) -> None:
        """Show the last step if it was not, and give the terminal back; harmless when called again."""
        if self.silent:
            return
        with suppress(Exception):
            if self._last is not None and not self._last_is_shown:
                self._show(self._last, time.monotonic())
        self._fall_silent()

    def __enter__(self) -> "Progress":  # noqa: PYI034  beartype knows no Self
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _show(self, report: StepReport, now: float) -> None:
        self._shown, self._last_is_shown = now, True
        if self._live is not None:
            self._live.update(self._picture(report), refresh=True)
        else:
            self._file.write(self._line(report) + "\n")
            self._file.flush()

    def _fall_silent(self) -> None:
        self.silent = True
        live, self._live = self._live, None
        if live is not None:
            with suppress(Exception):
                live.stop()

    @property
    def _step_seconds(self) -> float:
        return sum(report.seconds for report in self._recent) / len(self._recent)

    @property
    def _samples_per_second(self) -> float:
        seconds = sum(report.seconds for report in self._recent)
        return sum(report.samples for report in self._recent) / seconds if seconds > 0 else 0.0

    def _shares(self) -> dict[str, float]:
        """Share of recent time spent computing, communicating, waiting and on the rest."""
        seconds = sum(report.seconds for report in self._recent)
        sums = {word: sum(report.terms.get(term, 0.0) for report in self._recent) for term, word in _TERMS.items()}
        if not any(sums.values()):
            return {}
        sums[_OTHER] = max(0.0, seconds - sum(sums.values()))
        total = sum(sums.values())
        return {word: value / total for word, value in sums.items()}

    def _left(self, report: StepReport) -> str:
        steps = self.total_steps - report.step - 1
        return "done" if steps <= 0 else f"{pretty_seconds(steps * self._step_seconds)} left"

    def _line(self, report: StepReport) -> str:
        parts = [
            f"step {report.step + 1:>{len(str(self.total_steps))}}/{self.total_steps}",
            f"loss {report.loss:.5g}",
            f"{pretty_number(self._samples_per_second)} samples/s",
            f"{pretty_seconds(self._step_seconds)}/step",
            ", ".join(f"{word} {share:.0%}" for word, share in self._shares().items()),
            pretty_bytes(report.memory_bytes) if report.memory_bytes else "",
            "skipped: gradients overflowed" if report.skipped else "",
            self._left(report),
        ]
        return "  ".join(part for part in parts if part)

    def _picture(self, report: StepReport) -> RenderableType:
        done = report.step + 1
        top, middle = Table.grid(padding=(0, 2)), Text(no_wrap=True, overflow="ellipsis")
        bar = ProgressBar(total=self.total_steps, completed=done, width=_WIDTH)
        skipped = Text("skipped: gradients overflowed" if report.skipped else "", "yellow")
        count = Text(f"{done}/{self.total_steps}", "bold")
        top.add_row(
            bar, count, Text(self._left(report)), Text(self.title, "bold", overflow="ellipsis", no_wrap=True), skipped
        )
        middle.append(f"{sparkline(self._losses):<{_WIDTH}}  loss {report.loss:.5g}", "cyan")
        middle.append(f"  {pretty_number(self._samples_per_second)} samples/s")
        middle.append(f"  {pretty_seconds(self._step_seconds)}/step")
        if report.memory_bytes:
            middle.append(f"  {pretty_bytes(report.memory_bytes)}")
        shares = self._shares()
        split, legend = Text(no_wrap=True, overflow="ellipsis"), Text()
        for (word, share), cells in zip(shares.items(), cells_of(list(shares.values()), _WIDTH), strict=True):
            split.append("█" * cells, _COLOURS[word])
            legend.append(f"  {word} {share:.0%}", _COLOURS[word])
        return Group(top, middle, split + legend)


class _PatientConsole(Console):
    """A console that stays quiet after its reader went away; rich's own ends the process."""

    def on_broken_pipe(self) -> None:
        self.quiet = True


def sparkline(values: list[float], width: int = _WIDTH) -> str:
    """Values as a row of small bars, averaged into at most ``width`` of them; what is not finite shows as ×.

    >>> sparkline([8.0, 7.0, 3.0, 1.0])
    '█▇▃▁'
    """
    per = max(1, math.ceil(len(values) / width))
    means = [
        sum(values[start : start + per]) / len(values[start : start + per]) for start in range(0, len(values), per)
    ]
    finite = [value for value in means if math.isfinite(value)]
    if not finite:
        return "×" * len(means)
    low, high = min(finite), max(finite)
    scale = (len(_SPARK) - 1) / (high - low) if high > low else 0.0
    return "".join(_SPARK[round((value - low) * scale)] if math.isfinite(value) else "×" for value in means)


def cells_of(shares: list[float], width: int) -> list[int]:
    """How many of ``width`` character cells each share gets, together exactly ``width`` (largest remainders).

    >>> cells_of([0.5, 0.3, 0.2], 5)
    [3, 1, 1]
    """
    total = sum(shares)
    if total <= 0:
        return [0] * len(shares)
    exact = [share / total * width for share in shares]
    cells = [int(value) for value in exact]
    by_remainder = sorted(range(len(shares)), key=lambda index: (cells[index] - exact[index], index))
    for index in by_remainder[: width - sum(cells)]:
        cells[index] += 1
    return cells
