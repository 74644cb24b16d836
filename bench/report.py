"""What the measurements say: rows for tables, goals met or not, and markdown for the README."""

import json
import re
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from bench import network_report, planner_report
from bench.tables import RATIO, Goal, Table, ratio_cells, skipped
from sheaf.units import pretty_bytes, pretty_seconds

RESULTS = Path(__file__).parent / "results"
NAMES = (
    "executors", "planner", "search", "tensor", "pipeline", "parts", "unequal", "server", "slow", "translation",
    "verify",
)  # fmt: skip

# (Sheaf's plan, its peer): the least ratio of throughputs that is wanted
GOALS = {("serial", "hand-written loop"): 0.99, ("dp=2", "DDP"): 0.98, ("dp=2,zero=3", "fully_shard"): 0.98}
AIM = {("dp=2,zero=3", "fully_shard"): 1.2}  # on gloo
BEST_DTENSOR, AIM_DTENSOR = 1.0, 1.2
BALANCE = 1.2  # of a pipeline with balanced stages over one with equally many layers in each
UNEQUAL = {  # (where, shares): the best plan with those; were only computing to count, 1.5 is the most at half speed
    ("one worker at half speed", "weighted"): 1.45,
    ("one worker at half speed", "stolen"): 1.45,
    ("one worker at half speed, long steps", "weighted"): 1.45,
    ("one worker at half speed, long steps", "stolen"): 1.45,
    ("a worker stalls for a second", "stolen"): 1.3,
    ("a worker stalls for a second, long steps", "stolen"): 1.3,
}
SHARES = {"weighted": r"shares=(\d+:\d+|balanced)", "stolen": "shares=stolen"}
SEARCHED = {1024: 1.0, 100_000: 10.0}  # workers: seconds at most
PLANNER_BYTES = 2 * 2**30
PLAN_WIDTH = 60  # in a table
FAILOVER_SECONDS = 1.0
PARTS_COLUMN = "by parts"
PARTS, TRAFFIC = 4.0, 8.0  # times the throughput, and times fewer bytes: "about tenfold"


def executor_table(results: Sequence[dict[str, Any]]) -> Table:
    """Each plan beside its peer: the ratio of throughputs, round by round, and both step times."""
    return Table(("Sheaf", "beside", *RATIO), [ratio_cells(one) for one in results], words=2)


def executor_goals(results: Sequence[dict[str, Any]]) -> list[Goal]:
    """The goals of throughput, judged by the median over rounds."""
    found = {(one["sheaf"], one["peer"]): one["median"] for one in results}
    goals: list[Goal] = []
    for pair, least in GOALS.items():
        if pair in found:
            plan, peer = pair
            text = f"`{plan}` at least {least:g} times the throughput of {peer}"
            goals.append(Goal(text, f"{found[pair]:.3f}", found[pair] >= least))
    for pair, least in AIM.items():
        if pair in found:
            text = f"`{pair[0]}` aims at {least:g} times {pair[1]} on gloo"
            goals.append(Goal(text, f"{found[pair]:.3f}", found[pair] >= least))
    return goals


def split_goals(results: Sequence[dict[str, Any]]) -> list[Goal]:
    """The goals of split layers: Sheaf's fastest plan beside the fastest plan written by hand for DTensor."""
    best = [one for one in results if one["best"]]
    if not best:
        return []
    ours = max(best, key=lambda one: one["median"])
    found = f"{ours['median']:.3f} (`{ours['sheaf']}` beside {ours['peer']})"
    return [
        Goal(f"{text} {least:g} times the throughput of the best DTensor plan", found, ours["median"] >= least)
        for text, least in (("split layers reach at least", BEST_DTENSOR), ("split layers aim at", AIM_DTENSOR))
    ]


def pipeline_table(results: Sequence[dict[str, Any]]) -> Table:
    """Each pipeline beside torch's with equally many layers per stage, and the shares of time in which workers wait."""
    kinds = ("measured", "of_these_stages", "of_equal_stages")
    rows = [
        (one.get("model", "gpt"), *ratio_cells(one), *(f"{one['bubble'][kind]:.0%}" for kind in kinds))
        for one in results
    ]
    return Table(("model", "Sheaf", "beside", *RATIO, "bubble", "of these stages", "(p-1)/(m+p-1)"), rows, words=3)


def pipeline_goals(results: Sequence[dict[str, Any]]) -> list[Goal]:
    """The goals of balance, by model and number of stages, under the schedule that plans have by themselves: 1F1B."""
    goals: list[Goal] = []
    cases = dict.fromkeys((one.get("model", "gpt"), one["stages"]) for one in results)
    for model, stages in cases:
        ours = next(one for one in results if one["sheaf"] == f"pp={stages}" and one.get("model", "gpt") == model)
        short = f", each on {ours['cores'] / stages:g} of a core" if ours["limited"] else ""
        if ours["cores"] < stages and not ours["limited"]:
            short = f", {stages} workers sharing {ours['cores']} cores"
        goals.append(
            Goal(
                f"{model}: `pp={stages}` at least {BALANCE:g} times torch's pipeline with equally many layers per "
                f"stage{short}",
                f"{ours['median']:.3f} beside {ours['peer']}",
                ours["median"] >= BALANCE,
            )
        )
    return goals


def parts_table(results: Sequence[dict[str, Any]]) -> Table:
    """The plan by parts beside DDP: throughput, and what a host sends in a step."""
    if any("skipped" in one for one in results):
        return skipped(results)
    sent = ("sheaf_sent_bytes", "peer_sent_bytes")
    rows = [(*ratio_cells(one, 2), *(pretty_bytes(one[kind]) for kind in sent), str(one["samples"])) for one in results]
    return Table(("Sheaf", "beside", *RATIO, "Sheaf sends", "peer sends", "samples a host"), rows, words=2)


def parts_goals(results: Sequence[dict[str, Any]]) -> list[Goal]:
    """The goals of different plans for different parts."""
    goals: list[Goal] = []
    for one in results[:1]:  # of the fewest samples, where links count as on hosts with cores of their own
        if "skipped" in one:
            continue
        where = f"on {one['hosts']} hosts with {one['rate']} links"
        fewer = one["peer_sent_bytes"] / one["sheaf_sent_bytes"]
        goals += [
            Goal(
                f"`{one['sheaf']}` at least {PARTS:g} times the throughput of {one['peer']} {where}",
                f"{one['median']:.2f}",
                one["median"] >= PARTS,
            ),
            Goal(f"it sends at least {TRAFFIC:g} times fewer bytes", f"{fewer:.1f} times", fewer >= TRAFFIC),
        ]
    return goals


def unequal_table(results: Sequence[dict[str, Any]]) -> Table:
    """Shares beside DDP's equal ones, where workers are not alike."""
    rows = [
        (one["what"], *ratio_cells(one, 2), f"{one['losses_apart']:.0e}") for one in results if "skipped" not in one
    ]
    return Table(("where", "Sheaf", "beside", *RATIO, "losses differ by"), rows, words=3) if rows else skipped(results)


def unequal_goals(results: Sequence[dict[str, Any]]) -> list[Goal]:
    """The goals of shares for unequal workers: of plans with the same shares the best counts, and all are told."""
    goals: list[Goal] = []
    for (what, shares), least in UNEQUAL.items():
        written = re.compile(f",{SHARES[shares]}(,|$)")
        alike = [one for one in results if one["what"] == what and written.search(one.get("sheaf", ""))]
        alike.sort(key=lambda one: one["median"], reverse=True)
        if alike:
            text = f"{what}, {shares} shares at least {least:g} times DDP"
            found = ", ".join(f"{one['median']:.2f} (`{one['sheaf']}`)" for one in alike)
            goals.append(Goal(text, found, alike[0]["median"] >= least))
    return goals


def search_table(results: Sequence[dict[str, Any]]) -> Table:
    """How long the search for each cluster takes, and the command around it."""
    rows = [
        (
            f"{one['workers']:,}",
            f"`{one['cluster']}`",
            f"`{_short(one['plan'])}`",
            str(one["looked_at"]),
            pretty_seconds(one["search_seconds"]),
            f"{pretty_seconds(one['low'])} to {pretty_seconds(one['high'])}",
            pretty_seconds(one["command_seconds"]),
            pretty_bytes(one["peak_bytes"]),
        )
        for one in results
    ]
    headings = ("devices", "cluster", "best plan", "priced", "search", "quartiles", "whole command", "peak memory")
    return Table(headings, rows, words=3)


def _short(plan: str) -> str:
    """As many of a plan's keys as a table has room for; the results hold all of them."""
    return textwrap.shorten(plan.replace(",", " "), PLAN_WIDTH, placeholder=" ...").replace(" ", ",")


def search_goals(results: Sequence[dict[str, Any]]) -> list[Goal]:
    """The goals of time, judged by the median, and of the planner's own memory."""
    goals: list[Goal] = []
    for one in results:
        most = SEARCHED[one["workers"]]
        text = f"a plan for 175 billion parameters on {one['workers']:,} devices is found in less than {most:g} s"
        found = f"{pretty_seconds(one['search_seconds'])} in the median of {one['runs']}"
        goals.append(Goal(text, found, one["search_seconds"] < most))
    if results:
        held = max(one["peak_bytes"] for one in results)
        text = f"the planner holds less than {pretty_bytes(PLANNER_BYTES)}"
        goals.append(Goal(text, f"at most {pretty_bytes(held)}", held < PLANNER_BYTES))
    return goals


def server_table(results: Sequence[dict[str, Any]]) -> Table:
    """Pushes and pulls per second of all workers together."""
    rows = [
        (
            one["contender"],
            str(one["workers"]),
            pretty_bytes(one["size_bytes"]),
            f"{one['median']:.0f}",
            f"{one['low']:.0f} to {one['high']:.0f}",
        )
        for one in sorted(
            (one for one in results if "contender" in one),
            key=lambda one: (one["size_bytes"], one["workers"], -one["median"]),
        )
    ]
    return Table(("server", "workers", "gradient", "push and pull per second", "quartiles"), rows)


def server_goals(results: Sequence[dict[str, Any]]) -> list[Goal]:
    """That of failover, judged by the longest that any worker stood still; the table stands for itself."""
    return [
        Goal(
            f"a shard's {one['killed']} is killed, and workers stand still for less than {FAILOVER_SECONDS:g} s",
            f"at most {pretty_seconds(one['high'])} in {one['count']} times, {pretty_seconds(one['median'])} in the "
            "median" + _taken_over(one),
            one["high"] < FAILOVER_SECONDS,
        )
        for one in results
        if "killed" in one
    ]


def _taken_over(one: dict[str, Any]) -> str:
    seconds = one["took_over_seconds"]
    return "" if seconds is None else f"; the backup had taken over after {pretty_seconds(seconds)}"


def verify_table(results: Sequence[dict[str, Any]]) -> Table:
    """Each model under each plan: the largest relative departure of a gradient in one step, or why there is none."""
    plans = list(dict.fromkeys(one["plan"] for one in results if "=tp" not in one["plan"]))
    found = {(one["model"], one["plan"] if one["plan"] in plans else PARTS_COLUMN): one for one in results}
    rows = [
        (model, *(_verdict(found.get((model, plan))) for plan in (*plans, PARTS_COLUMN)))
        for model in dict.fromkeys(one["model"] for one in results)
    ]
    return Table(("model", *(f"`{plan}`" for plan in plans), PARTS_COLUMN), rows)


def _verdict(one: dict[str, Any] | None) -> str:
    if one is None:
        return ""
    if one["verdict"] in ("refused", "failed"):
        return one["verdict"]
    told = "0" if one["verdict"] == "identical" else f"{one['errors']['gradient']:.0e}"
    return f"**WRONG** {told}" if one["verdict"] == "wrong" else told


def verify_goals(results: Sequence[dict[str, Any]]) -> list[Goal]:
    """Every verdict is identical or rounding; what was refused or failed is told with its reason."""
    judged = [one for one in results if "errors" in one]
    right = [one for one in judged if one["verdict"] in ("identical", "rounding")]
    same = sum(one["verdict"] == "identical" for one in judged)
    found = f"{len(right)} of {len(judged)}, {same} of them identical to the last bit"
    goals = [Goal("every model under every plan computes the serial answer", found, len(right) == len(judged) > 0)]
    for one in results:
        if one["verdict"] in ("refused", "failed"):
            reason = " ".join(one["reason"].split())
            ends = "is refused before any worker starts" if one["verdict"] == "refused" else "runs"
            what = f"`{one['plan']}` for {one['model']} {ends}"
            goals.append(Goal(what, reason, one["verdict"] == "refused"))
    return goals


def measured_on(environment: dict[str, Any]) -> str:
    """Where, when and how, in a sentence."""
    load = ", ".join(f"{value:.2f}" for value in environment["load_average"])
    return (
        f"Measured on {environment['date']} by `{environment['command']}`: {environment['cores']} cores of "
        f"{environment['processor']}, torch {environment['torch']}, Python {environment['python']}; "
        f"load average at the start {load}."
    )


def read(name: str, folder: Path = RESULTS) -> dict[str, Any] | None:
    """The results of one benchmark, or None where it has not been run."""
    path = folder / f"{name}.json"
    return json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None


def section(name: str, folder: Path = RESULTS, *, tables: bool = True) -> str:
    """One benchmark as markdown: its tables, its goals, and where it was measured; or how to measure it."""
    found = read(name, folder)
    if found is None:
        return (
            f"Not measured yet: `python -m bench {name}` writes `bench/results/{name}.json`, `make docs` this section."
        )
    table, goals = SHOWN[name]
    shown = [one(found["results"]) for one in (table, *MORE.get(name, ()))] if tables else []
    lines = "\n".join(f"- {goal}." for goal in goals(found["results"]))
    told = (*(one.markdown() for one in shown if one.rows), lines, measured_on(found["environment"]))
    return "\n\n".join(part for part in told if part)


# name: (results -> table, results -> goals)
SHOWN: dict[str, tuple[Callable[[Any], Table], Callable[[Any], list[Goal]]]] = {
    "executors": (executor_table, executor_goals),
    "planner": (planner_report.planner_table, planner_report.planner_goals),
    "search": (search_table, search_goals),
    "tensor": (executor_table, split_goals),
    "pipeline": (pipeline_table, pipeline_goals),
    "parts": (parts_table, parts_goals),
    "verify": (verify_table, verify_goals),
    "unequal": (unequal_table, unequal_goals),
    "server": (server_table, server_goals),
    "slow": (network_report.slow_table, network_report.slow_goals),
    "translation": (network_report.translation_table, network_report.translation_goals),
}

# name: further tables of its section
MORE: dict[str, tuple[Callable[[Any], Table], ...]] = {"planner": (planner_report.term_table,)}
