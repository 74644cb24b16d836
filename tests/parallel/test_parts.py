"""Parts of a model split over replicas of the rest compute what plain PyTorch computes; what cannot be is refused."""

import functools
from dataclasses import replace

import pytest
import small
import torch
from plain import assert_same, brief, plain, planned, ragged_gpt
from torch import nn
from torch.nn import functional as F

from pool import RankRaised
from sheaf import Task
from sheaf.errors import PlanError
from sheaf.graph import cut
from sheaf.parallel.parts import segments
from sheaf.plans import Plan
from sheaf.task.blueprint import Blueprint

STEPS = 2


def tied() -> Task:
    """A table that is used first and last, with a part between that is split."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words = nn.Embedding(11, 6)
            self.middle = nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 6))
            self.head = nn.Linear(6, 11)
            self.head.weight = self.words.weight

        def forward(self, tokens: torch.Tensor) -> torch.Tensor:
            return self.head(self.middle(self.words(tokens)))

    data = torch.randint(0, 11, (21, 5), generator=torch.Generator().manual_seed(5))
    return Task(
        model=Tied,
        loss=lambda output, batch: F.cross_entropy(output.flatten(0, 1), batch.flatten()),
        inputs=lambda batch: (batch,),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2),
        data=data,
        batch=10,
        microbatch=2,
        clip=0.5,
    )


def task(name: str) -> Task:
    if name == "tied":
        return brief(tied())
    if name == "ragged_gpt":
        return brief(ragged_gpt())
    made = brief(small.SMALL[name.removesuffix("64")]())
    return replace(made, precision="fp64") if name.endswith("64") else made


@functools.cache
def reference(name: str):
    return plain(task(name), STEPS)


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("vgg1664", "dp=2,classifier.*=tp"),
        ("vgg1664", "dp=3,classifier.*=tp"),
        ("alexnet64", "dp=4,classifier.*=tp"),
        ("alexnet64", "dp=2,shares=2:1,classifier.*=tp"),
        ("alexnet64", "dp=2,features.*=tp"),
        ("lstm_seq2seq64", "dp=3,source_words=tp,target_words=tp,head=tp,recompute=full"),
        ("transformer_seq2seq64", "dp=2,tokens=tp,head=tp"),
        ("ragged_gpt", "dp=3,tokens=tp,head=tp"),
        ("tied", "dp=2,middle.*=tp"),
        ("tied", "dp=3,words=tp,head=tp"),
    ],
)
def test_a_split_part_changes_nothing(ranks, name, plan):
    found = ranks(planned, Plan.parse(plan).dp, task(name), plan, STEPS)[0]
    assert_same(found, reference(name), 1e-11 if name.endswith("64") else 2e-4)


def test_a_split_part_is_held_once_over_all_workers(ranks):
    def held() -> tuple[int, int]:
        from sheaf.parallel import build

        step = build(task("vgg1664"), Plan.parse("dp=2,classifier.*=tp"))
        sizes = {name: parameter.numel() for name, parameter in step.model.named_parameters()}
        step.close()
        return (
            sum(size for name, size in sizes.items() if name.startswith("classifier")),
            sum(size for name, size in sizes.items() if name.startswith("features")),
        )

    whole = {name: fake.numel() for name, fake in Blueprint(task("vgg1664")).parameters.items()}
    classifier = sum(size for name, size in whole.items() if name.startswith("classifier"))
    for split, replicated in ranks(held, 2):
        assert split < 0.55 * classifier
        assert replicated == sum(whole.values()) - classifier


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        ("dp=2,clasifier=tp", "matches no module of the model; did you mean classifier"),
        ("dp=2,tokens=tp", "parameter tokens.weight is shared between a part"),
        ("dp=2,blocks.0.feed_in=tp", "inside blocks.0 only: name whole blocks, blocks.0"),
    ],
)
def test_what_cannot_be_a_part_is_refused_by_name(plan, message):
    made = task("vgg1664") if "sifier" in plan else ragged_gpt()
    blueprint = Blueprint(made)
    with pytest.raises(PlanError, match=message):
        segments(Plan.parse(plan), blueprint, cut(blueprint.model))


def test_a_part_that_does_not_fit_is_refused_on_every_worker(ranks):
    def built() -> None:
        from sheaf.parallel import build

        build(ragged_gpt(), Plan.parse("dp=2,tokens=tp"))

    with pytest.raises(RankRaised, match="give both the same answer"):
        ranks(built, 2)
