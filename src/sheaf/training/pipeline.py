"""A pipeline's step as it was measured: every worker's actions on one clock, in the run's directory."""

import json
import socket
import time
import zlib
from collections import deque
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import torch
import torch.distributed as dist

from sheaf.checkpoint import barrier, from_first
from sheaf.checkpoint.together import is_first, is_together
from sheaf.plans import Plan
from sheaf.plans.mesh import Mesh
from sheaf.record import StepReport

SPANS, PICTURE = "pipeline.json", "pipeline.svg"
RECENT = 9  # steps of which the one of median length is kept
COLUMNS = ("worker", "kind", "microbatch", "stage", "start_seconds", "stop_seconds")
_KINDS = "FBW"
_BOOT = Path("/proc/sys/kernel/random/boot_id")

Span = tuple[str, int, int, float, float]  # kind, microbatch, stage, start and stop by time.perf_counter
Row = tuple[int, str, int, int, float, float]  # with the worker in front, in seconds since the first began


@runtime_checkable
class Timed(Protocol):
    """What is asked of a step."""

    @property
    def plan(self) -> Plan: ...

    @property
    def spans(self) -> list[Span]: ...


class Spans:
    """Keeps this worker's actions of the last few steps; ``write`` brings those of one step together."""

    def __init__(self, step: Timed) -> None:
        self._step = step
        self._recent: deque[tuple[StepReport, list[Span]]] = deque(maxlen=RECENT)

    def after(self, report: StepReport) -> None:
        """A step is done."""
        if self._step.plan.pp > 1:
            self._recent.append((report, list(self._step.spans)))

    def write(self, out: Path) -> None:
        """Leave ``pipeline.json``: of the steps kept, the one of median length (collective; nothing without steps)."""
        if not self._recent:
            return
        lengths = [report.seconds for report, _ in self._recent]
        chosen: int = from_first(lambda: sorted(range(len(lengths)), key=lengths.__getitem__)[len(lengths) // 2])
        report, spans = self._recent[chosen]
        rows = gathered(spans)
        if is_first():
            self._leave(out, report.step, rows)

    def kept(self) -> dict[str, Any]:
        """This worker's actions by step, and whose clock they are by, of what JSON knows."""
        return {"clock": _machine(), "steps": {str(report.step): spans for report, spans in self._recent}}

    def write_of(self, brought: Mapping[int, dict[str, Any]], out: Path) -> None:
        """The same of what some workers ``kept``, by worker: of those with this worker's clock, without the others."""
        lengths = {report.step: report.seconds for report, _ in self._recent}
        here = {rank: told["steps"] for rank, told in brought.items() if told["clock"] == _machine()}
        whole = [step for step in lengths if all(str(step) in steps for steps in here.values())]
        if not whole:
            return
        step = sorted(whole, key=lengths.__getitem__)[len(whole) // 2]
        rows: list[Row] = [(rank, *span) for rank, steps in sorted(here.items()) for span in steps[str(step)]]
        self._leave(out, step, _from_the_first(rows))

    def _leave(self, out: Path, step: int, rows: list[Row]) -> None:
        values = {"step": step, "plan": str(self._step.plan), "columns": COLUMNS, "rows": rows}
        with suppress(OSError):  # watching never stops a run
            (out / SPANS).write_text(json.dumps(values) + "\n", encoding="utf-8")


def gathered(spans: list[Span]) -> list[Row]:
    """Every worker's actions, by worker, on worker 0's clock from the first action on; the same on each (collective).

    Workers of one machine have one clock; another machine's is set by the end of a barrier.
    """
    rank, workers = (dist.get_rank(), dist.get_world_size()) if is_together() else (0, 1)
    most = torch.zeros(workers, dtype=torch.float64)
    most[rank] = len(spans)
    _add(most)
    barrier()
    clocks = torch.zeros(workers, 2, dtype=torch.float64)
    clocks[rank] = torch.tensor([float(_machine()), time.perf_counter()], dtype=torch.float64)
    table = torch.zeros(workers, int(most.max()), 5, dtype=torch.float64)
    for place, (kind, *numbers) in enumerate(spans):
        table[rank, place] = torch.tensor([float(_KINDS.index(kind)), *numbers], dtype=torch.float64)
    _add(clocks)
    _add(table)
    rows: list[Row] = []
    for worker in range(workers):
        here = clocks[worker, 0] == clocks[0, 0]
        late = 0.0 if here else float(clocks[worker, 1] - clocks[0, 1])
        for kind, microbatch, stage, start, stop in table[worker, : int(most[worker])].tolist():
            rows.append((worker, _KINDS[int(kind)], int(microbatch), int(stage), start - late, stop - late))
    return _from_the_first(rows)


def _from_the_first(rows: list[Row]) -> list[Row]:
    """The same with times since the first began."""
    begin = min((row[4] for row in rows), default=0.0)
    return [(*row[:4], row[4] - begin, row[5] - begin) for row in rows]


def measured_rows(out: Path, plan: Plan) -> list[Row] | None:
    """The actions of the replica that took longest, a worker per pipeline rank; None where this plan left none."""
    try:
        values: dict[str, Any] = json.loads((out / SPANS).read_text(encoding="utf-8"))
        rows = [(row[0], row[1], row[2], row[3], row[4], row[5]) for row in values["rows"]]
        if values["plan"] != str(plan):
            return None
    except (OSError, ValueError, KeyError, TypeError, IndexError):
        return None
    mesh, replicas = Mesh.of(plan), dict[int, list[Row]]()
    for row in rows:
        place = mesh.place(row[0])
        if place.tp == 0:
            replicas.setdefault(place.dp, []).append((place.pp, *row[1:]))
    return max(replicas.values(), key=lambda own: max(row[5] for row in own), default=None)


def _add(tensor: torch.Tensor) -> None:
    if is_together():
        dist.all_reduce(tensor)  # each worker's places are zero elsewhere


def _machine() -> int:
    """A number for this machine since it started, as its clock runs since then."""
    with suppress(OSError):
        return zlib.crc32(_BOOT.read_bytes())
    return zlib.crc32(socket.gethostname().encode())
