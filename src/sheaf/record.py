"""What a run leaves behind: one line of JSON per step, and the values those lines hold."""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class StepReport:
    """One global step: loss, weight, norm and samples are the same on every worker, times and memory are its own.

    ``loss`` is sum over weight of the whole global batch; ``terms`` splits ``seconds`` into compute, communicate
    (transfers that nothing hid), wait (for workers that computed longer, and for other stages of a pipeline), optimizer
    and host; ``gradient_norm`` is the true global norm before clipping, when the task clips. ``server`` has staleness
    (this step's, the largest and the mean so far, in clocks), delay (updates between pull and push), how often a
    gradient was dropped, steps missed while this worker was given up, shares that came back (of all workers so
    far), bytes sent, time waited, and of a meeting of local steps the loss and weight of its round (round_loss,
    round_weight); there the loss above is the worker's own. ``meeting`` has how many workers were present and
    absent, the weight of what met, seconds waited, and of this worker so far: meetings for which it was late,
    samples that it missed (dealt to it, and not computed) and that were dropped.
    """

    step: int
    loss: float
    weight: float
    samples: int
    seconds: float
    terms: dict[str, float] = field(default_factory=dict[str, float])
    gradient_norm: float | None = None
    learning_rate: float | None = None
    memory_bytes: int = 0
    microbatches: tuple[int, ...] = ()  # how many each worker computed
    computed: tuple[float, ...] = ()  # and for how many seconds
    sent_bytes: float = 0.0  # by this worker to others, without the network's headers
    server: dict[str, float] = field(default_factory=dict[str, float])  # beside a parameter server: what was seen
    meeting: dict[str, float] = field(default_factory=dict[str, float])  # that some may miss: who was there
    skipped: bool = False  # fp16: gradients overflowed, the loss scale backed off, no update
    stop: bool = False  # a worker was asked to stop; every worker sees it at the same step


class Record:
    """Appends step reports and events to ``record.jsonl``; every line is whole or absent."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._file = path.open("a", encoding="utf-8", buffering=1)

    def step(self, report: StepReport) -> None:
        """Append one step."""
        self.event("step", **asdict(report))

    def event(self, kind: str, **values: Any) -> None:
        """Append an event of another kind: start, plan, checkpoint, resume, end."""
        self._file.write(json.dumps({"kind": kind, **values}) + "\n")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_record(path: Path) -> Iterator[dict[str, Any]]:
    """Every whole line of a record, in order; a line cut short by a crash is left out."""
    with path.open(encoding="utf-8") as lines:
        for line in lines:
            try:
                yield json.loads(line)
            except json.JSONDecodeError:
                continue


def step_reports(path: Path) -> list[StepReport]:
    """The steps of a record; of a step that was run again after a resume, the last."""
    names = {item.name for item in fields(StepReport)}
    steps: dict[int, StepReport] = {}
    for line in read_record(path):
        if line.get("kind") == "step":
            values = {key: value for key, value in line.items() if key in names}
            for name in ("microbatches", "computed"):
                values[name] = tuple(values.get(name, ()))
            steps[line["step"]] = StepReport(**values)
    return [steps[step] for step in sorted(steps)]
