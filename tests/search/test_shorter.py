"""What three of many equal layers show must be what all of them show."""

from collections import Counter
from contextlib import suppress
from itertools import pairwise

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from sheaf.api.shorter import KEPT, Shorter, shortened
from sheaf.api.splits import Rehearsals, rehearsed
from sheaf.graph import trace
from sheaf.split.rehearsal import rehearse
from sheaf.split.sequences import sequences
from sheaf.task import Loss, Task
from sheaf.zoo.models import GPT


def loss(logits, batch) -> Loss:
    total = F.cross_entropy(logits.flatten(0, 1), batch[1].flatten(), reduction="sum")
    return Loss(total, batch[1].numel())


def task(model=lambda: GPT(vocabulary=64, context=8, width=32, layers=6, heads=4, dropout=0.0)) -> Task:
    tokens = torch.arange(16 * 9).reshape(16, 9) % 64
    return Task(
        model=model,
        loss=loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        data=torch.utils.data.TensorDataset(tokens[:, :-1], tokens[:, 1:]),
        batch=8,
        microbatch=2,
    )


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    "find",
    [
        lambda given: rehearse(given, 2, samples=2, sequence=False),
        lambda given: rehearse(given, 4, samples=2, sequence=True),
        lambda given: sequences(given, 2, samples=2),
    ],
    ids=["layers", "along the sequence", "sequences"],
)
def test_three_layers_show_what_six_do(find):
    given = task()
    shorter = Shorter.of(given, trace(given, 2))
    assert shorter is not None
    assert (shorter.stack, shorter.layers) == ("blocks", 6)
    found, whole = shorter.lengthened(find(shorter.task)), find(given)
    assert found.slices == whole.slices
    assert Counter(found.moves) == Counter(whole.moves)
    assert found.work == pytest.approx(whole.work)
    assert found.activations == pytest.approx(whole.activations)
    assert set(found.partial) == set(whole.partial)
    assert (found.closed, found.dealt) == (whole.closed, whole.dealt)


def test_few_layers_and_unlike_ones_are_rehearsed_whole():
    few = task(lambda: GPT(vocabulary=64, context=8, width=32, layers=4, heads=4, dropout=0.0))
    assert Shorter.of(few, trace(few, 2)) is None

    def growing() -> nn.Module:
        widths = [16, 16, 16, 16, 24, 24, 24, 24]
        return nn.Sequential(
            nn.Embedding(64, 16),
            *(nn.Linear(*pair) for pair in pairwise(widths)),
            nn.Linear(24, 64),
        )

    unlike = task(growing)
    assert Shorter.of(unlike, trace(unlike, 2)) is None


def test_rehearsals_of_one_model_find_what_each_finds_alone():
    given = task()
    facts = trace(given, 2)
    together = Rehearsals(given, facts)
    for number, sequence in ((2, 3), (4, 0), (2, 0), (2, 1)):
        assert together.of(number, sequence) == rehearsed(given, facts, number, sequence)
    assert trace(given, 2, drawn=together.drawn) == facts


def test_a_stack_is_whole_again_after_it_was_shortened() -> None:
    model = nn.ModuleDict({"layers": nn.ModuleList(nn.Linear(2, 2) for _ in range(7)), "head": nn.Linear(2, 1)})
    before = list(model.named_modules())
    with suppress(RuntimeError), shortened(model, "layers", 7):
        assert len(model.get_submodule("layers")._modules) == KEPT
        raise RuntimeError("it counts its layers")
    assert list(model.named_modules()) == before
    with pytest.raises(TypeError, match="no list of 6 layers"), shortened(model, "layers", 6):
        pass
    assert list(model.named_modules()) == before
