"""The README's numbers are those in bench/results, and goals are judged as they are written."""

import json
import runpy
from pathlib import Path

import pytest

PROJECT = Path(__file__).parent.parent
readme = runpy.run_path(str(PROJECT / "tools" / "readme.py"))
report = readme["report"]

PAGE = "before\n<!-- numbers: executors -->\nold\n<!-- end -->\nafter\n"
ENVIRONMENT = {
    "command": "python -m bench executors",
    "date": "2026-01-31",
    "processor": "a processor",
    "cores": 2,
    "torch": "2.13.0",
    "python": "3.12.1",
    "load_average": [0.1, 0.2, 0.3],
}


def ratio(sheaf, peer, median):
    times = {"sheaf_seconds": 0.5, "peer_seconds": 0.5 * median}
    return {"sheaf": sheaf, "peer": peer, "median": median, "low": median - 0.1, "high": median + 0.1, **times}


def task(*errors, regret=0.0):
    rows = [
        {"plan": f"dp={1 + n}", "predicted_seconds": 1 + error, "measured_seconds": 1.0, "error": error}
        for n, error in enumerate(errors)
    ]
    return {
        "task": "one",
        "rows": rows,
        "median_error": 0.1,
        "first_choice": "dp=1",
        "fastest": "dp=2",
        "regret": regret,
    }


def test_a_page_says_how_to_measure_what_was_not_measured(tmp_path):
    page = readme["filled"](PAGE, tmp_path)
    assert "Not measured yet" in page
    assert "old" not in page


def test_a_page_holds_what_was_measured_and_filling_it_again_changes_nothing(tmp_path):
    results = {"environment": ENVIRONMENT, "results": [ratio("dp=2", "DDP", 1.02)]}
    (tmp_path / "executors.json").write_text(json.dumps(results))
    page = readme["filled"](PAGE, tmp_path)
    assert "| `dp=2` | DDP | 1.020 | 0.920 to 1.120 | 500 ms | 510 ms |" in page
    assert "2026-01-31" in page
    assert page.startswith("before\n<!-- numbers: executors -->\n")
    assert page.endswith("<!-- end -->\nafter\n")
    assert readme["filled"](page, tmp_path) == page
    brief = readme["filled"](PAGE.replace("executors", "executors goals"), tmp_path)
    assert "<!-- numbers: executors goals -->\n- " in brief
    assert "|" not in brief
    assert "2026-01-31" in brief


def test_a_section_of_no_benchmark_is_refused(tmp_path):
    with pytest.raises(ValueError, match="'speed' is no benchmark"):
        readme["filled"]("<!-- numbers: speed -->\n<!-- end -->", tmp_path)


@pytest.mark.parametrize(("median", "met"), [(0.98, [True, False]), (0.97, [False, False]), (1.2, [True, True])])
def test_a_throughput_goal_is_met_from_its_bound_on(median, met):
    assert [goal.met for goal in report.executor_goals([ratio("dp=2,zero=3", "fully_shard", median)])] == met


def test_the_planner_is_judged_by_all_plans_and_by_every_first_choice():
    here = task(-0.1, 0.07, 0.9), task(0.05, -0.05, regret=0.07)
    left_out = {"network": "1gbit", "left_out": "no root"}
    whole, accurate, near = report.planner_report.planner_goals([*here, left_out])
    assert not whole.met
    assert "1 tasks, at least 2 plans of each, 1 networks, 1gbit left out (no root)" in whole.found
    assert accurate.met
    assert not near.met
    assert "3.5%; within 3% in 1 of 2 cases, 7.0% at worst" in near.found


def test_the_planners_table_has_a_row_for_each_task_and_network():
    other = {**task(0.1, 0.2), "task": "two", "network": "1gbit"}
    table = report.planner_report.planner_table(
        [task(0.1, 0.2, 0.3), other, {"network": "100mbit", "left_out": "no root"}]
    )
    assert table.rows == [
        ("one", "loopback", "`dp=1`", "`dp=2`", "3", "10.0%", "0.0%"),
        ("two", "1gbit", "`dp=1`", "`dp=2`", "2", "10.0%", "0.0%"),
    ]
