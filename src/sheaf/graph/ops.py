"""What one kernel does: floating-point operations, bytes read and written, whether it draws or mixes samples.

Formulas of matrix and convolution kernels are torch's own (``torch.utils.flop_counter``); added here are the fused
attention and recurrent kernels of CPUs, which torch leaves out.
"""

import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten

# They allocate or describe, and touch no memory.
_FREE = frozenset(
    {
        "empty",
        "empty_like",
        "empty_permuted",
        "empty_strided",
        "new_empty",
        "new_empty_strided",
        "detach",
        "alias",
        "lift_fresh",
        "_unsafe_view",
        "_reshape_alias",
        "is_same_size",
        "set_",
        "device",
        "layout",
        "_fused_sdp_choice",
        "_local_scalar_dense",
    }
)
# They read as many elements as they write, however large the table is.
_LOOKUPS = frozenset({"embedding", "index", "gather", "index_select", "take_along_dim"})
_BATCH_NORMS = frozenset(
    {
        "native_batch_norm",
        "_native_batch_norm_legit",
        "cudnn_batch_norm",
        "miopen_batch_norm",
        "batch_norm_with_update",
        "_batch_norm_with_update",
    }
)

_ONE_TYPE = frozenset(
    {aten.mm.default, aten.addmm.default, aten.bmm.default, aten.baddbmm.default, aten.convolution.default}
)
# Autocast brings these together, perhaps that of an accelerator inside of the model, which does nothing on fakes.
_BY_AUTOCAST = frozenset({torch.float32, torch.bfloat16, torch.float16})


@cache
def is_kernel(operator: OpOverload) -> bool:
    """Whether an operator moves data; views and allocations do not."""
    name = operator.overloadpacket.__name__
    return name not in _FREE and not name.startswith("sym_") and not operator.is_view


@cache
def decomposes(operator: OpOverload) -> bool:
    """Whether an operator is made of others that should be counted in its place."""
    known = operator.overloadpacket in flop_registry or operator.overloadpacket in _OWN
    if known or operator.namespace == "prim":  # prim asks for a device or layout, and may not be registered
        return False
    return torch._C._dispatch_has_kernel_for_dispatch_key(
        operator.name(), torch._C.DispatchKey.CompositeImplicitAutograd
    )


def flops(operator: OpOverload, arguments: tuple[Any, ...], keywords: dict[str, Any], result: object) -> float:
    """Floating-point operations of one call of a matrix, convolution, attention or recurrent kernel; else 0."""
    own = _OWN.get(operator.overloadpacket)
    if own is not None:
        return own(*arguments, **keywords)
    formula = flop_registry.get(operator.overloadpacket)
    return 0.0 if formula is None else float(formula(*arguments, **keywords, out_val=result))


def moved_bytes(operator: OpOverload, arguments: tuple[Any, ...], keywords: dict[str, Any], result: object) -> int:
    """Bytes that one call reads and writes: every tensor argument and result once, expanded ones as they are stored."""
    written = sum(stored_bytes(tensor) for tensor in tensors(result))
    read = [tensor for tensor in _flat(arguments, keywords) if isinstance(tensor, Tensor)]
    if operator.overloadpacket.__name__ in _LOOKUPS and read:
        return 2 * written + sum(stored_bytes(tensor) for tensor in read[1:])
    return written + sum(stored_bytes(tensor) for tensor in read)


def stored_bytes(tensor: Tensor) -> int:
    """Bytes of the elements that a tensor really holds; an expanded dimension holds one.

    >>> stored_bytes(torch.zeros(3, 1)), stored_bytes(torch.zeros(3, 1).expand(3, 100))
    (12, 12)
    """
    if tensor.layout is not torch.strided:
        return tensor.numel() * tensor.element_size()
    held = math.prod(size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or not size)
    return held * tensor.element_size()


def refuse_mixed(operator: OpOverload, arguments: tuple[Any, ...]) -> None:
    """Raise RuntimeError where a product is given numbers of two types that no autocast brings together, as it does
    when it runs. On fake tensors torch lets it pass.
    """
    if operator not in _ONE_TYPE:
        return
    found = {one.dtype for one in arguments if isinstance(one, Tensor)}
    if len(found) > 1 and not found <= _BY_AUTOCAST:
        named = sorted(str(one).removeprefix("torch.") for one in found)
        raise RuntimeError(
            f"a product of {' and '.join(named)}: its numbers must be of one type; "
            "give data of the weights' type, such as tensor.float()"
        )


def as_run(operator: OpOverload, result: Any) -> Any:
    """What a call gives, with one tensor in all places in which the kernel gives one, as it does when it runs.

    On fake tensors some calls come from torch's cache, which makes a tensor for each place.
    """
    if operator.overloadpacket is aten.mkldnn_rnn_layer_backward:
        return (*result[:4], result[3], *result[5:])  # the gradient of both biases
    return result


def tensors(value: object) -> list[Tensor]:
    """Every tensor in nested tuples, lists, dicts and registered containers."""
    if isinstance(value, Tensor):
        return [value]
    return [leaf for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


def draws(operator: OpOverload, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    """Whether one call draws random numbers: kernels that may, with a probability above zero and not in evaluation."""
    if torch.Tag.nondeterministic_seeded not in operator.tags or not is_kernel(operator):
        return False
    given = named(operator, arguments, keywords)
    if any(given.get(name) in (0, 0.0) for name in ("dropout_p", "dropout", "p")):
        return False
    return given.get("training", True) is not False and given.get("train", True) is not False


def uses_batch_statistics(operator: OpOverload, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> bool:
    """Whether one call is a batch normalisation over several samples.

    Instance normalisation runs the same kernel with all samples folded into channels, so over one sample.
    """
    if operator.overloadpacket.__name__ not in _BATCH_NORMS:
        return False
    given = named(operator, arguments, keywords)
    return bool(given.get("training", True)) and given["input"].shape[0] > 1


def changed(operator: OpOverload, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> list[Tensor]:
    """The arguments that one call changes in place, running statistics included."""
    given = named(operator, arguments, keywords)
    if operator.overloadpacket.__name__ in _BATCH_NORMS:
        running = (given.get("running_mean"), given.get("running_var"))
        return [tensor for tensor in running if isinstance(tensor, Tensor)] if given.get("training", True) else []
    written = _written(operator)
    return [tensor for name in written for tensor in tensors(given.get(name))]


def named(operator: OpOverload, arguments: tuple[Any, ...], keywords: dict[str, Any]) -> dict[str, Any]:
    """The arguments of a call by name, without defaults."""
    return dict(zip(_names(operator), arguments, strict=False)) | keywords


@cache
def _names(operator: OpOverload) -> tuple[str, ...]:
    return tuple(argument.name for argument in operator._schema.arguments)


@cache
def _written(operator: OpOverload) -> tuple[str, ...]:
    arguments = operator._schema.arguments
    return tuple(item.name for item in arguments if item.alias_info is not None and item.alias_info.is_write)


def _flat(arguments: tuple[Any, ...], keywords: dict[str, Any]) -> list[Any]:
    flat: list[Any] = []
    for value in (*arguments, *keywords.values()):
        flat.extend(value) if isinstance(value, tuple | list) else flat.append(value)
    return flat


def _attention(query: Tensor, key: Tensor, value: Tensor, *_rest: Any, **_named: Any) -> float:
    batch, heads, length, width = query.shape
    return 2.0 * batch * heads * length * key.shape[-2] * (width + value.shape[-1])


def _attention_backward(_gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_rest: Any, **_n: Any) -> float:
    # scores again, then the gradients of value, probabilities, query and key: 2.5 times the forward
    batch, heads, length, width = query.shape
    return 2.0 * batch * heads * length * key.shape[-2] * (3 * width + 2 * value.shape[-1])


def _recurrent(sequence: Tensor, input_weight: Tensor, hidden_weight: Tensor, *_rest: Any, **_named: Any) -> float:
    positions = sequence.shape[0] * sequence.shape[1]
    return 2.0 * positions * (input_weight.numel() + hidden_weight.numel())


def _recurrent_backward(sequence: Tensor, *weights: Any, **_named: Any) -> float:
    return 2 * _recurrent(sequence, weights[0], weights[1])


def _grouped(left: Tensor, right: Tensor, *_rest: Any, **_named: Any) -> float:
    # rows sorted by group meet one matrix each, whichever of the operands holds them; of two stacks each pair is one
    pairs = left.shape[0] if left.ndim == right.ndim == 3 else 1
    return 2.0 * pairs * left.shape[-2] * left.shape[-1] * right.shape[-1]


_Formula = Callable[..., float]
_OWN: dict[Any, _Formula] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _attention,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _attention_backward,
    aten._grouped_mm: _grouped,
    aten.mkldnn_rnn_layer: _recurrent,
    aten.mkldnn_rnn_layer_backward: _recurrent_backward,
}


def storage_bytes(values: Sequence[Tensor]) -> dict[int, int]:
    """The distinct storages beneath tensors, by identity, with their bytes."""
    found: dict[int, int] = {}
    for tensor in values:
        if tensor.layout is torch.strided:
            storage = tensor.untyped_storage()
            found[storage._cdata] = storage.nbytes()
        else:
            found[id(tensor)] = tensor.numel() * tensor.element_size()
    return found


def kept_apart(values: Sequence[Tensor]) -> list[Any]:
    """What to hold so that no other storage gets the identity of one beneath these tensors; their memory may go."""
    return [StorageWeakRef(tensor.untyped_storage()) if tensor.layout is torch.strided else tensor for tensor in values]
