"""Reference models in plain PyTorch; they know nothing of the house."""

from sheaf.zoo.models.gpt import GPT
from sheaf.zoo.models.mlp import MLP
from sheaf.zoo.models.resnet import ResNet

__all__ = ["GPT", "MLP", "ResNet"]
