"""What a step asks of its task, its optimizer and its workers, and what it gives back."""

import gc
import os
import weakref
from dataclasses import replace

import pytest
import torch
from plain import assert_same, mlp_float64, norm_resnet, plain, planned, ragged_gpt
from safetensors.torch import load_file
from test_refusals import refused
from torch import Tensor, nn

from pool import RankRaised
from sheaf import Loss, checkpoint
from sheaf.errors import PlanError, TaskError, WorkerFailed
from sheaf.parallel import build, with_microbatch
from sheaf.parallel.build import default_device
from sheaf.parallel.microbatch import _depends_on_microbatch
from sheaf.parallel.optimizers import load_named_state, named_state
from sheaf.parallel.shares import Stolen
from sheaf.plans import Plan
from sheaf.task import Blueprint, Microbatch


class OwnTensor(torch.optim.Optimizer):
    """Counts its steps in a tensor of its own, kept in an attribute and in a list."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": torch.tensor(0.1, dtype=torch.float64)})
        self.count = torch.tensor(0.0, dtype=torch.float64)
        self.ones = [torch.tensor(1.0, dtype=torch.float64)]

    @torch.no_grad()
    def step(self, closure=None):
        self.count += self.ones[0]
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    parameter.sub_(parameter.grad * (group["lr"] / self.count))


class Hiding(OwnTensor):
    """Keeps a tensor where nothing can be exchanged."""

    def __init__(self, parameters):
        super().__init__(parameters)
        kept = torch.tensor(2.0)
        self.hidden = lambda: kept


class Keeping(OwnTensor):
    """Keeps the whole parameters beside its groups."""

    def __init__(self, parameters):
        super().__init__(parameters)
        self.mine = list(parameters)


@pytest.mark.parametrize("plan", ["dp=2,zero=1", "dp=2,zero=3,bucket_bytes=1024"])
@pytest.mark.parametrize(
    "optimizer",
    [
        lambda ps: torch.optim.AdamW(ps, lr=torch.tensor(0.01, dtype=torch.float64), weight_decay=0.5),
        lambda ps: torch.optim.AdamW(
            [{"params": ps, "lr": torch.tensor(0.02, dtype=torch.float64)}], lr=0.01, weight_decay=0.5
        ),
        OwnTensor,
    ],
    ids=["tensor lr", "tensor lr of a group", "own tensor"],
)
def test_tensors_that_an_optimizer_makes_are_real(ranks, plan, optimizer):
    task = mlp_float64(optimizer=optimizer)
    assert_same(ranks(planned, 2, task, plan, 3)[0], plain(task, 3), 1e-11)


@pytest.mark.parametrize(("optimizer", "named"), [(Hiding, "Hiding.hidden"), (Keeping, "Keeping.mine")])
def test_an_optimizer_that_hides_tensors_is_refused_when_sharded(ranks, optimizer, named):
    error = refused(ranks, mlp_float64(optimizer=optimizer), "dp=2,zero=1")
    assert isinstance(error, PlanError)
    assert named in str(error)


def detached(output, batch):
    return nn.functional.cross_entropy(output, batch[1]).detach()


def unrelated(output, batch):
    return torch.ones((), dtype=torch.float64, requires_grad=True) * len(batch[1])


@pytest.mark.parametrize("loss", [detached, unrelated])
@pytest.mark.parametrize("plan", ["serial", "dp=2", "dp=2,zero=1", "dp=2,zero=3,bucket_bytes=1024"])
def test_a_loss_that_reaches_no_parameter_is_refused(ranks, loss, plan):
    task = mlp_float64(loss=loss)
    if plan == "serial":
        with pytest.raises(TaskError, match=r"no parameter got a gradient from the loss of step 0: look for detach"):
            build(task, Plan())()
    else:
        error = refused(ranks, task, plan)
        assert isinstance(error, TaskError)
        assert "no parameter got a gradient" in str(error)


@pytest.mark.parametrize("plan", ["serial", "dp=2", "dp=2,zero=3,bucket_bytes=1024"])
def test_one_microbatch_without_gradient_is_fine(ranks, plan):
    def loss(output: Tensor, batch: list[Tensor], nothing=lambda _output: torch.zeros((), dtype=torch.float64)) -> Loss:
        if bool((batch[0] == padding).any()):
            return Loss(nothing(output), 0)
        return Loss(nn.functional.cross_entropy(output, batch[1], reduction="sum"), len(batch[1]))

    padding = mlp_float64().data[3][0][0].double()
    found = ranks(planned, 1 if plan == "serial" else 2, mlp_float64(loss=loss), plan, 3)[0]
    wanted = plain(mlp_float64(loss=lambda output, batch: loss(output, batch, lambda given: given.sum() * 0)), 3)
    assert_same(found, wanted, 1e-11)


@pytest.mark.parametrize("plan", ["serial", "dp=2", "dp=2,zero=1", "dp=2,zero=3,bucket_bytes=1024"])
def test_a_parameter_unfrozen_after_the_build_is_refused(ranks, plan):
    class Frozen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.out = nn.Linear(12, 12), nn.Linear(12, 5)
            self.first.weight.requires_grad_(requires_grad=False)

        def forward(self, given: Tensor) -> Tensor:
            return self.out(self.first(given))

    def unfreeze() -> str:
        step = build(task, Plan.parse(plan))
        step()
        step.model.first.weight.requires_grad_(requires_grad=True)
        with pytest.raises(PlanError) as caught:
            step()
        step.close()
        return str(caught.value)

    task = mlp_float64(model=Frozen)
    for message in [unfreeze()] if plan == "serial" else ranks(unfreeze, 2):
        assert "first.weight" in message
        assert "build the step again" in message


@pytest.mark.parametrize(
    ("layer", "depends"),
    [
        (lambda: nn.Dropout(0.1), True),
        (lambda: nn.Dropout(0.0), False),
        (lambda: nn.BatchNorm1d(12), True),
        (lambda: nn.InstanceNorm1d(12), False),
        (lambda: nn.InstanceNorm1d(12, track_running_stats=True), True),
        (lambda: nn.MultiheadAttention(12, 2, dropout=0.1), True),
        (lambda: nn.MultiheadAttention(12, 2), False),
        (lambda: nn.TransformerEncoderLayer(12, 2, dropout=0.1), True),
        (lambda: nn.TransformerEncoderLayer(12, 2, dropout=0.0), False),
        (lambda: nn.LSTM(12, 2, num_layers=2, dropout=0.5), True),
        (lambda: nn.LSTM(12, 2), False),
        (nn.RReLU, True),
        (lambda: nn.FractionalMaxPool2d(2, output_size=3), True),
        (lambda: nn.BatchNorm1d(12).eval(), False),
        (lambda: nn.LayerNorm(12), False),
    ],
)
def test_which_modules_make_the_answer_depend_on_the_microbatch(layer, depends):
    found = _depends_on_microbatch(nn.Sequential(nn.Linear(12, 12), layer()))
    assert (found is not None) == depends


def test_an_open_microbatch_is_refused_where_the_answer_depends_on_it():
    with pytest.raises(PlanError, match=r"neither the task nor the plan gives a microbatch.*BatchNorm2d.*microbatch=4"):
        build(norm_resnet(microbatch=None), Plan())
    with pytest.raises(PlanError, match=r"neither the task nor the plan gives a microbatch"):
        with_microbatch(norm_resnet(microbatch=None), Plan(dp=2))
    assert with_microbatch(norm_resnet(microbatch=None), Plan(microbatch=8)).microbatch == 8
    assert with_microbatch(mlp_float64(microbatch=None), Plan(dp=2)).microbatch == 7


class OneCounter:
    """A counter of one process."""

    def __init__(self):
        self.held = {}

    def add(self, key, amount, /):
        self.held[key] = self.held.get(key, 0) + amount
        return self.held[key]

    def delete_key(self, key, /):
        return self.held.pop(key, None) is not None


def test_a_step_can_be_dealt_again_and_leaves_no_counter():
    counter = OneCounter()
    dealer = Stolen(counter, "it", 1, 0)
    microbatches = [Microbatch(index, (index,)) for index in range(3)]
    for _ in range(2):
        assert [microbatch.index for microbatch, last in dealer.deal(0, microbatches) if last() or True] == [0, 1, 2]
        dealer.finished()
    assert counter.held == {}


def test_builds_are_numbered_by_the_workers_together(ranks):
    def builds() -> tuple[str, str, float, int]:
        import torch.distributed as dist

        from sheaf.parallel import build
        from sheaf.plans import Plan

        if dist.get_rank() == 0:
            with pytest.MonkeyPatch.context() as patch:
                patch.setattr(dist, "is_initialized", lambda: False)
                build(mlp_float64(), Plan()).close()
        first, second = (build(mlp_float64(), Plan.parse("dp=2,shares=stolen")) for _ in range(2))
        report = first()
        return (
            first._runner.parts.dealer._name,
            second._runner.parts.dealer._name,
            report.weight,
            sum(report.microbatches),
        )

    left, right = ranks(builds, 2)
    assert left == right
    assert left[0] != left[1]
    assert left[2:] == (14.0, 5)


def test_workers_that_do_not_deal_alike_fail(ranks):
    def astray() -> None:
        from sheaf.parallel import build
        from sheaf.plans import Plan

        step = build(mlp_float64(), Plan.parse("dp=2,shares=stolen"))
        step._runner.parts.dealer._name += str(step.rank)
        step()

    with pytest.raises(RankRaised) as caught:
        ranks(astray, 2)
    assert isinstance(caught.value.exception, WorkerFailed)
    assert "(5, 5) microbatches of a step that has 5" in str(caught.value.exception)


class Tied(nn.Module):
    """A shared parameter and a shared module with buffers, one of them not persistent."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b, self.out = nn.Linear(12, 12), nn.Linear(12, 12), nn.Linear(12, 5)
        self.b.weight = self.a.weight
        self.norm = nn.BatchNorm1d(12)
        self.again = self.norm
        self.register_buffer("mask", torch.ones(12), persistent=False)

    def forward(self, given: Tensor) -> Tensor:
        return self.out(self.norm(self.b(self.a(given)) * self.mask))


@pytest.mark.parametrize("plan", ["serial", "dp=2", "dp=2,zero=1", "dp=2,zero=3,bucket_bytes=1024"])
@pytest.mark.parametrize("task", [mlp_float64(model=Tied), ragged_gpt()], ids=["tied", "gpt"])
def test_the_final_weights_load_strictly_into_a_plain_model(ranks, tmp_path, plan, task):
    def train() -> None:
        from sheaf.parallel import build
        from sheaf.plans import Plan

        step = build(task, Plan.parse(plan))
        step()
        whole = step.full_state()
        if step.rank == 0:
            checkpoint.write_model(tmp_path / "model.safetensors", whole)
        else:
            assert whole == {}
        step.close()

    ranks(train, 1 if plan == "serial" else 2)
    model = task.model()
    model.load_state_dict(load_file(tmp_path / "model.safetensors"), strict=True)
    if task.model is not Tied:  # what Run.model() does; weights files do not know other names of buffers yet
        filled = Blueprint(replace(task, weights=tmp_path / "model.safetensors")).fill(torch.device("cpu"))
        assert all(torch.equal(filled.state_dict()[name], value) for name, value in model.state_dict().items())
    wanted = plain(task, 1).weights[0]
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(parameter.detach(), wanted[name].to(parameter.dtype), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "kept_on"),
    [({}, "cpu"), ({"capturable": True}, "meta"), ({"fused": True}, "meta")],
)
def test_loaded_state_is_where_the_optimizer_wants_it(settings, kept_on):
    parameter = nn.Parameter(torch.ones((), device="meta"))
    optimizer = torch.optim.AdamW([parameter])
    optimizer.param_groups[0].update(settings)
    state = {"it/step": torch.tensor(3.0), "it/exp_avg": torch.ones(()), "it/exp_avg_sq": torch.ones(())}
    load_named_state(optimizer, {id(parameter): "it"}, state, named_state(optimizer, {})[1])
    found = {key: value.device.type for key, value in optimizer.state[parameter].items()}
    assert found == {"step": kept_on, "exp_avg": "meta", "exp_avg_sq": "meta"}


def test_the_default_device_follows_the_local_rank(monkeypatch):
    chosen = []
    accelerator = torch.accelerator
    monkeypatch.setattr(accelerator, "current_accelerator", lambda check_available: torch.device("cuda"))
    monkeypatch.setattr(accelerator, "current_device_index", lambda: 0)
    monkeypatch.setattr(accelerator, "device_count", lambda: 4)
    monkeypatch.setattr(accelerator, "set_device_index", chosen.append)
    monkeypatch.setattr("torch.distributed.is_initialized", lambda: True)
    monkeypatch.setenv("LOCAL_RANK", "3")
    assert default_device() == torch.device("cuda", 3)
    assert chosen == [3]
    monkeypatch.setenv("LOCAL_RANK", "4")
    assert default_device() == torch.device("cuda", 0)


@pytest.mark.parametrize("plan", ["serial", "recompute=full"])
def test_a_closed_step_lets_its_model_go(plan):
    step = build(mlp_float64(), Plan.parse(plan))
    step()
    model = weakref.ref(step.model)
    step.close()
    del step
    gc.collect()
    assert model() is None


@pytest.mark.parametrize("plan", ["dp=2", "dp=2,zero=1", "dp=2,zero=3,bucket_bytes=1024"])
def test_building_again_and_again_takes_no_more_file_descriptors(ranks, plan):
    def again() -> list[int]:
        from sheaf.parallel import build
        from sheaf.plans import Plan

        counts = []
        for _ in range(3):
            step = build(mlp_float64(), Plan.parse(plan))
            assert (step._spread.replicas._gathers is not None) == ("zero=3" in plan)
            step()
            step.close()
            step.close()
            del step
            gc.collect()
            counts.append(len(os.listdir("/proc/self/fd")))
        return counts

    for counts in ranks(again, 2):
        assert counts[0] == counts[-1]


@pytest.mark.parametrize("clip", [0.05, 1e9])
def test_clipping_is_bit_for_bit_that_of_torch_for_one_worker(clip):
    task = mlp_float64(clip=clip, batch=3, microbatch=3, precision="fp32")
    found, wanted = planned(task, "serial", 3), plain(task, 3)
    for ours, theirs in zip(found.weights, wanted.weights, strict=True):
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)


class Normed(torch.optim.Optimizer):
    """Has no learning rate."""

    def __init__(self, parameters):
        super().__init__(parameters, {})

    @torch.no_grad()
    def step(self, closure=None):
        for value in (value for group in self.param_groups for value in group["params"]):
            value -= 0.1 * value.grad / (value.grad.norm() + 1e-6)


@pytest.mark.parametrize("plan", ["serial", "dp=2", "dp=2,local=2"])
def test_an_optimizer_without_a_learning_rate_trains(ranks, plan):
    def train() -> tuple[float | None, float]:
        from sheaf.parallel import build
        from sheaf.plans import Plan

        step = build(mlp_float64(optimizer=Normed, scheduler=None), Plan.parse(plan))
        reports = [step() for _ in range(2)]
        step.close()
        return reports[1].learning_rate, reports[1].loss

    for rate, loss in ranks(train, Plan.parse(plan).workers):
        assert rate is None
        if plan != "dp=2,local=2":
            assert loss == pytest.approx(plain(mlp_float64(optimizer=Normed, scheduler=None), 2).losses[1])
