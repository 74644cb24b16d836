"""Modules that are kept whole inside a model that is split: they see whole tensors only."""

from collections.abc import Iterable
from typing import Any

from torch import nn
from torch.utils._pytree import tree_map
from torch.utils.hooks import RemovableHandle

from sheaf.split.mode import Splitting
from sheaf.split.tensor import Split


def close(model: nn.Module, names: Iterable[str], mode: Splitting) -> list[RemovableHandle]:
    """Give the named modules whole inputs, gathered where they are slices."""

    def before(_module: nn.Module, args: Any, kwargs: Any) -> Any:
        return tree_map(whole, args), tree_map(whole, kwargs)

    def whole(value: Any) -> Any:
        return mode.gather(value, "a module that is kept whole") if type(value) is Split else value

    modules = dict(model.named_modules())
    return [modules[name].register_forward_pre_hook(before, with_kwargs=True) for name in names if name in modules]
