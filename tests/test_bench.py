"""What the benchmarks of split models make of their measurements."""

import json
import runpy
from itertools import pairwise
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


def test_unequal_workers_are_judged_by_the_best_plan_with_the_same_shares():
    plans = {"dp=2,shares=2:1": 1.39, "dp=2,shares=69:31,zero=1": 1.46, "dp=2,shares=stolen,zero=1,shards=69:31": 1.41}
    rows = [ratio(plan, "DDP", median, what="one worker at half speed") for plan, median in plans.items()]
    weighted, stolen = report.unequal_goals(rows)
    assert (weighted.met, stolen.met) == (True, False)
    assert weighted.found == "1.46 (`dp=2,shares=69:31,zero=1`), 1.39 (`dp=2,shares=2:1`)"


def test_what_stolen_shares_could_gain_beside_stalls_is_played():
    from bench.stall_limits import done, drawn, equal, limits, stolen

    once = [(1.0, 2.0)]
    assert (done(0.0, 0.5, once), done(0.0, 1.5, once), done(1.5, 0.0, once)) == (0.5, 2.5, 2.0)
    assert equal(0.0, 4, 0.6, once) == done(0.0, 1.2, once)
    # worker 0 draws the third microbatch at 0.6 and the fourth at 1.2, which worker 1 would have begun at 2.2
    assert stolen(0.0, 4, 0.6, once) == pytest.approx(2.2)
    assert stolen(0.0, 4, 0.6, []) == pytest.approx(equal(0.0, 4, 0.6, []))
    assert all(end - start == pytest.approx(1.0) for start, end in drawn(3, 5))
    whole, fine = limits(range(1, 21), 6, finer=20)
    assert 1.0 < whole < fine


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


@pytest.mark.parametrize("name", ["gpt", "vgg16", "translation"])
def test_stages_cut_by_hand_are_the_whole_model_one_after_another(name):
    import torch
    from bench.pipeline_models import CASES

    from sheaf.task import Blueprint, arguments, fetch

    case = CASES[name]
    task = case.task()
    whole = Blueprint(task).fill(torch.device("cpu"))
    batch = fetch(task, (3, 5), 0)
    with torch.no_grad():
        wanted = whole(*arguments(task, batch)[0])
        for stages in (2, 4):
            cuts = [case.layers * stage // stages for stage in range(stages + 1)]
            given = case.given(batch)[0]
            for first, last in pairwise(cuts):
                passed = given if isinstance(given, tuple) else (given,)
                given = case.stage(whole, first, last)(*passed, **case.named(batch, first, last))
            torch.testing.assert_close(given, wanted)
    assert [report.pipeline_goals([pipelined])[0].text.split(":")[0] for pipelined in _pipelined(name)] == [name]


def _pipelined(name):
    return [ratio("pp=2", "Schedule1F1B", 1.3, stages=2, cores=2, limited=False, model=name)]


def mode(name, seconds, sent, predicted):
    peer = {"hosts": 4, "rate": "100mbit", "target": 2.8, "learning_rate": 1e-3}
    times = {"seconds": seconds, "steps": 24 if seconds else None, "step_seconds": 3.0, "best_loss": 2.7}
    told = {"trained_steps": 24, "trained_seconds": 85.0, "sent_bytes": sent, "predicted_bytes": predicted}
    return {"mode": name, **times, **told, **peer}


def test_modes_that_do_not_reach_the_loss_are_told():
    rows = [mode("DDP", 80.0, 3e7, None), mode("dp=4", None, 6e7, 6.1e7), mode("dp=4,local=16", 40.0, 4e6, 3.7e6)]
    table, goals = report.SHOWN["slow"]
    assert [row[1:3] for row in table(rows).rows] == [("80 s", "1.00"), ("not in 85 s", ""), ("40 s", "2.00")]
    near, faster = goals(rows)
    assert (near.met, faster.met) == (False, True)
    assert "`dp=4,local=16` is -7.5% off" in near.found
    assert goals(rows[:2])[0].met


def test_what_a_mode_sends_is_the_mean_over_hosts_beside_the_most():
    from bench import slow

    curve = [[4, 2.0, 3.0], [8, 4.0, 2.5]]
    found = [{"curve": curve, "bytes_per_step": sent} for sent in (500.0, 100.0, 300.0, 300.0)]
    row = slow.told(slow.PEER, found)
    assert (row["sent_bytes"], row["most_sent_bytes"], row["predicted_bytes"]) == (300.0, 500.0, None)
    assert (row["seconds"], row["steps"], row["best_loss"]) == (4.0, 8, 2.5)


def test_bytes_are_counted_in_whole_rounds_after_who_was_late_has_caught_up(monkeypatch):
    from bench import slow

    monkeypatch.setattr(slow.dist, "barrier", lambda: None)
    monkeypatch.setattr(slow.dist, "broadcast", lambda *_: None)
    sent = 0

    def sending(size):
        nonlocal sent
        sent += size

    monkeypatch.setattr(slow, "sent_bytes", lambda: sent)
    losses = iter([3.0] * 3 + [2.0] * 9)

    def validate(_module):
        sending(10**6)  # for the validation, which does not count
        return next(losses)

    def mode(every):
        return slow.trained(lambda: sending(10), None, validate, 1e9, every, catch_up=lambda: sending(100))

    assert mode(1)["bytes_per_step"] == 10 + 100 / slow.INTERVAL
    losses = iter([3.0] * 5 + [2.0])
    found = mode(4 * slow.INTERVAL)
    assert [step for step, *_ in found["curve"]] == [slow.INTERVAL * number for number in range(1, 7)]
    assert found["bytes_per_step"] == 10 + 100 / slow.INTERVAL, "up to the end of the first round"


def test_tables_as_rows_are_judged_on_the_slowest_links():
    sent = {"sheaf_sent_bytes": 8e6, "peer_sent_bytes": 1e8, "losses_apart": 4e-8, "hosts": 4, "samples": 2}
    rows = [ratio("rows", "DDP", 2.0, rate="1gbit", **sent), ratio("rows", "DDP", 6.0, rate="100mbit", **sent)]
    table, goals = report.SHOWN["translation"]
    few, many = goals([*rows, rows[1] | {"median": 4.9, "samples": 8}])
    assert (few.met, many.met) == (True, False)
    assert "6.00 (`rows`), losses 4e-08 apart" in few.found
    assert table(rows).rows[0][-2:] == ("2", "4e-08")
    assert goals([{"skipped": "no apt-get"}]) == []


def test_what_hosts_note_becomes_a_row_beside_the_peer(tmp_path, monkeypatch):
    from bench import on_hosts

    sent = iter(range(0, 10**6, 100))
    monkeypatch.setattr(on_hosts, "sent_bytes", lambda: next(sent))
    for rank, loss in enumerate((2.0, 4.0)):
        found = on_hosts.noted({"DDP": lambda: 3.0, "tp": lambda loss=loss: loss}, count=2, steps=2)
        on_hosts.tell(tmp_path, rank, found)
    told = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    assert told[0]["losses"] == {"DDP": [3.0] * 6, "tp": [2.0] * 6}, "a round to warm up, and two"
    assert told[1]["sent_bytes"]["tp"] == [100] * 6
    told[1]["sent_bytes"]["tp"] = [9, 9, 300, 300, 300, 300]
    ((name, row),) = on_hosts.beside(told, "1gbit", "DDP", steps=2).items()
    assert (name, row["sheaf"], row["peer"], row["hosts"], row["rate"]) == ("tp", "tp", "DDP", 2, "1gbit")
    assert (row["sheaf_sent_bytes"], row["peer_sent_bytes"], row["losses_apart"]) == (200, 100, 0.0)


def test_networks_measured_again_stand_beside_those_that_were_kept():
    from bench.__main__ import beside_kept

    kept = {
        "environment": {"command": "python -m bench planner", "cores": 2},
        "results": [{"network": name, "task": "old"} for name in ("loopback", "loopback", "1gbit")],
    }
    where = {"command": "python -m bench planner --network loopback", "cores": 2}
    again = [{"network": "loopback", "task": "new"}]
    results, told = beside_kept(again, where, kept)
    assert [(one["network"], one["task"]) for one in results] == [("loopback", "new"), ("1gbit", "old")]
    assert told["command"].endswith("planner` and loopback again by `python -m bench planner --network loopback")
    assert beside_kept(again, where, None) == (again, where)


def searched(workers, seconds, peak_bytes):
    asked = {"workers": workers, "cluster": "a100-dgx:128", "plan": "dp=5,tp=8,pp=25", "looked_at": 82, "runs": 5}
    times = {"search_seconds": seconds, "low": 0.9 * seconds, "high": 1.1 * seconds, "command_seconds": 9.0}
    return asked | times | {"peak_bytes": peak_bytes}


def test_a_search_is_judged_by_its_seconds_and_by_the_planners_memory():
    table, goals = report.SHOWN["search"]
    rows = [searched(1024, 1.25, 5e8), searched(100_000, 4.0, 3e9)]
    small, large, memory = goals(rows)
    assert (small.met, large.met, memory.met) == (False, True, False)
    assert table(rows).rows[0][:4] == ("1,024", "`a100-dgx:128`", "`dp=5,tp=8,pp=25`", "82")
    assert all(goal.met for goal in goals([searched(1024, 0.9, 5e8)]))


@pytest.mark.nightly
def test_the_command_is_asked_as_a_user_asks_it():
    from bench import search

    found = search.planned("", "a100-dgx:8")
    assert found["workers"] == 64
    assert found["search_seconds"] < found["command_seconds"]
    assert found["peak_bytes"] > 50 * 2**20


def test_modes_that_are_left_when_hosts_break_are_run_again(monkeypatch, capsys):
    from bench import slow
    from bench.hosts import HostsError
    from bench.on_hosts import Broken

    asked = []

    def found_by(_name, hosts, _rate, _budget, *modes, timeout_s):
        asked.append(modes)
        told = [{mode: {"rank": rank} for mode in modes[: 2 if rank else 1]} for rank in range(hosts)]
        if len(asked) == 1:
            raise Broken(HostsError("host 3 ended"), told)
        return [{mode: {"rank": rank} for mode in modes} for rank in range(hosts)]

    monkeypatch.setattr(slow, "found_by", found_by)
    found = slow.found(("a", "b", "c"), 1.0)
    assert asked == [("a", "b", "c"), ("b", "c")]
    assert found == {mode: [{"rank": rank} for rank in range(slow.HOSTS)] for mode in "abc"}
    assert "1 of 3 modes: host 3 ended" in capsys.readouterr().err

    def broken(_name, hosts, *_given, timeout_s):
        raise Broken(HostsError("host 0 ended"), [None] * hosts)

    monkeypatch.setattr(slow, "found_by", broken)
    with pytest.raises(Broken):
        slow.found(("a",), 1.0)
