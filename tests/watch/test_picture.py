"""The picture of a run is drawn from whatever its directory holds."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.image import imread

from sheaf.errors import RunError
from sheaf.record import Record, StepReport
from sheaf.watch import draw, picture

TERMS = ("compute", "recompute", "all_reduce", "reduce_scatter", "all_gather", "wait", "offload", "optimizer", "host")


def report(step, **changes):
    values = {
        "step": step, "loss": 3.0 / (step + 1), "weight": 64.0, "samples": 32, "seconds": 0.2 + 0.01 * (step % 3),
        "terms": {"compute": 0.1, "communicate": 0.04, "wait": 0.02, "optimizer": 0.03},
    }  # fmt: skip
    return StepReport(**(values | changes))


def run_of(directory, *lines):
    """A run directory whose record holds steps (numbers or reports) and events (dicts)."""
    record = Record(directory / "record.jsonl")
    for line in lines:
        if isinstance(line, dict):
            record.event(**line)
        else:
            record.step(line if isinstance(line, StepReport) else report(line))
    record.close()
    return directory


@pytest.fixture(autouse=True)
def _coarse(monkeypatch):
    monkeypatch.setattr(picture, "_DPI", 30)


PLAN = {"kind": "plan", "plan": "dp=2", "predicted": dict.fromkeys(TERMS, 0.02)}


@pytest.mark.parametrize(
    "lines",
    [
        [],
        [PLAN, 0],
        [*range(5)],
        [
            {"kind": "start", "step": 0, "plan": "dp=2"},
            PLAN,
            *range(4),
            {"kind": "resume", "step": 2},
            PLAN,
            *range(2, 6),
        ],
        [PLAN, *range(101)],
        [PLAN, report(0, loss=math.nan), report(1, loss=math.inf), report(2)],
        [report(0, seconds=0.0, terms={})],
        [{"kind": "plan", "plan": "dp=2"}, 0, 1],
    ],
    ids=["nothing", "one step", "no prediction", "resumed", "long", "not finite", "no times", "plan alone"],
)
def test_it_is_drawn_whatever_there_is(tmp_path, lines):
    path = draw(run_of(tmp_path, *lines))
    pixels = imread(path)
    assert path == tmp_path / "picture.png"
    assert pixels.shape[:2] == (192, 360)
    assert np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0).shape[0] > 10  # not blank


def test_a_high_rate_is_written_in_whole_numbers(tmp_path):
    axes = Figure().subplots()
    picture._throughput(
        axes, picture._read(run_of(tmp_path, *(report(step, seconds=32 / 13_412.4) for step in (0, 1))))
    )
    assert "median 13,412 samples/s" in [text.get_text() for text in axes.texts]


def test_it_is_drawn_over_an_old_one_and_leaves_nothing_beside_it(tmp_path):
    run_of(tmp_path, PLAN, 0)
    draw(tmp_path)
    draw(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["picture.png", "record.jsonl"]


def test_a_directory_without_a_record_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"record\.jsonl"):
        draw(tmp_path)


def test_times_are_those_under_the_latest_start_and_plan(tmp_path):
    (tmp_path / "plan.toml").write_text("dp = 4\n")
    slow = [report(step, seconds=9.0) for step in range(4)]
    run = picture._read(run_of(tmp_path, PLAN, *slow, {"kind": "start", "step": 4, "plan": "dp=2"}, 4, 5, 6))
    assert [each.step for each in run.timed] == [5, 6]  # the first after a start warms up
    assert run.plan == "dp=2"
    assert run.predicted == PLAN["predicted"]  # still of the same plan
    (tmp_path / "other").mkdir()
    run = picture._read(run_of(tmp_path / "other", PLAN, 0, 1, {"kind": "start", "step": 2, "plan": "dp=3"}, 2, 3))
    assert (run.plan, run.predicted) == ("dp=3", {})


def test_the_plan_file_is_read_where_the_record_names_none(tmp_path):
    (tmp_path / "plan.toml").write_text("dp = 4\n")
    assert picture._read(run_of(tmp_path, 0)).plan == "dp=4"


@given(predicted=st.dictionaries(st.sampled_from([*TERMS, "bubble"]), st.floats(0, 10)))
def test_no_predicted_second_is_lost(predicted):
    grouped = picture.as_measured(predicted)
    assert set(grouped) <= {*picture.MEASURED_TERMS, "bubble"}
    assert sum(grouped.values()) == pytest.approx(sum(predicted.values()))


@given(terms=st.dictionaries(st.sampled_from(picture.MEASURED_TERMS), st.floats(0, 0.03)))
def test_measured_terms_fill_the_step(terms):
    series = picture.measured_terms([report(0, terms=terms, seconds=0.2)])
    assert sum(values[0] for values in series.values()) == pytest.approx(0.2)


def test_what_was_predicted_stands_beside_what_was_measured_term_by_term(tmp_path):
    predicted = {"compute": 0.1, "recompute": 0.02, "dispatch": 0.01, "all_reduce": 0.03, "host": 0.004}
    plan = {"kind": "plan", "plan": "dp=2", "predicted": predicted}
    found = picture.compared(run_of(tmp_path, plan, *range(4)))
    assert found["compute"] == pytest.approx({"predicted": 0.13, "measured": 0.1})
    assert found["communicate"] == pytest.approx({"predicted": 0.03, "measured": 0.04})
    assert found["step"] == pytest.approx({"predicted": 0.164, "measured": 0.21})
    assert found["wait"] == pytest.approx({"predicted": 0.0, "measured": 0.02})
    assert sum(each["predicted"] for term, each in found.items() if term != "step") == pytest.approx(0.164)


def test_meetings_every_few_steps_are_shared_out_as_predictions_share_them(tmp_path):
    plan = {"kind": "plan", "plan": "dp=2,local=4", "predicted": {"compute": 0.1}}
    steps = [report(step, seconds=1.0 if step == 4 else 0.2) for step in range(5)]
    assert picture.compared(run_of(tmp_path, plan, *steps))["step"]["measured"] == pytest.approx(0.4)


def test_nothing_is_compared_where_nothing_was_predicted(tmp_path):
    assert picture.compared(run_of(tmp_path, {"kind": "plan", "plan": "dp=2"}, *range(4))) == {}


def test_bytes_that_were_predicted_stand_beside_those_that_were_sent(tmp_path):
    plan = {"kind": "plan", "plan": "dp=2", "predicted": {"compute": 1.0}, "predicted_sent_bytes": 1000.0}
    steps = [report(number, sent_bytes=sent) for number, sent in enumerate((9e9, 1100.0, 900.0))]
    directory = run_of(tmp_path, plan, *steps)
    assert picture.sent_bytes(directory) == {"predicted": 1000.0, "measured": 1000.0}, "the first warms up"
    assert "sends 0.98 KiB a step (0.98 KiB predicted)" in picture._title(picture._read(directory))
    assert picture.sent_bytes(run_of(tmp_path, {"kind": "plan", "plan": "dp=3"}, *range(3))) == {}


@pytest.mark.parametrize(
    "plan", ["dp=2", "dp=2,pp=2:interleaved,virtual=2", "dp=2," + "blocks.{0-9}=tp," * 12 + "zero=1"]
)
def test_a_title_stays_inside_of_the_picture(tmp_path, plan):
    run = picture._read(run_of(tmp_path, {"kind": "plan", "plan": "dp=2"}, *range(4)))
    run.plan = plan
    figure = Figure(figsize=(12, 6.4), dpi=130)
    FigureCanvasAgg(figure)
    drawn = figure.suptitle(picture._title(run), x=0.01, ha="left", fontsize=13, fontweight="bold")
    assert drawn.get_window_extent().x1 < figure.bbox.x1
    assert all(part in picture._title(run).replace("\n", "") for part in plan.split(","))
