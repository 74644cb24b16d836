"""Reference models in plain PyTorch; they know nothing of the house."""

from sheaf.zoo.models.alexnet import AlexNet
from sheaf.zoo.models.bert import BERT
from sheaf.zoo.models.gpt import GPT
from sheaf.zoo.models.mlp import MLP
from sheaf.zoo.models.moe import MoE
from sheaf.zoo.models.resnet import ResNet
from sheaf.zoo.models.resnet50 import BottleneckResNet
from sheaf.zoo.models.seq2seq import Seq2Seq
from sheaf.zoo.models.transformer import Transformer
from sheaf.zoo.models.unet3d import UNet3d
from sheaf.zoo.models.vgg import VGG

__all__ = [
    "BERT",
    "GPT",
    "MLP",
    "VGG",
    "AlexNet",
    "BottleneckResNet",
    "MoE",
    "ResNet",
    "Seq2Seq",
    "Transformer",
    "UNet3d",
]
