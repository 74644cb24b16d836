"""Which functions may take another path, or give other shapes, for another batch of the same shapes."""

from typing import Any

import pytest
import torch
from plain import assert_same, mlp_float64, plain, planned
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.rnn import pack_padded_sequence
from torch.overrides import TorchFunctionMode

from sheaf.parallel.functions import may_differ

X, MASK, COUNTS = torch.arange(4), torch.tensor([True, False, True, True]), torch.tensor([2, 1, 1, 3])


class Asking(TorchFunctionMode):
    """Asks of every function whether it may differ."""

    def __init__(self, *, picks: bool) -> None:
        super().__init__()
        self.picks, self.found = picks, False

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        self.found |= may_differ(func, args, kwargs, picks=self.picks)
        return func(*args, **kwargs)


@pytest.mark.parametrize("picks", [True, False])
@pytest.mark.parametrize(
    ("differs", "call"),
    [
        (True, lambda: torch.where(MASK)),
        (True, lambda: torch.where(condition=MASK)),
        (True, lambda: torch.nonzero(input=MASK)),
        (True, lambda: F.one_hot(X)),
        (True, lambda: X.repeat_interleave(COUNTS)),
        (True, lambda: torch.repeat_interleave(X, repeats=COUNTS)),
        (True, lambda: torch.repeat_interleave(COUNTS)),
        (True, lambda: torch.tensor_split(X, tensor_indices_or_sections=COUNTS[1:2])),
        (True, lambda: pack_padded_sequence(torch.ones(4, 3, 1), COUNTS, batch_first=True, enforce_sorted=False)),
        (True, lambda: X.sum().item()),
        (None, lambda: X[MASK]),
        (None, lambda: X.masked_select(MASK)),
        (None, lambda: X.masked_select(mask=MASK)),
        (None, lambda: torch.masked_select(input=X, mask=MASK)),
        (False, lambda: torch.where(MASK, X, 0)),
        (False, lambda: torch.where(MASK, input=X, other=X)),
        (False, lambda: torch.where(condition=MASK, input=X, other=X)),
        (False, lambda: F.one_hot(X, num_classes=5)),
        (False, lambda: X.repeat_interleave(2)),
        (False, lambda: torch.tensor_split(X, 2)),
        (False, lambda: MASK[0]),
        (False, lambda: X[COUNTS]),
    ],
)
def test_values_that_decide_shapes_are_found_however_they_are_given(differs: bool | None, call: Any, picks: bool):
    """None: only where elements are picked."""
    with Asking(picks=picks) as asking:
        call()
    assert asking.found is (picks if differs is None else differs)


class Fitting(nn.Module):
    """Layers see as many rows as the batch's values say."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(12, 12) for _ in range(4))
        self.head = nn.Linear(12, 5)

    def forward(self, given: Tensor) -> Tensor:
        (rows,) = torch.where(condition=given[:, 0] > -0.8)
        few = given[rows]
        for layer in self.layers:
            few = layer(few).tanh()
        return self.head(given.index_add(0, rows, few))


def test_a_pipeline_passes_as_many_rows_as_each_batch_has(ranks: Any):
    task = mlp_float64(model=Fitting)
    assert_same(ranks(planned, 2, task, "pp=2", 4)[0], plain(task, 4), 1e-12)
