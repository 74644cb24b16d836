"""Fitting and scoring: constants come back from runs made with them, and shipped ones fit the runs they are from."""

import dataclasses
import itertools
import json
import math
import statistics
from pathlib import Path

import pytest
from published_cases import row

from sheaf.api.published import fit_runs, predict, predict_runs
from sheaf.cost.analytic.constants import Constants, book, unfitted, write_fitted
from sheaf.cost.analytic.rows import workload
from sheaf.cost.analytic.score import Scored, errors, rank_correlation, regret, summary
from sheaf.cost.analytic.step import job, seconds
from sheaf.errors import DataError

RUNS = Path(__file__).parent.parent.parent / "bench" / "measured" / "runs.jsonl"


def plans():
    for number, (tp, micro, layers) in enumerate(
        (tp, micro, n) for tp in (1, 2, 4) for micro in (1, 4) for n in (8, 24)
    ):
        yield row(
            id=f"made-{number}", model__layers=layers, parallel__tp=tp, parallel__dp=4 // tp, batch__micro=micro,
            batch__grad_accum=None,
        )  # fmt: skip


def test_a_fit_finds_a_slower_machine_and_predicts_plans_it_has_not_seen():
    empty = unfitted(book())
    truth = dataclasses.replace(empty.expected(), matmul=0.6, layer_seconds=0.0015, memory=0.6)
    measured = []
    for each in plans():
        made = job(workload(each), empty)
        measured.append({**each, "measured": {"iter_time_s": sum(seconds(made, truth).values())}})
    known = fit_runs(measured[::2])
    before, after = (predict(measured[1::2], used)["summary"]["seconds"]["all"]["mean"] for used in (empty, known))
    assert after < 0.05 < before
    stack = empty.stack(" Megatron-DeepSpeed ")
    assert set(known.fitted) == set(empty.effects(stack, "A100"))
    assert known.constants(stack, "A100").layer_seconds > 1.2 * empty.expected().layer_seconds


def test_what_was_never_fitted_shares_what_its_device_and_its_kin_show():
    empty = unfitted(book())
    ones = dict.fromkeys(Constants.names(), 1.0)
    known = dataclasses.replace(
        empty,
        fitted={
            ("", ""): Constants(**ones | {"head": 1.1}),
            ("", "A100"): Constants(**ones | {"matmul": 0.8}),
            ("", "Ampere and later"): Constants(**ones | {"memory": 0.9}),
            ("megatron-deepspeed", ""): Constants(**ones | {"layer_seconds": 2.0}),
            ("megatron-deepspeed", "A100"): Constants(**ones | {"inter": 0.5}),
        },
    )
    expected = empty.expected()
    unheard = known.constants(empty.stack("unheard of"), "A100")
    assert (unheard.matmul, unheard.layer_seconds) == pytest.approx((0.8 * expected.matmul, expected.layer_seconds))
    assert unheard.head == pytest.approx(1.1 * expected.head)
    elsewhere = known.constants(empty.stack(" Megatron-DeepSpeed "), "RTX-4090")
    assert (elsewhere.matmul, elsewhere.memory) == pytest.approx((expected.matmul, 0.9 * expected.memory))
    assert (elsewhere.layer_seconds, elsewhere.inter) == pytest.approx((2 * expected.layer_seconds, expected.inter))
    like = known.constants(empty.stack("BigScience"), "A100")  # like megatron-deepspeed
    assert (like.layer_seconds, like.inter) == pytest.approx((2 * expected.layer_seconds, 0.5 * expected.inter))


def test_runs_of_a_stack_that_scatter_move_what_others_share_less():
    empty = unfitted(book())
    steady = [{**each, "measured": {"iter_time_s": 1.3 * predicted(each, empty)}} for each in plans()]
    wild = [
        {**each, "software": "Composer", "measured": {"iter_time_s": times * predicted(each, empty)}}
        for each, times in zip(plans(), itertools.cycle((0.6, 3.0)), strict=False)
    ]
    found = predict(steady, fit_runs([*steady, *wild]))["summary"]["seconds"]["all"]
    assert found["median"] < 0.04


def predicted(each, known):
    made = job(workload(each), known)
    return sum(seconds(made, known.constants(made.stack, made.kind)).values())


def test_fitted_constants_are_written_and_read_again(tmp_path, monkeypatch):
    path = tmp_path / "fitted.json"
    write_fitted(book(), path, "a test")
    written = json.loads(path.read_text())
    assert written["source"] == "a test"
    assert set(written["fitted"][0]["factors"]) == set(Constants.names())
    assert len(written["fitted"]) == len(book().fitted)
    assert len(written["measured"]) == len(book().measured)


@pytest.mark.parametrize(
    ("source", "most"), [("vtrain", 0.04), ("llm_foundry", 0.04), ("megatron_sc21_t1", 0.05), ("dgxc", 0.05)]
)
def test_shipped_constants_fit_the_runs_they_come_from(source, most):
    rows = [one for one in map(json.loads, RUNS.read_text().splitlines()) if one["source"] == source][:80]
    found = predict(rows, book())["summary"]["seconds"]["all"]
    assert found["count"] >= 3
    assert found["median"] <= most


def test_the_published_run_that_ran_out_of_memory_is_not_called_safe():
    rows = [one for one in map(json.loads, RUNS.read_text().splitlines()) if one["measured"].get("oom")]
    answers = predict(rows, book())
    assert answers["rows"]
    assert not any(one["fits"] for one in answers["rows"])
    assert answers["summary"]["memory"]["out_of_memory_called_safe"] == []


def test_measured_peaks_are_met():
    rows = [one for one in map(json.loads, RUNS.read_text().splitlines()) if one["measured"].get("peak_mem_gb")]
    found = predict(rows, book())["summary"]["memory"]
    assert found["count"] > 50
    assert found["median"] <= 0.05


def test_ranks_and_regret():
    assert rank_correlation([(1, 1), (2, 2), (3, 3)]) == 1.0
    assert rank_correlation([(1, 3), (2, 2), (3, 1)]) == -1.0
    assert math.isnan(rank_correlation([(1, 3), (1, 2)]))
    assert rank_correlation([(1, 1), (1, 2), (2, 3)]) == pytest.approx(0.866, abs=1e-3)
    assert regret([(2.0, 5.0), (1.0, 6.0)]) == pytest.approx(0.2)


def test_errors_and_groups():
    assert errors([]) == {"count": 0}
    assert errors([0.1, -0.3])["bias"] == pytest.approx(-0.1)
    scored = [Scored(str(n), "a", "g", predicted, 1.0 + n) for n, predicted in enumerate((1.0, 2.0, 0.5))]
    found = summary(scored)
    assert found["groups"] == {"count": 1, "rank_correlation": -0.5, "regret": 2.0}
    assert found["sources"]["a"]["count"] == 3
    assert statistics.fmean(abs(one.error) for one in scored) == pytest.approx(found["all"]["mean"], abs=1e-6)


def test_a_file_that_is_not_there_is_told(tmp_path):
    with pytest.raises(DataError, match="cannot read the runs"):
        predict_runs(tmp_path / "none.jsonl")


def test_bad_rows_among_good_ones_are_refused_and_the_others_predicted(tmp_path):
    path = tmp_path / "runs.jsonl"
    lines = [json.dumps(row()), "{", "", "[1]", json.dumps(row(id=None, hardware__gpu="abacus")), json.dumps(row(id=7))]
    path.write_text("\n".join(lines))
    found = predict_runs(path)
    assert [("refused" in one, one["id"]) for one in found["rows"]] == [
        (False, "one"), (True, "row 2"), (True, "row 3"), (True, "row 4"), (False, 7),
    ]  # fmt: skip
    assert "line 2 is no JSON" in found["rows"][1]["refused"]
    assert "abacus" in found["rows"][3]["refused"]
    assert (found["summary"]["predicted"], found["summary"]["refused"]) == (2, 3)
    assert sum(found["rows"][0]["terms"].values()) == pytest.approx(found["rows"][0]["predicted_seconds"])
