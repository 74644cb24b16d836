"""Optimizers over slices begin with the state that plain PyTorch gives them, and say what they cannot take."""

from typing import Any

import pytest
import torch
from plain import assert_same, mlp_float64, plain, planned
from torch import Tensor, nn

from sheaf.errors import TaskError
from sheaf.parallel import build
from sheaf.parallel.optimizers import load_named_state, named_state
from sheaf.plans import Plan


class Averaged(torch.optim.Optimizer):
    """Plain steps; the constructor begins a mean of the weights, and a count of its own in 16 bits."""

    def __init__(self, parameters: Any) -> None:
        super().__init__(parameters, {"lr": 0.1})
        for group in self.param_groups:
            for value in group["params"]:
                half = torch.full_like(value, 0.1, dtype=torch.bfloat16)
                self.state[value] = {"mean": value.detach() / 3, "half": half}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """Step by the gradient, its mean, and what is kept in few bits."""
        for group in self.param_groups:
            for value in group["params"]:
                state = self.state[value]
                state["mean"].mul_(0.9).add_(value, alpha=0.1)
                state["half"].mul_(1.3)
                value.sub_(group["lr"] * (value.grad + 0.01 * state["mean"] * state["half"]))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("plan", ["dp=2,zero=1", "dp=2,zero=3,bucket_bytes=1024", "dp=2,server=2", "tp=2"])
@pytest.mark.parametrize(
    "optimizer", [lambda ps: torch.optim.Adagrad(ps, lr=0.1, initial_accumulator_value=0.1), Averaged]
)
def test_state_made_with_the_optimizer_is_that_of_the_dtype_that_is_trained(ranks: Any, plan: str, optimizer: Any):
    task = mlp_float64(optimizer=optimizer)
    assert_same(ranks(planned, 2, task, plan, 3)[0], plain(task, 3), 1e-12)


def noted() -> nn.Module:
    """A model that notes on its parameters which of them decay."""
    made = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 5))
    for name, value in made.named_parameters():
        value.decays = name.endswith("weight")  # pyright: ignore[reportAttributeAccessIssue]
    return made


def by_note(parameters: list[Any]) -> torch.optim.Optimizer:
    """Groups by what is noted."""
    groups = [{"params": [one for one in parameters if getattr(one, "decays", True) == here]} for here in (True, False)]
    return torch.optim.AdamW([groups[0] | {"weight_decay": 0.3}, groups[1] | {"weight_decay": 0.0}], lr=0.01)


@pytest.mark.parametrize("plan", ["dp=2,zero=2", "tp=2"])
def test_an_optimizer_may_group_by_what_the_model_notes_on_parameters(ranks: Any, plan: str):
    task = mlp_float64(model=noted, optimizer=by_note)
    assert_same(ranks(planned, 2, task, plan, 3)[0], plain(task, 3), 1e-12)


class Mixed(nn.Module):
    """A table whose gradients are rows, and a layer whose gradient is not."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.layer = nn.Embedding(12, 12, sparse=True), nn.Linear(12, 5)

    def forward(self, given: Tensor) -> Tensor:
        return self.layer(given + self.table(given.argmax(1)))


@pytest.mark.parametrize("plan", ["serial", "dp=2", "dp=2,local=2"])
def test_a_dense_gradient_for_an_optimizer_of_rows_is_named_and_nothing_is_stepped(ranks: Any, plan: str):
    task = mlp_float64(optimizer=torch.optim.SparseAdam, **({} if "local" in plan else {"model": Mixed}))

    def refused() -> tuple[str, bool]:
        step = build(task, Plan.parse(plan))
        before = [value.detach().clone() for value in step.model.parameters()]
        with pytest.raises(TaskError) as caught:
            step()
        return str(caught.value), all(map(torch.equal, before, step.model.parameters()))

    name = "0.weight (6" if "local" in plan else "layer.weight (2"
    for said, unchanged in ranks(refused, Plan.parse(plan).workers):
        assert said.startswith(f"{name} parameters in all) got a dense gradient, and SparseAdam")
        assert unchanged


class Pictured(nn.Module):
    """Its weights lie in memory as images do, channels last."""

    def __init__(self) -> None:
        super().__init__()
        self.image = nn.Conv2d(3, 4, 2, padding=1).to(memory_format=torch.channels_last)
        self.out = nn.Linear(36, 5)

    def forward(self, given: Tensor) -> Tensor:
        return self.out(self.image(given.view(-1, 3, 2, 2)).tanh().flatten(1))


def fused(parameters: Any) -> torch.optim.Optimizer:
    """Goes by memory alone, whatever strides say."""
    return torch.optim.AdamW(parameters, lr=0.01, fused=True)


@pytest.mark.parametrize("plan", ["dp=2", "dp=2,offload=optimizer"])
def test_fused_kernels_find_gradients_where_their_parameters_lie(ranks: Any, plan: str):
    task = mlp_float64(model=Pictured, optimizer=fused)
    whole = build(task, Plan())
    assert not next(whole.model.parameters()).is_contiguous()
    whole.close()
    assert_same(ranks(planned, 2, task, plan, 3)[0], plain(task, 3), 1e-12)


def test_loaded_state_lies_in_memory_as_its_parameter_does():
    """Checkpoints hold every tensor in the order of its indices."""
    first = torch.linspace(-1, 1, 48, dtype=torch.float64).reshape(4, 3, 2, 2).to(memory_format=torch.channels_last)
    one, other = nn.Parameter(first.clone()), nn.Parameter(first.clone())
    optimizers = [fused([one]), fused([other])]
    for gradient in (first, first.cos()):
        one.grad = gradient
        optimizers[0].step()
    tensors, values = named_state(optimizers[0], {id(one): "it"})
    kept = {name: value.contiguous() for name, value in tensors.items()}
    load_named_state(optimizers[1], {id(other): "it"}, kept, values)
    with torch.no_grad():
        other.copy_(one)
    for parameter, optimizer in zip((one, other), optimizers, strict=True):
        parameter.grad = first.sin()
        optimizer.step()
    assert torch.equal(one, other)
