"""Microbatches of a round that go through a split part at once: the same answer, and only where it is the same."""

from collections.abc import Callable

import pytest
import torch
from plain import assert_same, plain, planned
from torch import Tensor, nn
from torch.nn import functional as F

from sheaf import Task
from sheaf.graph import cut
from sheaf.parallel.parts import PartsRunner
from sheaf.parallel.stand_ins import originals
from sheaf.parallel.together import is_by_rows, put_together
from sheaf.plans import Plan
from sheaf.task.blueprint import Blueprint

STEPS = 2


class Parted(nn.Module):
    """Features with a norm over the batch, then a part of plain layers."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.features = nn.Sequential(nn.Linear(6, 8, bias=False), nn.BatchNorm1d(8), nn.Tanh())
        self.part = nn.Sequential(nn.Linear(8, 31), nn.ReLU(), nn.Dropout(dropout), nn.Linear(31, 5))

    def forward(self, given: Tensor) -> Tensor:
        return self.part(self.features(given).flatten(1))


class Leading(Parted):
    """Dropout is the part's first block, as in AlexNet, and one of several in it."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Sequential(nn.Dropout(0.3), nn.Linear(8, 31), nn.ReLU(), nn.Dropout(0.5), nn.Linear(31, 5))


class Turned(Parted):
    """What goes to the part has samples in its second dimension, and by chance as many elements in its first."""

    def forward(self, given: Tensor) -> Tensor:
        rows = self.features(given)
        return self.part(torch.stack([rows, rows * 2, rows * 3]))


class Mixing(Parted):
    """What goes to the part was looked at across samples by the part's own side."""

    def forward(self, given: Tensor) -> Tensor:
        scores = self.part(self.features(given))
        return scores - scores.mean(0)


def task(make: Callable[[], nn.Module]) -> Task:
    generator = torch.Generator().manual_seed(0)
    images, labels = torch.randn(22, 6, generator=generator), torch.randint(0, 5, (22,), generator=generator)

    def loss(output: Tensor, batch: list[Tensor]) -> Tensor:
        output = output if output.ndim == 2 else output.mean(0)
        return F.cross_entropy(output, batch[1])

    return Task(
        model=make,
        loss=loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        data=torch.utils.data.TensorDataset(images, labels),
        batch=11,
        microbatch=3,
        precision="fp64",
    )


@pytest.mark.parametrize(
    ("name", "plan", "at_once"),
    [
        ("plain", "dp=2,part.*=tp", True),
        ("plain", "dp=3,shares=2:1:1,part.*=tp", True),
        ("dropout", "dp=2,part.*=tp", True),
        ("leading", "dp=3,shares=2:1:1,part.*=tp", True),
        ("dropout", "dp=2,recompute=full,part.*=tp", False),
        ("turned", "dp=2,part.*=tp", False),
        ("mixing", "dp=2,part.*=tp", False),
    ],
)
def test_a_round_at_once_computes_the_serial_answer(ranks, name, plan, at_once):
    made = task(
        {"plain": Parted, "dropout": lambda: Parted(0.4), "leading": Leading, "turned": Turned, "mixing": Mixing}[name]
    )

    def run():
        went: list[bool] = []
        asked = PartsRunner._at_once

        def noted(runner: PartsRunner, *given: object) -> bool:
            went.append(asked(runner, *given))  # pyright: ignore[reportArgumentType]
            return went[-1]

        PartsRunner._at_once = noted
        try:
            return planned(made, plan, STEPS), went
        finally:
            PartsRunner._at_once = asked

    found, went = ranks(run, Plan.parse(plan).workers)[0]
    assert any(went) == at_once
    assert not any(went[: len(went) // STEPS]), "the first step looks at microbatches one by one"
    assert_same(found, plain(made, STEPS), 1e-11)


def test_which_blocks_compute_row_by_row():
    blueprint = Blueprint(task(lambda: Parted(0.4)))
    found = originals(cut(blueprint.model), blueprint.dtype_of, blueprint.mode)
    assert {name: is_by_rows(one) for name, one in found.items()} == {
        "features.0": True,
        "features.1": False,
        "features.2": True,
        "part.0": True,
        "part.1": True,
        "part.2": False,
        "part.3": True,
    }


def test_a_block_with_a_hook_of_the_models_own_may_do_anything():
    def hooked() -> nn.Module:
        made = Parted()
        made.part[0].register_forward_hook(lambda _module, _given, output: output - output.mean(0))
        return made

    blueprint = Blueprint(task(hooked))
    found = originals(cut(blueprint.model), blueprint.dtype_of, blueprint.mode)
    assert not is_by_rows(found["part.0"])


def test_batches_without_a_row_for_each_sample_are_not_put_together():
    one, other = (torch.zeros(3, 2), torch.ones(3)), (torch.zeros(2, 2), torch.ones(2))
    made = put_together([one, other], (3, 2))
    assert [tuple(leaf.shape) for leaf in made] == [(5, 2), (5,)]
    assert put_together([one, other], (3, 3)) is None
    assert put_together([one, (torch.zeros(2, 4), torch.ones(2))], (3, 2)) is None
    assert put_together([(*one, "text"), (*other, "text")], (3, 2)) is None
