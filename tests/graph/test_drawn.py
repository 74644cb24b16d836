"""A model that is built once and lent to many must look to each as if it had been built for it."""

from typing import Any

import pytest
import torch
from graph_cases import gpt2, image_task, task, text_task, vectors
from torch import Tensor, nn

from sheaf.api.shorter import cut_down
from sheaf.graph import trace
from sheaf.graph.drawn import Drawn
from sheaf.task import Task


class Remembers(nn.Module):
    """Takes another path in its second forward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []
        self.calls = 0
        self.layer = nn.Linear(10, 10)

    def forward(self, value: Tensor) -> Tensor:
        self.calls += 1
        self.seen.append(self.calls)
        for _ in self.seen:
            value = self.layer(value)
        return value


@pytest.mark.parametrize(
    "make",
    [
        lambda **given: text_task(gpt2, **given),
        image_task,
        lambda **given: task(Remembers, vectors(10), **given),
    ],
    ids=["gpt2", "resnet", "remembers"],
)
@pytest.mark.parametrize("precision", ["fp32", "fp64"])
def test_the_facts_of_a_lent_model_are_those_of_one_built_for_them(make: Any, precision: str):
    one: Task = make(precision=precision)
    drawn = Drawn(one)
    alone = {size: trace(one, size) for size in (4, 2)}
    names = list(dict(drawn.blueprint.model.named_parameters()))
    for size in (4, 2, 4):
        assert trace(one, size, drawn=drawn) == alone[size]
    assert list(dict(drawn.blueprint.model.named_parameters())) == names
    assert {fake.dtype for fake in drawn.blueprint.model.parameters()} == {torch.float32}


def test_layers_that_were_taken_out_are_back_when_the_model_is_returned():
    one = text_task(lambda: gpt2(n_layer=6))
    drawn, facts = Drawn(one), trace(one, 4)
    with drawn.lent() as blueprint:
        cut_down(blueprint.model, "transformer.h", 6)
        assert len(blueprint.model.get_submodule("transformer.h")) == 3
    assert len(drawn.blueprint.model.get_submodule("transformer.h")) == 6
    assert trace(one, 4, drawn=drawn) == facts
    with pytest.raises(TypeError, match="no list of 5 layers"), drawn.lent() as blueprint:
        cut_down(blueprint.model, "transformer.h", 5)
