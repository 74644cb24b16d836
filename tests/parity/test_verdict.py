"""The judgement as a function of plain numbers."""

import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from sheaf.parity.compare import GRADIENT, LOSS, MISSING, OUTPUT, WEIGHT, Key, departures, difference, largest, norm
from sheaf.parity.observation import START, Observation
from sheaf.parity.verdict import FACTOR, FLOAT32_EPSILON, Step, first_departure, judge

NAMES = ("a", "b", "c")
KEYS = [Key(LOSS, ""), Key(LOSS, "sum", 0), *(Key(kind, name) for kind in (GRADIENT, WEIGHT) for name in NAMES)]
positive = st.floats(1e-6, 1e6)


@st.composite
def steps(draw):
    size = {key: draw(positive) for key in KEYS}
    noise = {key: size[key] * draw(st.floats(0, 1e-5)) for key in KEYS}
    share = {key: draw(st.floats(0, 1)) for key in KEYS}
    return Step(step=0, apart={key: share[key] * noise[key] for key in KEYS}, noise=noise, size=size)


@settings(deadline=None)
@given(steps())
def test_no_further_than_the_noise_is_never_wrong(step):
    assert first_departure(step) is None
    assert judge([step], [step], "p").verdict == ("identical" if step.identical else "rounding")


@settings(deadline=None)
@given(steps(), st.sampled_from(KEYS), st.floats(1e-3, 1e3))
def test_far_beyond_every_noise_is_wrong_and_named(step, key, relative):
    apart = {**step.apart, key: relative * step.size[key]}
    wrong = Step(step=4, apart=apart, noise=step.noise, size=step.size)
    found = first_departure(wrong)
    assert (found["step"], found["kind"], found["module"]) == (4, key.kind, key.name)
    assert found["error"] == pytest.approx(relative)
    assert found["allowed"] < relative


@settings(deadline=None)
@given(steps(), st.sampled_from(KEYS), st.sampled_from([2.0**-20, 2.0**20]))
def test_units_do_not_matter(step, key, unit):
    scaled = [{k: v * unit for k, v in values.items()} for values in (step.apart, step.noise, step.size)]
    other = Step(step=0, apart=scaled[0], noise=scaled[1], size=scaled[2])
    assert other.allowed(key) == pytest.approx(unit * step.allowed(key))
    assert other.worst(other.apart, GRADIENT) == pytest.approx(step.worst(step.apart, GRADIENT))


@settings(deadline=None)
@given(steps(), st.sampled_from(KEYS))
def test_missing_is_wrong_whatever_the_noise(step, key):
    wrong = Step(step=0, apart={**step.apart, key: MISSING}, noise=step.noise, size=step.size)
    assert first_departure(wrong)["missing"]
    assert first_departure(wrong)["error"] == 1.0


def test_a_gradient_of_rounding_only_raises_no_alarm():
    key_bias, other = Key(GRADIENT, "key.bias"), Key(GRADIENT, "value.bias")
    size = {key_bias: 1e-9, other: 1.0}
    step = Step(step=0, apart={key_bias: 3e-9, other: 0.0}, noise={key_bias: 2e-9, other: 1e-7}, size=size,
                background={key_bias: 1.0, other: 1.0})  # fmt: skip
    assert first_departure(step) is None
    assert step.worst(step.apart, GRADIENT) == pytest.approx(3e-8)  # relative to a typical gradient, not to nothing


def test_weights_are_judged_by_their_update():
    weight = Key(WEIGHT, "w")
    skipped_decay = {weight: 1e-4 * 0.01}  # learning rate times weight decay times a weight of norm 1
    step = Step(step=0, apart=skipped_decay, noise={}, size={weight: 1.0}, moves={"w": 1e-3})
    assert first_departure(step)["kind"] == WEIGHT
    one_rounding = Step(step=0, apart={weight: FLOAT32_EPSILON}, noise={}, size={weight: 1.0}, moves={"w": 1e-3})
    assert first_departure(one_rounding) is None


def test_one_number_that_came_out_equal_borrows_the_noise_of_its_like():
    keys = [Key(GRADIENT, name) for name in "abcde"]
    noise = dict.fromkeys(keys, 1e-4) | {keys[0]: 0.0}
    step = Step(step=0, apart={keys[0]: 5e-4}, noise=noise, size=dict.fromkeys(keys, 1.0))
    assert first_departure(step) is None
    assert step.allowed(keys[0]) == pytest.approx(FACTOR * 1e-4, rel=1e-2)


def test_the_first_block_of_the_first_microbatch_is_named():
    apart = {
        Key(LOSS, ""): 1.0,
        Key(OUTPUT, "first", 0): 0.0, Key(OUTPUT, "last", 0): 0.0,
        Key(OUTPUT, "first", 2): 1.0, Key(OUTPUT, "last", 2): 1.0,
        Key(OUTPUT, "first", 1): 0.0, Key(OUTPUT, "last", 1): 1.0,
        Key(GRADIENT, "first.weight"): 1.0,
    }  # fmt: skip
    found = first_departure(Step(step=0, apart=apart, noise={}, size=dict.fromkeys(apart, 1.0)))
    assert (found["kind"], found["module"], found["microbatch"]) == (OUTPUT, "last", 1)
    assert (found["departing"], found["compared"]) == (3, 6)


def test_outputs_alone_condemn_nothing():
    apart = {Key(OUTPUT, "first", 0): 1.0, Key(LOSS, ""): 0.0}
    assert first_departure(Step(step=0, apart=apart, noise={}, size=dict.fromkeys(apart, 1.0))) is None


def observation(**changes):
    values = {
        "step": 0, "loss": 2.0, "losses": {0: (4.0, 2.0), 1: (6.0, 3.0)},
        "gradients": {"a": torch.tensor([3.0, 4.0])}, "weights": {"a": torch.ones(2), "b": torch.ones(1)},
        "buffers": {"count": torch.tensor(3)},
    }  # fmt: skip
    return Observation(**(values | changes))


@pytest.mark.parametrize(
    ("changes", "key"),
    [
        ({"gradients": {}}, Key(GRADIENT, "a")),
        ({"gradients": {"a": torch.tensor([3.0, math.nan])}}, Key(GRADIENT, "a")),
        ({"gradients": {"a": torch.tensor([3.0, 4.0]), "b": torch.zeros(1)}}, Key(GRADIENT, "b")),
        ({"gradients": {"a": torch.ones(3)}}, Key(GRADIENT, "a")),
        ({"losses": {0: (4.0, 2.0)}}, Key(LOSS, "sum", 1)),
        ({"losses": {0: (4.0, 2.0), 1: (6.0, 3.0), 2: (1.0, 1.0)}}, Key(LOSS, "sum", 2)),
        ({"skipped": True}, Key(LOSS, "skipped")),
        ({"loss": math.nan}, Key(LOSS, "")),
    ],
)
def test_what_one_side_lacks_is_missing(changes, key):
    apart = departures(observation(**changes), observation())
    assert apart[key] == MISSING
    assert [k for k, value in apart.items() if value == MISSING and k.name != "weight"] == [key]


def test_equal_observations_are_nothing_apart():
    assert set(departures(observation(), observation()).values()) == {0.0}
    assert largest([{Key(LOSS, ""): 1.0}, {Key(LOSS, ""): 3.0}, {}]) == {Key(LOSS, ""): 3.0}


@settings(deadline=None)
@given(st.lists(st.floats(-1e3, 1e3, width=32), min_size=1, max_size=20), st.floats(-1e3, 1e3, width=32))
def test_difference_is_a_norm(values, shift):
    tensor = torch.tensor(values)
    moved = tensor.double() + shift
    assert difference(moved, tensor.double()) == pytest.approx(abs(shift) * math.sqrt(len(values)), rel=1e-6, abs=1e-9)
    assert norm(tensor) == pytest.approx(math.hypot(*tensor.tolist()))


def test_reads_in_three_lines_and_as_json():
    apart = {Key(LOSS, ""): 0.5, Key(GRADIENT, "a.weight"): 0.25}
    size = dict.fromkeys(apart, 1.0)
    start = Step(step=START, apart={}, noise={}, size={})
    bad = Step(step=0, apart=apart, noise=dict.fromkeys(apart, 1e-7), size=size)
    good = Step(step=0, apart=dict.fromkeys(apart, 1e-8), noise=dict.fromkeys(apart, 1e-7), size=size)
    wrong, right = judge([start, bad], [start, bad], "dp=2"), judge([start, good], [start, good], "dp=2")
    for verdict in (wrong, right, judge([start], [], "dp=2")):
        assert len(str(verdict).splitlines()) == 3
        assert json.loads(json.dumps(verdict.to_dict(), allow_nan=False))["plan"] == "dp=2"
    assert "departs first at step 0: loss of the model" in str(wrong)
    assert "rounding: dp=2, 1 step" in str(right)
    assert right.exact
    assert not wrong.exact
    assert right.noise["gradient"] == 1e-7
    assert right.max_gradient_error == 1e-8
