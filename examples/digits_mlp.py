"""The smallest task: a perceptron reads handwritten digits; `sheaf train examples/digits_mlp.py --plan dp=2`."""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import sheaf


def model():
    return nn.Sequential(nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10))


def loss(logits, batch):
    _, labels = batch
    return nn.functional.cross_entropy(logits, labels)  # a plain mean over the samples will do


def task():
    digits = load_digits()
    images = torch.tensor(digits.data / 16, dtype=torch.float32)
    return sheaf.Task(
        name="digits_mlp",
        model=model,
        loss=loss,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
        data=TensorDataset(images, torch.tensor(digits.target)),
        batch=100,  # 1797 digits: the last batch of an epoch has 97, and none is dropped or padded
        microbatch=20,
    )
