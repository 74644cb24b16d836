"""What is decided: which layers pair up, what is gathered and why, and what is kept whole."""

import re
from collections import Counter
from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from small import SMALL
from torch import Tensor, nn
from torch.nn import functional as F

from sheaf.errors import PlanError
from sheaf.plans.split import Cut, Slice, SplitFacts
from sheaf.split.alone import Alone
from sheaf.split.rehearsal import Rehearsing, rehearse
from sheaf.split.tensor import Split
from sheaf.task import Task


def task_of(model: Callable[[], nn.Module], *shape: int, words: int = 0, **changes: Any) -> Task:
    """Squared outputs of a model of random series or vectors."""
    generator = torch.Generator().manual_seed(1)
    data = torch.randint(words, (6, *shape), generator=generator) if words else torch.randn(6, *shape)
    given = {"batch": 4, "microbatch": 2} | changes
    return Task(
        model=model,
        loss=lambda output, batch: output.square().mean(),
        optimizer=torch.optim.AdamW,
        data=data,
        inputs=lambda batch: (batch,),
        **given,
    )


def found(model: Callable[[], nn.Module], *shape: int, workers: int = 2, **changes: Any) -> SplitFacts:
    return rehearse(task_of(model, *shape, **changes), workers, samples=2)


def moved(facts: SplitFacts, *, backward: bool = False) -> Counter[str]:
    return Counter(f"{move.operation} {move.why}" for move in facts.moves if move.backward is backward)


class Attention(nn.Module):
    """Attention with one matrix for queries, keys and values, or three; ``groups`` heads of keys and values."""

    def __init__(self, width: int, heads: int, *, fused: bool, groups: int | None = None) -> None:
        super().__init__()
        self.heads, self.groups, self.size = heads, groups or heads, width // heads
        self.sizes = [width, self.groups * self.size, self.groups * self.size]
        if fused:
            self.qkv = nn.Linear(width, sum(self.sizes))
        else:
            self.query, self.key, self.value = (nn.Linear(width, size) for size in self.sizes)
        self.out = nn.Linear(width, width)

    def forward(self, given: Tensor) -> Tensor:
        parts = self.qkv(given).split(self.sizes, dim=-1) if hasattr(self, "qkv") else None
        parts = parts or (self.query(given), self.key(given), self.value(given))
        query, key, value = (part.unflatten(-1, (-1, self.size)).transpose(1, 2) for part in parts)
        mixed = F.scaled_dot_product_attention(query, key, value, enable_gqa=self.groups != self.heads)
        return self.out(mixed.transpose(1, 2).flatten(2))


class Layers(nn.Module):
    """Wide layers, added to what they are given."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(12), nn.Linear(12, 30), nn.GELU(), nn.Linear(30, 12)) for _ in range(count)
        )

    def forward(self, given: Tensor) -> Tensor:
        for layer in self.layers:
            given = given + layer(given)
        return given


def chain(*sizes: int, between: Callable[[], nn.Module] = nn.GELU) -> Callable[[], nn.Module]:
    def model() -> nn.Module:
        pairs = [(nn.Linear(size, following), between()) for size, following in pairwise(sizes)]
        return nn.Sequential(*[module for pair in pairs for module in pair][:-1])

    return model


@pytest.mark.parametrize(("workers", "sizes"), [(2, (10, 9)), (3, (7, 6, 6)), (4, (5, 5, 5, 4))])
def test_columns_then_rows_share_one_sum(workers, sizes):
    facts = found(chain(12, 19, 12), 12, workers=workers)
    cut = Cut(sizes)
    assert facts.slices == {"0.weight": Slice(0, cut), "0.bias": Slice(0, cut), "2.weight": Slice(1, cut)}
    assert moved(facts) == {"all_reduce partial sums of linear": 1}
    assert moved(facts, backward=True) == {}  # the batch needs no gradient
    assert facts.work["0"] == pytest.approx(sizes[0] / 19)
    assert facts.closed == {}


def test_layers_of_a_stack_are_decided_alike_and_move_two_sums_each():
    facts = found(lambda: Layers(3), 12)
    dims = {"1.weight": 0, "1.bias": 0, "3.weight": 1}
    assert {name: where.dim for name, where in facts.slices.items()} == {
        f"layers.{layer}.{name}": dim for layer in range(3) for name, dim in dims.items()
    }
    assert moved(facts) == {"all_reduce partial sums of linear": 3}
    assert sum(moved(facts, backward=True).values()) == 3
    assert [move.block for move in facts.moves if not move.backward] == ["layers.0", "layers.1", "layers.2"]


def test_queries_keys_and_values_of_one_matrix_are_cut_by_heads():
    facts = found(lambda: Attention(12, 3, fused=True), 5, 12)
    cut = Cut((8, 4), outer=3)  # two heads of 4 and one, in each of the three
    assert facts.slices["qkv.weight"] == Slice(0, cut)
    assert facts.slices["out.weight"] == Slice(1, Cut((8, 4)))
    assert moved(facts) == {"all_reduce partial sums of linear": 1}


def test_separate_matrices_are_cut_by_heads():
    facts = found(lambda: Attention(12, 3, fused=False), 5, 12)
    assert {facts.slices[f"{name}.weight"] for name in ("query", "key", "value")} == {Slice(0, Cut((8, 4)))}
    assert facts.slices["out.weight"] == Slice(1, Cut((8, 4)))
    assert moved(facts) == {"all_reduce partial sums of linear": 1}


def test_heads_that_share_keys_and_values_go_with_them():
    facts = found(lambda: Attention(24, 6, fused=False, groups=2), 5, 24)
    assert facts.slices["query.weight"] == Slice(0, Cut((12, 12)))
    assert facts.slices["key.weight"] == facts.slices["value.weight"] == Slice(0, Cut((4, 4)))
    assert moved(facts) == {"all_reduce partial sums of linear": 1}


def test_more_workers_than_heads_leave_one_without():
    facts = found(lambda: Attention(12, 3, fused=False), 5, 12, workers=4)
    assert facts.slices["query.weight"].cut.sizes == (4, 4, 4, 0)


class Sorted(nn.Module):
    """Something that needs all features between two layers."""

    def forward(self, given: Tensor) -> Tensor:
        return given.sort(dim=-1).values


@pytest.mark.parametrize(
    ("name", "sums"),
    [
        # every second layer of the chain of convolutions and the head; a projection beside split channels sums too
        ("resnet50", {"blocks.0": 2 + 1, "blocks.1": 1, "blocks.2": 2 + 1, "blocks.3": 1, "head": 1}),
        ("resnet", {f"blocks.{block}": 1 for block in range(6)} | {"head": 1}),
    ],
)
def test_two_convolutions_share_one_sum_with_batch_norms_between(name, sums):
    facts = rehearse(SMALL[name](), 2, samples=2)
    forward = [move for move in facts.moves if not move.backward]
    assert Counter(move.block for move in forward if move.operation == "all_reduce") == sums
    others = Counter(move.why for move in forward if move.operation != "all_reduce")
    statistics = others.pop("running statistics of batch_norm")
    assert statistics == 1  # one message for all norms on split channels
    assert others == ({"whole for pad": 2} if name == "resnet" else {})  # channels are added where the image halves


def test_what_is_gathered_is_told_with_its_reason():
    facts = found(chain(12, 19, 12, between=Sorted), 12)
    assert moved(facts)["all_gather whole for sort"] == 1
    (gather,) = [move for move in facts.moves if move.why == "whole for sort"]
    assert gather.size_bytes == 2 * 19 * 4


def test_names_that_are_to_be_whole_stay_so():
    task = task_of(chain(12, 19, 12, 19, 12), 12)
    facts = rehearse(task, 2, samples=2, whole=lambda name: re.match(r"[02]\.", name) is not None)
    assert set(facts.slices) == {"4.weight", "4.bias", "6.weight"}
    assert rehearse(task, 2, samples=2, whole=lambda name: True).moves == ()


class Unsplittable(nn.Module):
    """Changes a slice in a way that has no split counterpart."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(12, 19), nn.Linear(19, 12)

    def forward(self, given: Tensor) -> Tensor:
        hidden = self.inner(given) * 1.0
        hidden.index_add_(1, torch.tensor([1]), torch.ones(len(given), 1, dtype=given.dtype))
        return self.outer(hidden)


class Around(nn.Module):
    """Layers around an inner module."""

    def __init__(self, inner: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.first, self.inner, self.last = Layers(1), inner(), Layers(1)

    def forward(self, given: Tensor) -> Tensor:
        return self.last(self.inner(self.first(given)))


def test_a_module_that_cannot_be_split_is_closed_and_the_others_are_not():
    facts = found(lambda: Around(Unsplittable), 12)
    assert list(facts.closed) == ["inner"]
    assert "index_add_" in facts.closed["inner"]
    assert {name.split(".")[0] for name in facts.slices} == {"first", "last"}


def test_a_model_that_is_broken_by_itself_is_told_as_it_is():
    with pytest.raises(PlanError, match="cannot be rehearsed: RuntimeError"):
        found(chain(11, 19, 12), 12)


class Deciding(nn.Module):
    """Needs a value to know its way."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.other = nn.Linear(12, 19), nn.Linear(19, 12)

    def forward(self, given: Tensor) -> Tensor:
        hidden = self.inner(given)
        return self.other(hidden.relu() if bool(given.sum() > 1e9) else hidden)


def test_a_path_that_depends_on_values_is_rehearsed_with_real_ones():
    assert set(found(Deciding, 12).slices) == {"inner.weight", "inner.bias", "other.weight"}


class Words(nn.Module):
    """A table, a layer, and the table again."""

    def __init__(self, words: int) -> None:
        super().__init__()
        self.table, self.layers = nn.Embedding(words, 12), Layers(4)

    def forward(self, given: Tensor) -> Tensor:
        return F.linear(self.layers(self.table(given)), self.table.weight)


def test_a_large_vocabulary_is_cut_and_a_small_one_is_not():
    assert found(lambda: Words(57), 5, words=7, workers=4).slices["table.weight"] == Slice(0, Cut((15, 14, 14, 14)))
    assert "table.weight" not in found(lambda: Words(2), 5, words=2).slices


def test_a_rehearsal_gives_the_same_again_and_leaves_no_trace():
    task = task_of(lambda: nn.Sequential(Attention(12, 3, fused=True), nn.Dropout(0.3), Layers(2)), 5, 12)
    torch.manual_seed(3)
    before = torch.get_rng_state()
    first = rehearse(task, 3, samples=2)
    assert torch.equal(torch.get_rng_state(), before)
    torch.manual_seed(4)
    assert rehearse(task, 3, samples=2) == first


def test_sequence_leaves_sums_split_along_the_length():
    task = task_of(lambda: Layers(2), 6, 12)
    facts = rehearse(task, 2, samples=2, sequence=True)
    assert moved(facts)["reduce_scatter partial sums of linear"] == 2
    assert "all_reduce partial sums of linear" not in moved(facts)


@pytest.mark.parametrize("precision", ["bf16", "fp16", "fp64"])
def test_precisions_change_bytes_and_not_decisions(precision):
    right, facts = found(lambda: Layers(1), 12), found(lambda: Layers(1), 12, precision=precision)
    assert facts.slices == right.slices
    assert [move.why for move in facts.moves] == [move.why for move in right.moves]


def test_bert_of_its_own_size_moves_four_sums_a_layer():
    from transformers import BertConfig, BertForMaskedLM

    def model() -> nn.Module:
        return BertForMaskedLM(BertConfig(num_hidden_layers=3))

    data = torch.randint(1, 30000, (4, 128), generator=torch.Generator().manual_seed(1))
    task = Task(
        model=model,
        loss=lambda output, batch: F.cross_entropy(output.logits.flatten(0, 1), batch.flatten()),
        optimizer=torch.optim.AdamW,
        data=data,
        inputs=lambda batch: {"input_ids": batch, "attention_mask": torch.ones_like(batch)},
        batch=2,
        microbatch=2,
    )
    facts = rehearse(task, 2, samples=2)
    assert facts.closed == {}
    layer = [move for move in facts.moves if move.block == "bert.encoder.layer.1"]
    assert Counter((move.operation, move.backward) for move in layer) == {
        ("all_reduce", False): 2,
        ("all_reduce", True): 2,
    }
    assert facts.slices["bert.embeddings.word_embeddings.weight"].cut.sizes == (15261, 15261)
    assert facts.slices["bert.encoder.layer.2.attention.self.query.weight"] == Slice(0, Cut((384, 384)))


def test_what_enters_is_foreseen_where_it_lies_in_the_place_of_what_is_gone():
    mode = Rehearsing(Alone(2), {}, {}, lambda _name: False, (), sequence=False)
    given = torch.ones(3, requires_grad=True)
    for _ in range(50):  # Python gives a new tensor the number of one that is gone; what is decided must not hang on it
        mode.enter(Split(given * 2, 0, Cut.even(6, 2)), "product")
    assert len(mode.found.foreseen) == 50
