"""What a step refuses, and that it says why before anything is updated."""

import math
from typing import Any

import pytest
import torch
from plain import mlp_float64, norm_resnet
from torch import Tensor, nn

from pool import RankRaised
from sheaf import Loss
from sheaf.errors import DataError, NonFiniteLoss, PlanError, TaskError
from sheaf.parallel import build, refuse
from sheaf.plans import Plan


def first_steps(task, plan: str, steps: int = 1):
    from sheaf.parallel import build
    from sheaf.plans import Plan

    step = build(task, Plan.parse(plan))
    for _ in range(steps):
        step()
    return step.index


def refused(ranks, task, plan: str, steps: int = 1) -> Exception:
    with pytest.raises(RankRaised) as caught:
        ranks(first_steps, 2, task, plan, steps)
    return caught.value.exception


def test_a_plan_for_another_number_of_workers():
    with pytest.raises(PlanError, match="the plan dp=2 is for 2 workers and 1 are here"):
        build(mlp_float64(), Plan(dp=2))


def test_two_different_microbatches():
    with pytest.raises(PlanError, match=r"the plan says microbatch=2 and the task microbatch=3"):
        build(mlp_float64(), Plan(microbatch=2))


def test_a_microbatch_larger_than_the_batch():
    with pytest.raises(PlanError, match="microbatch=15 is larger than batch=14: lower it or raise batch"):
        build(mlp_float64(microbatch=None), Plan(microbatch=15))


@pytest.mark.parametrize("plan", ["dp=2,compress=int8", "dp=2,local=4", "dp=2,server=1:staleness=2"])
def test_a_loss_scale_that_workers_could_not_change_together(plan):
    reason = "does not go with precision='fp16', whose loss scale .*: use bf16 or fp32"
    with pytest.raises(PlanError, match=reason):
        refuse(mlp_float64(precision="fp16"), Plan.parse(plan))
    refuse(mlp_float64(precision="fp16"), Plan(dp=2))


@pytest.mark.parametrize("plan", ["serial", "dp=2", "dp=2,server=2", "dp=2,local=4"])
def test_an_optimizer_that_wants_the_loss_again(plan):
    with pytest.raises(TaskError, match=r"LBFGS computes the loss again .*: use an optimizer that steps by gradients"):
        refuse(mlp_float64(optimizer=torch.optim.LBFGS), Plan.parse(plan))


def _nothing_counts(output: Tensor, batch: Any) -> Loss:
    return Loss(output.sum() * 0, torch.zeros(()))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"loss": _nothing_counts}, r"loss of microbatch 0 at step 0 is nan.*No microbatch of the step has any weight"),
        (
            {"loss": lambda output, batch: (output * 0).sum().sqrt(), "clip": 1.0},
            "The loss is a number but its gradient is not: look for sqrt or log at zero, or 0/0",
        ),
    ],
)
def test_a_step_without_a_sound_gradient_is_not_applied(changes, message):
    step = build(mlp_float64(**changes), Plan())
    before = {name: value.detach().clone() for name, value in step.model.named_parameters()}
    with pytest.raises(NonFiniteLoss, match=f"(?s){message}"):
        step()
    assert all(torch.equal(before[name], value) for name, value in step.model.named_parameters())


def test_an_optimizer_whose_slices_depend_on_each_other(ranks):
    muon = mlp_float64(optimizer=lambda ps: torch.optim.Muon([p for p in ps if p.ndim == 2]))
    error = refused(ranks, muon, "dp=2,zero=1")
    assert isinstance(error, PlanError)
    assert "an elementwise optimizer such as AdamW" in str(error)
    assert ranks(first_steps, 2, muon, "dp=2") == [1, 1]


def test_sparse_gradients_between_workers(ranks):
    class Sparse(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.rows = nn.Embedding(5, 5, sparse=True)

        def forward(self, given: Tensor) -> Tensor:
            return self.rows(given[:, 0].long().abs() % 5)

    error = refused(ranks, mlp_float64(model=Sparse), "dp=2")
    assert isinstance(error, PlanError)
    assert "rows makes sparse gradients" in str(error)


def test_a_norm_that_runs_twice_in_a_forward(ranks):
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.out = nn.BatchNorm1d(12), nn.Linear(12, 5)

        def forward(self, given: Tensor) -> Tensor:
            return self.out(self.norm(self.norm(given)))

    error = refused(ranks, mlp_float64(model=Twice), "dp=2")
    assert isinstance(error, PlanError)
    assert "norm runs 2 times in one forward" in str(error)


def test_zero_3_with_a_parameter_reached_from_behind_a_branch_on_data(ranks):
    class Hidden(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.into, self.out = nn.Linear(12, 5), nn.Linear(5, 5)

        def forward(self, given: Tensor) -> Tensor:
            hidden = self.into(given)
            if hidden.sum() < 1e9:
                hidden = hidden @ self.out.weight
            return self.out(hidden)

    error = refused(ranks, mlp_float64(model=Hidden), "dp=2,zero=3,bucket_bytes=1024")
    assert isinstance(error, PlanError)
    assert "a parameter of out is used while out is not running" in str(error)
    assert ranks(first_steps, 2, mlp_float64(model=Hidden), "dp=2,zero=2") == [1, 1]


def test_a_buffer_that_forward_changes(ranks):
    class Counting(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.out = nn.Linear(12, 5)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, given: Tensor) -> Tensor:
            self.seen += len(given)
            return self.out(given)

    error = refused(ranks, mlp_float64(model=Counting), "dp=2")
    assert isinstance(error, PlanError)
    assert "changes the buffer seen" in str(error)
    assert first_steps(mlp_float64(model=Counting), "serial") == 1


@pytest.mark.parametrize("plan", ["dp=2", "dp=2,zero=3,bucket_bytes=1024"])
def test_a_loss_that_is_no_number_stops_every_worker_before_the_update(ranks, plan):
    def diverging() -> tuple[str, int, int, bool]:
        step = build(task, Plan.parse(plan))
        step()
        before = {name: value.clone() for name, value in step._holding.full_parameters().items()}
        try:
            step()
        except NonFiniteLoss as error:
            after = step._holding.full_parameters()
            same = all(torch.equal(before[name], after[name]) for name in before)
            return str(error), error.step, error.microbatch, same
        raise AssertionError("a NaN went by")

    from sheaf.parallel import build
    from sheaf.plans import Plan
    from sheaf.task import Order

    good = mlp_float64()
    poisoned = Order(45, 14, 3, 0, shuffle=True).step(1)[3].samples[0]
    data = [(x * math.nan if index == poisoned else x, y) for index, (x, y) in enumerate(good.data)]
    task = mlp_float64(data=data)
    for message, step, microbatch, same in ranks(diverging, 2):
        assert (step, microbatch, same) == (1, 3, True)
        assert message.startswith("the loss of microbatch 3 at step 1 is nan; the step was not applied")


def test_an_item_that_raises_is_named(ranks):
    class Broken(list):
        def __getitem__(self, index):
            if index == 17:
                raise OSError("cannot read")
            return super().__getitem__(index)

    error = refused(ranks, mlp_float64(data=Broken(mlp_float64().data)), "dp=2", steps=4)
    assert isinstance(error, DataError)
    assert str(error) == "data[17] raised OSError: cannot read"


def test_a_lost_worker_is_named_by_the_others(ranks):
    def lonely() -> str:
        import os

        import torch.distributed as dist

        from sheaf.errors import WorkerFailed
        from sheaf.parallel import build
        from sheaf.plans import Plan

        step = build(task, Plan.parse("dp=3"))
        step()
        if dist.get_rank() == 2:
            os.kill(os.getpid(), 9)
        try:
            step()
        except WorkerFailed as error:
            print(error)
            raise
        return "went on"

    task = norm_resnet()
    with pytest.raises(Exception, match=r"rank 2|worker 2"):
        ranks(lonely, 3)


class Counting(nn.Module):
    """Counts its calls in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.out, self.calls = nn.Linear(12, 5), 0

    def forward(self, given: Tensor) -> Tensor:
        self.calls += 1
        return self.out(given) * (1 + self.calls)


class Slope(nn.Module):
    """Takes a gradient with respect to its input while it runs forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(12, 12), nn.Tanh(), nn.Linear(12, 12))
        self.out = nn.Linear(12, 5)

    def forward(self, given: Tensor) -> Tensor:
        given = given.detach().requires_grad_()
        (slope,) = torch.autograd.grad(self.layers(given).square().sum(), given, create_graph=True)
        return self.out(slope)


class Turning(nn.Module):
    """Takes its layers from the other end where the batch says so, which fake tensors cannot."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.out = nn.ModuleList([nn.Linear(12, 12) for _ in range(3)]), nn.Linear(12, 5)

    def forward(self, given: Tensor) -> Tensor:
        turned = type(given) is Tensor and bool(given.square().sum() > 0)
        for layer in reversed(self.layers) if turned else self.layers:
            given = layer(given).tanh()
        return self.out(given)


@pytest.mark.parametrize(
    ("model", "plan", "reason"),
    [
        (Counting, "dp=2", "the forward of the model changes calls, which each worker"),
        (Slope, "dp=2,zero=3,bucket_bytes=1024", "is taken within forward, when ZeRO-3 has freed its parameters: use"),
        (Turning, "dp=2,zero=3,bucket_bytes=1024", "runs in another order or more often than when the model was tr"),
    ],
)
def test_a_forward_that_workers_cannot_keep_in_step(ranks, model, plan, reason):
    error = refused(ranks, mlp_float64(model=model), plan)
    assert isinstance(error, PlanError)
    assert reason in str(error)


def test_a_parameter_frozen_after_the_step_was_built():
    step = build(mlp_float64(), Plan())
    step()
    next(step.model.parameters()).requires_grad_(requires_grad=False)
    with pytest.raises(PlanError, match=r"requires_grad of 0.weight \(1 parameters in all\) changed after the step"):
        step()


class Box:
    """Hides a tensor from everybody."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


class Boxed(torch.optim.SGD):
    """Holds a tensor that it made where nobody can exchange it."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, lr=0.1)
        self.box = Box(torch.zeros_like(parameters[0]))


class Homeless(torch.optim.SGD):
    """Keeps state that is of no parameter."""

    def __init__(self, parameters: list[nn.Parameter]) -> None:
        super().__init__(parameters, lr=0.1)
        self.state["all"] = {"count": 0}


def test_an_optimizer_over_a_tensor_that_is_no_parameter(ranks):
    task = mlp_float64(optimizer=lambda ps: torch.optim.SGD([*ps, nn.Parameter(torch.ones(2))], lr=0.1))
    error = refused(ranks, task, "dp=2,zero=1")
    assert isinstance(error, TaskError)
    assert "the optimizer holds a tensor that is no parameter of the model" in str(error)


def test_an_optimizer_that_hides_a_tensor(ranks):
    error = refused(ranks, mlp_float64(optimizer=lambda ps: Boxed(list(ps))), "dp=2,zero=1")
    assert isinstance(error, PlanError)
    assert "cannot be exchanged for this worker's part: use zero=0" in str(error)


def test_state_of_an_optimizer_that_belongs_to_no_parameter():
    step = build(mlp_float64(optimizer=lambda ps: Homeless(list(ps))), Plan())
    step()
    with pytest.raises(TaskError, match=r"Homeless keeps state \('all'\) that belongs to no parameter"):
        step.state()
