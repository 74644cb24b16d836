"""The planner's benchmark goes on when a case fails, and tells what it left out; its picture and tables are drawn."""

import pytest
from bench import planner, planner_report
from bench.planner_pair import judged, slower

from sheaf.errors import WorkerFailed


def row(plan, predicted, *rounds, exact=True):
    measured = sorted(rounds)[len(rounds) // 2]
    return {
        "plan": plan,
        "exact": exact,
        "predicted_seconds": predicted,
        "measured_seconds": measured,
        "rounds": list(rounds),
        "error": predicted / measured - 1,
        "terms": {"compute": [0.75 * predicted, 0.75 * measured], "communicate": [0.25 * predicted, 0.25 * measured]},
    }


ROWS = [row("serial", 1.05, 1.0, 1.1, 0.9), row("dp=2", 0.9, 1.0, 1.2, 0.98), row("dp=2,local=4", 0.1, 0.5, 0.5, 0.5)]


def found(name, network):
    rows = [dict(one, exact="local" not in one["plan"]) for one in ROWS]
    return {"task": name, "network": network, **judged(rows), "plans_left_out": {}, "spent_seconds": {"running": 1.0}}


def test_the_first_choice_among_exact_plans_is_judged_round_by_round():
    case = found("gpt", "loopback")
    assert (case["first_choice"], case["fastest"]) == ("dp=2", "serial")
    assert case["regret"] == pytest.approx(0.98 / 0.9 - 1)
    assert slower(ROWS[0], ROWS[0]) == 0


def test_a_case_that_fails_is_told_and_the_others_go_on(monkeypatch, capsys):
    def one(name, network, *_):
        if (name, network) == ("bert", "1gbit"):
            raise WorkerFailed("worker 1 died\nof that")
        return found(name, network)

    heard = []
    monkeypatch.setattr(planner, "found_on", one)
    monkeypatch.setattr(planner, "unavailable", lambda: None)
    results = planner.run(tasks=("gpt", "bert"), networks=("loopback", "1gbit"), told=heard.append)
    assert heard == results
    assert [one.get("left_out") for one in results] == [None, None, None, "worker 1 died\nof that"]
    assert "1gbit bert: " in capsys.readouterr().out
    whole, *judgements = planner_report.planner_goals(results)
    assert not whole.met
    assert "bert on 1gbit left out (of that)" in whole.found
    assert [goal.text.split(":")[0] for goal in judgements] == ["all networks"] * 2 + ["loopback"] * 2 + ["1gbit"] * 2


def test_hosts_that_cannot_be_made_leave_their_network_out(monkeypatch):
    monkeypatch.setattr(planner, "found_on", lambda name, network, *_: found(name, network))
    monkeypatch.setattr(planner, "unavailable", lambda: "no root")
    results = planner.run(tasks=("gpt",), networks=("loopback", "1gbit"))
    assert [one.get("left_out") for one in results] == [None, "no root"]
    assert "1gbit left out (no root)" in planner_report.planner_goals(results)[0].found


def test_errors_are_shared_out_by_the_term_that_takes_most_and_drawn(tmp_path):
    results = [found("gpt", "loopback"), found("gpt", "1gbit"), {"network": "100mbit", "left_out": "no root"}]
    table = planner_report.term_table(results)
    assert [(cells[0], cells[1]) for cells in table.rows] == [("compute", "6")]
    planner_report.draw(results, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 10_000
