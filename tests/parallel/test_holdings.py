"""What every way of holding a model owes: no gradient lost, none that it cannot add up, and nothing left behind."""

import gc
import weakref

import pytest
import torch
from plain import mlp_float64, plain, planned
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sheaf.errors import PlanError
from sheaf.parallel.turnstile import Turnstile

PLANS = ["dp=2", "dp=2,zero=1", "dp=2,zero=2", "dp=2,zero=3", "dp=2,zero=3,bucket_bytes=1024"]


def raised(task, plan: str) -> str:
    """The class and words of what a run raised."""
    try:
        planned(task, plan, 1)
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing"


class Twice(nn.Module):
    """One layer used three times under reentrant checkpoints, so its gradient comes in three parts."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.middle, self.out = nn.Linear(12, 20), nn.Linear(20, 20), nn.Linear(20, 5)

    def forward(self, given: Tensor) -> Tensor:
        hidden = self.into(given)
        for _ in range(3):
            hidden = checkpoint(self.inner, hidden, use_reentrant=True)
        return self.out(hidden)

    def inner(self, given: Tensor) -> Tensor:
        return self.middle(given).tanh()


@pytest.mark.parametrize(
    "plan", ["dp=2,bucket_bytes=1024", "dp=2,zero=1,bucket_bytes=1024", "dp=2,zero=2,bucket_bytes=1024"]
)
def test_a_gradient_that_comes_after_its_bucket_went_is_refused_by_name(ranks, plan):
    for text in ranks(raised, 2, mlp_float64(model=Twice), plan):
        assert "PlanError: parameter middle." in text
        assert "use_reentrant=False" in text


def test_a_member_that_comes_twice_does_not_stand_in_for_another():
    out: list[int] = []
    turnstile = Turnstile([["a", "b"], ["c"]], out.append)
    turnstile.arm()
    for name in ("a", "a", "c"):
        turnstile.ready(name)
    assert out == []
    turnstile.ready("b")
    assert out == [0, 1]
    with pytest.raises(PlanError, match="parameter c"):
        turnstile.ready("c")
    turnstile.flush()
    turnstile.ready("c")  # no pass: other microbatches only add up
    assert out == [0, 1]


def test_what_is_complete_goes_when_it_is_open_or_the_pass_ends():
    out: list[int] = []
    doors = [False]
    turnstile = Turnstile([["a"], ["b"], ["c"], ["d"]], out.append, lambda: doors[0])
    turnstile.arm()
    turnstile.ready("a")
    assert out == []
    with pytest.raises(PlanError, match="parameter a"):
        turnstile.ready("a")  # as it would where it was open: all workers must find the same
    doors[0] = True
    turnstile.ready("c")
    assert out == [0], "and no more: b has not come"
    turnstile.ready("b")
    assert out == [0, 1, 2]
    doors[0] = False
    turnstile.ready("d")
    assert out == [0, 1, 2]
    turnstile.flush()
    assert out == [0, 1, 2, 3]


class Sparse(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.out = nn.Parameter(torch.randn(40, 16)), nn.Linear(16, 5)

    def forward(self, given: Tensor) -> Tensor:
        return self.out(F.embedding((given[:, 0].abs() * 10).long() % 40, self.table, sparse=True))


@pytest.mark.parametrize("plan", PLANS)
def test_a_sparse_gradient_is_refused_by_name(ranks, plan):
    for text in ranks(raised, 2, mlp_float64(model=Sparse), plan):
        assert "PlanError: parameter table got a sparse gradient" in text
        assert "sparse=False" in text


@pytest.mark.parametrize("closed", [True, False], ids=["closed", "forgotten"])
@pytest.mark.parametrize("plan", ["serial", *PLANS])
def test_a_model_is_freed_with_its_step(ranks, plan, closed):
    def alive() -> bool:
        from sheaf.parallel import build
        from sheaf.plans import Plan

        step = build(mlp_float64(), Plan.parse(plan))
        step()
        parameter = weakref.ref(next(iter(step.model.parameters())))
        if closed:
            step._holding.close()
            step.close()
        del step
        gc.collect()
        return parameter() is not None

    assert not any(ranks(alive, 1 if plan == "serial" else 2))


def test_close_gives_blocks_their_own_forward_back(ranks):
    def own() -> tuple[list[bool], bool]:
        from sheaf.parallel import build
        from sheaf.plans import Plan

        step = build(mlp_float64(), Plan.parse("dp=2,zero=3,bucket_bytes=1024"))
        wrapped = any("forward" in module.__dict__ for module in step.model.modules())
        step._holding.close()
        return ["forward" in module.__dict__ for module in step.model.modules()], wrapped

    left, wrapped = ranks(own, 2)[0]
    assert wrapped
    assert not any(left)


def through_its_last_backward(text: str) -> tuple[float, bool]:
    """The loss of a step in which worker 1 tells its losses only when worker 0 is done with its last backward."""
    import time

    import torch.distributed as dist

    from sheaf.parallel import build
    from sheaf.plans import Plan

    step = build(mlp_float64(), Plan.parse(text))
    parts, counter = step._runner.parts, step._spread.world.counter
    ended, send, key = parts.holding.end_backward, parts.exchange.send, f"early {text}"
    theirs, early = parts.dealer.counts(-(-parts.task.batch // parts.task.microbatch))[0], True

    def end_backward() -> None:
        ended()
        counter.add(key, 1)

    def sends() -> None:
        nonlocal early
        limit = time.monotonic() + 20
        while counter.add(key, 0) < theirs and time.monotonic() < limit:
            time.sleep(0.001)
        early = time.monotonic() < limit
        send()

    if dist.get_rank() == 0:
        parts.holding.end_backward = end_backward
    else:
        parts.exchange.send = sends
    loss = step().loss
    step.close()
    return loss, early


@pytest.mark.parametrize("text", ["dp=2,bucket_bytes=1024", "dp=2,zero=1,shares=2:1,bucket_bytes=1024"])
def test_a_worker_that_is_early_does_not_wait_in_its_last_backward(ranks, text):
    found = ranks(through_its_last_backward, 2, text)
    assert found == [(pytest.approx(plain(mlp_float64(), 1).losses[0], rel=1e-12), True)] * 2


class Fails(torch.autograd.Function):
    """Nothing forward; backward it fails."""

    @staticmethod
    def forward(ctx, given):
        return given.clone()

    @staticmethod
    def backward(ctx, *gradients):
        raise ArithmeticError("this backward fails")


class Failing(nn.Module):
    """A model whose backward fails half-way, when some buckets are complete."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.middle, self.out = nn.Linear(12, 20), nn.Linear(20, 20), nn.Linear(20, 5)

    def forward(self, given: Tensor) -> Tensor:
        return self.out(self.middle(Fails.apply(self.into(given))).tanh())


def failed_and_gone_on(text: str):
    import time

    from sheaf.parallel import build
    from sheaf.plans import Plan

    step = build(mlp_float64(model=Failing, batch=14, microbatch=7), Plan.parse(text))
    send = step._runner.parts.exchange.send

    def late() -> None:
        time.sleep(0.2 * torch.distributed.get_rank())  # the other one's backward fails before this
        send()
        time.sleep(0.2 * torch.distributed.get_rank())  # and this one's knows the losses from its beginning

    step._runner.parts.exchange.send = late
    with pytest.raises(ArithmeticError, match="this backward fails"):
        step()
    step.close()
    other = build(mlp_float64(), Plan.parse(text))
    loss = other().loss
    other.close()
    return loss


@pytest.mark.parametrize("text", ["dp=2,bucket_bytes=1024", "dp=2,zero=1,bucket_bytes=1024"])
def test_workers_whose_backwards_fail_go_on_together(ranks, text):
    wanted = plain(mlp_float64(), 1).losses[0]
    assert ranks(failed_and_gone_on, 2, text) == [pytest.approx(wanted, rel=1e-12)] * 2
