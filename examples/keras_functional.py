"""A Keras 3 functional model on its torch backend reads handwritten digits: two branches, a skip, BatchNormalization.

KERAS_BACKEND=torch must be set before Keras is first imported. A loop in plain PyTorch calls such a model with
`training=True`, else nothing is dropped; `inputs` says so here.
"""

import os

os.environ.setdefault("KERAS_BACKEND", "torch")

import keras
import torch
from keras import layers
from sklearn.datasets import load_digits
from torch.nn import functional as F
from torch.utils.data import TensorDataset

import sheaf


def model():
    image = keras.Input((8, 8, 1))
    first = layers.Conv2D(16, 3, padding="same", use_bias=False)(image)
    first = layers.ReLU()(layers.BatchNormalization()(first))
    second = layers.Conv2D(16, 3, padding="same", activation="relu")(first)
    shapes = layers.MaxPooling2D()(layers.Add()([first, second]))
    strokes = layers.Dense(64, activation="gelu")(layers.Flatten()(image))
    both = layers.Concatenate()([layers.Flatten()(shapes), strokes])
    hidden = layers.Dropout(0.2)(layers.Dense(64, activation="relu")(both))
    return keras.Model(image, layers.Dense(10)(hidden))


def inputs(batch):
    return {"inputs": batch[0], "training": True}


def loss(logits, batch):
    return F.cross_entropy(logits, batch[1])


def task():
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[..., None]  # samples, 8, 8, 1 channel
    return sheaf.Task(
        name="keras_functional",
        model=model,
        inputs=inputs,
        loss=loss,
        optimizer=lambda parameters: torch.optim.AdamW(parameters, lr=1e-3),
        data=TensorDataset(images, torch.tensor(digits.target)),
        batch=64,
        microbatch=16,
    )
