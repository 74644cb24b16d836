"""What the benchmarks of split models make of their measurements."""

import runpy
from pathlib import Path

import pytest

report = runpy.run_path(str(Path(__file__).parent.parent / "tools" / "readme.py"))["report"]


def ratio(sheaf, peer, median, **more):
    times = {"sheaf_seconds": 0.5, "peer_seconds": 0.5 * median}
    return {"sheaf": sheaf, "peer": peer, "median": median, "low": median - 0.1, "high": median + 0.1, **times, **more}


def test_split_layers_are_judged_beside_the_best_dtensor_plan():
    rows = [ratio("tp=2", "DTensor", 2.0, best=False), ratio("tp=2", "DTensor, loss parallel", 1.1, best=True)]
    least, aim = report.split_goals(rows)
    assert least.met
    assert not aim.met
    assert "1.100" in aim.found


def test_four_stages_on_two_cores_are_told():
    shares = dict.fromkeys(("measured", "of_these_stages", "of_equal_stages"), 0.25)
    row = ratio("pp=4", "Schedule1F1B", 1.3, stages=4, cores=2, limited=True, bubble=shares)
    assert "each on 0.5 of a core" in report.pipeline_goals([row])[0].text
    assert "4 workers sharing 2 cores" in report.pipeline_goals([row | {"limited": False}])[0].text
    assert report.pipeline_table([row]).rows[0][-3:] == ("25%", "25%", "25%")


def test_parts_count_bytes_and_say_why_they_were_not_measured():
    sent = {"sheaf_sent_bytes": 1e8, "peer_sent_bytes": 9e8}
    row = ratio("dp=4,classifier.*=tp", "DDP", 3.5, samples=2, hosts=4, rate="1gbit", **sent)
    faster, fewer = report.parts_goals([row])
    assert (faster.met, fewer.met) == (False, True)
    skipped = [{"skipped": "making network namespaces needs root"}]
    assert report.parts_goals(skipped) == []
    assert report.parts_table(skipped).rows == [("here", "making network namespaces needs root")]


def test_contenders_that_train_something_else_are_found():
    from bench.tensor import agreed

    assert agreed({"DDP": [[2.0, 1.0], [4.0, 3.0]], "tp=2": [[3.0, 2.0], [3.0, 2.0]]}) == 0.0
    with pytest.raises(ValueError, match="losses of tp=2"):
        agreed({"DDP": [[2.0]], "tp=2": [[2.01]]})


def test_verdicts_become_a_table_of_models_and_plans():
    errors = {"loss": 0.0, "gradient": 3e-7, "weight": 0.0, "buffer": 0.0}
    rows = [
        {"model": "gpt", "plan": "tp=2", "verdict": "rounding", "errors": errors},
        {"model": "gpt", "plan": "pp=4", "verdict": "refused", "reason": "3 blocks\nfor 4 stages"},
        {"model": "vgg", "plan": "tp=2", "verdict": "identical", "errors": errors | {"gradient": 0.0}},
        {"model": "vgg", "plan": "pp=4", "verdict": "wrong", "errors": errors},
        {"model": "vgg", "plan": "dp=2,classifier=tp", "verdict": "failed", "reason": "it died"},
    ]
    table = report.verify_table(rows)
    assert table.headings == ("model", "`tp=2`", "`pp=4`", "by parts")
    assert table.rows == [("gpt", "3e-07", "refused", ""), ("vgg", "0", "**WRONG** 3e-07", "failed")]
    every, refused, failed = report.verify_goals(rows)
    assert (every.met, refused.met, failed.met) == (False, True, False)
    assert "2 of 3, 1 of them identical" in every.found
    assert refused.found == "3 blocks for 4 stages"
