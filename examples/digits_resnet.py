"""A residual network with BatchNorm reads handwritten digits.

BatchNorm's statistics are those of a microbatch, under every plan, so `microbatch` is part of what is computed.
"""

import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.utils.data import TensorDataset

import sheaf
from sheaf.zoo.models import ResNet


def model():
    return ResNet(blocks=1, channels=1, classes=10)


def loss(logits, batch):
    _, labels = batch
    return nn.functional.cross_entropy(logits, labels)


def optimizer(parameters):
    return torch.optim.SGD(parameters, lr=0.05, momentum=0.9, weight_decay=1e-4)


def scheduler(optimizer):
    return torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=200)


def task():
    digits = load_digits()
    images = torch.tensor(digits.images / 16, dtype=torch.float32)[:, None]  # samples, 1 channel, 8, 8
    return sheaf.Task(
        name="digits_resnet",
        model=model,
        loss=loss,
        optimizer=optimizer,
        scheduler=scheduler,
        data=TensorDataset(images, torch.tensor(digits.target)),
        batch=64,
        microbatch=16,
    )
