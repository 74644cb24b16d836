"""An optimizer that steps in the host's memory computes what plain PyTorch does, and its state is where it says."""

import copy

import pytest
import torch
from plain import assert_same, mlp_float64, plain, planned
from torch import Tensor, nn

from sheaf import checkpoint
from sheaf.errors import PlanError
from sheaf.parallel import build
from sheaf.parallel.build import refuse
from sheaf.parallel.offload import in_one_pass
from sheaf.parallel.resharding import is_reshardable
from sheaf.plans import Plan

STEPS = 4
OPTIMIZERS = {
    "adamw": lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
    "momentum": lambda parameters: torch.optim.SGD(parameters, lr=0.05, momentum=0.9),
    "adagrad": lambda parameters: torch.optim.Adagrad(parameters, lr=0.05, initial_accumulator_value=0.1),
}
PLANS = [  # of two in a row the first runs in `make test`
    "dp=2",
    "dp=2,shares=stolen",
    "dp=2,zero=1,shares=3:1",
    "dp=2,zero=1,bucket_bytes=1024",
    "dp=2,zero=2,recompute=full",
    "dp=3,zero=2,bucket_bytes=1024",
    "dp=2,zero=3,bucket_bytes=1024",
    "dp=2,4=tp",
    "tp=2",
    "dp=2,tp=2,zero=1",
    "pp=2",
    "dp=2,pp=2:gpipe,zero=3,bucket_bytes=1024",
]


class Turns(nn.Module):
    """Parts that some steps do not use, one that is frozen, and one that lies in memory as images do."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(12, 16), nn.Linear(16, 5)
        self.image = nn.Conv2d(4, 4, 2, padding=1).to(memory_format=torch.channels_last)
        self.seldom = nn.Linear(16, 16)
        self.out.bias.requires_grad_(False)

    def forward(self, given: Tensor) -> Tensor:
        hidden = self.into(given).tanh()
        hidden = hidden + self.image(hidden.view(-1, 4, 2, 2))[..., :2, :2].flatten(1)
        return self.out(self.seldom(hidden) if float(given.detach()[0, 0]) > 0.3 else hidden)


def turns(**changes):
    return mlp_float64(model=Turns, batch=3, microbatch=3, **changes)  # one microbatch: nothing is added up


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_one_worker_computes_what_a_plain_loop_does_to_the_bit(optimizer):
    task = turns(optimizer=OPTIMIZERS[optimizer])
    wanted = plain(task, 6)
    unused = ["seldom.weight" not in gradients for gradients in wanted.gradients]
    assert any(unused)
    assert not all(unused)
    assert_same(planned(task, "offload=optimizer", 6), wanted, 0.0)


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_low_precision_computes_what_it_does_on_the_device_to_the_bit(precision):
    task = turns(precision=precision, clip=0.1)
    assert_same(planned(task, "offload=optimizer", STEPS), planned(task, "serial", STEPS), 0.0)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_computes_the_serial_answer(ranks, plan):
    name = list(OPTIMIZERS)[PLANS.index(plan) // 2 % 2]
    task = mlp_float64(optimizer=OPTIMIZERS[name], clip=0.3)
    found = ranks(planned, Plan.parse(plan).workers, task, f"{plan},offload=optimizer", STEPS)[0]
    assert_same(found, plain(task, STEPS), 1e-12)


def where(task, plan: str):
    """What a step's optimizer holds after two steps: by kind of tensor, whether any of it is memory of the model."""
    step = build(task, Plan.parse(plan))
    step()
    step()
    held = {value.untyped_storage().data_ptr() for value in (*step.model.parameters(), *step._holding.kept().values())}
    stepped = [value for group in step.optimizer.param_groups for value in group["params"] if value.grad is not None]
    shared = [value.untyped_storage().data_ptr() in held for value in stepped]
    gradients = {value.grad.untyped_storage().data_ptr() for value in step.model.parameters() if value.grad is not None}
    apart = [value.grad.untyped_storage().data_ptr() not in gradients for value in stepped]
    keys = sorted(step.state()[0])
    step.close()
    return any(shared), all(apart), len(stepped), keys


def test_what_the_optimizer_steps_is_memory_of_its_own(ranks):
    for plan in ("dp=2", "dp=2,zero=1", "dp=2,zero=3,bucket_bytes=1024"):
        here, there = (ranks(where, 2, mlp_float64(), one)[0] for one in (plan, f"{plan},offload=optimizer"))
        assert (here[0], there[0], there[1]) == (True, False, True), plan
        assert there[2] == here[2] > 0, plan
        assert there[3] == here[3], plan


def through_disk(task, first: str, second: str, directory) -> tuple[list, list]:
    """Weights after five steps that never stopped, and after two under one plan and three under the other."""
    whole, before, after = (build(task, Plan.parse(plan)) for plan in (first, first, second))
    for _ in range(2):
        before()
    checkpoint.load(after, checkpoint.save(before, directory))
    for _ in range(3):
        after()
    for _ in range(5):
        whole()
    return [list(step.full_state().values()) for step in (whole, after)]


@pytest.mark.thinned(2)
@pytest.mark.parametrize("back", [False, True])
@pytest.mark.parametrize("plan", ["dp=2,zero=1", "serial", "dp=2", "dp=2,zero=3,bucket_bytes=1024", "tp=2"])
def test_a_run_goes_on_with_and_without(ranks, tmp_path, plan, back):
    offloaded = "offload=optimizer" if plan == "serial" else f"{plan},offload=optimizer"
    first, second = (offloaded, plan) if back else (plan, offloaded)
    task = mlp_float64(optimizer=OPTIMIZERS["adamw"])
    wanted, found = ranks(through_disk, Plan.parse(plan).workers, task, first, second, tmp_path)[0]
    assert len(wanted) == len(found) > 0
    assert all(torch.equal(one, other) for one, other in zip(wanted, found, strict=True))


def test_shards_of_other_sizes_go_on_too():
    assert is_reshardable(Plan.parse("dp=2,zero=1,offload=optimizer"), "dp=3,zero=1")


def test_optimizers_that_step_on_accelerators_alone_are_refused():
    task = mlp_float64(optimizer=lambda parameters: torch.optim.AdamW(parameters, capturable=True))
    refuse(task, Plan())
    with pytest.raises(PlanError, match=r"offload=optimizer steps tensors in the host's memory.*capturable"):
        refuse(task, Plan.parse("offload=optimizer"))
    with pytest.raises(PlanError, match="SparseAdam"):
        refuse(mlp_float64(optimizer=torch.optim.SparseAdam), Plan.parse("offload=optimizer"))


class Words(nn.Module):
    """A table whose gradient is sparse."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 5, sparse=True)

    def forward(self, given: Tensor) -> Tensor:
        return self.words(given.abs().long().clamp(max=8)).mean(1)


def test_a_sparse_gradient_is_refused_by_name():
    step = build(mlp_float64(model=Words, optimizer=OPTIMIZERS["momentum"]), Plan.parse("offload=optimizer"))
    with pytest.raises(PlanError, match=r"parameter words\.weight got a sparse gradient"):
        step()
    step.close()


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_one_pass_over_memory_steps_as_several_do(name):
    """What workers on accelerators use: torch's fused kernels, and settings that stay as they were."""
    values, gradients = torch.randn(2, 1000, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    ones = [nn.Parameter(values.clone()) for _ in range(2)]
    optimizers = [OPTIMIZERS[name]([one]) for one in ones]
    settings = copy.deepcopy(optimizers[1].param_groups[0])
    for step in range(3):
        for one in ones:
            one.grad = gradients * (step + 1)
        optimizers[0].step()
        with in_one_pass(optimizers[1]):
            assert optimizers[1].param_groups[0]["fused"]
            optimizers[1].step()
    torch.testing.assert_close(ones[1], ones[0], rtol=1e-12, atol=1e-14)
    now = optimizers[1].param_groups[0]
    assert {key: now[key] for key in now if key != "params"} == {
        key: settings[key] for key in settings if key != "params"
    }


def test_how_a_task_wants_to_step_is_kept():
    one = nn.Parameter(torch.ones(3))
    for kind, settings in (
        (torch.optim.AdamW, {"foreach": True}),
        (torch.optim.AdamW, {"foreach": False}),
        (torch.optim.AdamW, {"fused": False}),
        (torch.optim.NAdam, {}),
    ):
        optimizer = kind([one], **settings)
        before = optimizer.param_groups[0].get("fused")
        with in_one_pass(optimizer):
            assert optimizer.param_groups[0].get("fused") is before


@pytest.mark.parametrize("used", [(2, 2), (1, 2, 2), (2, 1, 2)])
def test_one_pass_goes_with_parameters_that_are_used_later_than_others(used):
    """Torch's fused SGD takes the momentum of a whole group, or begins that of a whole group."""
    ones, others = ([nn.Parameter(torch.ones(5, dtype=torch.float64)) for _ in range(2)] for _ in range(2))
    plainly, at_once = OPTIMIZERS["momentum"](ones), OPTIMIZERS["momentum"](others)
    for step, count in enumerate(used):
        for each in (ones, others):
            for number, one in enumerate(each):
                one.grad = torch.full_like(one, 0.5 + step) if number < count else None
        plainly.step()
        with in_one_pass(at_once):
            at_once.step()
    torch.testing.assert_close(others, ones, rtol=1e-12, atol=1e-14)
