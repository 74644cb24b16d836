"""The picture of a pipeline has a lane per worker and a box per action, and says how much of it is bubble."""

import re
from xml.etree import ElementTree as ET

import numpy as np
import pytest
from matplotlib.image import imread

from sheaf.errors import RunError
from sheaf.plans.plan import SCHEDULES
from sheaf.plans.schedule import actions
from sheaf.plans.timeline import simulate
from sheaf.watch import pipeline
from sheaf.watch.pipeline import draw_pipeline


def rows(kind="1f1b", workers=3, microbatches=4, virtual=1, begin=0.0):
    stages = workers * virtual
    listed = actions(kind, workers=workers, stages=stages, microbatches=microbatches)
    seconds = [0.01 * (stage + 1) for stage in range(stages)]
    timeline = simulate(listed, forward_seconds=seconds, backward_seconds=seconds, weight_seconds=seconds)
    return tuple((*row[:4], row[4] + begin, row[5] + begin) for row in timeline.rows)


@pytest.fixture
def drawn(tmp_path, monkeypatch):
    """Draws an SVG; gives its element tree and the text in it."""
    monkeypatch.setitem(pipeline.mpl.rcParams, "svg.fonttype", "none")  # words as words, not as outlines

    def of(**given):
        path = draw_pipeline(tmp_path / "pipeline.svg", **({"predicted": None, "measured": None, "title": "x"} | given))
        tree = ET.parse(path)
        return tree, [word for text in tree.iter("{http://www.w3.org/2000/svg}text") for word in text.itertext()]

    return of


def lanes(tree, name):
    found = [element.get("id") or "" for element in tree.iter()]
    return sorted(one for one in found if re.fullmatch(rf"{name}-lane-\d+", one))


@pytest.mark.parametrize("kind", SCHEDULES)
def test_every_schedule_is_drawn_with_a_lane_per_worker_and_a_number_per_box(drawn, kind):
    given = rows(kind, workers=3, microbatches=4, virtual=2 if kind == "interleaved" else 1)
    tree, words = drawn(predicted=given, measured=given, title="dp=2,pp=3")
    assert lanes(tree, "predicted") == [f"predicted-lane-{worker}" for worker in range(3)]
    assert lanes(tree, "measured") == [f"measured-lane-{worker}" for worker in range(3)]
    assert {"dp=2,pp=3", "Predicted", "Measured", "worker 2", "forward", "bubble"} <= set(words)
    for microbatch in range(4):
        assert words.count(str(microbatch)) >= 2 * sum(row[2] == microbatch for row in given)
    assert ("backward of weights" in words) == (kind == "zero-bubble")
    assert ("paler: a worker's later stages" in words) == (kind == "interleaved")


def test_the_titles_tell_seconds_bubbles_and_the_difference(drawn):
    predicted = ((0, "F", 0, 0, 0.0, 0.1), (1, "F", 0, 1, 0.1, 0.2))
    measured = ((0, "F", 0, 0, 7.0, 7.1), (1, "F", 0, 1, 7.1, 7.4))  # a clock that began long before
    _, words = drawn(predicted=predicted, measured=measured)
    assert "200 ms (50% below measured), bubbles 50.0% of the workers' time" in words
    assert "400 ms, bubbles 50.0% of the workers' time" in words


def test_without_bubbles_none_are_claimed(drawn):
    _, words = drawn(measured=((0, "F", 0, 0, 0.0, 0.1), (0, "B", 0, 0, 0.1, 0.3)))
    assert "300 ms, bubbles 0.0% of the workers' time" in words


@pytest.mark.parametrize("name", ["predicted", "measured"])
def test_one_of_the_two_is_drawn_alone(drawn, name):
    tree, words = drawn(**{name: rows()})
    assert len(lanes(tree, name)) == 3
    assert [word for word in words if word in ("Predicted", "Measured")] == [name.capitalize()]


def test_an_empty_timeline_is_said_to_be_empty(drawn):
    tree, words = drawn(predicted=rows(), measured=())
    assert (len(lanes(tree, "predicted")), len(lanes(tree, "measured"))) == (3, 0)
    assert "no action was timed" in words
    tree, words = drawn(predicted=(), measured=())
    assert words.count("no action was timed") == 2


def test_a_worker_seen_only_in_one_timeline_has_its_lane_in_both(drawn):
    tree, _ = drawn(predicted=rows(workers=3), measured=rows(workers=2))
    assert len(lanes(tree, "measured")) == 3


def test_numbers_are_left_out_where_they_do_not_fit(drawn):
    narrow = ((0, "F", 123456789, 0, 0.0, 0.001), (0, "B", 987654321, 0, 0.001, 1.0))
    _, words = drawn(predicted=narrow)
    assert "987654321" in words
    assert "123456789" not in words


def test_actions_of_another_kind_and_without_duration_are_drawn_too(drawn):
    _, words = drawn(measured=((0, "F", 0, 0, 0.0, 0.0), (0, "optimizer", 0, 0, 0.0, 0.2)))
    assert "optimizer" in words
    _, words = drawn(measured=((0, "F", 0, 0, 3.0, 3.0),))
    assert "no action was timed" in words


def test_later_stages_of_a_worker_are_paler():
    first, second, third = (pipeline._colour("F", turn, 3) for turn in range(3))
    assert sum(first) < sum(second) < sum(third) < 3


def test_a_png_is_drawn_over_an_old_one_and_leaves_nothing_beside_it(tmp_path, monkeypatch):
    monkeypatch.setattr(pipeline, "_DPI", 40)
    (tmp_path / "pipeline.png").write_bytes(b"old")
    path = draw_pipeline(tmp_path / "pipeline.png", predicted=rows(), measured=rows(begin=9.0), title="both")
    pixels = imread(path)
    assert pixels.shape[1] == 480
    assert np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0).shape[0] > 10  # not blank
    assert list(tmp_path.iterdir()) == [path]


def test_the_same_rows_give_the_same_file(tmp_path):
    first = draw_pipeline(tmp_path / "a.svg", predicted=rows(), measured=None, title="same").read_bytes()
    assert first == draw_pipeline(tmp_path / "b.svg", predicted=rows(), measured=None, title="same").read_bytes()


def test_what_cannot_be_drawn_is_refused(tmp_path):
    with pytest.raises(RunError, match=r"name it \.svg or \.png"):
        draw_pipeline(tmp_path / "pipeline.pdf", predicted=rows(), measured=None, title="x")
    with pytest.raises(RunError, match="nothing to draw"):
        draw_pipeline(tmp_path / "pipeline.svg", predicted=None, measured=None, title="x")
    assert not list(tmp_path.iterdir())
