"""How right Sheaf is about runs that others published: fitted on a third of the workloads, scored on the rest.

`python -m bench.published` (or `make bench-planner`) writes `bench/results/published.json` and
`docs/pictures/published.png`. `--ship` fits the constants that ship with Sheaf, on all runs.
"""

import hashlib
import json
import re
import statistics
from collections import defaultdict
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import click

from bench import published_report as report
from sheaf.api.published import fit_runs, measured_bytes, measured_seconds, predict, read_runs
from sheaf.cli.answer import console as make_console
from sheaf.cost.analytic.constants import Book, book, write_fitted
from sheaf.cost.analytic.rows import Refused, workload
from sheaf.cost.analytic.score import Scored, errors, model_flops, summary
from sheaf.cost.analytic.step import job

PROJECT = Path(__file__).resolve().parent.parent
RUNS = PROJECT / "bench" / "measured" / "runs.jsonl"
SHIPPED = PROJECT / "src" / "sheaf" / "cluster" / "fitted.json"
PARTS = 3  # one part of the workloads is fitted on, the others are scored
MOST_OF_SOURCE = 25  # runs of each other source that constants come from where a source is left out whole


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.option(
    "--runs", type=click.Path(path_type=Path, exists=True), default=RUNS, show_default="bench/measured/runs.jsonl"
)
@click.option("--out", type=click.Path(path_type=Path), default=report.RESULTS, show_default="bench/results")
@click.option("--ship", is_flag=True, help="Fit the constants that ship, on all runs, and write them.")
def main(runs: Path, out: Path, ship: bool) -> None:
    """Split by workload, fit on a third, predict the rest, and say how far off they are."""
    rows = read_runs(runs)
    if ship:
        count = sum(_counts(row) and measured_seconds(row) is not None for row in rows)
        source = f"fitted on {count} runs of bench/measured/runs.jsonl by `python -m bench.published --ship`"
        write_fitted(fit_runs(rows), SHIPPED, source)
        book.cache_clear()
        print(f"written to {SHIPPED.relative_to(PROJECT)}")
        return
    out.mkdir(parents=True, exist_ok=True)
    results = measure(rows)
    results["command"], results["date"] = "python -m bench.published", datetime.now(UTC).strftime("%Y-%m-%d")
    _keep(results, out)  # what follows takes as long again, several times
    results["unseen"] = unseen(rows)
    _keep(results, out)
    console = make_console()
    for goal in report.goals(results):
        console.print(str(goal), style="green" if goal.met else "bold red", markup=False)
    console.print(f"kept in {out / 'published.json'}", soft_wrap=True)


def _keep(results: dict[str, Any], out: Path) -> None:
    text = re.sub(r"\n   +|\n  (?=[}\]])", " ", json.dumps(results, indent=1))  # one run a line
    (out / "published.json").write_text(text + "\n", encoding="utf-8")
    if out == report.RESULTS:
        report.draw(results, PROJECT / "docs" / "pictures" / "published.png")


def measure(rows: Sequence[Any]) -> dict[str, Any]:
    """Fit on each third of the workloads in turn, and score the other two: each run is scored twice, by others."""
    part = parts(rows)
    every: list[Scored] = []
    plain: list[Scored] = []
    points: list[dict[str, Any]] = []
    held: list[dict[str, Any]] = []
    unsafe: set[str] = set()
    refused: dict[str, int] = defaultdict(int)
    rows = [row for row in rows if not isinstance(row, Refused)]
    for row in rows:
        refused[_source(row)] += _id(row) not in part
    for fold in range(PARTS):
        train = [row for row in rows if part.get(_id(row)) == fold]
        test = [row for row in rows if part.get(_id(row), fold) != fold]
        known = fit_runs(train)
        found = predict(test, known)
        by_id = {one["id"]: one for one in found["rows"]}
        unsafe |= set(found["summary"]["memory"]["out_of_memory_called_safe"])
        baseline = _baseline(train, known)
        for row in test:
            answer = by_id[_id(row)]
            _score(row, answer, fold, every, points, held)
            _plain(row, known, baseline, fold, plain)
    dense = {one["id"] for one in points if one["dense_a100"]}
    return {
        "parts": PARTS,
        "workloads": len(set(_workloads(rows).values())),
        "seconds": summary(every),
        "dense_a100": summary([one for one in every if one.id.split("@")[0] in dense]),
        "baseline": summary(plain),
        "baseline_dense_a100": summary([one for one in plain if one.id.split("@")[0] in dense]),
        "repeated": repeated(rows),
        "memory": errors(one["predicted"] / one["measured"] - 1 for one in held),
        "peaks": held,
        "out_of_memory_called_safe": sorted(unsafe),
        "refused": {source: count for source, count in sorted(refused.items()) if count},
        "points": points,
    }


def unseen(rows: Sequence[Any]) -> dict[str, Any]:
    """Errors of each source with constants from all the others: what a source gets that nobody has ever fitted on."""
    by_source: dict[str, list[Any]] = defaultdict(list)
    for row in rows:
        if not isinstance(row, Refused) and _counts(row):
            by_source[_source(row)].append(row)
    every: list[Scored] = []
    peaks: list[float] = []
    for source, test in sorted(by_source.items()):
        others = [each for name, members in by_source.items() if name != source for each in _some(members)]
        known = fit_runs(others)
        by_id = {one["id"]: one for one in predict(test, known)["rows"] if "refused" not in one}
        for row in test:
            answer, measured, held = by_id.get(_id(row)), measured_seconds(row), measured_bytes(row)
            if answer and measured:
                group = row.get("ranking_group") or ""
                every.append(Scored(_id(row), source, group, answer["predicted_seconds"], measured))
            if answer and held:
                peaks.append(answer["predicted_peak_bytes"] / held - 1)
    return {**summary(every), "memory": errors(peaks)}


def _some(members: Sequence[Any]) -> Sequence[Any]:
    return members[:: max(1, len(members) // MOST_OF_SOURCE)]


def repeated(rows: Sequence[Any]) -> dict[str, dict[str, float]]:
    """How far runs of a source that say the same of themselves are from each other's mean: no model does better."""
    alike: dict[tuple[str, str], list[float]] = defaultdict(list)
    for row in rows:
        measured = measured_seconds(row)
        if measured and _counts(row):
            said = [row.get(name) for name in ("task", "model", "batch", "parallel", "hardware", "precision")]
            alike[_source(row), json.dumps([*said, _system(row)], sort_keys=True)].append(measured)
    off: dict[str, list[float]] = defaultdict(list)
    for (source, _), times in alike.items():
        if len(times) > 1:
            mean = statistics.fmean(times)
            off[source] += [abs(each / mean - 1) for each in times]
    return {name: {"runs": len(each), "mean": round(statistics.fmean(each), 4)} for name, each in sorted(off.items())}


def _system(row: Any) -> str:
    """The software without its release: how far releases are apart counts as the source's own spread."""
    return re.sub(r"[\d.]+", "", str(row.get("software", "")))


def parts(rows: Sequence[Any]) -> dict[str, int]:
    """Which part each run is in: each source's workloads dealt out in an order that their names' digests give."""
    of_run = _workloads(rows)
    source_of = {of_run[_id(row)]: _source(row) for row in rows if _id(row) in of_run}
    by_source: dict[str, list[str]] = defaultdict(list)
    for workload_name in sorted(source_of, key=lambda name: hashlib.sha256(name.encode()).hexdigest()):
        by_source[source_of[workload_name]].append(workload_name)
    part = {name: place % PARTS for names in by_source.values() for place, name in enumerate(names)}
    return {run: part[name] for run, name in of_run.items()}


def _workloads(rows: Sequence[Any]) -> dict[str, str]:
    """A name for what each run trains and on what: all plans for it are in the same part."""
    names: dict[str, str] = {}
    for row in rows:
        if isinstance(row, Refused) or not _counts(row):
            continue
        model, batch = row.get("model", {}), row.get("batch", {})
        sizes = [model.get(key) for key in ("name", "layers", "hidden", "seq")]
        names[_id(row)] = row.get("ranking_group") or json.dumps(
            [_source(row), *sizes, row.get("hardware", {}).get("gpu"), batch.get("global")]
        )
    return names


def _counts(row: Any) -> bool:
    """Whether a run can be predicted, and something of it was measured."""
    try:
        workload(row)
    except Refused:
        return False
    return bool(measured_seconds(row) or measured_bytes(row) or row.get("measured", {}).get("oom"))


def _score(
    row: Any,
    answer: dict[str, Any],
    fold: int,
    every: list[Scored],
    points: list[dict[str, Any]],
    held: list[dict[str, Any]],
) -> None:
    peak = row.get("measured", {}).get("peak_mem_gb")
    if peak:
        held.append({"id": _id(row), "predicted": answer["predicted_peak_bytes"], "measured": peak * 1e9})
    measured = measured_seconds(row)
    if not measured:
        return
    name = f"{_id(row)}@{fold}"
    group = f"{row['ranking_group']}@{fold}" if row.get("ranking_group") else ""
    every.append(Scored(name, _source(row), group, answer["predicted_seconds"], measured))
    family = row.get("model", {}).get("family")
    points.append(
        {
            "id": _id(row),
            "source": _source(row),
            "dense_a100": family in ("gpt", "llama") and "A100" in str(row["hardware"].get("gpu")),
            "predicted": _short(answer["predicted_seconds"]),
            "measured": _short(measured),
            "terms": {
                term: _short(value)
                for term, value in answer["terms"].items()
                if value > 0.01 * answer["predicted_seconds"]
            },
        }
    )


def _short(value: float) -> float:
    return float(f"{value:.4g}")


def _baseline(train: Sequence[Any], known: Book) -> dict[str, float]:
    """The share of the peak that the model's FLOP reach, for each software on each kind of device: the median."""
    shares: dict[str, list[float]] = defaultdict(list)
    for row in train:
        made = _made(row, known)
        measured = measured_seconds(row) if made else None
        if made and measured:
            peak = made.machine.flops_per_second(made.work.precision)
            for kind in (made.kind, f"{made.stack.name} {made.kind}"):
                shares[kind].append(model_flops(made) / peak / measured)
    return {kind: statistics.median(values) for kind, values in shares.items()}


def _plain(row: Any, known: Book, baseline: dict[str, float], fold: int, plain: list[Scored]) -> None:
    made, measured = _made(row, known), measured_seconds(row)
    if made is None or not measured:
        return
    share = baseline.get(f"{made.stack.name} {made.kind}") or baseline.get(made.kind)
    share = share or statistics.median(baseline.values())
    predicted = model_flops(made) / made.machine.flops_per_second(made.work.precision) / share
    group = f"{row['ranking_group']}@{fold}" if row.get("ranking_group") else ""
    plain.append(Scored(f"{_id(row)}@{fold}", _source(row), group, predicted, measured))


def _made(row: Any, known: Book) -> Any:
    try:
        return job(workload(row), known)
    except Refused:
        return None


def _id(row: Any) -> str:
    return str(row.get("id")) if isinstance(row, dict) else ""


def _source(row: Any) -> str:
    return str(row.get("source", "")) if isinstance(row, dict) else ""


if __name__ == "__main__":
    main()
