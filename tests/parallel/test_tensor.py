"""Layers split among workers compute what plain PyTorch computes: losses, gradients, weights, buffers.

In float64, so that a mistake shows; the first weights and every dropout mask are the same to the bit.
"""

import functools
from dataclasses import replace
from typing import Any

import pytest
import torch
from plain import (
    Look,
    Run,
    assert_same,
    mlp_float64,
    norm_resnet,
    plain,
    planned,
    ragged_gpt,
    transformers_bert,
    transformers_gpt2,
)
from small import SMALL
from torch import Tensor, nn
from torch.nn import functional as F

from sheaf import Task
from sheaf.plans import Plan
from sheaf.task.blueprint import Blueprint

STEPS = 2


def wide(task: Task) -> Task:
    """In float64; a gradient that is zero but for rounding (a key's bias) stays so under an eps that is not tiny."""
    optimizer = functools.partial(torch.optim.AdamW, lr=1e-3, eps=1e-4)
    return replace(task, precision="fp64", optimizer=optimizer)


def transformers_t5() -> Task:
    """T5 from its transformers config, as it is: relative positions shared by all layers, tied embeddings."""

    def model() -> nn.Module:
        from transformers import T5Config, T5ForConditionalGeneration

        config = T5Config(vocab_size=61, d_model=30, d_kv=10, d_ff=42, num_layers=2, num_heads=3, use_cache=False)
        return T5ForConditionalGeneration(config)

    def loss(output: Any, batch: Tensor) -> Tensor:
        return F.cross_entropy(output.logits.flatten(0, 1), batch.flatten())

    return transformers_gpt2(
        model=model, loss=loss, inputs=lambda batch: {"input_ids": batch, "decoder_input_ids": batch.roll(1, 1)}
    )


def transformers_llama() -> Task:
    """Llama from its transformers config, as it is: 4 heads that share 2 of keys and values, gated layers, RMSNorm."""

    def model() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        config = LlamaConfig(
            vocab_size=61,
            hidden_size=32,
            intermediate_size=45,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=16,
        )
        return LlamaForCausalLM(config)

    return transformers_gpt2(model=model)


TOLERANCES = {"t5": 1e-6, "llama": 1e-6}  # they compute their norms in float32, whatever the model is in

TASKS = {
    "mlp_float64": mlp_float64,
    "ragged_gpt": ragged_gpt,
    "norm_resnet": norm_resnet,
    "gpt2": transformers_gpt2,
    "hugging_bert": transformers_bert,
    "t5": transformers_t5,
    "llama": transformers_llama,
    **SMALL,
}


@functools.cache
def reference(name: str) -> Run:
    return plain(wide(TASKS[name]()), STEPS)


# Each task under a plan or two, and each plan with several kinds of layers.
CELLS = [
    ("mlp_float64", ["tp=4", "dp=2,tp=2,zero=2", "dp=2,tp=2,zero=3,shares=3:1"]),
    ("ragged_gpt", ["tp=2,sequence=1", "dp=2,tp=2,zero=3", "tp=2,h.*=whole"]),
    ("norm_resnet", ["tp=3", "dp=2,tp=2"]),
    ("gpt2", ["tp=3,sequence=1"]),
    ("hugging_bert", ["tp=2"]),
    ("t5", ["tp=2"]),
    ("llama", ["tp=3,recompute=full"]),
    ("gpt", ["tp=2,recompute=full"]),
    ("mlp", ["dp=2,tp=2,recompute=full"]),
    ("resnet", ["tp=2,recompute=full"]),
    ("alexnet", ["tp=4"]),
    ("vgg16", ["tp=2"]),
    ("resnet50", ["tp=2"]),
    ("bert", ["tp=3,sequence=1"]),
    ("lstm_seq2seq", ["tp=2"]),
    ("transformer_seq2seq", ["tp=2"]),
    ("unet3d", ["tp=3"]),
    ("moe", ["dp=2,tp=2,zero=1"]),
]


def workers(plan: str) -> int:
    return Plan.parse(plan).workers


@pytest.mark.thinned(7)
@pytest.mark.parametrize(("name", "plan"), [(name, plan) for name, plans in CELLS for plan in plans])
def test_split_layers_compute_the_serial_answer(ranks, name, plan):
    found = ranks(planned, workers(plan), wide(TASKS[name]()), plan, STEPS)[0]
    assert_same(found, reference(name), TOLERANCES.get(name, 1e-11))


@pytest.mark.thinned(2)
@pytest.mark.parametrize("plan", ["tp=2", "dp=2,tp=2,zero=1"])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_low_precision_departs_no_more_than_rounding(ranks, precision, plan):
    task = mlp_float64(precision=precision, clip=0.3)
    assert_same(ranks(planned, workers(plan), task, plan, 3)[0], plain(task, 3), 2e-4 if precision == "fp32" else 3e-2)


@pytest.mark.parametrize("plan", ["tp=2", "tp=3", "dp=2,tp=2,zero=3"])
def test_the_norm_of_gradients_is_that_of_the_whole(ranks, plan):
    task = mlp_float64(clip=0.01)
    assert_same(ranks(planned, workers(plan), task, plan, 3)[0], plain(task, 3), 1e-11)


class Mask(nn.Module):
    """Gradients are what dropout keeps: a power of two per element, added up exactly."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(12, 22), nn.Linear(22, 5)
        self.drop, self.final = nn.Dropout(0.5), nn.Dropout(0.75)

    def forward(self, given: Tensor) -> Tensor:
        return self.final(self.drop(self.up(given)).sum(1, keepdim=True) + self.down(F.dropout(self.up(given), 0.5)))


@pytest.mark.parametrize("plan", ["tp=2", "tp=3", "tp=4", "dp=2,tp=2,recompute=full", "dp=2,tp=2,zero=3"])
def test_the_first_weights_and_masks_are_the_same_to_the_bit(ranks, plan):
    task = mlp_float64(model=Mask, loss=lambda output, batch: output.sum() / len(output), batch=8, microbatch=1)

    def first() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        from sheaf.parallel import build

        step, run = build(task, Plan.parse(plan)), Run()
        weights = {name: value.clone() for name, value in step.full_state().items()}
        step.observe(Look(run))
        step()
        step.close()
        return weights, run.gradients[0] if run.gradients else {}

    weights, gradients = ranks(first, workers(plan))[0]
    right = Blueprint(task).fill(torch.device("cpu")).state_dict()
    assert set(weights) == set(right)
    assert all(torch.equal(weights[name], right[name]) for name in right)
    wanted = plain(task, 1).gradients[0]["down.bias"]
    assert len(set(wanted.tolist())) > 1
    assert torch.equal(gradients["down.bias"], wanted)


class Cube(torch.autograd.Function):
    """A custom function, which torch shows to no mode."""

    @staticmethod
    def forward(ctx: Any, tensor: Tensor) -> Tensor:
        ctx.save_for_backward(tensor)
        return tensor**3

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return 3 * ctx.saved_tensors[0] ** 2 * gradients[0]


class Custom(nn.Module):
    """A custom function between two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(12, 7), nn.Linear(7, 5)

    def forward(self, given: Tensor) -> Tensor:
        return self.out(Cube.apply(self.into(given)))


class Checkpointed(nn.Module):
    """A model that recomputes by itself."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.into, self.middle, self.out = nn.Linear(12, 8), nn.Linear(8, 9), nn.Linear(9, 5)
        self.reentrant = reentrant

    def forward(self, given: Tensor) -> Tensor:
        from torch.utils.checkpoint import checkpoint

        def inner(hidden: Tensor) -> Tensor:
            return F.dropout(self.middle(hidden.tanh()), 0.2).tanh()

        return self.out(checkpoint(inner, self.into(given), use_reentrant=self.reentrant))


class Caching(nn.Module):
    """A module that keeps a tensor from one forward to the next."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out, self.kept = nn.Linear(12, 8), nn.Linear(8, 5), None

    def forward(self, given: Tensor) -> Tensor:
        hidden = self.into(given)
        mask = torch.linspace(0.5, 1.5, 8, dtype=hidden.dtype) if self.kept is None else self.kept
        self.kept = mask
        return self.out(hidden.tanh() * mask)


class Deciding(nn.Module):
    """Which way it goes depends on what split layers compute."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.other, self.out = nn.Linear(12, 8), nn.Linear(8, 8), nn.Linear(8, 5)

    def forward(self, given: Tensor) -> Tensor:
        hidden = self.into(given)
        return self.out(self.other(hidden).tanh() if hidden.sum().item() > 0 else hidden)


class Closed(nn.Module):
    """Changes a slice in a way that has no split counterpart, so that it is kept whole."""

    def __init__(self) -> None:
        super().__init__()
        self.into, self.out = nn.Linear(9, 7), nn.Linear(7, 9)

    def forward(self, given: Tensor) -> Tensor:
        hidden = self.into(given) * 1.0
        hidden.index_add_(1, torch.tensor([1]), torch.ones(len(given), 1, dtype=given.dtype))
        return self.out(hidden)


class Padded(nn.Module):
    """torch's own encoder with a mask, whose values it looks at."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(6, 3, 10, batch_first=True, dropout=0.1)
        self.encoder, self.out = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False), nn.Linear(6, 5)

    def forward(self, given: Tensor) -> Tensor:
        series = given.view(len(given), 2, 6)
        mask = torch.zeros(2, 2, dtype=given.dtype)
        padding = torch.zeros(len(given), 2, dtype=given.dtype)
        return self.out(self.encoder(series, mask=mask, src_key_padding_mask=padding).mean(1))


ODD = {
    "a custom function": Custom,
    "a checkpoint": functools.partial(Checkpointed, False),
    "a reentrant checkpoint": functools.partial(Checkpointed, True),
    "a cache": Caching,
    "a decision": Deciding,
    "padding": Padded,
    "a closed module": lambda: nn.Sequential(nn.Linear(12, 17), nn.Tanh(), nn.Linear(17, 9), Closed(), nn.Linear(9, 5)),
}


@pytest.mark.parametrize("plan", ["tp=2,recompute=full"])
@pytest.mark.parametrize("model", list(ODD))
def test_odd_modules_stay_exact(ranks, model, plan):
    task = wide(mlp_float64(model=ODD[model]))
    assert_same(ranks(planned, workers(plan), task, plan, STEPS)[0], plain(task, STEPS), 1e-11)
