"""Experts that lie in a list of modules, and replicas that compute them for each other, as plain PyTorch computes them.

In float64, with 5 experts, microbatches of unlike sizes, rounds without a microbatch, and experts that get no rows.
"""

import functools
import random
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from plain import Cube, assert_same, plain, planned
from torch import Tensor, nn
from torch.nn import functional as F

from pool import RankRaised
from sheaf import Task
from sheaf.errors import PlanError
from sheaf.plans import Plan

STEPS, WIDTH, EXPERTS, CHOSEN = 2, 6, 5, 2


class Expert(nn.Module):
    """A gated feed-forward part, as in Mixtral."""

    def __init__(self) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(WIDTH, 9, bias=False), nn.Linear(WIDTH, 9)
        self.down, self.dropout = nn.Linear(9, WIDTH), nn.Dropout(0.3)

    def forward(self, rows: Tensor) -> Tensor:
        return self.down(self.dropout(F.silu(self.gate(rows)) * self.up(rows)))


Routed = Callable[[nn.ModuleList, Tensor, Tensor, Tensor], Tensor]


class Mixture(nn.Module):
    """``routed`` is the loop over experts, given them, tokens, and each token's shares and choices."""

    def __init__(self, routed: Routed, expert: Callable[[], nn.Module], count: int) -> None:
        super().__init__()
        self.gate = nn.Linear(WIDTH, count)
        self.experts = nn.ModuleList([expert() for _ in range(count)])
        self.routed = routed

    def forward(self, hidden: Tensor) -> Tensor:
        tokens = hidden.flatten(0, 1)
        shares, choices = self.gate(tokens).softmax(-1).topk(CHOSEN, dim=-1)
        return self.routed(self.experts, tokens, shares, choices).view_as(hidden)


class Model(nn.Module):
    def __init__(self, routed: Routed, expert: Callable[[], nn.Module] = Expert, count: int = EXPERTS) -> None:
        super().__init__()
        self.first = nn.Linear(4, WIDTH)
        self.blocks = nn.ModuleList([Mixture(routed, expert, count) for _ in range(2)])
        self.last = nn.Linear(WIDTH, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        for block in self.blocks:
            hidden = hidden + block(hidden)
        return self.last(hidden)


def _added(experts: nn.ModuleList, tokens: Tensor, shares: Tensor, choices: Tensor) -> Tensor:
    """As Mixtral's forward was, in transformers 4."""
    result = torch.zeros_like(tokens)
    mask = F.one_hot(choices, EXPERTS).permute(2, 1, 0)
    for number, expert in enumerate(experts):
        place, row = torch.where(mask[number])
        result.index_add_(0, row, (expert(tokens[row]) * shares[row, place, None]).to(tokens.dtype))
    return result


def _skipping(experts: nn.ModuleList, tokens: Tensor, shares: Tensor, choices: Tensor) -> Tensor:
    """Whoever gets no rows is not called: replicas go different ways."""
    result = torch.zeros_like(tokens)
    for number in choices.unique().tolist():
        row, place = torch.where(choices == number)
        result[row] += experts[number](tokens[row]) * shares[row, place, None]
    return result


def _set(experts: nn.ModuleList, tokens: Tensor, shares: Tensor, choices: Tensor) -> Tensor:
    """Each token to its first choice, looked at in between by the share of the second."""
    result = torch.empty_like(tokens)
    for number, expert in enumerate(experts):
        mask = choices[:, 0] == number
        if mask.any():
            result[mask] = expert(tokens[mask])
    return result * shares[:, :1] + result.detach().mean() * shares[:, 1:]


def _dense(experts: nn.ModuleList, tokens: Tensor, shares: Tensor, choices: Tensor) -> Tensor:
    """Every expert gets every token; what one makes is never used."""
    chances = torch.zeros(len(tokens), EXPERTS, dtype=tokens.dtype).scatter(1, choices, shares)
    made = [expert(tokens) for expert in experts]
    return sum(chances[:, number, None] * one for number, one in enumerate(made[:-1]))


def _spoiling(experts: nn.ModuleList, tokens: Tensor, shares: Tensor, choices: Tensor) -> Tensor:
    """Changes, before anything looks at the output, what was given to an expert and what it was multiplied with."""
    result = _added(experts, tokens, shares, choices)
    with torch.no_grad():
        extra, weights, given = torch.zeros_like(tokens), shares.clone(), tokens.clone()
        for expert in experts:
            extra.add_(expert(given) * weights[:, :1])
            weights.mul_(0.5)
            given.mul_(0.5)
    return result + extra


def _unseen(experts: nn.ModuleList, tokens: Tensor, shares: Tensor, choices: Tensor) -> Tensor:
    """A custom function is given an output that is still to be written, and one that is due."""
    written = _added(experts, tokens, shares, choices)
    return Cube.apply(written) + Cube.apply(experts[0](tokens))


LOOPS: dict[str, Routed] = {
    "added": _added,
    "skipping": _skipping,
    "set": _set,
    "dense": _dense,
    "spoiling": _spoiling,
    "unseen": _unseen,
}


def task(routed: Routed, expert: Callable[[], nn.Module] = Expert, **changes: Any) -> Task:
    generator = torch.Generator().manual_seed(7)
    inputs, targets = torch.randn(14, 3, 4, generator=generator), torch.randn(14, 3, 3, generator=generator)
    given = Task(
        model=lambda: Model(routed, expert),
        loss=lambda output, batch: F.mse_loss(output, batch[1]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
        data=list(zip(inputs, targets, strict=True)),
        batch=9,
        microbatch=2,
        precision="fp64",
        clip=0.5,
    )
    return replace(given, **changes)


@functools.cache
def reference(name: str, precision: str = "fp64"):
    return plain(task(LOOPS[name], precision=precision), STEPS)


@pytest.mark.thinned(4)
@pytest.mark.parametrize("workers", [2, 3])
@pytest.mark.parametrize("name", LOOPS)
def test_replicas_that_hold_modules_of_a_list_change_nothing(ranks, name, workers):
    found = ranks(planned, workers, task(LOOPS[name]), f"dp={workers},blocks.*.experts=ep", STEPS)[0]
    assert_same(found, reference(name), 1e-11)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("count", "plan"), [(3, "dp=4,*.experts=ep"), (EXPERTS, "dp=3,shares=3:0:1,*.experts=ep")], ids=["4", "3"]
)
def test_workers_without_an_expert_and_without_a_microbatch(ranks, count, plan):
    made = task(_skipping, model=functools.partial(Model, _skipping, count=count))
    assert_same(ranks(planned, Plan.parse(plan).dp, made, plan, STEPS)[0], plain(made, STEPS), 1e-11)


def test_rows_travel_under_autocast(ranks):
    found = ranks(planned, 2, task(_added, precision="bf16"), "dp=2,*.experts=ep", STEPS)[0]
    assert_same(found, reference("added", "bf16"), 2e-2)


def test_calls_of_a_list_go_out_together_and_gradients_of_experts_do_not_travel(ranks):
    def watched() -> tuple[list[str], int]:
        from sheaf.parallel import build

        step = build(task(_added, batch=4), Plan.parse("dp=2,*.experts=ep"))
        team, told = step._spread.experts, []
        assert team is not None
        for name in ("swap", "collect"):
            own = getattr(team, name)

            def noted(*given: Any, _own: Any = own) -> Any:
                told.append(given[-1])
                return _own(*given)

            setattr(team, name, noted)
        step()
        held = sum(one.numel() for one in step.model.parameters())
        step.close()
        return told, held

    whole = sum(one.numel() for one in Model(_added).parameters())
    expert = sum(one.numel() for one in Expert().parameters())
    for rank, (told, held) in enumerate(ranks(watched, 2)):
        asked = ["who asks for experts", "which rows go to which expert", "rows for experts", "rows from experts"]
        forward = [*asked, *asked, "who asks for experts", "which experts count"]  # two layers, and the end
        assert told == [*forward, "rows from experts", "rows for experts", "rows from experts", "rows for experts"]
        assert whole - held == 2 * expert * (2, 3)[rank]


def test_a_plan_with_experts_in_lists_is_priced_and_told():
    from sheaf.api.splits import described, rehearsed, told
    from sheaf.graph import trace

    made = task(_added, microbatch=8, batch=8)
    facts = trace(made, 8)
    split = rehearsed(made, facts, 2, 2)
    assert set(split.dealt.values()) == {0, 1}
    assert len(split.dealt) == 2 * EXPERTS
    assert told(described(split, facts))[0].startswith(
        "10 experts in lists dealt out over 2 replicas; tokens travel 4 "
    )
    rows = 8 * 3 * CHOSEN * WIDTH * 8  # of one layer, in bytes of float64
    moved = [move.size_bytes for move in split.moves if move.operation == "all_to_all"]
    assert sum(moved) == 2 * 2 * 2 * rows  # two layers, out and back, forward and backward
    assert all(1.0 < split.work[block] < 2.0 for block in ("blocks.0", "blocks.1"))


# What is refused ----------------------------------------------------------------------------------------------------


class Named(Expert):
    def forward(self, rows: Tensor, factor: float = 1.0) -> Tensor:
        return super().forward(rows) * factor


def _named(experts: nn.ModuleList, tokens: Tensor, shares: Tensor, choices: Tensor) -> Tensor:
    return sum(expert(tokens, factor=0.5) for expert in experts)


def _chained(experts: nn.ModuleList, tokens: Tensor, shares: Tensor, choices: Tensor) -> Tensor:
    for expert in experts:
        tokens = tokens + expert(tokens).tanh()
    return tokens


def _uncalled(experts: nn.ModuleList, tokens: Tensor, shares: Tensor, choices: Tensor) -> Tensor:
    return tokens * shares.sum()


def _decayed(experts: nn.ModuleList, tokens: Tensor, shares: Tensor, choices: Tensor) -> Tensor:
    return _added(experts, tokens, shares, choices) + experts[0].gate.weight.square().mean()


def _checkpointed(experts: nn.ModuleList, tokens: Tensor, shares: Tensor, choices: Tensor) -> Tensor:
    from torch.utils.checkpoint import checkpoint

    return sum(checkpoint(lambda given: expert(given).tanh(), tokens, use_reentrant=False) for expert in experts)  # noqa: B023


class Pooled(Expert):
    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows).mean(0)


class Normed(Expert):
    def __init__(self) -> None:
        super().__init__()
        self.norm = nn.BatchNorm1d(WIDTH)

    def forward(self, rows: Tensor) -> Tensor:
        return self.norm(super().forward(rows))


class Rolling(Expert):
    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows) * random.random()


def _plainly(experts: nn.ModuleList, tokens: Tensor, shares: Tensor, choices: Tensor) -> Tensor:
    return sum(expert(tokens) * shares[:, :1] for expert in experts)


@pytest.mark.thinned(2)
@pytest.mark.parametrize(
    ("made", "message"),
    [
        (task(_named, Named), "blocks.0.experts.0 is called with other things than one tensor of rows"),
        (task(_chained), "blocks.0.experts.1 is given what blocks.0.experts.0 computed, so they are layers of a stack"),
        (task(_uncalled), "no module of blocks.0.experts was called"),
        (task(_decayed), "a parameter of its modules is used outside of them"),
        (task(_checkpointed), "experts.4 runs again in backward"),
        (task(_plainly, Pooled), "does not return one tensor with a row for each row"),
        (task(_plainly, Normed), r"blocks.0.experts.0 changes a buffer \(a batch norm does that\)"),
        (task(_plainly, Rolling), "draws numbers from Python's or numpy's generator"),
    ],
)
def test_lists_that_are_none_of_experts_are_refused_with_their_reason(made, message):
    from sheaf.parallel.build import refuse

    with pytest.raises(PlanError, match=f"holds no experts .*{message}.*use dp=2 with zero=3, or tp=2"):
        refuse(made, Plan.parse("dp=2,blocks.*.experts=ep"))


class Both(Model):
    """A stack of experts beside the lists."""

    def __init__(self) -> None:
        super().__init__(_plainly)
        self.stack = nn.Parameter(torch.randn(EXPERTS, WIDTH, WIDTH))

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs).flatten(0, 1)
        inputs = super().forward(inputs)
        return inputs + torch.bmm(hidden.expand(EXPERTS, *hidden.shape), self.stack).mean()


@pytest.mark.parametrize(
    ("made", "plan", "message"),
    [
        (
            task(_plainly),
            "dp=2,recompute=full,*.experts=ep",
            "whose rows would travel again in backward: use recompute=none",
        ),
        (replace(task(_plainly), model=Both), "dp=2,stack=ep,*.experts=ep", "name the ones or the others"),
        (task(_plainly), "dp=2,last=ep", r"last=ep holds no experts to send tokens to; use blocks\.\*\.experts=ep"),
    ],
)
def test_plans_that_do_not_go_with_experts_in_lists(made, plan, message):
    from sheaf.parallel.build import refuse

    with pytest.raises(PlanError, match=message):
        refuse(made, Plan.parse(plan))


class Deciding(Expert):
    """By the values of its rows."""

    def forward(self, rows: Tensor) -> Tensor:
        return super().forward(rows) if rows.mean() < 1e9 else rows


class Shrinking(Expert):
    """Another width, in time."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, rows: Tensor) -> Tensor:
        self.seen.append(0)
        return super().forward(rows)[:, : WIDTH - (len(self.seen) > 12)]


def _hidden(experts: nn.ModuleList, tokens: Tensor, shares: Tensor, choices: Tensor) -> Tensor:
    made = experts[0](tokens)
    with torch._C.DisableTorchFunction():
        return made * 2


def in_time(other: Routed) -> Routed:
    """A loop that is watched and sent, and another one after some calls, which no attribute of a module tells."""
    seen: dict[int, int] = {}

    def either(experts: nn.ModuleList, tokens: Tensor, shares: Tensor, choices: Tensor) -> Tensor:
        seen[id(experts)] = seen.get(id(experts), 0) + 1
        return (other if seen[id(experts)] > 8 else _plainly)(experts, tokens, shares, choices)

    return either


@pytest.mark.thinned(3)
@pytest.mark.parametrize(
    ("made", "message"),
    [
        (task(in_time(_decayed)), "uses a parameter of blocks.0.experts.0 outside of its forward, and one replica"),
        (task(in_time(_checkpointed)), "experts.4 runs again in backward, and another replica may hold it: switch the"),
        (task(in_time(_named), Named), "blocks.0.experts.0 is called with other things than one tensor of rows, which"),
        (task(in_time(_hidden)), r"reached rows that are at their experts unseen \(a compiled extension does that\)"),
        (task(_plainly, Deciding), "what blocks.0.experts.0 returns depends on values"),
        (
            task(_plainly, Shrinking),
            r"returned \(\d, 5\) of torch.float64 for rows \(\d, 6\), and \(\d, 6\) of",
        ),
    ],
)
def test_what_shows_only_while_training_stops_it_with_its_reason(ranks, made, message):
    with pytest.raises(RankRaised, match=message) as raised:
        ranks(planned, 2, made, "dp=2,*.experts=ep", 5)
    assert isinstance(raised.value.exception, PlanError)
