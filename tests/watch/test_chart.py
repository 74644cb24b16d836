"""The chart of strategies: a picture, and crossings where the lines do cross."""

import math

import pytest
from matplotlib.figure import Figure
from matplotlib.image import imread

from sheaf.watch.chart import _draw, crossings, draw_chart


def test_crossings_are_where_both_lines_are_as_high():
    x = [1.0, 10.0, 100.0]
    lines = {"falls": [value**-1 for value in x], "flat": [0.05] * 3, "gone": [None, None, 1e-9]}
    ((where, height, before, after),) = crossings(x[:2], {**lines, "falls": [1.0, 0.01]})
    assert (before, after) == ("flat", "falls")
    assert height == pytest.approx(0.05)
    assert where ** math.log10(0.01) == pytest.approx(0.05)
    assert crossings(x, {"a": [1.0, 1.0, 1.0], "b": [2.0, 2.0, 2.0]}) == []


@pytest.mark.parametrize(("scale", "named"), [(1e9, "1.41"), (7.069e11, "1,000"), (1e12, "1,414"), (1e13, "14,142")])
def test_where_another_leads_is_written_without_an_exponent(scale, named):
    axes = Figure().subplots()
    lines = {"a": {"seconds": [1.0, 2.0], "cost": []}, "b": {"seconds": [2.0, 1.0], "cost": []}}
    sweep = {"figure": "bandwidth of a, GB/s", "at": scale, "x": [scale, 2 * scale], "lines": lines}
    _draw(axes, sweep, "seconds", ["a", "b"])
    assert [text.get_text() for text in axes.texts] == [named]


@pytest.mark.parametrize("cost", [0.0, 2.0])
def test_a_chart_is_drawn_with_cost_where_there_is_a_price(tmp_path, cost):
    line = {"seconds": [3.0, 2.0, None], "cost": [cost, cost, None]}
    other = {"seconds": [4.0, 1.0, 0.5], "cost": [cost, cost, cost]}
    sweep = {"figure": "workers", "at": 2, "x": [1, 2, 4], "currency": "USD", "lines": {"serial": line, "b": other}}
    path = tmp_path / "folder" / "chart.png"
    draw_chart([sweep, {**sweep, "figure": "bandwidth of a, GB/s", "x": [1e9, 2e9, 4e9], "at": 2e9}], path, "a title")
    height, width = imread(path).shape[:2]
    assert (height > width * 0.6) == (cost > 0), "a second row for cost"
