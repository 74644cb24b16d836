"""Experts that a grouped product multiplies with tokens sorted by expert: those of transformers, and a module's own.

5 experts that no number of replicas divides, microbatches of unlike sizes, rounds in which some replica has none.
"""

import functools
from typing import Any

import pytest
import torch
from plain import assert_same, brief, plain, planned, transformers_gpt2
from torch import Tensor, nn
from torch.nn import functional as F

from sheaf import Task
from sheaf.errors import PlanError
from sheaf.plans import Plan
from sheaf.split.experts import experts

STEPS, WIDTH, WIDE, EXPERTS = 2, 8, 12, 5
SIZES = {"vocab_size": 61, "hidden_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4, "use_cache": False}


def mixtral(**changes: Any) -> nn.Module:
    from transformers import MixtralConfig, MixtralForCausalLM

    sizes = {"intermediate_size": 20, "num_key_value_heads": 2, "num_local_experts": EXPERTS}
    return MixtralForCausalLM(MixtralConfig(**SIZES, **sizes, max_position_embeddings=16, **changes))


def qwen() -> nn.Module:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    sizes = {"intermediate_size": 20, "moe_intermediate_size": 12, "num_key_value_heads": 2, "num_experts": EXPERTS}
    more = {"num_experts_per_tok": 2, "head_dim": 8, "norm_topk_prob": True, "max_position_embeddings": 16}
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**SIZES, **sizes, **more))


class Grouped(nn.Module):
    """Each token goes to its first choice; those of the last choice are no expert's, and stay what they were."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.count = count
        self.gate = nn.Linear(WIDTH, count + 1)
        self.up = nn.Parameter(torch.randn(count, WIDTH, WIDE) / 3)
        self.down = nn.Parameter(torch.randn(count, WIDTH, WIDE) / 3)
        self.never = nn.Parameter(torch.randn(count, WIDTH, WIDE))
        self.dropout = nn.Dropout(0.3)

    def forward(self, tokens: Tensor) -> Tensor:
        rows = tokens.flatten(0, 1)
        share, choice = self.gate(rows).softmax(-1).max(-1)
        choice, order = choice.sort()
        ends = torch.bincount(choice, minlength=self.count + 1)[: self.count].cumsum(0).int()
        nobody = (choice == self.count)[:, None]
        chosen = rows[order].masked_fill(nobody, 0.0)
        _ = F.grouped_mm(chosen, self.never, offs=ends)
        wide = F.grouped_mm(chosen, self.up, offs=ends).masked_fill(nobody, 0.0)
        wide += share[order, None].expand_as(wide)
        wide = self.dropout(wide.tanh()).masked_fill(nobody, 0.0)  # of what is nobody's gradients are not set, too
        made = F.grouped_mm(wide, self.down.mT, offs=ends).masked_fill(nobody, 0.0)
        return (made * share[order, None])[order.argsort()].view_as(tokens)


class Model(nn.Module):
    def __init__(self, count: int) -> None:
        super().__init__()
        self.first, self.experts, self.last = nn.Linear(4, WIDTH), Grouped(count), nn.Linear(WIDTH, 3)

    def forward(self, inputs: Tensor) -> Tensor:
        hidden = self.first(inputs)
        return self.last(hidden + self.experts(hidden))


def grouped(count: int) -> Task:
    generator = torch.Generator().manual_seed(7)
    inputs, targets = torch.randn(14, 3, 4, generator=generator), torch.randn(14, 3, 3, generator=generator)
    return Task(
        model=functools.partial(Model, count),
        loss=lambda output, batch: F.mse_loss(output, batch[1]),
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-2, weight_decay=0.1),
        data=list(zip(inputs, targets, strict=True)),
        batch=9,
        microbatch=2,
        clip=0.5,
    )


def hugging(model: Any) -> Task:
    return brief(transformers_gpt2(model=model))


TASKS = {
    "mixtral": lambda: hugging(mixtral),
    "qwen": lambda: hugging(qwen),
    "grouped": lambda: grouped(EXPERTS),
    "three": lambda: grouped(3),
}
TOLERANCE = 2e-4  # grouped_mm takes no float64


@functools.cache
def reference(name: str) -> Any:
    return plain(TASKS[name](), STEPS)


@pytest.mark.parametrize(
    ("name", "plan"),
    [
        pytest.param("mixtral", "dp=2,*.experts=ep", marks=pytest.mark.nightly),
        pytest.param("mixtral", "dp=3,*.experts=ep", marks=pytest.mark.nightly),
        ("mixtral", "tp=2"),
        ("mixtral", "dp=2,recompute=full,*.experts=ep"),
        ("qwen", "dp=3,shares=2:0:1,*.experts=ep"),
        pytest.param("grouped", "dp=2,experts=ep", marks=pytest.mark.nightly),
        ("three", "dp=4,experts=ep"),  # one has no expert
    ],
)
def test_rows_sorted_by_expert_go_to_their_experts(ranks, name, plan):
    found = ranks(planned, Plan.parse(plan).workers, TASKS[name](), plan, STEPS)[0]
    assert_same(found, reference(name), TOLERANCE)


def test_what_travels_is_known_without_memory():
    found = experts(hugging(mixtral), 2, samples=2)
    assert sorted(found.slices) == sorted(
        f"model.layers.{layer}.mlp.experts.{name}" for layer in range(2) for name in ("gate_up_proj", "down_proj")
    )
    rows = 2 * 12 * 2  # of two sequences of twelve tokens, each for two experts
    out = [move.size_bytes for move in found.moves if move.why.startswith("tokens for") and not move.backward]
    assert max(out) == rows * 24 * 4
    layers = {name: share for name, share in found.work.items() if "layers" in name}
    assert all(1 < share < 1.3 for share in layers.values()), "the first replica has three of five experts"
    assert {share for name, share in found.work.items() if name not in layers} == {1.0}


@pytest.mark.parametrize("way", ["eager", "batched_mm"])
def test_matrices_that_are_picked_one_by_one_are_refused(way):
    from sheaf.parallel.build import refuse

    task = hugging(lambda: mixtral(experts_implementation=way))
    with pytest.raises(PlanError, match=r"meets __getitem__.*='grouped_mm'\).*use dp=2 with zero=3"):
        refuse(task, Plan.parse("dp=2,*.experts=ep"))
