"""A Hugging Face BERT fills in masked bytes of paragraphs of different lengths; small, with random weights.

Every microbatch has another number of masked bytes. The loss says how many, so the gradient is that of the whole batch.
"""

import torch
from torch.nn import functional as F
from transformers import BertConfig, BertForMaskedLM

import sheaf
from sheaf.zoo.tasks.text import Paragraphs, reference_text

PADDING, MASK, NO_TARGET = 256, 257, -100


def model():
    return BertForMaskedLM(
        BertConfig(
            vocab_size=258,
            hidden_size=128,
            num_hidden_layers=4,
            num_attention_heads=4,
            intermediate_size=512,
            max_position_embeddings=96,
            pad_token_id=PADDING,
        )
    )


def collate(paragraphs):
    """Pad to the longest, and hide one byte in seven; which ones is drawn from a stream of the task's seed."""
    tokens = torch.nn.utils.rnn.pad_sequence(paragraphs, batch_first=True, padding_value=PADDING)
    hidden = (torch.rand(tokens.shape) < 0.15) & (tokens != PADDING)
    return {
        "input_ids": tokens.masked_fill(hidden, MASK),
        "attention_mask": (tokens != PADDING).long(),
        "targets": tokens.masked_fill(~hidden, NO_TARGET),
    }


def inputs(batch):
    return {"input_ids": batch["input_ids"], "attention_mask": batch["attention_mask"]}


def loss(output, batch):
    targets = batch["targets"]
    total = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten(), ignore_index=NO_TARGET, reduction="sum")
    return sheaf.Loss(total, (targets != NO_TARGET).sum())


def task():
    return sheaf.Task(
        name="hf_bert",
        model=model,
        inputs=inputs,
        loss=loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=5e-4),
        data=Paragraphs(reference_text(), context=95),
        collate=collate,
        batch=16,
        microbatch=4,
    )
