"""A step goes on from a checkpoint on disk with the numbers of a step that never stopped."""

import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from plain import mlp_float64, norm_resnet
from torch import Tensor, nn
from torch.optim import lr_scheduler

from sheaf import checkpoint
from sheaf.errors import RunError, TaskError
from sheaf.parallel import build
from sheaf.parallel.values import decoded, encoded
from sheaf.plans import Plan


class Falling:
    """A learning rate rule with state of its own, keyed by whole numbers."""

    def __init__(self):
        self.seen = {}

    def __call__(self, epoch):
        self.seen[epoch] = self.seen.get(epoch, 0) + 1
        return 1 / (1 + sum(self.seen.values()))


SCHEDULERS = {
    "StepLR": lambda o: lr_scheduler.StepLR(o, 2),
    "MultiStepLR": lambda o: lr_scheduler.MultiStepLR(o, [3, 4], 0.01),
    "ConstantLR": lambda o: lr_scheduler.ConstantLR(o, 0.1, 3),
    "LinearLR": lambda o: lr_scheduler.LinearLR(o, 0.1),
    "ExponentialLR": lambda o: lr_scheduler.ExponentialLR(o, 0.5),
    "PolynomialLR": lambda o: lr_scheduler.PolynomialLR(o, 10),
    "CosineAnnealingLR": lambda o: lr_scheduler.CosineAnnealingLR(o, 4),
    "CosineAnnealingWarmRestarts": lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    "ChainedScheduler": lambda o: lr_scheduler.ChainedScheduler(
        [lr_scheduler.MultiStepLR(o, [3]), lr_scheduler.ExponentialLR(o, 0.9)], o
    ),
    "SequentialLR": lambda o: lr_scheduler.SequentialLR(
        o, [lr_scheduler.ConstantLR(o, 0.1, 2), lr_scheduler.MultiStepLR(o, [1, 2])], [3]
    ),
    "ReduceLROnPlateau": lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=0, threshold=10.0),
    "CyclicLR": lambda o: lr_scheduler.CyclicLR(o, 0.001, 0.1, 2, cycle_momentum=False),
    "OneCycleLR": lambda o: lr_scheduler.OneCycleLR(o, 0.1, total_steps=9),
    "LambdaLR": lambda o: lr_scheduler.LambdaLR(o, lambda epoch: 0.5**epoch),
    "LambdaLR of an object": lambda o: lr_scheduler.LambdaLR(o, Falling()),
    "MultiplicativeLR": lambda o: lr_scheduler.MultiplicativeLR(o, lambda epoch: 0.9),
}


def resumed(task, plan: str, directory, before: int = 2, after: int = 3) -> tuple[list[float], list[float]]:
    """Losses and learning rates of a step that never stopped, and of one that went through the disk."""
    from sheaf import checkpoint
    from sheaf.parallel import build
    from sheaf.plans import Plan

    def run(step, steps: int) -> list[float]:
        found = []
        for _ in range(steps):
            report = step()
            found += [report.loss, report.learning_rate]
        return found

    whole, first, second = (build(task, Plan.parse(plan)) for _ in range(3))
    wanted, found = run(whole, before + after), run(first, before)
    checkpoint.load(second, checkpoint.save(first, directory))
    return wanted, found + run(second, after)


@pytest.mark.parametrize("name", SCHEDULERS)
def test_every_scheduler_goes_on(tmp_path, name):
    wanted, found = resumed(mlp_float64(scheduler=SCHEDULERS[name]), "serial", tmp_path)
    assert found == wanted


def test_every_scheduler_of_torch_is_tested():
    torchs = {
        name for name, kind in vars(lr_scheduler).items() if isinstance(kind, type) and name in lr_scheduler.__all__
    }
    assert torchs - {"LRScheduler"} <= set(SCHEDULERS)


class Masked(nn.Module):
    """Constant buffers, one of them not persistent."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(12, 5)
        self.register_buffer("scale", torch.full((5,), 2.0))
        self.register_buffer("mask", torch.ones(5), persistent=False)

    def forward(self, given: Tensor) -> Tensor:
        return self.out(given) * self.scale * self.mask


TASKS = {
    "buffers": mlp_float64(model=Masked),
    "statistics": norm_resnet(),
    "fused": mlp_float64(optimizer=lambda ps: torch.optim.AdamW(ps, lr=0.01, fused=True)),
    "tensor lr": mlp_float64(
        optimizer=lambda ps: torch.optim.AdamW(ps, lr=torch.tensor(0.01, dtype=torch.float64), weight_decay=0.5),
        scheduler=lambda o: lr_scheduler.MultiStepLR(o, [3]),
    ),
    "nadam": mlp_float64(optimizer=lambda ps: torch.optim.NAdam(ps, lr=0.01)),
    "rprop": mlp_float64(optimizer=torch.optim.Rprop),
    "asgd": mlp_float64(optimizer=torch.optim.ASGD),
}


@pytest.mark.thinned(5)
@pytest.mark.parametrize("plan", ["serial", "dp=2", "dp=2,zero=1", "dp=2,zero=3,bucket_bytes=1024"])
@pytest.mark.parametrize("name", TASKS)
def test_a_step_goes_on_from_disk(ranks, tmp_path, plan, name):
    for wanted, found in ranks(resumed, 1 if plan == "serial" else 2, TASKS[name], plan, tmp_path):
        assert found == wanted


def clones(step):
    tensors, values = step.state()
    return {name: tensor.clone() for name, tensor in tensors.items()}, json.loads(json.dumps(values))


@pytest.mark.parametrize("plan", ["dp=2", "dp=2,shares=stolen", "dp=2,zero=1", "dp=2,zero=3,bucket_bytes=1024"])
def test_a_step_goes_back_in_time_as_often_as_one_likes(ranks, plan):
    def rewinding() -> list[list[float]]:
        import torch.distributed as dist

        from sheaf.parallel import build
        from sheaf.plans import Plan

        step = build(task, Plan.parse(plan))
        runs = []
        for at in (0, 2):
            while step.index < at:
                step()
            held = [None, None]
            tensors, values = clones(step)
            dist.all_gather_object(held, tensors)
            for _ in range(3):
                runs.append([step().loss for _ in range(3)])
                step.load(held[step.state_owner], values)
        return runs

    task = mlp_float64(scheduler=SCHEDULERS["MultiStepLR"])
    for runs in ranks(rewinding, 2):
        for first, *again in (runs[:3], runs[3:]):
            for other in again:
                assert other == pytest.approx(first, rel=1e-12, abs=0)


def test_a_checkpoint_whose_layers_are_cut_otherwise_is_refused(ranks):
    def told() -> str:
        from sheaf.parallel import build
        from sheaf.plans import Plan

        step = build(mlp_float64(), Plan.parse("tp=2"))
        tensors, values = clones(step)
        name, (dim, outer, *sizes) = next(iter(values["cuts"].items()))
        before = {key: value.clone() for key, value in step.state()[0].items()}
        cuts = values["cuts"] | {name: [dim, outer, *(size - 1 for size in sizes), len(sizes)]}
        with pytest.raises(RunError, match="another version of Sheaf or torch") as raised:
            step.load(tensors, values | {"cuts": cuts})
        assert all(torch.equal(value, before[key]) for key, value in step.state()[0].items())
        step.load(tensors, values)
        return str(raised.value)

    for message in ranks(told, 2):
        assert "1 parameters" in message


def test_load_takes_copies():
    first, second, alone = (build(mlp_float64(), Plan()) for _ in range(3))
    for step in (first, alone):
        step()
    second.load(*first.state())
    for _ in range(3):
        first()
    assert [second().loss for _ in range(3)] == [alone().loss for _ in range(3)]


def test_a_scheduler_that_keeps_what_no_file_can_hold_is_named(tmp_path):
    class Odd(lr_scheduler.StepLR):
        def __init__(self, optimizer):
            super().__init__(optimizer, 2)
            self.file = object()

    step = build(mlp_float64(scheduler=Odd), Plan())
    with pytest.raises(TaskError, match=r"Odd\['file'\] is a object, which a checkpoint cannot hold"):
        checkpoint.save(step, tmp_path)


def test_an_optimizer_that_keeps_what_no_file_can_hold_is_named():
    step = build(mlp_float64(optimizer=lambda ps: torch.optim.SGD([{"params": ps, "rule": len}], lr=0.1)), Plan())
    with pytest.raises(TaskError, match=r"SGD's group 0\['rule'\]"):
        step.state()


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=4),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.lists(inner, max_size=3).map(tuple)
        | st.dictionaries(st.integers() | st.text(max_size=12) | st.tuples(st.integers()), inner, max_size=3)
        | st.dictionaries(st.just("sheaf_kind"), inner)
        | st.frozensets(st.integers(), max_size=3)
    ),
    max_leaves=8,
)


@given(value=VALUES)
def test_values_come_back_as_they_were(value):
    found = decoded(json.loads(json.dumps(encoded(value, "it"))))
    assert found == value
    assert repr(found) == repr(value) or isinstance(value, frozenset | dict | list | tuple)
    assert type(found) is type(value)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.int64, torch.bool])
def test_small_tensors_come_back_as_they_were(dtype):
    value = torch.tensor([[1.5, 0.1], [0.0, 3.0]]).to(dtype)
    found = decoded(json.loads(json.dumps(encoded({"it": value}, "it"))))["it"]
    assert found.dtype == dtype
    assert torch.equal(found, value)
