"""Convolutional networks by name: what one image costs."""

import re
import tomllib
from dataclasses import dataclass
from functools import cache
from importlib import resources


@dataclass(frozen=True, kw_only=True)
class Network:
    """Sizes of one network; ``kernels`` are those of a forward pass."""

    flops: float  # of one image's forward, two per multiply-add
    parameters: float
    activations: float  # elements that its convolutions put out
    depthwise: bool  # most of its convolutions have one channel a group: bandwidth, not arithmetic, bounds them
    threes: float  # share of the FLOP in 3 x 3 convolutions with stride 1, which fewer multiplications do in fp32
    kernels: int


@cache
def networks() -> dict[str, Network]:
    """All that are known, from ``networks.toml``."""
    text = (resources.files("sheaf.cost.analytic") / "networks.toml").read_text(encoding="utf-8")
    return {name: Network(**values) for name, values in tomllib.loads(text)["networks"].items()}


def network_named(said: str) -> str | None:
    """The known network that a run's words mean.

    >>> network_named("ResNet50 v1.5"), network_named("ResNeXt101-32x4d"), network_named("GPT")
    ('resnet50', 'resnext101', None)
    """
    word = re.sub(r"[^a-z0-9]", "", said.lower())
    found = [name for name in networks() if word.startswith(name)]
    return max(found, key=len, default=None)
