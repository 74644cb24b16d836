"""What a rehearsal takes for experts, what it leaves whole, and what it says that tokens on their way cost."""

from dataclasses import replace

import torch
from small import SMALL
from torch import Tensor, nn
from torch.nn import functional as F

from sheaf import Task
from sheaf.plans.split import Cut, Slice
from sheaf.split.common import Common
from sheaf.split.experts import experts
from sheaf.split.listed import listed
from sheaf.task.blueprint import Blueprint


class Mixed(nn.Module):
    """Two stacks that tokens may be sent to, one that is read in part, and a matrix that has as many rows."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(4, 3, bias=False)
        self.up = nn.Parameter(torch.randn(3, 4, 6))
        self.scale = nn.Parameter(torch.randn(3))
        self.down = nn.Parameter(torch.randn(3, 6, 4))
        self.read = nn.Parameter(torch.randn(3, 4, 4))

    def forward(self, tokens: Tensor) -> Tensor:
        shares = self.gate(tokens).softmax(-1)
        wide = torch.bmm(shares.T[:, :, None] * tokens, self.up).relu() * self.scale[:, None, None]
        fed = torch.einsum("ech,ehw->ecw", wide, self.down)
        return fed.sum(0) @ self.read[0]


def mixed(precision: str = "fp32") -> Task:
    return Task(
        model=Mixed,
        loss=lambda output, batch: F.mse_loss(output, batch[0]),
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        inputs=lambda batch: (batch[0],),
        data=[(one,) for one in torch.randn(8, 4)],
        batch=8,
        microbatch=5,
        precision=precision,
    )


def test_stacks_are_found_and_the_rest_is_left_whole():
    found = experts(mixed(), 2, samples=5)
    assert found.slices == {name: Slice(0, Cut((2, 1))) for name in ("up", "scale", "down")}
    assert list(found.closed) == ["read"]
    assert "read is taken for experts and meets __getitem__" in found.closed["read"]


def test_only_what_is_wanted_is_dealt_out():
    found = experts(mixed(), 3, samples=5, wanted=lambda name: name == "down")
    assert list(found.slices) == ["down"]


def test_tokens_go_out_and_come_back_once_each_way():
    for precision, size in (("fp32", 4), ("bf16", 2)):
        moves = [move for move in experts(mixed(precision), 2, samples=5).moves if move.operation == "all_to_all"]
        assert [move.backward for move in moves] == [False, False, True, True]
        out, back = 3 * 5 * 4 * size, 2 * 10 * 4 * size  # all experts' own rows; two experts' rows of two replicas
        assert [move.size_bytes for move in moves] == [out, back, out, back]


def test_the_busiest_worker_computes_for_all_replicas():
    found = experts(SMALL["moe"](), 2, samples=2)
    assert found.work["blocks.0"] == 1.0
    assert 1.0 < found.work["blocks.1"] < 6 / 5  # 3 of 5 experts, of two replicas; attention is its own


def test_rehearsals_that_share_a_model_find_what_each_finds_alone():
    task, built = mixed(), []
    apart = [(experts(task, workers, samples=5), listed(task, workers, samples=5)) for workers in (2, 3)]
    counting = replace(task, model=lambda: (built.append(1), task.model())[1])
    common = Common(Blueprint(counting))
    once = len(built)
    for workers, found in zip((2, 3), apart, strict=True):
        stacks = experts(counting, workers, samples=5, common=common)
        assert (stacks, listed(counting, workers, samples=5, common=common)) == found
    assert len(built) == once, "the model is built once"


def test_a_model_without_stacks_has_none():
    found = experts(SMALL["gpt"](), 2, samples=2)
    assert not found.slices
    assert not found.moves
