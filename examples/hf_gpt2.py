"""A Hugging Face GPT-2, as it comes, with tied embeddings and dropout; small, from its config, with random weights."""

import torch
from torch.nn import functional as F
from transformers import GPT2Config, GPT2LMHeadModel

import sheaf
from sheaf.zoo.tasks.text import Windows, reference_text


def model():
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=256,
            n_positions=64,
            n_embd=128,
            n_layer=4,
            n_head=4,
            bos_token_id=None,
            eos_token_id=None,
            use_cache=False,
        )
    )


def inputs(batch):
    tokens, _ = batch
    return {"input_ids": tokens}  # a dict is keyword arguments of the model


def loss(output, batch):
    _, targets = batch
    total = F.cross_entropy(output.logits.flatten(0, 1), targets.flatten(), reduction="sum")
    return sheaf.Loss(total, targets.numel())


def optimizer(parameters):
    return torch.optim.AdamW(parameters, lr=1e-3)


def task():
    return sheaf.Task(
        name="hf_gpt2",
        model=model,
        inputs=inputs,
        loss=loss,
        optimizer=optimizer,
        data=Windows(reference_text(), context=64),
        batch=16,
        microbatch=4,
    )
