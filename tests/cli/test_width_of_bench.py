"""What benchmarks print into pipes and files is as wide as it needs to be, too."""

from bench import planner_kept, published
from bench.report import Goal
from click.testing import CliRunner

NETWORK, LONG = "a network whose name is long " * 5, "a goal of very many words " * 9


def test_what_is_predicted_again_has_a_line_for_each_row(monkeypatch, capsys):
    one = {"task": "mlp", "network": NETWORK, "median_error": 0.125, "regret": 0.25, "rows": [{"error": -0.125}]}
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(planner_kept.report, "read", lambda _: {"results": [one]})
    monkeypatch.setattr(planner_kept, "predicted_again", lambda _results, only: [one])
    planner_kept.main([])
    rows = capsys.readouterr().out.splitlines()
    assert [line.split()[-4:] for line in rows if NETWORK.strip() in line] == [["12.5%", "12.5%", "25.0%", "25.0%"]] * 2


def test_a_goal_of_published_runs_is_one_line(monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(published, "read_runs", lambda _: [])
    monkeypatch.setattr(published, "measure", lambda _: {})
    monkeypatch.setattr(published, "unseen", lambda _: {})
    monkeypatch.setattr(published.report, "goals", lambda _: [Goal(LONG, "0.5", met=True)])
    done = CliRunner().invoke(published.main, ["--out", str(tmp_path)], catch_exceptions=False)
    assert f"met: {LONG}; found 0.5" in done.output.splitlines()
