"""A byte-level GPT with 1.3 million parameters learns to write the Python language reference.

sheaf plan examples/gpt_text.py
sheaf train examples/gpt_text.py --steps 60
"""

import torch
from torch.nn import functional as F

import sheaf
from sheaf.zoo.models import GPT
from sheaf.zoo.tasks.text import Windows, reference_text


def model():
    return GPT(vocabulary=256, context=64, width=160, layers=4, heads=5, dropout=0.1)


def loss(logits, batch):
    _, targets = batch
    total = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return sheaf.Loss(total, targets.numel())  # a sum, and what its mean is over


def optimizer(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3, betas=(0.9, 0.95), weight_decay=0.1)


def task():
    return sheaf.Task(
        name="gpt_text",
        model=model,
        loss=loss,
        optimizer=optimizer,
        data=Windows(reference_text(), context=64),  # item i: 64 bytes, and the 64 that follow each
        batch=32,  # samples per step, over all workers
        microbatch=4,
        clip=1.0,
    )
