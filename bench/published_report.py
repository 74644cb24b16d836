"""What `bench/published.py` found: goals, a table for docs/planning.md, and a picture."""

from collections import defaultdict
from pathlib import Path
from typing import Any

from bench import scatter
from bench.report import RESULTS, Goal, Table, read

MOST_ERROR, MOST_REGRET, LEAST_CORRELATION = 0.06, 0.03, 0.9  # dense GPT on A100
MOST_SOURCE, MOST_OTHER, MOST_MEMORY = 0.10, 0.12, 0.05


def goals(results: dict[str, Any]) -> list[Goal]:
    """The goals of predicting runs that were never seen."""
    dense, memory = results["dense_a100"], results["memory"]
    groups = dense["groups"]
    over = _over(dense["sources"], MOST_SOURCE)
    others = {name: one for name, one in results["seconds"]["sources"].items() if name not in dense["sources"]}
    far = _over(others, MOST_OTHER)
    unsafe = results["out_of_memory_called_safe"]
    error, slower, order = dense["all"]["mean"], groups["regret"], groups["rank_correlation"]
    off = memory["median"]
    return [
        Goal(f"dense GPT on A100: mean error at most {MOST_ERROR:.0%}", f"{error:.1%}", error <= MOST_ERROR),
        Goal(
            f"the first choice at most {MOST_REGRET:.0%} slower than the fastest",
            f"{slower:.1%} in {groups['count']} groups",
            slower <= MOST_REGRET,
        ),
        Goal(f"rank correlation at least {LEAST_CORRELATION:g}", f"{order:.2f}", order >= LEAST_CORRELATION),
        Goal(f"no source of dense GPT on A100 over {MOST_SOURCE:.0%}", over or "none over it", not over),
        Goal(f"other sources at most {MOST_OTHER:.0%}", f"over it: {far}" if far else "all", not far),
        Goal(
            f"peak memory: median error at most {MOST_MEMORY:.0%}",
            f"{off:.1%} of {memory['count']}",
            off <= MOST_MEMORY,
        ),
        Goal("no run out of memory is called safe", ", ".join(unsafe) or "none", not unsafe),
    ]


def table(results: dict[str, Any]) -> Table:
    """Error of the step's time by source, beside a constant share of the peak."""
    plain = results["baseline"]["sources"]
    unseen, repeated = results.get("unseen", {"sources": {}, "all": None}), results.get("repeated", {})
    rows = [
        _row(name, one, _share(unseen["sources"].get(name)), _share(repeated.get(name)), plain[name]["mean"])
        for name, one in results["seconds"]["sources"].items()
        if one["count"]
    ]
    dense, of_dense = results["dense_a100"]["all"], results["baseline_dense_a100"]["all"]["mean"]
    rows.append(_row("**dense GPT on A100**", dense, "", "", of_dense))
    every, of_every = results["seconds"]["all"], results["baseline"]["all"]["mean"]
    rows.append(_row("**all**", every, _share(unseen["all"]), "", of_every))
    headings = (
        "source",
        "predictions",
        "mean error",
        "median",
        "90th percentile",
        "bias",
        "mean error when the whole source was never seen",
        "runs alike, from each other",
        "constant share of the peak for each software and device, mean error",
    )
    return Table(headings, rows)


def section(folder: Path = RESULTS) -> str:
    """The section as markdown, or how to measure it."""
    results = read("published", folder)
    if results is None:
        return "Not measured yet: `make bench-planner` writes `bench/results/published.json`, `make docs` this section."
    groups, plain = results["dense_a100"]["groups"], results["baseline_dense_a100"]["groups"]
    beside = (
        f"A constant share of the peak chooses {plain['regret']:.1%} slower plans than the fastest in the same groups, "
        f"with a rank correlation of {plain['rank_correlation']:.2f}, where Sheaf's are {groups['regret']:.1%} and "
        f"{groups['rank_correlation']:.2f}."
    )
    lines = "\n".join(f"- {goal}." for goal in goals(results))
    of = f"{results['workloads']} workloads in {results['parts']} parts"
    said = f"Written on {results['date']} by `{results['command']}`: {of}."
    return "\n\n".join([table(results).markdown(), beside, *_whole(results), lines, said])


def _whole(results: dict[str, Any]) -> list[str]:
    unseen = results.get("unseen")
    if unseen is None:
        return []
    every, groups, memory = unseen["all"], unseen["groups"], unseen["memory"]
    said = (
        f"Sources never seen at all, with constants from the others' runs only: {every['mean']:.1%} mean and "
        f"{every['median']:.1%} median error of {every['count']} runs, rank correlation "
        f"{groups['rank_correlation']:.2f}, the first choice {groups['regret']:.1%} slower than the fastest; peak "
        f"memory {memory['median']:.1%} median error of {memory['count']}."
    )
    return [said]


def draw(results: dict[str, Any], path: Path) -> None:
    """Predicted against measured, and the error by the term that takes most of the step."""
    by_source: dict[str, list[dict[str, Any]]] = defaultdict(list)
    by_term: dict[str, list[float]] = defaultdict(list)
    for point in results["points"]:
        by_source[point["source"]].append(point)
        most = max(point["terms"], key=point["terms"].__getitem__)
        by_term[most].append(point["predicted"] / point["measured"] - 1)
    groups = [
        scatter.Group(
            source,
            [one["measured"] for one in points],
            [one["predicted"] for one in points],
            color=f"C{number % 10}",
            marker="os^"[number // 10 % 3],
        )
        for number, (source, points) in enumerate(sorted(by_source.items(), key=lambda pair: -len(pair[1])))
    ]
    axis = "predicted from other workloads"
    scatter.draw(groups, by_term, path, predicted=axis, size=12, legend={"fontsize": 7, "ncols": 2})


def _over(sources: dict[str, Any], most: float) -> str:
    return ", ".join(
        f"{name} {one['mean']:.1%} ({one['count'] // 2} run{'s' * (one['count'] > 2)})"
        for name, one in sources.items()
        if one["count"] and one["mean"] > most
    )


def _share(one: dict[str, Any] | None) -> str:
    return f"{one['mean']:.1%}" if one and "mean" in one else ""


def _row(name: str, one: dict[str, Any], unseen: str, alike: str, plain: float) -> tuple[str, ...]:
    shares = (f"{one['mean']:.1%}", f"{one['median']:.1%}", f"{one['p90']:.1%}", f"{one['bias']:+.1%}")
    return (name, str(one["count"]), *shares, unseen, alike, f"{plain:.0%}")
