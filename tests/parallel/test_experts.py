"""Experts that replicas hold for each other compute what plain PyTorch computes; what cannot be followed is refused.

In float64, with 5 experts that no number of replicas divides, microbatches of unlike sizes, and rounds in which some
replica has no microbatch.
"""

import functools
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from plain import Cube, assert_same, brief, plain, planned
from small import SMALL
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from sheaf import Task, verify
from sheaf.errors import PlanError
from sheaf.plans import Plan

STEPS, WIDTH, WIDE, EXPERTS = 2, 6, 9, 5
EP = "*.experts=ep"


def moe(name: str) -> Task:
    made = SMALL["moe"]()
    precision = {"64": "fp64", "bf16": "bf16"}.get(name, "fp32")
    return replace(brief(made), precision=precision)


@functools.cache
def reference(name: str):
    return plain(task(name), STEPS)


def task(name: str) -> Task:
    return moe(name.removeprefix("moe")) if name.startswith("moe") else stacked(REGIONS[name])


@pytest.mark.thinned(4)
@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("moe64", f"dp=2,{EP}"),
        ("moe64", f"dp=3,{EP}"),
        ("moe64", "dp=4,blocks.*=ep"),
        ("moe64", f"dp=3,shares=3:0:1,{EP}"),
        ("moe64", f"dp=2,recompute=full,{EP}"),
        ("moe64", f"dp=3,recompute=full,bucket_bytes=1024,{EP}"),
        ("moe32", f"dp=3,{EP}"),
    ],
)
def test_tokens_sent_to_experts_change_nothing(ranks, name, plan):
    found = ranks(planned, Plan.parse(plan).dp, task(name), plan, STEPS)[0]
    assert_same(found, reference(name), 1e-11 if name == "moe64" else 2e-4)


def test_a_worker_without_an_expert(ranks):
    given = moe("64")
    given = replace(given, model=functools.partial(given.model, experts=3))
    assert_same(ranks(planned, 4, given, f"dp=4,{EP}", STEPS)[0], plain(given, STEPS), 1e-11)


def test_tokens_travel_in_bf16(ranks):
    found = ranks(planned, 2, task("moebf16"), f"dp=2,{EP}", STEPS)[0]
    assert_same(found, reference("moebf16"), 2e-2)


# What may be done to tokens at their experts ------------------------------------------------------------------------


class Region(nn.Module):
    """Tokens in (places, width); each expert gets every token that it is due, and ``fed`` says what becomes of them."""

    def __init__(self, fed: Callable[["Region", Tensor], Tensor]) -> None:
        super().__init__()
        self.fed = fed
        self.gate = nn.Linear(WIDTH, EXPERTS)
        self.up = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDE) / 3)
        self.up_bias = nn.Parameter(torch.randn(EXPERTS, WIDE) / 3)
        self.down = nn.Parameter(torch.randn(EXPERTS, WIDE, WIDTH) / 3)
        self.scale = nn.Parameter(torch.rand(EXPERTS))
        self.shared = nn.Parameter(torch.rand(WIDE))
        self.norm = nn.LayerNorm(WIDE)
        self.dropout = nn.Dropout(0.3)
        self.idle = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH))

    def forward(self, tokens: Tensor) -> Tensor:
        rows = tokens.flatten(0, 1)
        shares = self.gate(rows).softmax(-1)
        made = self.fed(self, (shares.T[:, :, None] * rows).contiguous())
        return (made * shares.T[:, :, None]).sum(0).view_as(tokens)


class Model(nn.Module):
    def __init__(self, fed: Callable[[Region, Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(4, WIDTH)
        self.experts = Region(fed)
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        return self.last(hidden + self.experts(hidden))


def stacked(fed: Callable[[Region, Tensor], Tensor], **changes: Any) -> Task:
    generator = torch.Generator().manual_seed(7)
    inputs, targets = torch.randn(14, 3, 4, generator=generator), torch.randn(14, 3, 3, generator=generator)
    given = Task(
        model=lambda: Model(fed),
        loss=lambda output, batch: F.mse_loss(output, batch[1]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
        data=list(zip(inputs, targets, strict=True)),
        batch=9,
        microbatch=2,
        precision="fp64",
        clip=0.5,
    )
    return replace(given, **changes)


def _relu(own: Region, given: Tensor) -> Tensor:
    return torch.bmm(F.relu(torch.bmm(given, own.up)), own.down)


def _dropped(own: Region, given: Tensor) -> Tensor:
    return own.dropout(own.dropout(given @ own.up).tanh() @ own.down)


def _einsum(own: Region, given: Tensor) -> Tensor:
    wide = torch.einsum("xcw,xwh->xch", given, own.up) + own.up_bias.unsqueeze(1)
    return torch.einsum("ehw,ech->ecw", own.down, wide.sigmoid())


def _turned(own: Region, given: Tensor) -> Tensor:
    wide = torch.einsum("cew,ewh->ceh", given.transpose(0, 1), own.up).exp()
    return torch.einsum("ceh,ehw->ecw", wide, own.down)


def _four_dimensions(own: Region, given: Tensor) -> Tensor:
    rows = given.unflatten(1, (-1, 3))
    return (torch.matmul(rows, own.up[:, None]).tanh() @ own.down[:, None]).flatten(1, 2)


def _gated(own: Region, given: Tensor) -> Tensor:
    left, right = (given @ torch.cat([own.up, own.up.sin()], -1)).chunk(2, -1)
    return (F.silu(left) * right) @ own.down


def _shared(own: Region, given: Tensor) -> Tensor:
    wide = own.norm(torch.baddbmm(own.up_bias[:, None], given, own.up)) * own.shared
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-3)
    return (wide * own.scale[:, None, None]) @ own.down.to(wide.dtype)


def _by_row(own: Region, given: Tensor) -> Tensor:
    weight = given.detach().norm(dim=-1, keepdim=True)
    wide = (given @ own.up) * weight + given.mean()
    return wide.masked_fill(weight > 1.0, 0.5) @ own.down


def _unseen(own: Region, given: Tensor) -> Tensor:
    return Cube.apply(given @ own.up + own.up_bias[:, None]) @ own.down


def _turned_matrix(own: Region, given: Tensor) -> Tensor:
    return F.gelu(given @ own.down.mT).sort(-1).values @ own.down


def _never_used(own: Region, given: Tensor) -> Tensor:
    _ = torch.bmm(given, own.idle)
    return _relu(own, given)


def _in_place(own: Region, given: Tensor) -> Tensor:
    wide = given @ own.up
    wide += own.up_bias[:, None]
    return torch.relu_(wide) @ own.down


def _in_part_replicated(own: Region, given: Tensor) -> Tensor:
    return _relu(own, given) * own.up.mean()  # needs all of `up`, which therefore stays whole


REGIONS = {
    "relu": _relu,
    "dropout": _dropped,
    "einsum": _einsum,
    "turned": _turned,
    "four dimensions": _four_dimensions,
    "gated": _gated,
    "shared": _shared,
    "by row": _by_row,
    "unseen": _unseen,
    "turned matrix": _turned_matrix,
    "never used": _never_used,
    "in place": _in_place,
    "in part replicated": _in_part_replicated,
}


@pytest.mark.thinned(6)
@pytest.mark.parametrize("name", REGIONS)
@pytest.mark.parametrize("workers", [2, 3])
def test_whatever_is_done_to_tokens_at_their_experts(ranks, name, workers):
    found = ranks(planned, workers, task(name), f"dp={workers},experts=ep", STEPS)[0]
    assert_same(found, reference(name), 1e-11)


@pytest.mark.thinned(2)
@pytest.mark.parametrize("name", ["dropout", "gated", "never used"])
def test_it_is_the_same_computed_again(ranks, name):
    found = ranks(planned, 2, task(name), "dp=2,recompute=full,experts=ep", STEPS)[0]
    assert_same(found, reference(name), 1e-11)


def _within_each_other(own: Region, given: Tensor) -> Tensor:
    def outer(tokens: Tensor) -> Tensor:
        return checkpoint(own.dropout, tokens @ own.up, use_reentrant=False) @ own.down

    return checkpoint(outer, given, use_reentrant=False)


@pytest.mark.parametrize("plan", ["dp=2,experts=ep", "dp=2,recompute=full,experts=ep"])
def test_a_models_own_checkpoint_of_tokens_at_their_experts_inside_of_another(ranks, plan):
    given = stacked(_within_each_other)
    assert_same(ranks(planned, 2, given, plan, STEPS)[0], plain(given, STEPS), 1e-11)


# What cannot be followed, and what a step keeps ----------------------------------------------------------------------


def _number_of_its_own(own: Region, given: Tensor) -> Tensor:
    return ((given @ own.up) * float(given.detach().sum())) @ own.down


def _skipped(own: Region, given: Tensor) -> Tensor:
    return _relu(own, given) if float(given.detach()[0, 0, 0]) > 0 else given


def _branched(own: Region, given: Tensor) -> Tensor:
    return given @ own.idle if float(given.detach()[0, 0, 0]) > 0 else _relu(own, given)


@pytest.mark.parametrize("fed", [_number_of_its_own, _skipped, _branched])
def test_replicas_that_part_ways_all_stop(ranks, fed):
    def stopped() -> str:
        from sheaf.parallel import build

        step = build(stacked(fed), Plan.parse("dp=2,experts=ep"))
        try:
            step()
        except PlanError as error:
            return str(error)
        finally:
            step.close()
        return ""

    for message in ranks(stopped, 2):
        assert "control flow or a number in it depends on the microbatch" in message


def _hidden(own: Region, given: Tensor) -> Tensor:
    wide = torch.bmm(given, own.up)
    with torch._C.DisableTorchFunction():
        return torch.bmm(wide * 2, own.down)


def _looped(own: Region, given: Tensor) -> Tensor:
    return torch.stack([given[expert] @ own.up[expert] for expert in range(EXPERTS)]) @ own.up.mT


@pytest.mark.parametrize(
    ("made", "plan", "message"),
    [
        (SMALL["moe"], "dp=2,head=ep", r"head=ep holds no experts to send tokens to; use blocks\.\*\.experts=ep"),
        (SMALL["moe"], "dp=2,nothing=ep,*.experts=ep", "nothing=ep holds no experts"),
        (SMALL["gpt"], "dp=2,blocks.*=ep", "neither does the rest of the model"),
        (
            lambda: stacked(_hidden),
            "dp=2,experts=ep",
            r"experts cannot be rehearsed with tokens .* reached tokens that are sent to experts unseen \(a com",
        ),
        (lambda: stacked(_looped), "dp=3,experts=ep", "experts.up is taken for experts and meets __getitem__"),
    ],
)
def test_parts_without_stacks_of_experts_are_refused(made, plan, message):
    from sheaf.parallel.build import refuse

    with pytest.raises(PlanError, match=message):
        refuse(made(), Plan.parse(plan))


def test_experts_are_held_once_and_a_checkpoint_goes_on(ranks, tmp_path):
    def through_the_disk(directory: Path) -> tuple[dict[str, int], list[float], list[float]]:
        from sheaf import checkpoint
        from sheaf.parallel import build

        plan = Plan.parse(f"dp=2,{EP}")
        through = build(moe("64"), plan)
        sizes = {name: parameter.numel() for name, parameter in through.model.named_parameters()}
        straight = [through().loss for _ in range(2)]
        saved = checkpoint.save(through, directory)
        straight += [through().loss for _ in range(2)]
        through.close()
        again = build(moe("64"), plan)
        checkpoint.load(again, saved)
        resumed = [again().loss for _ in range(2)]
        again.close()
        return sizes, straight, resumed

    (first, straight, resumed), (second, *_) = ranks(through_the_disk, 2, tmp_path)
    assert resumed == straight[2:]
    assert straight == pytest.approx(plain(moe("64"), 4).losses, rel=1e-12)
    whole = {name: parameter.numel() for name, parameter in moe("64").model().named_parameters()}
    stacks = [name for name in whole if "experts.feed" in name]
    assert all(first[name] * 5 == whole[name] * 3 and second[name] * 5 == whole[name] * 2 for name in stacks)
    assert all(first[name] == second[name] == whole[name] for name in whole if name not in stacks)


def test_verify_finds_rounding_alone():
    verdict = verify(moe("32"), f"dp=2,{EP}", steps=2)
    assert verdict.verdict in ("rounding", "identical"), str(verdict)
