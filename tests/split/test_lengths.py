"""Attention of queries cut along their length: what it computes, how much of it each worker, and what is kept."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from cases import Given, Room, ThreadTeam, check, check_threads, cut
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from sheaf.plans.split import Cut
from sheaf.split import loan
from sheaf.split.mode import Splitting
from sheaf.split.moves import sliced
from sheaf.split.sight import Sight, halves, traded, worth_trading
from sheaf.split.tensor import Split

HIDDEN = {"-inf": -torch.inf, "the lowest": torch.finfo(torch.float64).min}


def causal_mask(length: int, hidden: str = "") -> Tensor:
    seen = torch.ones(length, length, dtype=torch.bool).tril()
    return torch.zeros(length, length, dtype=torch.float64).masked_fill(~seen, HIDDEN[hidden]) if hidden else seen


def along(length: int, workers: int) -> Given:
    return cut((2, 3, length, 4), 2, Cut.even(length, workers).sizes)


def attended(**named: Any) -> Callable[..., Tensor]:
    return lambda *tensors: F.scaled_dot_product_attention(*tensors, **named)


@pytest.mark.parametrize("workers", [2, 3, 4])
@pytest.mark.parametrize("length", [13, 4])
def test_causal_attention_is_what_it_is_on_one_worker(workers: int, length: int) -> None:
    given = along(length, workers)
    found = check_threads(attended(is_causal=True), given, given, given, workers=workers)
    assert found.cuts == (given.slice,)
    assert (("trade", "queries for attention") in found.moves) == (length > 4 or workers < 3), "where it pays"


@pytest.mark.parametrize("mask", [causal_mask(13), causal_mask(13, "-inf"), causal_mask(13, "the lowest")])
def test_a_mask_may_say_that_it_is_causal(mask: Tensor) -> None:
    given = along(13, 3)
    found = check_threads(attended(attn_mask=mask), given, given, given, workers=3)
    assert ("trade", "queries for attention") in found.moves


def test_rows_that_see_nothing_and_windows() -> None:
    mask = causal_mask(12) & ~causal_mask(12).tril(-4)  # each query sees four keys
    given = along(12, 3)
    found = check_threads(attended(attn_mask=mask), given, given, given, workers=3)
    assert ("trade", "queries for attention") not in found.moves, "all have alike to do"
    shut = causal_mask(12)
    shut[2:7] = False
    check_threads(attended(attn_mask=shut), given, given, given, workers=3)
    check_threads(attended(attn_mask=causal_mask(12, "the lowest")[None, None]), given, given, given, workers=3)


@pytest.mark.parametrize("named", [{"is_causal": True}, {"attn_mask": causal_mask(9)}, {}])
def test_what_is_dropped_is_what_one_worker_drops(ranks: Any, named: dict[str, Any]) -> None:
    def run(*tensors: Tensor) -> Tensor:
        torch.manual_seed(5)
        return F.scaled_dot_product_attention(*tensors, dropout_p=0.4, **named)

    given = along(9, 2)
    check(ranks, run, given, given, given)


class Scores(TorchDispatchMode):
    """Counts the scores that attention computes, forward and backward."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if name.startswith("_scaled_dot_product_flash_attention_for_cpu"):
            query, key = args[1:3] if name.endswith("backward") else args[:2]
            self.count += query.shape[-2] * key.shape[-2] * (5 if name.endswith("backward") else 2)
        return func(*args, **(kwargs or {}))


def scores(workers: int, length: int, **named: Any) -> list[int]:
    """By worker, of one causal attention and its backward."""
    room, counts = Room(workers), [0] * workers
    whole = torch.randn(3, 1, 2, length, 4, dtype=torch.float64)
    place = Cut.even(length, workers)

    def run(rank: int) -> None:
        local = [sliced(one, 2, place, rank).clone().requires_grad_() for one in whole]
        with Scores() as counted:
            with Splitting(ThreadTeam(room, rank), {}):
                out = F.scaled_dot_product_attention(*(Split(one, 2, place) for one in local), **named)
            assert isinstance(out, Split)
            out.local.sum().backward()
        counts[rank] = counted.count

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(workers)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return counts


@pytest.mark.parametrize("workers", [2, 3, 4])
def test_all_workers_have_alike_to_do_under_a_causal_mask(workers: int) -> None:
    for named in ({"is_causal": True}, {"attn_mask": causal_mask(121)}):
        counts = scores(workers, 121, **named)
        assert max(counts) <= 1.1 * np.mean(counts)
        halved = 0.5 + 0.25 / workers  # the triangle, and half of the blocks on its edge
        assert sum(counts) <= 1.03 * halved * 7 * 121 * 121, "scores of keys that no query may see"


def test_the_trade_pairs_early_with_late() -> None:
    sight, even = Sight.causal(24, 24), Cut.even(24, 3)
    before = [sum(map(sight.work, halves(even, worker))) for worker in range(3)]
    after = [sum(map(sight.work, traded(even, worker))) for worker in range(3)]
    assert before == [48, 112, 176]
    assert after == [112, 112, 112]
    assert worth_trading(sight, even)
    assert not worth_trading(Sight(0 * sight.first, 0 * sight.stop + 24), even), "all see all"
    rows = sorted(range_ for worker in range(3) for range_ in traded(Cut.even(13, 3), worker))
    assert [row for start, stop in rows for row in range(start, stop)] == list(range(13))


def test_keys_and_values_are_whole_only_while_they_are_used(monkeypatch: pytest.MonkeyPatch) -> None:
    gathered: list[StorageWeakRef] = []
    plain = loan.Loan.open

    def opened(self: Any, locals_: Any) -> Any:
        found = plain(self, locals_)
        gathered.extend(StorageWeakRef(one.untyped_storage()) for one in self._held)
        return found

    monkeypatch.setattr(loan.Loan, "open", opened)
    room, place = Room(1), Cut((6,))
    local = torch.randn(2, 6, 4, dtype=torch.float64, requires_grad=True)
    with Splitting(ThreadTeam(room, 0), {}):
        split = Split(local, 1, place)
        out = F.scaled_dot_product_attention(split, split * 2, split * 3, is_causal=True)
    assert isinstance(out, Split)
    assert [one.expired() for one in gathered] == [True]
    out.local.sum().backward()
    assert [one.expired() for one in gathered] == [True, True]


def test_half_precision_stays_half() -> None:
    weight, bias = torch.randn(3, 4, requires_grad=True), torch.randn(3, requires_grad=True)
    with torch.autocast("cpu", torch.bfloat16), Splitting(ThreadTeam(Room(1), 0), {}):
        split = Split(torch.randn(2, 6, 4), 1, Cut((6,)))
        assert F.linear(split, weight, bias).dtype == torch.bfloat16
