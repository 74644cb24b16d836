"""What can be done to tokens while they are at their experts; whatever has no rule here brings them back first.

Rows of all replicas are treated alike, so a rule may use nothing that a replica found from its own microbatch, unless
it sends that along.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from sheaf.split.places import Sorted, Stacked
from sheaf.split.registry import FALLBACK, SENT, getter, is_inplace, rule
from sheaf.split.rules import about
from sheaf.split.rules.elementwise import _KNOWN
from sheaf.split.sent import Sent
from sheaf.split.tensor import Split

Given = tuple[Any, ...]
Named = dict[str, Any]


@rule(*(getter(name) for name in about._ABOUT if hasattr(Tensor, name)), into=SENT)
@rule("size", "dim", "numel", "nelement", "ndimension", "is_floating_point", "is_complex", "element_size", into=SENT)
@rule("get_device", Tensor.__len__, into=SENT)
def told(mode: Any, function: Callable[..., Any], args: Given, kwargs: Named) -> Any:
    """What is true of the microbatch's own tensor."""
    return function(*args, **kwargs) if isinstance(args[0], Sent) else FALLBACK


@rule(getter("requires_grad"), getter("grad_fn"), getter("is_leaf"), into=SENT)
def told_local(mode: Any, function: Callable[..., Any], args: Given, kwargs: Named) -> Any:
    """What is true of the rows that autograd knows."""
    return function(args[0].local, *args[1:], **kwargs) if isinstance(args[0], Sent) else FALLBACK


@rule("is_contiguous", into=SENT)
def is_contiguous(mode: Any, function: Callable[..., Any], args: Given, kwargs: Named) -> Any:
    """A product's result is."""
    return True if isinstance(args[0], Sent) and len(args) == 1 and not kwargs else FALLBACK


@rule("new_empty", "new_zeros", "new_ones", "new_full", "new_tensor", into=SENT)
def new(mode: Any, function: Callable[..., Any], args: Given, kwargs: Named) -> Any:
    """A fresh tensor of the same kind, this replica's own."""
    return function(args[0].local, *args[1:], **kwargs) if isinstance(args[0], Sent) else FALLBACK


# Products -----------------------------------------------------------------------------------------------------------


@rule("bmm", "matmul", "__matmul__", into=SENT)
def matmul(mode: Any, function: Callable[..., Any], args: Given, kwargs: Named) -> Any:
    """Rows of each expert times its matrix: (experts, *middle, in) and (experts, *1, in, out)."""
    if len(args) != 2 or kwargs:
        return FALLBACK
    left, right = args
    if not _is_stack(right) or left.ndim != right.ndim or left.ndim < 3 or left.shape[0] != right.shape[0]:
        return FALLBACK
    if any(size != 1 for size in right.shape[1:-2]):
        return FALLBACK
    return _product(mode, left, right, right.local.flatten(0, -3), "matmul")


@rule("baddbmm", into=SENT)
def baddbmm(mode: Any, function: Callable[..., Any], args: Given, kwargs: Named) -> Any:
    """A product plus something."""
    if len(args) != 3 or kwargs:
        return FALLBACK
    product = matmul(mode, torch.bmm, args[1:], {})
    if product is FALLBACK:
        return FALLBACK
    total = elementwise(mode, torch.add, (args[0], product), {})
    return torch.add(mode.whole(args[0], "baddbmm"), mode.back(product)) if total is FALLBACK else total


@rule("einsum", into=SENT)
def einsum(mode: Any, function: Callable[..., Any], args: Given, kwargs: Named) -> Any:
    """``e...k,ekh->e...h`` with its letters in any order, and any names."""
    operands: Sequence[Any] = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    if not isinstance(args[0], str) or len(operands) != 2:
        return FALLBACK
    flipped = _is_stack(operands[0])
    tokens, stack = operands[::-1] if flipped else operands
    found = _letters(args[0].replace(" ", ""), flipped=flipped)
    if found is None or not _is_stack(stack) or isinstance(tokens, Split) or not _by_expert(tokens):
        return FALLBACK
    given, matrix, result, wanted, order = found
    alike = [tokens.shape[given.index(one)] == stack.shape[matrix.index(one)] for one in (wanted[0], wanted[-1])]
    if not all(alike) or (isinstance(tokens, Sent) and given != wanted):
        return FALLBACK
    if given != wanted:
        tokens = tokens.permute([given.index(letter) for letter in wanted])
    matrices = stack.local if matrix[1] == wanted[-1] else stack.local.transpose(1, 2)
    made = _product(mode, tokens, stack, matrices, "einsum")
    return made if result == order else mode.back(made).permute([order.index(letter) for letter in result])


def _letters(equation: str, *, flipped: bool) -> tuple[str, str, str, str, str] | None:
    """Letters of the tokens, of the stack and of the result; the orders in which those of the first and last would be
    expert, rows, and width. None where it is no product of tokens with a stack of matrices.

    >>> _letters("gecm,emh->gech", flipped=False)
    ('gecm', 'emh', 'gech', 'egcm', 'egch')
    """
    given, arrow, result = equation.partition("->")
    left, _, right = given.partition(",")
    if flipped:
        left, right = right, left
    distinct = all(len(set(letters)) == len(letters) for letters in (left, right, result))
    if not arrow or "." in equation or "," in right or len(right) != 3 or not distinct:
        return None
    expert = right[0]
    inner = [letter for letter in right[1:] if letter in left and letter not in result]
    outer = [letter for letter in right[1:] if letter in result and letter not in left]
    if expert not in left or expert not in result or len(inner) != 1 or len(outer) != 1:
        return None
    rows = "".join(letter for letter in left if letter not in (expert, inner[0]))
    if set(result) != {expert, *rows, *outer}:
        return None
    return left, right, result, expert + rows + inner[0], expert + rows + outer[0]


def _product(mode: Any, tokens: Tensor, stack: Split, matrices: Tensor, why: str) -> Sent:
    if not isinstance(tokens, Sent):
        kind = tokens.device.type
        if torch.is_autocast_enabled(kind) and tokens.dtype in (torch.float32, torch.float16, torch.bfloat16):
            tokens = tokens.to(torch.get_autocast_dtype(kind))  # as the product would; half the bytes
        tokens = mode.send(tokens, stack, why)
    assert isinstance(tokens, Sent)
    return tokens.like(torch.bmm(tokens.local, matrices))


@rule("_grouped_mm", into=SENT)
def grouped(mode: Any, function: Callable[..., Any], args: Given, kwargs: Named) -> Any:
    """Rows sorted by expert times their experts' matrices: (rows, in), (experts, in, out), and where rows end."""
    given = dict(zip(("input", "mat2", "offs", "bias", "out_dtype"), args, strict=False)) | kwargs
    tokens, stack, ends = given.pop("input"), given.pop("mat2"), given.pop("offs", None)
    fits = _is_stack(stack) and stack.ndim == 3 and tokens.ndim == 2 and not isinstance(tokens, Split)
    if not fits or ends is None or ends.shape != stack.shape[:1] or any(one is not None for one in given.values()):
        return FALLBACK
    counts = mode.counted(ends, tokens.shape[0])
    if min(counts) < 0 or sum(counts) > tokens.shape[0]:
        return FALLBACK
    if not isinstance(tokens, Sent):
        tokens = mode.send(tokens, stack, "grouped_mm", Sorted(tokens.shape[0], counts))
    places = tokens.places
    if not isinstance(places, Sorted) or places.mine != counts:
        return FALLBACK
    local, matrices = tokens.local, stack.local
    if not local.shape[0]:  # a kernel may want something to multiply
        empty = local.reshape(matrices.shape[0], 0, local.shape[-1])
        return tokens.like(torch.bmm(empty, matrices).flatten(0, 1))
    ends = torch.tensor(places.ends(stack.cut, mode.team.rank), dtype=torch.int32, device=local.device)
    return tokens.like(function(local, matrices, offs=ends))


def _by_expert(tokens: Tensor) -> bool:
    """Whether the first dimension of tokens is that of experts."""
    return not isinstance(tokens, Sent) or isinstance(tokens.places, Stacked)


def _is_stack(value: Any) -> bool:
    return isinstance(value, Split) and value.axis == 0 and value.cut.outer == 1


# Each element or row for itself -------------------------------------------------------------------------------------


@rule(*_KNOWN, into=SENT)
def elementwise(  # noqa: PLR0911 - one for each kind of case
    mode: Any, function: Callable[..., Any], args: Given, kwargs: Named
) -> Any:
    """Elements at the same places; what is one per expert is there, what is one per row or for all is sent along."""
    if kwargs.get("out") is not None or (function is torch.where and len(args) + len(kwargs) == 1):
        return FALLBACK
    tensors = [value for value in (*args, *kwargs.values()) if isinstance(value, Tensor)]
    lead = next((tensor for tensor in tensors if isinstance(tensor, Sent)), None)
    if is_inplace(function) and not isinstance(args[0], Sent):
        return FALLBACK
    if lead is None:
        found = _to_send(mode, tensors)
        if found is None:
            return FALLBACK
        tokens, stack = found
        lead = mode.send(tokens, stack, function.__name__)
        args = tuple(lead if value is tokens else value for value in args)
        kwargs = {key: lead if value is tokens else value for key, value in kwargs.items()}
        tensors = [lead if value is tokens else value for value in tensors]
    written = is_inplace(function)
    if not all(_fits(mode, lead, tensor) or (written and tensor.shape == lead.shape) for tensor in tensors):
        return FALLBACK

    def bring(value: Any) -> Any:
        return _beside(mode, lead, value, function.__name__) if isinstance(value, Tensor) else value

    result = function(*(bring(value) for value in args), **{key: bring(value) for key, value in kwargs.items()})
    if not isinstance(result, Tensor):  # compared with None
        return result
    for tensor in tensors:
        if isinstance(tensor, Sent) and result is tensor.local:
            return tensor
    return lead.like(result)


def _to_send(mode: Any, tensors: Sequence[Tensor]) -> tuple[Tensor, Split] | None:
    """Tokens by expert that meet something of each expert, and what they meet."""
    stack = next((tensor for tensor in tensors if isinstance(tensor, Split) and _is_stack(tensor)), None)
    plain = [tensor for tensor in tensors if not isinstance(tensor, Split) and not mode.is_shared(tensor)]
    fitting = [tensor for tensor in plain if stack is not None and _is_per_expert(stack, tensor)]
    return (fitting[0], stack) if fitting and stack is not None else None


def _is_per_expert(stack: Tensor, tokens: Tensor) -> bool:
    """Whether a stack has one row, or one number, for all rows of an expert."""
    aligned = stack.ndim == tokens.ndim >= 2 and stack.shape[0] == tokens.shape[0] and _by_expert(tokens)
    return aligned and all(size == 1 for size in stack.shape[1:-1]) and stack.shape[-1] in (1, tokens.shape[-1])


def _fits(mode: Any, lead: Sent, tensor: Tensor) -> bool:
    if isinstance(tensor, Sent):
        return tensor.goes_with(lead) and (1 in (tensor.shape[-1], lead.shape[-1]) or tensor.shape == lead.shape)
    if isinstance(tensor, Split):
        return _is_stack(tensor) and _is_per_expert(tensor, lead)
    if mode.is_shared(tensor):
        return tensor.ndim <= lead.ndim and all(size == 1 for size in tensor.shape[:-1])
    return tensor.ndim <= lead.ndim and (tensor.ndim == 0 or tensor.shape[-1] == 1)


def _beside(mode: Any, lead: Sent, tensor: Tensor, why: str) -> Tensor:
    if isinstance(tensor, Sent):
        return tensor.local
    if isinstance(tensor, Split):
        return tensor.local.reshape(tensor.local.shape[0], 1, tensor.local.shape[-1])
    if mode.is_shared(tensor):
        return tensor.reshape(tensor.shape[-1:])
    width = tensor.shape[-1] if tensor.ndim else 1
    along = mode.send(tensor.expand(*lead.shape[:-1], width), lead, why).local
    return along if tensor.dtype == along.dtype else along.to(tensor.dtype)


@rule("to", "type_as", into=SENT)
def converted(mode: Any, function: Callable[..., Any], args: Given, kwargs: Named) -> Any:
    """Of another dtype."""
    first, *rest = args
    if not isinstance(first, Sent):
        return FALLBACK
    others = [value.local if isinstance(value, Split | Sent) else value for value in rest]
    result = function(first.local, *others, **kwargs)
    return first if result is first.local else first.like(result)


@rule(getter("data"), into=SENT)
def data(mode: Any, function: Callable[..., Any], args: Given, kwargs: Named) -> Any:
    """The rows without their history."""
    return args[0].like(args[0].local.detach()) if isinstance(args[0], Sent) else FALLBACK


@rule("dropout", into=SENT)
def dropout(mode: Any, function: Callable[..., Any], args: Given, kwargs: Named) -> Any:
    """Each replica draws for its own microbatch, as it would alone; which elements stay travels along."""
    given = dict(zip(("input", "p", "training"), args, strict=False)) | kwargs
    if "train" in given:
        given["training"] = given.pop("train")
    first, p, training = given["input"], given.get("p", 0.5), given.get("training", True)
    if not isinstance(first, Sent) or given.get("inplace"):
        return FALLBACK
    if not training or p == 0.0:
        return first
    ones = torch.ones(first.shape, dtype=first.local.dtype, device=first.local.device)
    kept = mode.send(F.dropout(ones, p) != 0, first, "dropout").local
    return first.like(first.local * kept.to(first.local.dtype) * (1.0 / (1.0 - p) if p < 1.0 else 0.0))


@rule("softmax", "log_softmax", into=SENT)
def softmax(mode: Any, function: Callable[..., Any], args: Given, kwargs: Named) -> Any:
    """Over the last dimension."""
    given = dict(zip(("input", "dim"), args, strict=False)) | kwargs
    first = given.pop("input")
    if not isinstance(first, Sent) or given.get("dim") not in (-1, first.ndim - 1) or len(args) > 2:
        return FALLBACK
    return first.like(function(first.local, **(given | {"dim": -1})))


@rule("layer_norm", "rms_norm", into=SENT)
def norm(mode: Any, function: Callable[..., Any], args: Given, kwargs: Named) -> Any:
    """Over the last dimension, by weights that all replicas share."""
    first = args[0] if args else kwargs.get("input")
    shape = args[1] if len(args) > 1 else kwargs.get("normalized_shape")
    if not isinstance(first, Sent) or shape is None or len(tuple(shape)) != 1:
        return FALLBACK
    tensors = [value for value in (*args[1:], *kwargs.values()) if isinstance(value, Tensor) and value is not first]
    if not all(mode.is_shared(tensor) for tensor in tensors):
        return FALLBACK
    local = [first.local if value is first else value for value in args]
    named = {key: first.local if value is first else value for key, value in kwargs.items()}
    return first.like(function(*local, **named))


@rule("mean", "sum", "amax", "amin", into=SENT)
def reduced(mode: Any, function: Callable[..., Any], args: Given, kwargs: Named) -> Any:
    """Over the last dimension, which stays."""
    given = dict(zip(("input", "dim", "keepdim"), args, strict=False)) | kwargs
    first, dim = given.get("input"), given.get("dim")
    dim = dim[0] if isinstance(dim, list | tuple) and len(dim) == 1 else dim
    if not isinstance(first, Sent) or dim not in (-1, first.ndim - 1) or not given.get("keepdim"):
        return FALLBACK
    return first.like(function(first.local, -1, keepdim=True))


@rule("chunk", "split", "tensor_split", into=SENT)
def pieces(mode: Any, function: Callable[..., Any], args: Given, kwargs: Named) -> Any:
    """Of the last dimension."""
    first = args[0] if args else None
    dim = args[2] if len(args) > 2 else kwargs.get("dim", 0)
    if not isinstance(first, Sent) or len(args) < 2 or dim not in (-1, first.ndim - 1):
        return FALLBACK
    return tuple(first.like(piece) for piece in function(first.local, args[1], -1))


@rule("glu", into=SENT)
def glu(mode: Any, function: Callable[..., Any], args: Given, kwargs: Named) -> Any:
    """Halves of the last dimension, one the gate of the other."""
    first = args[0] if args else None
    dim = args[1] if len(args) > 1 else kwargs.get("dim", -1)
    if not isinstance(first, Sent) or dim not in (-1, first.ndim - 1):
        return FALLBACK
    return first.like(function(first.local, -1))


@rule("__getitem__", into=SENT)
def item(mode: Any, function: Callable[..., Any], args: Given, kwargs: Named) -> Any:
    """A slice of the last dimension, all of the others."""
    first, index = args
    if not isinstance(first, Sent) or not isinstance(index, tuple) or not isinstance(index[-1], slice):
        return FALLBACK
    whole = slice(None)
    others = index[:-1]
    is_full = others == (Ellipsis,) or (len(index) == first.ndim and all(one == whole for one in others))
    return first.like(first.local[..., index[-1]]) if is_full else FALLBACK
