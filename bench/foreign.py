"""Models that others wrote, small and with random weights, as tasks: four of transformers', and one of Keras."""

import os
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sheaf import Task

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("KERAS_BACKEND", "torch")  # before Keras is imported

WORDS, LENGTH, SAMPLES = 61, 12, 20


def hf_gpt2() -> Task:
    """GPT-2 with dropout and tied embeddings."""

    def model() -> nn.Module:
        from transformers import GPT2Config, GPT2LMHeadModel

        return GPT2LMHeadModel(
            GPT2Config(n_layer=4, n_embd=36, n_head=3, vocab_size=WORDS, n_positions=16, bos_token_id=0, eos_token_id=0)
        )

    return _task("hf_gpt2", model)


def hf_bert() -> Task:
    """BERT with its masked language model's head."""

    def model() -> nn.Module:
        from transformers import BertConfig, BertForMaskedLM

        sizes: dict[str, Any] = {
            "hidden_size": 36,
            "num_hidden_layers": 4,
            "num_attention_heads": 3,
            "intermediate_size": 47,
        }
        return BertForMaskedLM(BertConfig(**sizes, vocab_size=WORDS, max_position_embeddings=16))

    return _task("hf_bert", model)


def hf_t5() -> Task:
    """T5: an encoder and a decoder whose relative positions all layers share."""

    def model() -> nn.Module:
        from transformers import T5Config, T5ForConditionalGeneration

        sizes: dict[str, Any] = {"d_model": 30, "d_kv": 10, "d_ff": 42, "num_layers": 2, "num_heads": 3}
        return T5ForConditionalGeneration(T5Config(**sizes, vocab_size=WORDS, use_cache=False))

    def inputs(batch: Tensor) -> dict[str, Tensor]:
        return {"input_ids": batch, "decoder_input_ids": batch.roll(1, 1)}

    return _task("hf_t5", model, inputs)


def hf_llama() -> Task:
    """Llama: 4 heads that share 2 of keys and values, gated layers, RMSNorm, rotated positions."""

    def model() -> nn.Module:
        from transformers import LlamaConfig, LlamaForCausalLM

        heads: dict[str, Any] = {"num_attention_heads": 4, "num_key_value_heads": 2}
        sizes: dict[str, Any] = {
            "hidden_size": 32,
            "intermediate_size": 45,
            "num_hidden_layers": 4,
            "max_position_embeddings": 16,
        }
        return LlamaForCausalLM(LlamaConfig(**sizes, **heads, vocab_size=WORDS))

    return _task("hf_llama", model)


def keras_functional() -> Task:
    """A functional model of Keras on its torch backend: two branches, a skip, BatchNormalization, dropout."""
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(SAMPLES, 12, 12, 3, generator=generator)
    labels = torch.randint(7, (SAMPLES,), generator=generator)
    return Task(
        name="keras_functional",
        model=_branches,
        loss=_classes,
        optimizer=partial(torch.optim.SGD, lr=0.01, momentum=0.9),
        data=list(zip(images, labels, strict=True)),
        inputs=_in_training,
        batch=8,
        microbatch=2,
        seed=5,
    )


def _branches() -> nn.Module:
    import keras
    from keras import layers

    image = keras.Input((12, 12, 3))
    first = layers.Conv2D(5, 3, padding="same")(image)
    first = layers.ReLU()(layers.BatchNormalization()(first))
    second = layers.Conv2D(5, 3, padding="same", activation="relu")(first)
    flat = layers.Flatten()(layers.MaxPooling2D()(layers.Add()([first, second])))
    one = layers.Dropout(0.2)(layers.Dense(33, activation="relu")(flat))
    both = layers.Concatenate()([one, layers.Dense(21, activation="gelu")(flat)]) * 2.0
    return keras.Model(image, layers.Dense(7)(both))


def _in_training(batch: Any) -> dict[str, Any]:
    return {"inputs": batch[0], "training": True}


def _classes(logits: Tensor, batch: Any) -> Tensor:
    return F.cross_entropy(logits, batch[1])


FOREIGN: dict[str, Callable[[], Task]] = {
    build.__name__: build for build in (hf_gpt2, hf_bert, hf_t5, hf_llama, keras_functional)
}


def _task(name: str, model: Callable[[], nn.Module], inputs: Any = None) -> Task:
    return Task(
        name=name,
        model=model,
        loss=_guessed,
        # the bias of attention's keys has no gradient but rounding, which AdamW would make large with a small eps
        optimizer=partial(torch.optim.AdamW, lr=1e-3, eps=1e-5),
        data=torch.randint(1, WORDS, (SAMPLES, LENGTH), generator=torch.Generator().manual_seed(4)),
        inputs=inputs or _masked,
        batch=8,
        microbatch=2,
        seed=5,
    )


def _masked(batch: Tensor) -> dict[str, Tensor]:
    return {"input_ids": batch, "attention_mask": torch.ones_like(batch)}


def _guessed(output: Any, batch: Tensor) -> Tensor:
    return F.cross_entropy(output.logits.flatten(0, 1), batch.flatten())
