"""How torch's functions work on slices; importing this room gives every rule to the registry."""

from sheaf.split.rules import (
    about,
    attention,
    convolution,
    elementwise,
    loss,
    normalisation,
    products,
    recurrent,
    reductions,
    sent,
    shapes,
    windows,
)

__all__ = [
    "about",
    "attention",
    "convolution",
    "elementwise",
    "loss",
    "normalisation",
    "products",
    "recurrent",
    "reductions",
    "sent",
    "shapes",
    "windows",
]
