"""Stages that begin inside of a block compute what plain PyTorch computes, whatever it does between its modules."""

import functools
from dataclasses import replace
from pipes import Deciding, Keeping, Twice, layered

import pytest
from plain import Run, assert_same, norm_resnet, plain, planned, ragged_gpt, transformers_bert, transformers_gpt2
from small import SMALL
from torch import nn

from sheaf import Task
from sheaf.errors import PlanError
from sheaf.graph import cut, trace
from sheaf.graph.cut import finer
from sheaf.graph.facts import within
from sheaf.parallel import build, refuse
from sheaf.plans import Plan
from sheaf.plans.stages import placed, separable, stages_of

STEPS = 2


def translation() -> Task:
    """An encoder and a decoder of a layer each."""
    made = SMALL["transformer_seq2seq"]()
    return replace(made, model=functools.partial(made.model, layers=1), precision="fp64")


TASKS = {
    "gpt": lambda: replace(ragged_gpt(batch=6), precision="fp64"),
    "resnet": lambda: replace(norm_resnet(), precision="fp64"),
    "translation": translation,
    "resnet50": lambda: replace(SMALL["resnet50"](), precision="fp64"),
    "vgg": lambda: replace(SMALL["vgg16"](), precision="fp64"),
    "twice": lambda: layered(Twice),
    "deciding": lambda: layered(Deciding),
    "torch": lambda: layered(lambda: nn.TransformerEncoderLayer(6, 2, 9, 0.1, batch_first=True)),
}
PLANS = [
    ("gpt", "tp=2,pp=2,blocks.0.attention=whole,stages=blocks.0.feed_norm"),
    ("gpt", "pp=2,stages=blocks.1.feed_norm"),
    ("gpt", "pp=2:zero-bubble,stages=blocks.0.attention.out"),
    ("translation", "pp=3:gpipe,stages=encoder.0.feed:decoder.0.look"),
    ("translation", "cp=2,pp=2,stages=decoder.0.feed_norm"),
    ("gpt", "pp=2:interleaved,stages=blocks.0.feed_norm:blocks.1:blocks.1.feed_out"),
    ("resnet", "dp=2,pp=2:gpipe,zero=1,stages=blocks.1.norm_1"),
    ("resnet", "pp=2,recompute=full,stages=blocks.1.convolution_2"),
    ("resnet50", "pp=2,stages=blocks.1.convolution_3"),
    ("twice", "dp=2,pp=2:zero-bubble,zero=3,bucket_bytes=1024,recompute=full,stages=layers.1.inner"),
    ("twice", "pp=2:interleaved,stages=layers.0.inner:layers.1.inner:layers.2"),
    ("gpt", "dp=2,pp=2,zero=3,bucket_bytes=1024,recompute=full,stages=blocks.0.attention"),
    ("deciding", "pp=2,stages=layers.1.inner"),
    ("vgg", "pp=2,stages=classifier.0"),
    ("torch", "pp=2,stages=layers.1.linear1"),
]


@functools.cache
def reference(name: str) -> Run:
    return plain(TASKS[name](), STEPS)


@pytest.mark.thinned(3)
@pytest.mark.parametrize(("name", "plan"), PLANS)
def test_a_stage_may_begin_inside_of_a_block(ranks, name, plan):
    found = ranks(planned, Plan.parse(plan).workers, TASKS[name](), plan, STEPS)[0]
    assert_same(found, reference(name), 1e-10)


@pytest.mark.nightly
@pytest.mark.parametrize("name", [*SMALL, "gpt2 of transformers", "bert of transformers"])
def test_a_place_that_would_be_looked_at_is_exact_in_any_model(ranks, name):
    make = {**SMALL, "gpt2 of transformers": transformers_gpt2, "bert of transformers": transformers_bert}[name]
    task = replace(make(), precision="fp64")
    whole, pieces = trace(task, 2), trace(task, 2, begins=finer(task.model()))
    names = [piece.name for piece in placed(pieces)]
    firsts = {next(name for name in names if name == one.name or within(name, one.name)) for one in placed(whole)}
    may = zip(names[1:], separable(pieces, whole), strict=False)
    inside = [name for name, legal in may if legal and name not in firsts]
    if inside:  # not where all blocks are leaves, or what comes in crosses everywhere
        plan = f"pp=2,stages={inside[len(inside) // 2]}"
        assert_same(ranks(planned, 2, task, plan, STEPS)[0], plain(task, STEPS), 1e-10)


def test_a_worker_holds_what_its_stage_computes(ranks):
    def held() -> list[str]:
        step = build(TASKS["gpt"](), Plan.parse("pp=2,stages=blocks.1.feed_norm"))
        names = [name.removeprefix("blocks.1.") for name in step._portion.parameters if name.startswith("blocks.1.")]
        step.close()
        return names

    first, second = ranks(held, 2)
    assert first
    assert all(name.startswith("attention") for name in first)
    assert second
    assert all(name.startswith("feed") for name in second)


def test_names_of_whole_blocks_are_the_cut_that_numbers_are():
    facts = trace(TASKS["gpt"](), 2)
    assert stages_of(Plan.parse("pp=2,stages=blocks.1"), facts) == stages_of(Plan.parse("pp=2,stages=4:3"), facts)


@pytest.mark.parametrize(
    ("begins", "why"),
    [
        ("blocks.7", "blocks.7 is no module that the model's forward calls: did you mean blocks.0?"),
        ("blocks.1.feed_in.weight", "is inside of blocks.1.feed_in, whose forward is not seen to call it"),
        ("tokens", "the model begins with tokens, which leaves the first stage nothing: begin the second with"),
    ],
)
def test_where_no_stage_can_begin_is_refused(begins, why):
    with pytest.raises(PlanError) as raised:
        refuse(TASKS["gpt"](), Plan.parse(f"pp=2,stages={begins}"))
    assert why in str(raised.value)


def test_modules_in_another_order_are_refused_with_the_right_one():
    with pytest.raises(PlanError, match=r"write stages=blocks\.0\.feed_in:blocks\.1"):
        refuse(TASKS["gpt"](), Plan.parse("pp=3,stages=blocks.1:blocks.0.feed_in"))
    with pytest.raises(PlanError, match="two of these begin at one place"):
        refuse(TASKS["gpt"](), Plan.parse("pp=3,stages=blocks:blocks.0"))


def test_what_a_piece_keeps_to_itself_is_refused():
    with pytest.raises(PlanError, match=r"uses in .* a tensor that layers\.1\.first computed and did not return"):
        refuse(layered(Keeping), Plan.parse("pp=2,stages=layers.1.last"))


def test_a_block_is_cut_where_no_more_crosses_than_at_its_edges():
    task = TASKS["gpt"]()
    whole = trace(task, 2)
    pieces = trace(task, 2, begins=finer(task.model()))
    names = [piece.name for piece in placed(pieces)]
    legal = {name for name, before in zip(names[1:], separable(pieces, whole), strict=False) if before}
    inside = {name for name in legal if name.startswith("blocks.0.")}
    # behind the first sum, one tensor crosses; everywhere else what came in crosses as well
    assert inside == {"blocks.0.attention_norm", "blocks.0.feed_norm"}
    once = trace(layered(Twice), 2)
    again = trace(layered(Twice), 2, begins=finer(layered(Twice).model()))
    assert not any(
        before and name.startswith("layers.1.")
        for name, before in zip([one.name for one in placed(again)][1:], separable(again, once), strict=False)
        if name != "layers.1.first"
    ), "a module that runs again in its block, with parameters"


def test_pieces_count_what_their_block_counts():
    task = TASKS["gpt"]()
    whole, pieces = trace(task, 2), trace(task, 2, begins=("blocks.0.feed_norm",))
    block = whole.block("blocks.0")
    inside = [one for one in pieces.blocks if one.name.startswith("blocks.0.")]
    assert len(inside) == 7
    assert {one.name for one in pieces.blocks if one not in inside} == {
        one.name for one in whole.blocks if one != block
    }
    for what in ("forward_flops", "backward_flops", "forward_bytes", "forward_kernels", "parameter_bytes"):
        total = sum(getattr(one, what) for one in inside)
        assert total == getattr(block, what), what
    assert sum(one.saved_bytes + one.saved_input_bytes for one in inside) == block.saved_bytes + block.saved_input_bytes
    assert pieces.saved_bytes == whole.saved_bytes
    assert pieces.flops == whole.flops
    assert cut(task.model(), ["blocks.0.feed_norm"]).keys() == {one.name for one in pieces.called}
