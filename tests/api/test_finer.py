"""Stages that begin inside of blocks: taken where what was measured says that it is clearly better, and kept."""

from dataclasses import replace

import made
import pytest
import torch
from torch.nn import functional as F

from sheaf.api import cuts
from sheaf.api import plan as module
from sheaf.api.choice import _heard, _told, checked, promised
from sheaf.api.cuts import cut_inside
from sheaf.api.verdicts import what_if
from sheaf.cluster import read
from sheaf.errors import PlanError
from sheaf.graph import BlockTime, trace
from sheaf.plans import Plan
from sheaf.search import Question, search
from sheaf.task import Task
from sheaf.zoo.models.gpt import GPT


def task(layers=3):
    return Task(
        model=lambda: GPT(vocabulary=11, context=8, width=8, layers=layers, heads=2, dropout=0.0, tied=False),
        loss=lambda output, batch: F.cross_entropy(output[:, :-1].flatten(0, 1), batch[:, 1:].flatten()),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        inputs=lambda batch: (batch,),
        data=torch.randint(0, 11, (16, 8), generator=torch.Generator().manual_seed(0)),
        batch=8,
        microbatch=2,
    )


def times(facts, attention=1.0, feed=1.0):
    """Blocks take a second each for attention and feed-forward part, all else a millisecond."""

    def seconds(name):
        inner = name.removeprefix("blocks.")[2:]
        parts = {"": attention + feed, "attention": attention, "feed_in": feed / 2, "feed_out": feed / 2}
        return parts.get(inner, 1e-3) if name.startswith("blocks.") else 1e-3

    return {block.name: BlockTime(seconds(block.name) / 3, seconds(block.name) / 1.5) for block in facts.blocks}


@pytest.fixture
def asked(monkeypatch):
    """This machine takes that long; of each time that pieces were measured, whether again."""
    pieces = []

    def measured(given, facts, workers, *, source=None):
        return [replace(made.profile(facts[0], concurrency=workers), blocks=times(facts[0]))]

    def inside(given, facts, workers, *, source=None, fresh):
        pieces.append(fresh)
        return measured(given, facts, workers)

    monkeypatch.setattr(module, "measure", lambda workers, *, quick: read("cpu-1gbit:4"))
    monkeypatch.setattr(module, "kept_rehearsals", lambda *_, **__: None)
    monkeypatch.setattr(module, "measured_profiles", measured)
    monkeypatch.setattr(cuts, "measured_profiles", inside)
    return pieces


def price(given, text, lines=None):
    found = checked(given, Plan.parse(text))
    lines = [] if lines is None else lines
    told, reason = promised(given, found, world=None, source=None, note=lines.append)
    assert reason == ""
    return told


def test_a_block_is_cut_inside_where_that_is_clearly_better(asked):
    lines = []
    cut = price(task(), "pp=2", lines)
    assert cut.plan.stages == "blocks.1.feed_norm"
    assert cut.begins == ("tokens", "blocks.1.feed_norm")
    assert any(line.startswith("stages=blocks.1.feed_norm, cut inside of a block: the slowest takes") for line in lines)
    assert Plan.from_toml(cut.plan.to_toml()) == cut.plan
    assert _heard(_told(cut)) == cut, "as every worker hears it"
    whole = price(task(), "pp=2,stages=4:4")
    assert whole.plan.stages == "4:4", "what the user names stays"
    assert cut.step_seconds < 0.85 * whole.step_seconds
    assert sum(cut.seconds.values()) == pytest.approx(cut.step_seconds)
    named = price(task(), "pp=2,stages=blocks.1.feed_norm")
    assert named.begins == cut.begins
    assert abs(named.step_seconds - cut.step_seconds) < 0.01 * cut.step_seconds
    assert asked == [False]


def test_nothing_is_looked_at_inside_where_whole_blocks_divide(asked):
    assert price(task(layers=4), "pp=2").plan.begins == ()
    assert not asked


@pytest.mark.parametrize(
    "text",
    [
        "tp=2,pp=2,recompute=full",
        "dp=2,pp=2:zero-bubble,zero=3",
        *(pytest.param(text, marks=pytest.mark.nightly) for text in ("tp=2,pp=2", "pp=2,recompute=full")),
    ],
)
def test_pieces_are_priced_in_every_mix(asked, text):
    cut = price(task(), text)
    assert any("." in name.removeprefix("blocks.") for name in cut.plan.begins)
    again = price(task(), str(cut.plan))
    assert again.memory == pytest.approx(cut.memory)
    # a worker holds less than the model, and both together all of it
    assert cut.memory["parameters"] < 4 * sum(one.num_elements for one in trace(task(), 2).parameters)


def test_a_ranking_has_its_first_pipeline_cut_so(asked):
    given, facts = task(), trace(task(), 2)
    profile = replace(made.profile(facts, concurrency=2), blocks=times(facts))
    question = Question(
        batch=8,
        facts={2: facts},
        cluster=read("cpu-1gbit:2"),
        microbatch=2,
        profiles={(2, 1): profile, (2, 2): profile},
    )
    ranking = search(question)
    pipes = [entry for entry in ranking.ranked if entry.plan.pp > 1]
    alone = replace(ranking, ranked=tuple(pipes[:1]))
    found = cut_inside(given, alone, lambda line: None, source=None, fresh=True)
    assert asked == [True]
    assert found.best.plan.begins
    assert found.best.step_seconds < alone.best.step_seconds
    assert found.asked.price(found.best.plan).step_seconds == pytest.approx(found.best.step_seconds)
    assert found.ranked[0].reason
    assert what_if(found, "links=x1").entry(found.best.plan), "other figures are asked of the same cut"


@pytest.mark.parametrize("stages", ["blocks.9", "blocks.1.feed_norm.weight"])
def test_where_no_stage_can_begin_is_refused_before_a_worker_starts(stages):
    with pytest.raises(PlanError, match=rf"stages={stages}: "):
        checked(task(), Plan.parse(f"pp=2,stages={stages}"))


@pytest.mark.parametrize("first", [0.0, 0.9])
def test_that_others_kept_the_cores_busy_is_said_once_however_much_is_measured(asked, monkeypatch, first):
    """Blocks, what is inside of them, and rehearsals are measured one after the other, each while others compute."""

    def disturbed(measured, cores):
        return lambda *given, **options: [replace(one, cores_taken=cores) for one in measured(*given, **options)]

    monkeypatch.setattr(module, "measured_profiles", disturbed(module.measured_profiles, first))
    monkeypatch.setattr(cuts, "measured_profiles", disturbed(cuts.measured_profiles, 0.8))
    lines = list[str]()
    assert price(task(), "pp=2", lines).plan.begins
    assert asked == [False]
    said = [line for line in lines if line.startswith("other programs kept")]
    assert [line[20:23] for line in said] == ["0.8"]
