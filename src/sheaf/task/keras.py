"""Keras 3 models on their torch backend as ordinary torch modules: layers become children, variables their tensors.

Such a model is an ``nn.Module``, but its layers are kept in lists that torch does not see, and its tensors in
``Variable`` objects, which would go on using the tensors they began with. Here every layer becomes a child of what
holds it, and every variable reads and writes its tensor in its layer's registry: what can be trained as a parameter,
all else (moving statistics, states of seed generators) as a buffer. Nothing else about the model changes. Keras is
never imported here.
"""

import re
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from sheaf.errors import TaskError

_HOLDER = "_functional"  # a Sequential's second view of its own layers


def is_layer(module: object) -> bool:
    """Whether a module is a layer of Keras (a model is one) on its torch backend."""
    return any(base.__name__ == "TorchLayer" and base.__module__.startswith("keras.") for base in type(module).__mro__)


def is_batch_norm(module: nn.Module) -> bool:
    """Whether a module is Keras's own BatchNormalization, with nothing to its moving statistics but the usual."""
    own = any(
        one.__name__ == "BatchNormalization" and one.__module__.startswith("keras.") for one in type(module).__mro__
    )
    return own and not getattr(module, "renorm", False) and {"moving_mean", "moving_variance"} <= set(module._buffers)


def may_draw(layer: nn.Module) -> bool:
    """Whether a layer of Keras has a generator of seeds, as those that draw do."""
    return getattr(layer, "seed_generator", None) is not None


def adopt(model: nn.Module) -> nn.Module:
    """The same model; Keras layers in it are torch modules in full from now on.

    Children are called as Keras would call them in a fresh session: ``dense``, ``dense_1``.
    Raises TaskError for a layer that makes its variables only when it is called.
    """
    for module in list(model.modules()):
        if is_layer(module):
            _adopt(module, set())
    return model


def _adopt(layer: Any, seen: set[int]) -> None:
    if id(layer) in seen:
        return
    seen.add(id(layer))
    if not layer.built:
        raise TaskError(
            f"the Keras layer {layer.name} has no variables before its first call: give the shape in model(), by a "
            "keras.Input or by build(shape), so that the model can be planned before it runs"
        )
    if _HOLDER in layer._modules:
        layer.__dict__[_HOLDER] = _bare(layer._modules.pop(_HOLDER))
    _bare(layer)
    children = [*_own(layer._layers)]
    held = {id(child) for child in layer._modules.values()}
    for child in children:
        if id(child) not in held:
            layer._modules[_free(layer._modules, _plain(child))] = child
            held.add(id(child))
    generators = [generator.state for generator in _own(layer._seed_generators)]
    trainable = {id(variable) for variable in layer._trainable_variables}
    for variable in (*layer._trainable_variables, *layer._non_trainable_variables, *generators):
        _tie(variable, layer, is_trainable=id(variable) in trainable)
    for child in children:
        _adopt(child, seen)


def _bare(layer: Any) -> Any:
    """The layer without the list of all tensors below it that Keras keeps for torch, and makes anew if it is gone."""
    layer._modules.pop("_torch_params", None)
    layer.__dict__["_torch_params"] = {}
    return layer


def _tie(variable: Any, layer: nn.Module, *, is_trainable: bool) -> None:
    """Let a variable have its tensor in the layer's registry."""
    value = variable.__dict__.pop("_value", None)
    if value is None:  # another layer has it
        return
    registry = "_parameters" if is_trainable else "_buffers"
    name = _free({**layer._parameters, **layer._buffers}, variable.name)
    layer.__dict__[registry][name] = value if is_trainable else value.detach()
    variable.__dict__["_sheaf_place"] = layer, registry, name
    variable.__class__ = _tied(type(variable))


def _tied(kind: type) -> type:
    """A kind of variable whose tensor is in a module's registry."""
    if kind not in _KINDS:

        def get(self: Any) -> Tensor:
            layer, registry, name = self.__dict__["_sheaf_place"]
            return layer.__dict__[registry][name]

        def put(self: Any, value: Tensor) -> None:
            layer, registry, name = self.__dict__["_sheaf_place"]
            layer.__dict__[registry][name] = value

        _KINDS[kind] = type(kind.__name__, (kind,), {"_value": property(get, put), "__module__": kind.__module__})
    return _KINDS[kind]


_KINDS: dict[type, type] = {}


def _plain(layer: Any) -> str:
    """A layer's name without the number that a session gives it."""
    words = re.sub(r"(.)([A-Z][a-z]+)", r"\1_\2", type(layer).__name__)
    kind = re.sub(r"([a-z])([A-Z])", r"\1_\2", words).lower()
    name = kind if re.fullmatch(rf"{re.escape(kind)}(_\d+)?", layer.name) else layer.name
    return name.replace(".", "_")


def _free(taken: Any, name: str) -> str:
    """The name, or the name with the first number that nobody has."""
    number, found = 0, name
    while found in taken:
        number += 1
        found = f"{name}_{number}"
    return found


def _own(held: Any) -> Iterator[Any]:
    """Layers or generators in a list, and in lists inside it."""
    for one in held:
        if isinstance(one, list | tuple):
            yield from _own(one)
        else:
            yield one
