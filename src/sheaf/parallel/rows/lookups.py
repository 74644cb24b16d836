"""The mode in which a model looks up rows of tables of which this worker holds a block only.

A lookup gets, in place of the table, the rows that it asks for and where among them each index points; the model's
code stays as it is, and everything that torch's functions do with padding, weights and bags is done by them.
"""

from collections.abc import Callable, Mapping
from functools import partial
from inspect import signature
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode, _get_current_function_mode_stack
from torch.utils._pytree import tree_map_only

from sheaf.errors import PlanError
from sheaf.graph.lookups import ABOUT, LOOKUPS, SHAPES
from sheaf.parallel.rows.store import Store
from sheaf.parallel.rows.tables import called, not_held_by_a_layer, not_looked_up
from sheaf.split.mode import leaves

_SIGNATURES = {F.embedding: signature(F.embedding), F.embedding_bag: signature(F.embedding_bag)}


class Lookups(TorchFunctionMode):
    """Runs a forward whose ``tables`` (by name) are blocks of rows; ``noted`` is told the ids of each lookup."""

    def __init__(
        self,
        store: Store,
        tables: Mapping[str, nn.Parameter],
        touch: Callable[[str], object],
        noted: Callable[[str, Tensor], object],
    ) -> None:
        super().__init__()
        self.store, self._touch, self._noted = store, touch, noted
        self._layers = 0
        self._tables = {id(value): (name, value) for name, value in tables.items()}
        self._whole = {
            form.name: torch.empty(form.rows, form.width, dtype=form.dtype, device="meta") for form in store.forms
        }

    def guard(self, model: nn.Module) -> None:
        """Let the layers that hold blocks of tables refuse to run where nobody pulls rows for them: outside of a step,
        and in backward, where a model's own checkpoints run forward again without this mode.
        """
        for module in model.modules():
            held = [self._tables.get(id(value)) for value in module._parameters.values()]
            names = [found[0] for found in held if found is not None]
            if names:
                module.register_forward_pre_hook(partial(self._enter, names[0]))
                module.register_forward_hook(self._leave, always_call=True)

    def _enter(self, name: str, _module: nn.Module, _given: Any) -> None:
        if self not in _get_current_function_mode_stack():
            raise PlanError(
                f"this worker holds a block of {name}, whose other rows are pulled in a step's forward only: keep its "
                "layer out of torch.utils.checkpoint (the plan may say recompute=full), and to run the model otherwise "
                "load full_state() into one of your own"
            )
        self._layers += 1

    def _leave(self, _module: nn.Module, _given: Any, _output: Any) -> None:
        self._layers = max(0, self._layers - 1)

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        named = next((self._tables[id(leaf)] for leaf in leaves(args, kwargs) if id(leaf) in self._tables), None)
        if named is None or func in ABOUT:
            return func(*args, **kwargs)
        name, table = named
        if func in SHAPES:
            return func(*tree_map_only(Tensor, lambda _: self._whole[name], args), **kwargs)
        if func is torch.embedding:
            return self._looked_up(F.embedding, name, table, _of_torch(args, kwargs))
        if func not in LOOKUPS:
            raise not_looked_up(name, called(func))
        return self._looked_up(func, name, table, dict(_SIGNATURES[func].bind(*args, **kwargs).arguments))

    def _looked_up(self, func: Callable[..., Any], name: str, table: nn.Parameter, given: dict[str, Any]) -> Any:
        if not self._layers:
            raise not_held_by_a_layer(name)
        if given.get("max_norm") is not None:
            raise PlanError(f"{name} is looked up with max_norm, which changes rows that other workers hold: drop it")
        wanted = given["input"]
        ids, places = torch.unique(wanted, return_inverse=True)
        ids = ids.long()
        if ids.numel() and not (int(ids[0]) >= 0 and int(ids[-1]) < self._whole[name].shape[0]):
            raise IndexError(f"an index of {name} is out of range: {int(ids[0])} to {int(ids[-1])}")
        self._noted(name, ids)
        rows = self.store.rows(name, ids)
        if table.requires_grad and torch.is_grad_enabled():
            rows.requires_grad_()
            rows.register_post_accumulate_grad_hook(lambda leaf: self._come(name, ids, leaf))
        padding = given.get("padding_idx")
        if padding is not None:
            given["padding_idx"] = _place(ids, padding % self._whole[name].shape[0])
        given |= {"input": places.to(wanted.dtype), "weight": rows, "sparse": False}
        return func(**given)

    def _come(self, name: str, ids: Tensor, leaf: Tensor) -> None:
        assert leaf.grad is not None
        self.store.add(name, ids, leaf.grad)
        leaf.grad = None
        self._touch(name)


def _place(ids: Tensor, wanted: int) -> int | None:
    """Where an id is among rising ones."""
    found = (ids == wanted).nonzero()
    return int(found[0]) if found.numel() else None


def _of_torch(args: tuple[Any, ...], kwargs: dict[str, Any]) -> dict[str, Any]:
    """The arguments of ``torch.embedding``, which has its own order, as those of ``F.embedding``."""
    names = ("weight", "indices", "padding_idx", "scale_grad_by_freq", "sparse")
    given: dict[str, Any] = dict(zip(names, args, strict=False)) | kwargs
    given["input"] = given.pop("indices")
    if given.get("padding_idx") == -1:
        del given["padding_idx"]
    return given
