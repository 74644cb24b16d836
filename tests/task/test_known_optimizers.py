"""Optimizers that are known to step each number for itself do so; others are not taken as known."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import optim

from sheaf.task import probe

SETTINGS: dict[type[optim.Optimizer], list[dict[str, Any]]] = {
    optim.SGD: [{"lr": 0.1}, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "weight_decay": 0.1}],
    optim.Adam: [{"lr": 0.1}, {"lr": 0.1, "amsgrad": True, "weight_decay": 0.1}],
    optim.AdamW: [{"lr": 0.1}, {"lr": 0.1, "amsgrad": True, "maximize": True}],
    optim.RMSprop: [{"lr": 0.1}, {"lr": 0.1, "momentum": 0.9, "centered": True}],
}


def test_what_is_known_is_so_when_stepped(monkeypatch: pytest.MonkeyPatch):
    shapes = [(3, 4), (7,)]
    cases = [partial(kind, **settings) for kind in probe._KNOWN for settings in SETTINGS[kind]]
    assert all(probe._is_known(case, shapes) for case in cases)
    monkeypatch.setattr(probe, "_KNOWN", frozenset())
    monkeypatch.setattr(probe, "_LARGE", ())
    assert all(probe.elementwise(case, shapes) for case in cases)


def _mixed(parameters: Any) -> optim.Optimizer:
    made = optim.SGD(parameters, lr=0.1)
    made.step = lambda: None  # pyright: ignore[reportAttributeAccessIssue]
    return made


def _hooked(parameters: Any) -> optim.Optimizer:
    made = optim.SGD(parameters, lr=0.1)
    made.register_step_post_hook(lambda *_: None)
    return made


class Own(optim.SGD):
    """Somebody's own."""


UNKNOWN: list[Callable[[Any], optim.Optimizer]] = [
    _mixed,
    _hooked,
    partial(Own, lr=0.1),
    partial(optim.Adam, lr=torch.tensor(0.1)),
    partial(optim.SGD, lr=1e9),
    partial(optim.SGD, lr=0.1, differentiable=True),
    partial(optim.SGD, lr=-1.0),
    lambda parameters: optim.SGD([{"params": parameters[:1]}, {"params": parameters[1:], "lr": float("nan")}], lr=0.1),
]


@pytest.mark.parametrize("optimizer", UNKNOWN)
def test_anything_else_is_stepped(optimizer: Callable[[Any], optim.Optimizer]):
    assert not probe._is_known(optimizer, [(3, 4), (7,)])
