"""GPT-3's largest model (Brown et al. 2020): `sheaf plan examples/gpt_175b.py --cluster a100-dgx:128`.

Nothing of it is allocated. Its batch is GPT-3's, 1,536 sequences of 2,048 tokens; `large` is for a hundred thousand
devices, with eight times as many. The tokens are made up.
"""

import torch
from torch.nn import functional as F
from torch.utils.data import Dataset

import sheaf
from sheaf.zoo.models import GPT

VOCABULARY, CONTEXT = 50257, 2048


class MadeUp(Dataset[tuple[torch.Tensor, torch.Tensor]]):
    """Sequences of tokens, each made when it is asked for."""

    def __len__(self) -> int:
        return 2**20

    def __getitem__(self, index: int) -> tuple[torch.Tensor, torch.Tensor]:
        tokens = torch.randint(0, VOCABULARY, (CONTEXT + 1,), generator=torch.Generator().manual_seed(index))
        return tokens[:-1], tokens[1:]


def loss(logits: torch.Tensor, batch: list[torch.Tensor]) -> sheaf.Loss:
    """Cross-entropy of every next token."""
    return sheaf.Loss(F.cross_entropy(logits.flatten(0, 1), batch[1].flatten(), reduction="sum"), batch[1].numel())


def task(batch: int = 1536) -> sheaf.Task:
    """96 layers, 12,288 wide, 96 heads."""
    return sheaf.Task(
        model=lambda: GPT(vocabulary=VOCABULARY, context=CONTEXT, width=12288, layers=96, heads=96, dropout=0.0),
        loss=loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=6e-5, betas=(0.9, 0.95), weight_decay=0.1),
        data=MadeUp(),
        batch=batch,
        microbatch=1,
        precision="bf16",
    )


def large() -> sheaf.Task:
    """The same with a batch for a hundred thousand devices."""
    return task(batch=12288)
