"""Running statistics under several workers and recomputation are those of plain PyTorch, or are refused."""

import pytest
import torch
from plain import assert_same, mlp_float64, plain, planned
from torch import Tensor, nn
from torch.nn import functional as F

from pool import RankRaised
from sheaf.errors import PlanError
from sheaf.parallel import build
from sheaf.plans import Plan

ALONE, TWO = "recompute=full", "dp=2"


class Normed(nn.Module):
    """A block with a norm between two linear layers, and two more blocks of it."""

    def __init__(self, norm) -> None:
        super().__init__()
        self.a, self.norm, self.out = nn.Linear(12, 8, bias=False), norm(), nn.Linear(8, 5)

    def forward(self, given: Tensor) -> Tensor:
        return self.out(torch.tanh(self.norm(self.a(given))))


class Frozen(Normed):
    """The usual way to freeze a BatchNorm."""

    def train(self, mode: bool = True):
        super().train(mode)
        self.norm.eval()
        return self


class FrozenInForward(Normed):
    def forward(self, given: Tensor) -> Tensor:
        self.norm.eval()
        return super().forward(given)


class Renorm(nn.BatchNorm1d):
    """Reads its running statistics in training."""

    def forward(self, given: Tensor) -> Tensor:
        return super().forward(given) + 0.1 * (given.mean(0) - self.running_mean)


class Untouched(nn.BatchNorm1d):
    """A subclass with torch's own forward."""


class Replacing(nn.Module):
    """Puts a new tensor in the place of a buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.out = nn.Linear(12, 5)
        self.register_buffer("seen", torch.zeros(()))

    def forward(self, given: Tensor) -> Tensor:
        self.change(given)
        return self.out(given) * (1 + self.seen * 0.01)

    def change(self, given: Tensor) -> None:
        self.seen = self.seen + len(given)


class InPlace(Replacing):
    def change(self, given: Tensor) -> None:
        self.seen += len(given)


class ThroughData(Replacing):
    def change(self, given: Tensor) -> None:
        self.seen.data.add_(len(given))


class Counter(Replacing):
    """Counts in a plain number."""

    def __init__(self) -> None:
        super().__init__()
        self.times = 0

    def change(self, given: Tensor) -> None:
        self.times += 1


class Attribute(Replacing):
    """Keeps an average in a tensor that is no buffer."""

    def __init__(self) -> None:
        super().__init__()
        self.average = torch.zeros((), dtype=torch.float64)

    def change(self, given: Tensor) -> None:
        self.average = 0.9 * self.average + given.detach().mean()


class Late(Replacing):
    """Changes its buffer in a later microbatch of the first step only."""

    def change(self, given: Tensor) -> None:
        if len(given) == 2:
            self.seen += 1


class Constant(Replacing):
    """A buffer that nothing changes."""

    def change(self, given: Tensor) -> None:
        assert len(given)


class Storing(Normed):
    """Leaves an activation on itself, as mixtures of experts leave their balancing loss."""

    aux: Tensor | None = None

    def forward(self, given: Tensor) -> Tensor:
        self.aux = self.a(given).square().mean()
        return super().forward(given)


def run(ranks, task, plan: str, steps: int = 3):
    return ranks(planned, 2, task, plan, steps)[0] if plan.startswith("dp") else planned(task, plan, steps)


def refused(ranks, task, plan: str) -> str:
    with pytest.raises((RankRaised, PlanError)) as caught:
        run(ranks, task, plan, 1)
    error = caught.value.exception if isinstance(caught.value, RankRaised) else caught.value
    assert isinstance(error, PlanError), error
    return str(error)


@pytest.mark.parametrize("plan", [TWO, ALONE])
@pytest.mark.parametrize(
    "model",
    [
        lambda: Frozen(lambda: nn.BatchNorm1d(8)),
        lambda: FrozenInForward(lambda: nn.BatchNorm1d(8)),
        lambda: Normed(lambda: nn.BatchNorm1d(8, momentum=None)),
        lambda: Normed(lambda: nn.BatchNorm1d(8, track_running_stats=False)),
        lambda: Normed(lambda: Untouched(8)),
        lambda: Storing(lambda: nn.BatchNorm1d(8)),
        Constant,
    ],
    ids=["frozen", "frozen in forward", "cumulative", "untracked", "subclass", "activation kept", "constant"],
)
def test_the_answer_is_plain(ranks, model, plan):
    task = mlp_float64(model=model)
    assert_same(run(ranks, task, plan), plain(task, 3), 1e-11)


def test_a_norm_inside_a_recomputed_block_is_updated_once():
    task = mlp_float64(model=lambda: nn.Sequential(nn.Linear(12, 12), Normed(lambda: nn.BatchNorm1d(8))))
    assert_same(planned(task, ALONE, 3), plain(task, 3), 1e-11)


@pytest.mark.parametrize("plan", [TWO, ALONE])
@pytest.mark.parametrize(
    ("model", "named"),
    [
        (Replacing, "the buffer seen"),
        (InPlace, "the buffer seen"),
        (ThroughData, "the buffer seen"),
        (Late, "the buffer seen"),
        (Counter, "changes times"),
        (Attribute, "changes average"),
        (lambda: Normed(lambda: Renorm(8)), "the buffer norm.running_mean"),
    ],
    ids=["replaced", "in place", "data", "late", "counter", "attribute", "renorm"],
)
def test_what_forward_leaves_behind_is_refused(ranks, model, named, plan):
    message = refused(ranks, mlp_float64(model=model), plan)
    assert named in message
    assert "use the serial plan without recomputation" in message


class Instance(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Conv1d(1, 4, 3)
        self.n = nn.InstanceNorm1d(4, affine=True, track_running_stats=True)
        self.out = nn.Linear(40, 5)

    def forward(self, given: Tensor) -> Tensor:
        return self.out(self.n(self.c(given[:, None])).flatten(1))


def test_a_tracking_instance_norm_is_refused(ranks):
    assert "the buffer n.running_mean" in refused(ranks, mlp_float64(model=Instance), TWO)
    assert "the buffer n.running_mean" in refused(ranks, mlp_float64(model=Instance), ALONE)


def test_synchronised_norms_are_refused_before_they_wait_for_each_other(ranks):
    task = mlp_float64(model=lambda: Normed(lambda: nn.SyncBatchNorm(8)))
    assert "SyncBatchNorm normalises over all workers" in refused(ranks, task, TWO)


def test_a_norm_that_also_reads_its_running_statistics_is_refused(ranks):
    class Both(Normed):
        def forward(self, given: Tensor) -> Tensor:
            self.norm.eval()
            before = self.norm(self.a(given))
            self.norm.train()
            return self.out(self.norm(self.a(given)) + before)

    assert "norm runs in training and in eval mode" in refused(
        ranks, mlp_float64(model=lambda: Both(lambda: nn.BatchNorm1d(8))), TWO
    )


def test_a_norm_in_the_models_own_checkpoint_is_refused(ranks):
    class Own(Normed):
        def forward(self, given: Tensor) -> Tensor:
            return torch.utils.checkpoint.checkpoint(super().forward, given, use_reentrant=False)

    message = refused(ranks, mlp_float64(model=lambda: Own(lambda: nn.BatchNorm1d(8))), TWO)
    assert "norm runs again in backward" in message


def test_a_step_goes_on_from_loaded_buffers():
    task = mlp_float64(model=Constant)
    one, other = build(task, Plan.parse(ALONE)), build(task, Plan.parse(ALONE))
    one()
    other()
    other.load(*one.state())
    assert other().loss == one().loss
    one.close()
    other.close()


def test_a_refused_step_leaves_no_nan_behind():
    poison = torch.zeros(())

    def loss(output: Tensor, batch: list[Tensor]) -> Tensor:
        return F.cross_entropy(output, batch[1])

    class Poisoned(Normed):
        def forward(self, given: Tensor) -> Tensor:
            return super().forward(given + poison)

    task = mlp_float64(model=lambda: Poisoned(lambda: nn.BatchNorm1d(8)), loss=loss)
    step = build(task, Plan.parse(ALONE))
    step()
    poison.fill_(torch.nan)
    with pytest.raises(Exception, match="the step was not applied"):
        step()
    poison.zero_()
    step()
    assert all(value.isfinite().all() for value in step.model.buffers())
    step.close()


def test_a_model_called_between_steps_moves_its_own_statistics():
    step = build(mlp_float64(model=lambda: Normed(lambda: nn.BatchNorm1d(8))), Plan.parse(ALONE))
    step()
    before = step.model.norm.running_mean.clone()
    step.model(torch.randn(4, 12, dtype=torch.float64))
    assert not torch.equal(step.model.norm.running_mean, before)
    step.close()
