"""Sequences split among workers (cp) compute what plain PyTorch computes, whatever the second dimension means."""

import functools
from dataclasses import replace

import pytest
import small
import torch
from plain import assert_same, brief, mlp_float64, plain, planned, ragged_gpt, transformers_gpt2
from torch import Tensor, nn
from torch.nn import functional as F

from sheaf import Loss, Task
from sheaf.errors import PlanError
from sheaf.plans import Plan

STEPS = 2


class Layers(nn.Module):
    """Torch's own transformer layers with a causal mask, and attention whose shares are looked at."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.places = nn.Embedding(23, 18), nn.Parameter(torch.randn(1, 40, 18) * 0.1)
        layer = nn.TransformerEncoderLayer(18, 3, 21, dropout=0.2, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2, enable_nested_tensor=False)
        self.look = nn.MultiheadAttention(18, 2, batch_first=True)
        self.head = nn.Linear(18, 23)

    def forward(self, tokens: Tensor) -> tuple[Tensor, Tensor]:
        mask = nn.Transformer.generate_square_subsequent_mask(tokens.shape[1])
        x = self.tokens(tokens) + self.places[:, : tokens.shape[1]]
        x = self.encoder(x, mask=mask.to(x.dtype), is_causal=True)
        seen, shares = self.look(x, x, x)
        return self.head(x + seen), shares


def layers() -> Task:
    """Sentences of odd lengths, each microbatch as long as its longest, and the next word as the answer."""
    draw = torch.Generator().manual_seed(3)
    data = [
        torch.randint(1, 23, (int(length),), generator=draw) for length in torch.randint(3, 14, (9,), generator=draw)
    ]

    def loss(output: tuple[Tensor, Tensor], tokens: Tensor) -> Loss:
        logits, shares = output
        wrong = F.cross_entropy(logits[:, :-1].flatten(0, 1), tokens[:, 1:].flatten(), ignore_index=0, reduction="sum")
        return Loss(wrong + 0.1 * shares.square().sum(), (tokens[:, 1:] != 0).sum())

    return Task(
        model=Layers,
        loss=loss,
        optimizer=lambda parameters: torch.optim.SGD(
            parameters, lr=0.1, momentum=0.9
        ),  # the keys' bias has no gradient
        data=data,
        collate=lambda items: nn.utils.rnn.pad_sequence(items, batch_first=True),
        inputs=lambda tokens: (tokens,),
        batch=6,
        microbatch=2,
        clip=1.0,
    )


PLAIN = {"mlp": mlp_float64, "ragged_gpt": ragged_gpt, "gpt2": transformers_gpt2}


def task(name: str) -> Task:
    if name in PLAIN:
        return brief(PLAIN[name]())
    return replace(brief(layers() if name == "layers" else small.SMALL[name]()), precision="fp64")


@functools.cache
def reference(name: str):
    return plain(task(name), STEPS)


@pytest.mark.thinned(4)
@pytest.mark.parametrize(
    ("name", "plan"),
    [
        ("mlp", "cp=2"),  # features are split, as if they were a sequence
        ("vgg16", "cp=3"),  # channels
        ("bert", "cp=3"),
        ("transformer_seq2seq", "cp=2"),
        ("lstm_seq2seq", "cp=2"),
        ("ragged_gpt", "cp=2,dp=2,zero=1"),
        ("ragged_gpt", "cp=2,recompute=full"),
        ("gpt2", "cp=2,zero=3,bucket_bytes=1024"),
        ("layers", "cp=3"),
        ("gpt", "cp=2,recompute=full"),
        ("gpt", "cp=2,pp=2"),
        ("transformer_seq2seq", "cp=2,pp=2:interleaved"),
        ("layers", "cp=2,pp=2,zero=3"),
        ("gpt", "cp=2,pp=2:zero-bubble,zero=1"),
    ],
)
def test_a_split_sequence_changes_nothing(ranks, name, plan):
    found = ranks(planned, Plan.parse(plan).workers, task(name), plan, STEPS)[0]
    assert_same(found, reference(name), 2e-4 if name in ("ragged_gpt", "gpt2") else 1e-11)


def test_what_it_does_not_go_with_is_refused():
    with pytest.raises(PlanError, match="use tp=4,sequence=1 in its place"):
        Plan.parse("cp=2,tp=2")
    with pytest.raises(PlanError, match="cp=2 splits sequences"):
        Plan.parse("dp=2,cp=2,head=tp")
    assert Plan.parse("cp=2,pp=2,dp=2").workers == 8


class Hiding(nn.Module):
    """Computes with torch's functions switched off for every mode, as compiled code does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(6, 6)

    def forward(self, given: Tensor) -> Tensor:
        with torch._C.DisableTorchFunction():
            return self.layer(given) + 1


def test_a_model_that_cannot_be_followed_is_refused_with_its_reason():
    from sheaf.parallel.build import refuse

    data = [torch.randn(4, 6) for _ in range(4)]
    task = Task(
        model=Hiding,
        loss=lambda output, batch: output.square().mean(),
        optimizer=torch.optim.AdamW,
        data=data,
        inputs=lambda batch: (batch,),
        batch=2,
        microbatch=1,
    )
    reason = "layer cannot be rehearsed with its sequences split: PlanError: .* split .*; use dp or tp in place of cp"
    with pytest.raises(PlanError, match=reason):
        refuse(task, Plan.parse("cp=2"))
