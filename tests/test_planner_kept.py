"""What the planner's benchmark measured is kept, and predicts again what it predicted."""

import json

import made
import small
from bench import planner_kept
from bench.planner_pair import judged, predicted

from sheaf.api.heard import Heard, question_from
from sheaf.cluster import read, write
from sheaf.graph import trace
from sheaf.plans import Plan

TEXTS = ("dp=2", "dp=2,zero=1")


def test_what_is_kept_predicts_the_same_and_other_networks_stay(tmp_path, monkeypatch):
    task = small.SMALL["mlp"]()
    monkeypatch.setattr(planner_kept, "made", lambda _: task)
    facts = trace(task, task.microbatch or task.batch)
    heard = Heard(((made.profile(facts, concurrency=2),) * 2,) * 3)
    write(made.cluster(2), tmp_path / "2.toml")
    question = question_from(task, facts, read(tmp_path / "2.toml"), heard, {})
    measured = {"exact": True, "measured_seconds": 1.0, "rounds": [1.0], "terms": {"compute": [0.0, 0.5]}}
    rows = [predicted({"plan": text, **measured}, question.price(Plan.parse(text))) for text in TEXTS]
    kept = {"workers": 2, "plans": list(TEXTS), "cluster": (tmp_path / "2.toml").read_text(), **heard.to_dict()}
    result = {"task": "mlp", "network": "loopback", **judged(rows), "heard": [kept]}
    other = {"task": "mlp", "network": "1gbit", "heard": [dict(kept)]}
    for results in ([result], [other]):
        planner_kept.keep(results, tmp_path)
        assert "heard" not in results[0]
    assert [line["network"] for line in map(json.loads, (tmp_path / planner_kept.HEARD).read_text().splitlines())] == [
        "loopback", "1gbit",
    ]  # fmt: skip
    (again,) = planner_kept.predicted_again([result], tmp_path)
    assert again["rows"] == rows
