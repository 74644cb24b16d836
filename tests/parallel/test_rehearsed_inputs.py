"""What a rehearsal makes of a batch whose floating-point numbers are not the model's."""

import torch
from torch import nn

from sheaf.graph import cut
from sheaf.parallel.portion import Portion
from sheaf.parallel.rehearsal import rehearse
from sheaf.task import Task
from sheaf.task.blueprint import Blueprint


class Twice(nn.Module):
    """Calls its first layer again behind a convolution."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 4), nn.Conv1d(3, 3, 1)

    def forward(self, given):
        return self.first(self.second(self.first(given))).mean(dim=(1, 2))


def test_numbers_in_double_precision_are_seen_in_the_models():
    task = Task(
        model=Twice,
        loss=lambda output, batch: output.square().mean(),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        data=torch.randn(4, 3, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(0)),
        inputs=lambda batch: (batch,),
        batch=4,
        microbatch=2,
    )
    blueprint = Blueprint(task)
    found = rehearse(Portion(blueprint), cut(blueprint.model))
    assert found.complete
    assert found.order == ("first", "second", "first")
