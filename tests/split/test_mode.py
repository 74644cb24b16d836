"""The mode itself: what is gathered, how often, and what it refuses."""

from typing import Any, NamedTuple

import pytest
import torch
from cases import Room, ThreadTeam, check, check_threads, cut, held, whole
from tiny import Doubled
from torch import Tensor, nn
from torch.nn import functional as F

import sheaf.split.rules  # noqa: F401 - gives the rules to the registry
from sheaf.errors import PlanError
from sheaf.plans.split import Cut, Slice
from sheaf.split.mode import Splitting
from sheaf.split.tensor import Split


class Pair(NamedTuple):
    first: Any
    second: Any


def lonely(parameters: dict[int, tuple[str, Slice]] | None = None) -> Splitting:
    return Splitting(ThreadTeam(Room(1), 0), parameters or {})


def split(*shape: int) -> Split:
    return Split(torch.ones(shape, dtype=torch.float64).requires_grad_(), 1, Cut((shape[1],)))


def test_a_function_without_a_rule_gets_its_arguments_whole(ranks):
    found = check(ranks, lambda one: torch.logcumsumexp(one, dim=1), cut((2, 5), 1, (3, 2)))
    assert found.moves[0] == ("all_gather", "whole for logcumsumexp")
    assert found.cuts == (None,)


def test_a_slice_is_gathered_once_however_often_it_is_asked_for():
    found = check_threads(
        lambda one: [torch.logcumsumexp(one, dim=1), torch.logcumsumexp(one * 1, dim=1), one.sort(dim=1).values],
        cut((2, 5), 1, (3, 2)),
    )
    assert [operation for operation, _ in found.moves].count("all_gather") == 2  # one, and one * 1


def test_what_was_gathered_is_stale_after_a_change_in_place():
    def changed(one: Tensor) -> list[Tensor]:
        one = one * 1
        first = torch.rot90(one)  # keeps nothing for backward
        one.add_(1.0)
        return [first, torch.rot90(one)]

    check_threads(changed, cut((2, 5), 1, (3, 2)))


def test_what_was_gathered_without_gradients_is_gathered_again_with_them():
    def twice(one: Tensor) -> Tensor:
        with torch.no_grad():
            largest = torch.cummax(one, dim=1).values.detach()
        return torch.logcumsumexp(one, dim=1) + largest

    check_threads(twice, cut((2, 5), 1, (3, 2)))


def test_a_whole_tensor_used_in_split_work_gets_the_sum_of_gradients():
    found = check_threads(lambda one, other: one * other, cut((2, 6), 1, (4, 2)), whole(2, 1))
    assert ("all_reduce", "gradient of mul's input") in found.moves


def test_an_empty_slice_takes_part():
    check_threads(
        lambda one, weight: F.linear(one, weight).tanh().sum(1),
        whole(3, 4),
        held((2, 4), 0, (1, 1, 0)),
        workers=3,
    )


def test_a_change_in_place_that_has_no_split_counterpart_is_refused():
    with lonely(), pytest.raises(PlanError, match=r"index_add_ changes a tensor that is split.*NAME=whole"):
        split(2, 3).index_add_(1, torch.tensor([0]), torch.ones(2, 1, dtype=torch.float64))


def test_results_cannot_be_written_into_a_slice():
    with lonely(), pytest.raises(PlanError, match="changes a tensor that is split"):
        torch.add(split(2, 3), 1, out=split(2, 3))


def test_nothing_is_computed_with_a_slice_outside_of_the_mode():
    with pytest.raises(PlanError, match="reached a tensor that is split among workers unseen"):
        split(2, 3) + 1


def test_a_custom_function_gets_whole_tensors_and_keeps_their_gradients():
    found = check_threads(lambda one, other: Doubled.apply(one) * other, cut((2, 5), 1, (3, 2)), whole(2, 5))
    assert found.moves[0] == ("all_gather", "whole for Doubled")
    with pytest.raises(PlanError, match=r"custom autograd\.Function.*NAME=whole"):
        Doubled.apply(split(2, 3))  # outside of the mode


def test_containers_come_back_of_their_own_kind_and_whole():
    mode, inner = lonely(), split(2, 3)
    found = mode.whole({"a": [inner, 1], "b": Pair(inner, "x"), "c": (inner,)}, "a test")
    assert type(found["b"]) is Pair
    assert type(found["a"]) is list
    assert type(found["c"]) is tuple
    assert not any(type(leaf) is Split for leaf in (found["a"][0], found["b"].first, found["c"][0]))


def test_a_parameter_is_one_slice_within_a_forward_and_forgotten_after_it():
    weight = nn.Parameter(torch.ones(2, 3))
    mode = lonely({id(weight): ("weight", Slice(0, Cut((2,))))})
    with mode:
        first = mode._parameter(weight)
        with mode:  # a rule that runs other rules
            assert mode._parameter(weight) is first
        assert mode._parameter(weight) is first
    assert not mode._held
    assert not mode._entered


def test_tensors_that_are_not_split_are_left_alone():
    mode = lonely()
    mode.fallback = None  # would fail if it were asked
    with mode:
        assert torch.equal(torch.ones(2) + 1, torch.full((2,), 2.0))


def test_a_slice_says_what_the_whole_is():
    with Splitting(ThreadTeam(Room(2), 0), {}):
        one = Split(torch.ones(2, 2, requires_grad=True), 1, Cut((2, 1)))
        assert (tuple(one.shape), one.size(1), one.numel(), len(one)) == ((2, 3), 3, 6, 2)
        assert (one.dim(), one.dtype, one.requires_grad) == (2, torch.float32, True)
        assert one.new_zeros(4).shape == (4,)
    assert repr(one) == "Split(axis=1, Cut(sizes=(2, 1), outer=1), local=(2, 2))"


def test_a_model_kept_whole_gets_whole_tensors(ranks):
    from sheaf.split.closing import close
    from sheaf.split.team import GroupTeam

    def run() -> tuple[list[float], bool]:
        import torch.distributed as dist

        seen: list[object] = []

        class Inner(nn.Module):
            def forward(self, pair, *, other):
                seen.extend([*pair, other])
                return Doubled.apply(pair[0]) + other

        model = nn.ModuleDict({"inner": Inner()})
        mode = Splitting(GroupTeam(None), {})
        handles = close(model, ["inner", "absent"], mode)
        assert len(handles) == 1
        with mode:
            local = torch.full((1, 2 - dist.get_rank()), 1.0 + dist.get_rank())
            found = model["inner"]([Split(local, 1, Cut((2, 1)))], other=torch.ones(1, 3))
        return found.flatten().tolist(), any(type(one) is Split for one in seen)

    assert ranks(run, 2) == [([3.0, 3.0, 5.0], False)] * 2
