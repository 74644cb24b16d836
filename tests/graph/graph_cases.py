"""Models and tasks of the graph tests."""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from sheaf.task import Loss, Task

os.environ.setdefault("HF_HUB_OFFLINE", "1")
VOCABULARY, LENGTH = 64, 16


def adam(parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    return torch.optim.Adam(parameters)


def task(model: Callable[[], nn.Module], data: Any, loss: Any = None, **options: Any) -> Task:
    given = {"batch": 8, "microbatch": 4, "shuffle": False, "optimizer": adam} | options
    return Task(model=model, data=data, loss=loss or (lambda output, _batch: output.float().mean()), **given)


def vectors(width: int, count: int = 16) -> list[tuple[Tensor, int]]:
    generator = torch.Generator().manual_seed(0)
    return [(torch.randn(width, generator=generator), index % 3) for index in range(count)]


def texts(length: int = LENGTH, vocabulary: int = VOCABULARY, count: int = 16) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randint(vocabulary, (length,), generator=generator) for _ in range(count)]


def token_loss(output: Any, batch: Tensor) -> Loss:
    logits = output.logits if hasattr(output, "logits") else output
    return Loss(F.cross_entropy(logits.flatten(0, 1).float(), batch.flatten(), reduction="sum"), float(batch.numel()))


def text_task(model: Callable[[], nn.Module], *, labels: bool = False, **options: Any) -> Task:
    names = ("input_ids", "labels") if labels else ("input_ids",)
    given = {"data": texts(), "inputs": lambda batch: dict.fromkeys(names, batch)} | options
    return task(model, loss=token_loss, **given)


def gpt2(**options: Any) -> nn.Module:
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": VOCABULARY, "n_positions": LENGTH}
    return GPT2LMHeadModel(GPT2Config(**(sizes | {"bos_token_id": 1, "eos_token_id": 2} | options)))


def bert() -> nn.Module:
    from transformers import BertConfig, BertForMaskedLM

    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    return BertForMaskedLM(BertConfig(vocab_size=VOCABULARY, max_position_embeddings=LENGTH, **sizes))


def t5() -> nn.Module:
    from transformers import T5Config, T5ForConditionalGeneration

    sizes = {"num_layers": 2, "d_model": 32, "d_kv": 8, "d_ff": 64, "num_heads": 4, "vocab_size": VOCABULARY}
    return T5ForConditionalGeneration(T5Config(decoder_start_token_id=0, **sizes))


def llama() -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    sizes = {"num_hidden_layers": 2, "hidden_size": 32, "num_attention_heads": 2, "intermediate_size": 64}
    return LlamaForCausalLM(LlamaConfig(vocab_size=VOCABULARY, bos_token_id=1, eos_token_id=2, **sizes))


class BasicBlock(nn.Module):
    """A residual block with batch normalisation."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, image: Tensor) -> Tensor:
        return F.relu(image + self.norm(self.convolution(image)))


def resnet() -> nn.Module:
    stages = [nn.Sequential(BasicBlock(8), BasicBlock(8)), nn.Sequential(BasicBlock(8), BasicBlock(8))]
    return nn.Sequential(
        nn.Conv2d(1, 8, 3), *stages, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(8, 3)
    )


def image_task(model: Callable[[], nn.Module] = resnet, **options: Any) -> Task:
    data = [(vector.reshape(1, 8, 8), label) for vector, label in vectors(64)]
    return task(model, data, lambda output, batch: F.cross_entropy(output, batch[1]), **options)


class Recurrent(nn.Module):
    """Embedding, recurrent layers and an output layer."""

    def __init__(self, kind: type[nn.RNNBase] = nn.LSTM) -> None:
        super().__init__()
        self.embedding = nn.Embedding(VOCABULARY, 8)
        self.layers = kind(8, 8, 2, batch_first=True)
        self.output = nn.Linear(8, VOCABULARY)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output(self.layers(self.embedding(tokens))[0])
