"""One plan's predicted step, and its stages, from what its own number of workers measured."""

import json
import time
from dataclasses import replace

import made
import pytest
import small
import torch
from torch import nn

from sheaf.api import plan as module
from sheaf.api import profiles
from sheaf.api.choice import _heard, _told, checked, choose, foretold, promised
from sheaf.api.compare import compare
from sheaf.api.train import train
from sheaf.api.verify import verify
from sheaf.cluster import read
from sheaf.errors import PlanError
from sheaf.graph import BlockTime
from sheaf.plans import Plan
from sheaf.task import Task


def task(**changed):
    settings = {
        "model": lambda: nn.Linear(4, 1),
        "loss": lambda output, batch: nn.functional.mse_loss(output, batch[1]),
        "optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        "data": [(torch.ones(4), torch.ones(1))] * 12,
        "batch": 8,
    }
    return Task(**(settings | changed))


def two_layers():
    return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


@pytest.mark.parametrize("plan", ["dp=2", "tp=2", "pp=2", "dp=2,0=tp"])
@pytest.mark.parametrize("settings", [{"microbatch": 2}, {}, {"batch": 40}])
def test_only_the_plans_own_workers_are_measured_and_only_its_microbatch(monkeypatch, settings, plan):
    asked = []

    def measured_profiles(given, facts, workers, *, source):
        asked.append(([one.samples for one in facts], workers))
        return []

    def measure(workers, *, quick):
        asked.append((workers, quick))
        return read("cpu-1gbit:4")

    monkeypatch.setattr(module, "measure", measure)
    monkeypatch.setattr(module, "measured_profiles", measured_profiles)
    given = task(model=two_layers, **settings)
    found = checked(given, Plan.parse(plan))
    price, reason = promised(given, found, world=None, source=None, note=lambda line: None)
    assert reason == ""
    assert price.plan == found.plan
    assert price.step_seconds > 0
    assert asked == [(2, True), ([found.facts.samples], 2)]
    assert sum(price.stages) == (3 if plan == "pp=2" else 0)
    assert _heard(_told(price)) == price, "as every worker hears it"


@pytest.mark.parametrize(
    ("plan", "settings", "why"),
    [
        ("pp=4", {}, "has 4 stages, and the model has 3 blocks"),
        ("pp=2,stages=1:1", {}, "places 2 blocks, the model has 3"),
        ("tp=2", {"optimizer": lambda parameters: torch.optim.Adafactor(parameters, lr=0.1)}, "not elementwise"),
        ("dp=2,head=tp", {}, "head=tp matches no module"),
        (
            "dp=2,zero=1",
            {"model": lambda: nn.Sequential(nn.Embedding(4, 2, sparse=True)), "microbatch": 2},
            "sparse gradients",
        ),
    ],
)
def test_what_cannot_be_built_is_refused_before_any_worker_starts(plan, settings, why):
    given = task(**{"model": two_layers} | settings)
    if "sparse" in why:
        given = task(**settings, data=[(torch.ones(2, dtype=torch.int64), torch.ones(2, 2))] * 12)
    with pytest.raises(PlanError, match=why):
        checked(given, Plan.parse(plan))


def test_the_plan_that_runs_names_its_microbatch_and_its_cut():
    found = checked(task(model=two_layers, batch=8), Plan.parse("dp=1,pp=2"))
    assert str(found.plan) == "pp=2,stages=1:2,microbatch=1" or str(found.plan) == "pp=2,stages=2:1,microbatch=1"
    assert found.facts.samples == 1
    assert checked(task(model=two_layers, batch=8), found.plan).plan == found.plan


@pytest.mark.parametrize("given", ["pp=2", "pp=2,microbatch=1", None])
def test_a_resumed_run_is_cut_as_before(tmp_path, given):
    kept = Plan.parse("pp=2,stages=2:1,microbatch=1")
    (tmp_path / "plan.toml").write_text(kept.to_toml())
    chosen, _ = choose(
        task(), given, world=None, workers=2, resumed=tmp_path, allow_relaxed=False, source=None, note=print
    )
    assert chosen == kept


def test_a_run_that_goes_on_with_more_workers_keeps_its_microbatch(tmp_path):
    (tmp_path / "plan.toml").write_text(Plan.parse("dp=2,zero=1").to_toml())
    (tmp_path / "task.json").write_text(json.dumps({"microbatch": 4}))
    chosen, _ = choose(
        task(), "dp=3,zero=1", world=None, workers=3, resumed=tmp_path, allow_relaxed=False, source=None, note=print
    )
    assert chosen == Plan.parse("dp=3,zero=1,microbatch=4")


def test_a_pipeline_that_was_ranked_behind_others_gets_its_timeline(monkeypatch):
    monkeypatch.setattr(module, "measure", lambda workers, *, quick: read("cpu-1gbit:4"))
    monkeypatch.setattr(module, "measured_profiles", lambda *_, **__: [])
    given = task(model=two_layers, microbatch=2)
    price, _ = promised(given, checked(given, Plan.parse("pp=2")), world=None, source=None, note=lambda line: None)
    bare = replace(price, timeline=(), seconds={**price.seconds, "compute": 5.0})
    found, _ = foretold(given, None, bare, world=None, source=None, note=lambda line: None)
    assert found.timeline == price.timeline != ()
    assert found.seconds == bare.seconds, "what was ranked stays"
    monkeypatch.setattr(module, "measure", lambda workers, *, quick: 1 / 0)
    assert foretold(given, None, price, world=None, source=None, note=lambda line: None) == (price, "")
    kept, reason = foretold(given, None, bare, world=None, source=None, note=lambda line: None)
    assert kept == bare
    assert "ZeroDivisionError" in reason


@pytest.mark.parametrize("plan", ["cp=2", "cp=2,pp=2"])
def test_split_sequences_are_priced(monkeypatch, plan):
    monkeypatch.setattr(module, "measure", lambda workers, *, quick: read("cpu-1gbit:4"))
    monkeypatch.setattr(module, "measured_profiles", lambda *_, **__: [])
    given = replace(small.SMALL["gpt"](), precision="fp32")
    price, reason = promised(given, checked(given, Plan.parse(plan)), world=None, source=None, note=lambda line: None)
    assert reason == ""
    assert price.seconds["tensor"] > 0
    assert price.seconds["all_reduce"] > 0


def six_layers():
    """Alike by operations."""
    return nn.Sequential(*(nn.Linear(4, 4) for _ in range(5)), nn.Linear(4, 1))


def slow(*names):
    """What measuring gives where these blocks take a second, and others a millisecond."""

    def measured_profiles(given, facts, workers, *, source):
        found = made.profile(facts[0], concurrency=workers)
        seconds = {block.name: 1.0 if block.name in names else 1e-3 for block in facts[0].blocks}
        return [replace(found, blocks={name: BlockTime(one / 3, one) for name, one in seconds.items()})]

    return measured_profiles


@pytest.fixture
def _no_machine(monkeypatch):
    monkeypatch.setattr(module, "measure", lambda workers, *, quick: read("cpu-1gbit:4"))
    monkeypatch.setattr(module, "kept_rehearsals", lambda *_, **__: None)


@pytest.mark.usefixtures("_no_machine")
@pytest.mark.parametrize(
    ("plan", "stages", "said"),
    [
        ("pp=2", "1:5", "stages=1:5, balanced by measured times: the slowest takes 1.34 s a microbatch, where 3:3"),
        ("dp=2,pp=2", "1:5", "stages=1:5"),
        ("tp=2,pp=2", "1:5", "stages=1:5"),
        ("pp=2:interleaved,virtual=2", "1:1:2:2", "stages=1:1:2:2"),
        ("pp=2,stages=4:2", "4:2", None),
    ],
)
def test_stages_that_nobody_named_are_cut_by_what_blocks_took(monkeypatch, plan, stages, said):
    monkeypatch.setattr(module, "measured_profiles", slow("0", "1"))
    given = task(model=six_layers, microbatch=2)
    found = checked(given, Plan.parse(plan))
    lines = []
    price, reason = promised(given, found, world=None, source=None, note=lines.append)
    assert reason == ""
    assert price.plan == replace(found.plan, stages=stages)
    assert ":".join(str(count) for count in price.stages) == stages
    told = [line for line in lines if line.startswith("stages=")]
    assert (told == []) if said is None else told[0].startswith(said)


@pytest.mark.usefixtures("_no_machine")
def test_stages_that_are_as_good_stay(monkeypatch):
    monkeypatch.setattr(module, "measured_profiles", slow("0"))
    given = task(model=six_layers, microbatch=2)
    found, lines = checked(given, Plan.parse("pp=2")), []
    price, _ = promised(given, found, world=None, source=None, note=lines.append)
    assert price.plan == found.plan, "the first block alone takes nearly all there is in either"
    assert any("as good by measured times" in line for line in lines)


class Keeping(nn.Linear):
    """Keeps what it computed, or adds what another kept."""

    def __init__(self, of=()):
        super().__init__(4, 4)
        self.kept, self.of = [], list(of)

    def forward(self, inputs):
        output = super().forward(inputs)
        self.kept[:] = [output.tanh()]
        return output + self.of[0][0] if self.of else output


def leaking():
    """The third layer uses what the second keeps to itself."""
    second = Keeping()
    return nn.Sequential(nn.Linear(4, 4), second, Keeping([second.kept]), *list(six_layers())[3:])


@pytest.mark.usefixtures("_no_machine")
def test_stages_that_the_model_cannot_be_cut_into_are_not_taken(monkeypatch):
    monkeypatch.setattr(module, "measured_profiles", slow("0", "1", "2", "3"))
    given = task(model=leaking, microbatch=2)
    found, lines = checked(given, Plan.parse("pp=2")), []
    price, _ = promised(given, found, world=None, source=None, note=lines.append)
    assert price.plan == found.plan
    assert any("measured times ask for 2:4, but" in line for line in lines)


@pytest.mark.usefixtures("_no_machine")
def test_blocks_that_wait_are_measured_too(monkeypatch, tmp_path):
    class Slow(nn.Linear):
        def forward(self, inputs):
            time.sleep(0.05)
            return super().forward(inputs)

    monkeypatch.setenv("SHEAF_CACHE", str(tmp_path))
    monkeypatch.setattr(profiles, "BUDGET_SECONDS", 0.01)
    monkeypatch.setattr(profiles, "LEAST_SECONDS", 0.01)
    monkeypatch.setattr(profiles.launch, "run", lambda work, workers, *given, **_: [work(*given)])  # in this process
    given = task(model=lambda: nn.Sequential(Slow(4, 4), Slow(4, 4), *list(six_layers())[2:]), microbatch=2)
    price, _ = promised(given, checked(given, Plan.parse("pp=2")), world=None, source=None, note=lambda line: None)
    assert price.plan.stages == "1:5"


def test_a_resumed_run_keeps_the_stages_that_were_measured(ranks, tmp_path):
    def trained(out):
        given, runs = task(model=six_layers, microbatch=2), []
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(module, "measure", lambda workers, *, quick: read("cpu-1gbit:4"))
            patch.setattr(module, "kept_rehearsals", lambda *_, **__: None)
            for steps, names in ((1, ("0", "1")), (2, ("4", "5"))):
                patch.setattr(module, "measured_profiles", slow(*names))
                runs.append(train(given, "pp=2", steps=steps, out=out, quiet=True, resume=steps > 1))
        return [(str(run.plan), len(run.losses), run.predicted_seconds_per_step > 0) for run in runs]

    told = ranks(trained, 2, str(tmp_path / "run"))
    assert told == [[("pp=2,stages=1:5", steps, True) for steps in (1, 2)]] * 2


@pytest.mark.usefixtures("_no_machine")
def test_verify_and_comparisons_take_the_stages_that_training_takes(monkeypatch, ranks, tmp_path):
    def seen(_task, plan, **_):
        plans.append(plan)
        raise LookupError("seen")

    monkeypatch.setattr(module, "measured_profiles", slow("0", "1"))

    def run(function, workers, *args, threads):
        return ranks(function, workers, *args)

    monkeypatch.setattr("sheaf.launch.run", run)
    monkeypatch.setattr("sheaf.api.compare.train", seen)
    given, plans = task(model=six_layers, microbatch=2), []
    for predict in (True, False):
        verdict = verify(given, "pp=2", steps=1, predict=predict)
        assert verdict.exact
        with pytest.raises(LookupError, match="seen"):
            compare(given, "all-reduce; compress=bf16", "pp=2,dp=2", steps=1, out=tmp_path / "runs", predict=predict)
        plans.append(Plan.parse(verdict.plan))
    assert [plan.stages for plan in plans] == ["1:5", "1:5", "3:3", "3:3"]
