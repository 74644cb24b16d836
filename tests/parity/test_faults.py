"""Every fault of an executor is `wrong` and named; another order of sums is `rounding`; the same sums `identical`."""

import pytest
from parity_fakes import FakeStep, Faults, words_task

import sheaf.parity.planned
from sheaf.api.verify import verify
from sheaf.plans import Plan


@pytest.fixture
def tried(monkeypatch, shared_trials):
    def run(faults, steps=2, **changes):
        monkeypatch.setattr(sheaf.parity.planned, "build", lambda task, plan: FakeStep(task, plan, faults))
        return verify(words_task(**changes), Plan(), steps=steps)

    return run


def test_same_sums_are_identical(tried):
    verdict = tried(Faults(halves=False))
    assert verdict.verdict == "identical", str(verdict)
    assert verdict.max_gradient_error == verdict.max_weight_error == verdict.max_loss_error == 0.0
    assert verdict.noise["gradient"] > 0
    assert verdict.first_departure is None
    assert verdict.steps == 2


@pytest.mark.parametrize("precision", ["fp32", "fp64", "bf16"])
def test_other_order_is_rounding(tried, precision):
    verdict = tried(Faults(), steps=2, precision=precision)
    assert verdict.verdict == "rounding", str(verdict)
    assert 0 < verdict.step_errors["gradient"] <= 10 * verdict.step_noise["gradient"]


FAULTS = {
    "a bias gradient a thousandth too large": (
        Faults(scaled={"layers.1.value.bias": 1.001}),
        "gradient",
        "layers.1.value.bias",
    ),
    "a weight gradient a thousandth too large": (
        Faults(scaled={"layers.0.query.weight": 1.001}),
        "gradient",
        "layers.0.query.weight",
    ),
    "a microbatch counted twice": (Faults(twice=1), "gradient", None),
    "another dropout mask": (Faults(stream=1), "output", "dropout"),
    "weight decay skipped": (Faults(decay=False), "weight", None),
    "statistics in another order": (Faults(reversed_statistics=True), "buffer", None),
    "a gradient lost": (Faults(dropped="norm.bias"), "gradient", "norm.bias"),
    "no clipping": (Faults(no_clip=True), "weight", None),
    "other initial weights": (Faults(seed=1), "weight", None),
}


@pytest.mark.parametrize("name", FAULTS)
def test_fault_is_wrong_and_named(tried, name):
    faults, kind, module = FAULTS[name]
    verdict = tried(faults, clip=0.01, steps=1)
    assert verdict.verdict == "wrong", str(verdict)
    assert verdict.first_departure["kind"] == kind, str(verdict)
    if module is not None:
        assert verdict.first_departure["module"].startswith(module), str(verdict)
    assert verdict.first_departure["step"] == (-1 if faults.seed else 0)


def test_small_fault_of_a_late_step_is_not_hidden_by_growth(tried):
    verdict = tried(Faults(step=2, scaled={"layers.0.value.bias": 1.001}), steps=3)
    assert verdict.verdict == "wrong", str(verdict)
    assert verdict.first_departure["step"] == 2
    assert verdict.first_departure["module"] == "layers.0.value.bias"
    assert verdict.first_departure["noise"] < 1e-4
