"""The table of plans reads well in 100 columns, and keeps every plan's text whole."""

import io
from dataclasses import replace
from types import SimpleNamespace

from rich.console import Console

from sheaf.cli.plan import show
from sheaf.cli.show import described
from sheaf.cluster import read
from sheaf.cluster.cluster import Tier
from sheaf.cost.price import Price
from sheaf.plans import Plan
from sheaf.search import Entry, Ranking, Refusal

LONG = "dp=2,shares=stolen,recompute=full,microbatch=16"


def entry(text, seconds, **words):
    price = Price(Plan.parse(text), {"compute": seconds}, {"parameters": 2**20}, 0.0)
    return Entry(price, **words)


def shown(ranking, cluster=None, rows=12, width=100):
    console = Console(file=io.StringIO(), width=width, highlight=False)
    show(ranking, cluster, console, rows=rows)
    return console.file.getvalue()


def ranking(ranked, refused=()):
    return Ranking(ranked=tuple(ranked), refused=tuple(refused), cluster="here", batch=32, microbatch=4)


def test_a_ranking_tells_times_speeds_and_reasons():
    text = shown(
        ranking(
            [
                entry("dp=2", 0.2, reason="fastest: 1.80 times serial with 2 workers"),
                entry("serial", 0.36, loses_on="160 ms more computing"),
                entry(LONG, 0.4, loses_on="60 ms more running blocks forward again, and so on and so on"),
            ],
            [Refusal(plan, "zero=3 needs room", "use zero=1") for plan in ("dp=2,zero=3", "dp=2,zero=2")],
        ),
        read("cpu-1gbit"),
    )
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    assert lines[0].startswith("cpu-1gbit: 4 hosts of 1 worker")
    rows = {line.split()[0]: line for line in lines if "MiB" in line}
    assert list(rows) == ["dp=2", "serial", LONG]  # whole: it is what users copy
    assert rows["dp=2"].split()[1:] == ["200", "ms", "1.80x", "1.00", "MiB"]
    assert "1.00x" in rows["serial"]
    assert rows["serial"].rstrip().endswith("160 ms more computing")
    assert "dp=2 leads: fastest: 1.80 times serial with 2 workers" in text
    assert "- dp=2,zero=3, dp=2,zero=2: zero=3 needs room; use zero=1" in text


def test_a_long_ranking_is_cut_and_says_so():
    plans = [entry(f"dp={workers}", 1 / workers) for workers in range(20, 1, -1)]
    assert "and 7 more" in shown(ranking(plans))
    text = shown(ranking(plans), rows=None)
    assert "and 7 more" not in text
    assert "dp=2 " in text


def test_without_a_plan_the_refusals_are_told():
    text = shown(ranking([], [Refusal(f"dp={number}", "too large", "more memory") for number in range(1, 7)]))
    assert "dp=1, dp=2, dp=3, dp=4 and 2 more: too large; more memory" in text
    assert "leads" not in text


def test_speed_is_left_out_where_one_worker_cannot_run_it():
    assert "x" not in shown(ranking([entry("dp=2,zero=3", 0.2, reason="fits")])).split("leads")[0]


def test_clusters_are_described_in_few_lines():
    assert len(described(read("cpu-1gbit"))) == 3
    assert described(read("h100-dgx"))[-1].startswith("nccl: NVLink 4")
    assert "16 hosts of 8 workers" in described(read("h100-dgx", hosts=16))[0]


def test_a_plan_too_long_for_the_table_stays_whole_with_its_reason_below():
    longer = "dp=2,tp=2,pp=2:interleaved,virtual=2,stages=3:4:4:2,microbatch=16"
    text = shown(ranking([entry("dp=2", 0.2, reason="fastest"), entry(longer, 0.4, loses_on="200 ms more computing")]))
    lines = text.splitlines()
    assert max(map(len, lines)) <= 100
    place = next(number for number, line in enumerate(lines) if line.startswith(longer + " "))
    assert lines[place + 1].strip() == "200 ms more computing"


def test_what_the_first_plan_that_splits_layers_splits_is_told():
    split = {
        "sent": 0, "sequences": False,
        "workers": 2, "matrices": 14, "split": 12, "by_output": 8, "by_input": 4, "sums": 6, "sums_bytes": 2**20,
        "gathered": [{"block": "<loss>", "for": "cross_entropy", "times": 1, "bytes": 2048}],
        "whole": {"odd": "PlanError: a sort"},
    }  # fmt: skip
    found = replace(ranking([entry("dp=2", 0.2, reason="r"), entry("tp=2", 0.3)]), splits={(2, 0): split})
    text = " ".join(shown(found).split())
    assert "tp=2: 12 of 14 weight matrices split among 2 (8 by outputs, 4 by inputs), 6 sums of 1.00 MiB" in text
    assert "gathered, as no pair was found: input of cross_entropy in loss (2.00 KiB)" in text
    assert "kept whole: odd: PlanError: a sort" in text


def test_links_of_tiers_are_told_from_the_nearest_on():
    far = Tier(name="rack", workers=16, latency_seconds=1e-5, bytes_per_second=2e9)
    near = Tier(name="socket", workers=4, latency_seconds=1e-6, bytes_per_second=3e9)
    line = described(replace(read("a100-dgx"), tiers=(far, near)))[-1]
    places = [line.index(one) for one in ("socket of 4,", "NVLink 3,", "rack of 16,", "between tiers HDR InfiniBand")]
    assert places == sorted(places)


def test_where_nothing_fits_it_is_said_how_many_workers_would_do():
    none = ranking([], [Refusal("dp=2", "needs 161 GiB", "")])
    assert "no plan fits: 48 workers of this kind would do" in shown(replace(none, workers_needed=48))
    starved = (entry("dp=2", 0.2).price,)
    assert "no plan fits, nor would one with a million workers" in shown(replace(none, starved=starved))


def test_a_remedy_longer_than_a_line_is_whole():
    remedy = "dp=46,tp=2,pp=11:zero-bubble,zero=2," + ",".join(f"blocks.{tens}[0-9]=recompute" for tens in range(1, 9))
    text = shown(ranking([], [Refusal("dp=2", "needs room", f"use {remedy} (3 % slower)")]))
    assert remedy in "".join(line.strip() for line in text.splitlines())


def test_speeds_that_only_a_busy_machine_has_are_called_so():
    profiles = {1: SimpleNamespace(cores_taken=1.9)}
    busy = replace(
        ranking([entry("dp=2", 0.01, reason="r"), entry("serial", 0.62)]), asked=SimpleNamespace(profiles=profiles)
    )
    assert "speeds above the number of workers come of that too" in shown(busy)
    likely = replace(busy, ranked=(entry("dp=2", 0.4, reason="r"), entry("serial", 0.62)))
    assert "other programs kept 1.9" in shown(likely)
    assert "speeds above" not in shown(likely)
