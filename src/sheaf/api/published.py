"""Published training runs: predicted from their shape, scored where they were measured, and fitted on."""

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from sheaf.cost.analytic.constants import Book, book, unfitted
from sheaf.cost.analytic.fit import NOISE, Sample, fitted
from sheaf.cost.analytic.memory import MARGIN, peak, upper_bytes
from sheaf.cost.analytic.rows import Refused, workload
from sheaf.cost.analytic.score import Scored, errors, summary
from sheaf.cost.analytic.step import Job, job, seconds
from sheaf.errors import DataError

_MOST_MEASURED = 1e15  # seconds or gigabytes: no measurement


def read_runs(path: Path) -> list[Any]:
    """The rows of a file with one JSON object a line; a line that is no JSON becomes a Refused.

    Raises DataError where there is no such file.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(f"cannot read the runs {path}: {error}; wanted one JSON object a line") from None
    rows: list[Any] = []
    for number, line in enumerate(lines, start=1):
        if not line.strip():
            continue
        try:
            rows.append(json.loads(line))
        except (json.JSONDecodeError, RecursionError) as error:
            rows.append(Refused([f"line {number} is no JSON: {error}"]))
    return rows


def predict_runs(runs: Path, *, fit: Path | None = None) -> dict[str, Any]:
    """Predict every run of a file; ``fit`` is a file of runs to take the constants from, else those that ship.

    Gives ``rows`` (``id``, ``predicted_seconds``, ``predicted_peak_bytes``, ``terms``; or ``refused`` with the
    reasons) and a ``summary`` of errors where runs say what was measured. Raises DataError for a file that cannot be
    read, and for a ``fit`` of which no run can be fitted on.
    """
    rows = read_runs(runs)
    if fit is None:
        return predict(rows, book())
    given, empty = read_runs(fit), unfitted(book())
    samples = _samples(given, empty)
    if not samples:
        raise DataError(
            f"none of the {len(given)} rows of {fit} can be fitted on: wanted runs that can be predicted and say what "
            "was measured; leave --fit out for the constants that ship"
        )
    return predict(rows, fitted(empty, samples))


def fit_runs(rows: Iterable[Any]) -> Book:
    """The book with constants from these rows and no others, of which those count that can be priced."""
    empty = unfitted(book())
    return fitted(empty, _samples(rows, empty))


def _samples(rows: Iterable[Any], empty: Book) -> list[Sample]:
    """What was measured of the rows that can be priced."""
    samples: list[Sample] = []
    for row in rows:
        try:
            made = _job(row, empty)
            _answer("", made, empty)
        except (Refused, ArithmeticError, ValueError):
            continue
        weight = NOISE / max(NOISE, _stated_noise(made))
        samples.append(Sample(made, measured_seconds(row) or 0.0, measured_bytes(row) or 0.0, weight))
    return [sample for sample in samples if sample.seconds or sample.peak_bytes]


def predict(rows: Sequence[Any], known: Book) -> dict[str, Any]:
    """The same for rows and a book at hand."""
    answers: list[dict[str, Any]] = []
    scored: list[Scored] = []
    memory: list[float] = []
    unsafe: list[str] = []
    for number, row in enumerate(rows, start=1):
        name = _name(row, number)
        try:
            made = _job(row, known)
            answer = _answer(name, made, known)
        except Refused as refused:
            answers.append({"id": name, "refused": str(refused)})
            continue
        except (ArithmeticError, ValueError) as error:  # sizes that no machine has, each allowed, together not
            answers.append({"id": name, "refused": f"its sizes do not go together: {error}"})
            continue
        answers.append(answer)
        measured = measured_seconds(row)
        if measured:
            group = row.get("ranking_group")
            scored.append(
                Scored(
                    str(name), _text(row, "source"), group if isinstance(group, str) else "",
                    answer["predicted_seconds"], measured,
                )
            )  # fmt: skip
        held = measured_bytes(row)
        if held:
            memory.append(answer["predicted_peak_bytes"] / held - 1)
        if _section(row, "measured").get("oom") is True and answer["fits"]:
            unsafe.append(str(name))
    reasons = Counter(reason for one in answers if "refused" in one for reason in one["refused"].split("; "))
    return {
        "rows": answers,
        "summary": {
            "rows": len(answers),
            "predicted": sum("refused" not in one for one in answers),
            "refused": len(answers) - sum("refused" not in one for one in answers),
            "reasons": dict(reasons.most_common(12)),
            "seconds": summary(scored),
            "memory": {**errors(memory), "margin": MARGIN, "out_of_memory_called_safe": unsafe},
        },
    }


def measured_seconds(row: Any) -> float | None:
    """What a row says a step took, or None."""
    for section in ("derived", "measured"):
        found = _above_zero(_section(row, section).get("iter_time_s"))
        if found is not None:
            return found
    return None


def measured_bytes(row: Any) -> float | None:
    """What a row says the fullest worker held, or None."""
    found = _above_zero(_section(row, "measured").get("peak_mem_gb"))
    return None if found is None else found * 1e9


def _stated_noise(made: Job) -> float:
    """How far a source says that its runs vary by themselves: 0.4 for "+/-40% run-to-run"; 0 where it says nothing."""
    said = re.search(r"\+/-\s*(\d+)\s*%", " ".join(made.work.notes))
    return int(said[1]) / 100 if said else 0.0


def _above_zero(value: Any) -> float | None:
    if not isinstance(value, int | float) or isinstance(value, bool):
        return None
    return float(value) if 0 < value < _MOST_MEASURED else None


def _job(row: Any, known: Book) -> Job:
    if isinstance(row, Refused):
        raise row
    return job(workload(row), known)


def _answer(name: Any, made: Job, known: Book) -> dict[str, Any]:
    made = replace(made, book=known)
    terms = seconds(made, known.constants(made.stack, made.kind))
    memory = peak(made)
    step, most = sum(terms.values()), sum(memory.values())
    if not (math.isfinite(step) and math.isfinite(most)):
        raise Refused(["its sizes are beyond what numbers can hold"])
    found = known.measured.get(made.layer_keys[-1])
    answer: dict[str, Any] = {
        "id": name,
        "predicted_seconds": step,
        "predicted_peak_bytes": round(most),
        "upper_peak_bytes": round(upper_bytes(most)),
        "fits": upper_bytes(most) <= made.machine.memory_bytes,
        "terms": terms,
        "memory": {term: round(value) for term, value in memory.items()},
        "device": made.machine.cluster.hosts[0].device.name,
        "stack": made.stack.name,
        "runs_with_these_layers": found.runs if found else 0,
    }
    assumed = [*made.work.assumed, *made.machine.assumed]
    if assumed:
        answer["assumed"] = assumed
    return answer


def _name(row: Any, number: int) -> Any:
    name = row.get("id") if isinstance(row, Mapping) else None
    return name if isinstance(name, str | int) and not isinstance(name, bool) else f"row {number}"


def _section(row: Any, name: str) -> Mapping[str, Any]:
    found = row.get(name) if isinstance(row, Mapping) else None
    return found if isinstance(found, Mapping) else {}


def _text(row: Any, name: str) -> str:
    found = row.get(name) if isinstance(row, Mapping) else None
    return found if isinstance(found, str) else ""
