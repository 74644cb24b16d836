"""Products: each dimension of each operand has a letter, and a cut letter is either kept or summed over.

A letter that the result keeps makes the result a slice; one that is summed over makes partial sums, to be added up.
A parameter that is free to be cut is cut by the summed letter where its partner is cut there (rows), else by its own
letter in the result (columns).
"""

from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional as F

from sheaf.split.registry import FALLBACK, rule
from sheaf.split.rules.elementwise import ask_alike, converted, elementwise
from sheaf.split.tensor import Split

Compute = Callable[[Sequence[Tensor]], Tensor]


def product(
    mode: Any, operands: Sequence[Tensor], letters: Sequence[str], result: str, compute: Compute, why: str
) -> Any:
    """``compute`` (over the operands' slices) where operand *i* has dimensions ``letters[i]``, and gives ``result``.

    Letters of broadcast dimensions (size 1 where another operand has more) must be left out of what they broadcast
    to: give them letters of their own.
    """
    lead = _leader(mode, operands, letters, result)
    if lead is None:
        return compute(operands)
    place = next(index for index, operand in enumerate(operands) if operand is lead[0])
    split, letter = lead[1], letters[place][lead[1].axis]
    local: list[Tensor] = []
    for index, (operand, named) in enumerate(zip(operands, letters, strict=True)):
        dim = named.find(letter)
        if index == place:
            local.append(split.local)
        elif dim < 0:
            local.append(mode.enter(operand, why))
        else:
            local.append(mode.part(operand, dim, split.cut, why))
    made = compute(local)
    if letter not in result:
        return mode.add_up(made, why)
    return split.like(made, dim=result.index(letter))


def _leader(mode: Any, operands: Sequence[Tensor], letters: Sequence[str], result: str) -> tuple[Tensor, Split] | None:
    """The operand whose cut the others follow, and its slice: a parameter that is cut before anything that moves."""
    found = [(operand, named[operand.axis]) for operand, named in zip(operands, letters, strict=True) if _cut(operand)]
    for operand, _ in found:
        if operand.held:
            return operand, operand
    for index, (one, letter) in enumerate(found):
        for other, other_letter in found[index + 1 :]:
            if letter == other_letter and one.cut == other.cut:
                return one, one
            if letter == other_letter:
                ask_alike(mode, one, other)
    rows = [operand for operand, letter in found if letter not in result]
    if rows:
        return rows[0], rows[0]
    if not found or mode.sequence:
        columns = _columns(mode, operands, letters, result)
        if columns is not None:
            return columns
    return (found[0][0], found[0][0]) if found else None


def _columns(mode: Any, operands: Sequence[Tensor], letters: Sequence[str], result: str) -> tuple[Tensor, Split] | None:
    """Cut a parameter by a letter that only it has, and the result keeps."""
    for index in reversed(range(len(operands))):
        others = "".join(named for place, named in enumerate(letters) if place != index)
        for dim, letter in enumerate(letters[index]):
            if letter in result and letter not in others:
                proposed = mode.propose(operands[index], dim)
                if proposed is not None:
                    return operands[index], proposed
                break
    return None


def _cut(operand: Tensor) -> TypeGuard[Split]:
    return isinstance(operand, Split)


@rule(F.linear, torch._C._nn.linear)  # pyright: ignore[reportAttributeAccessIssue]
def linear(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``input`` times the transposed ``weight`` plus ``bias``."""
    given = dict(zip(("input", "weight", "bias"), args, strict=False)) | kwargs
    tensor, weight, bias = given["input"], given["weight"], given.get("bias")
    if weight.ndim != 2:
        return FALLBACK
    rows = _LETTERS[: tensor.ndim - 1]
    out = product(
        mode, (tensor, weight), (rows + "y", "zy"), rows + "z", lambda local: F.linear(local[0], local[1]), "linear"
    )
    return out if bias is None else biased(mode, out, bias)


def biased(mode: Any, out: Tensor, bias: Tensor) -> Any:
    """A product plus its bias, as wide as the product is: under autocast the bias is wider."""
    made = elementwise(mode, torch.add, (out, bias), {})
    return made if made.dtype == out.dtype else converted(mode, Tensor.to, (made, out.dtype), {})


@rule("matmul", "mm", "bmm", "mv", "dot", "__matmul__", "__rmatmul__")
def matmul(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The last two dimensions multiplied, those before them broadcast."""
    if kwargs.get("out") is not None or len(args) < 2:
        return FALLBACK
    left, right = args[:2] if function.__name__ != "__rmatmul__" else (args[1], args[0])
    named = _matmul_letters(left, right)
    return product(mode, (left, right), named[:2], named[2], lambda local: torch.matmul(*local), "matmul")


@rule("addmm", "baddbmm", "addbmm")
def addmm(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A product plus something broadcast."""
    if kwargs or len(args) != 3 or function.__name__ == "addbmm":
        return FALLBACK
    added, left, right = args
    return elementwise(mode, torch.add, (matmul(mode, torch.matmul, (left, right), {}), added), {})


@rule("einsum")
def einsum(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Any product written with letters; without ellipsis and repeated letters."""
    if not isinstance(args[0], str) or "." in args[0]:
        return FALLBACK
    operands = args[1] if len(args) == 2 and isinstance(args[1], list | tuple) else args[1:]
    equation = args[0].replace(" ", "")
    inputs, arrow, result = equation.partition("->")
    letters = inputs.split(",")
    if not arrow:
        result = "".join(sorted(letter for letter in set(inputs) - {","} if inputs.count(letter) == 1))
    sizes: dict[str, int] = {}
    for operand, named in zip(operands, letters, strict=True):
        if len(set(named)) < len(named):
            return FALLBACK
        for letter, size in zip(named, operand.shape, strict=True):
            if sizes.setdefault(letter, size) != size:
                return FALLBACK
    return product(mode, operands, letters, result, lambda local: torch.einsum(f"{inputs}->{result}", *local), "einsum")


@rule(F.embedding)
def embedding(mode: Any, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """Rows of a table by number; a worker that holds some of the rows gives zeros for the others."""
    names = ("input", "weight", "padding_idx", "max_norm", "norm_type", "scale_grad_by_freq", "sparse")
    given = dict(zip(names, args, strict=False)) | kwargs
    indices, weight, padding = given["input"], given["weight"], given.get("padding_idx")
    if given.get("max_norm") is not None or given.get("scale_grad_by_freq") or given.get("sparse"):
        return FALLBACK
    if isinstance(indices, Split):
        table = mode.enter(weight, "embedding")
        return indices.like(F.embedding(indices.local, table, padding))
    table = weight if isinstance(weight, Split) else mode.propose(weight, 0)
    if table is None:
        return F.embedding(indices, weight, padding)
    if table.axis == 1:
        local = F.embedding(indices, table.local, padding)
        return table.like(local, dim=indices.ndim)
    if table.cut.outer != 1:
        return FALLBACK
    rows, first = table.local.shape[0], table.cut.offset(mode.team.rank)
    if not rows:  # stays part of the graph, so that every worker's backward meets the same collectives
        found = table.local.new_zeros((*indices.shape, table.shape[1])) + table.local.sum()
    else:
        inside = (indices >= first) & (indices < first + rows)
        own = (indices - first).clamp(0, rows - 1)
        if padding is not None:
            padding = padding % weight.shape[0]
        found = F.embedding(own, table.local)
        if padding is not None and first <= padding < first + rows:
            # the row itself is read, and gets no gradient
            found = torch.where((indices == padding).unsqueeze(-1), found.detach(), found)
        found = found.masked_fill(~inside.unsqueeze(-1), 0.0)
    return mode.add_up(found, "embedding")


_LETTERS = "abcdefghijklmnopq"


def _matmul_letters(left: Tensor, right: Tensor) -> tuple[str, str, str]:
    """Letters of both operands and of the result of ``torch.matmul``; broadcast dimensions get their own."""
    ndim = max(left.ndim, right.ndim, 2)
    batch = [_LETTERS[place] for place in range(ndim - 2)]
    spare = iter("rstuvw" + "ABCDEFGH")

    def named(tensor: Tensor, matrix: str) -> str:
        own = tensor.shape[: max(0, tensor.ndim - 2)]
        letters: list[str] = []
        for place, size in enumerate(own, start=ndim - 2 - len(own)):
            letters.append(next(spare) if size == 1 else batch[place])
        return "".join(letters) + matrix

    left_letters = named(left, "y" if left.ndim == 1 else "xy")
    right_letters = named(right, "y" if right.ndim == 1 else "yz")
    kept = "".join(
        letter if letter in left_letters + right_letters else _one(left_letters, right_letters, place, ndim)
        for place, letter in enumerate(batch)
    )
    return left_letters, right_letters, kept + ("x" if left.ndim > 1 else "") + ("z" if right.ndim > 1 else "")


def _one(left: str, right: str, place: int, ndim: int) -> str:
    """A batch dimension of size 1 in both operands, or in the only one that has it."""
    for letters in (left, right):
        at = place - (ndim - 2) + len(letters) - 2
        if 0 <= at < len(letters) - 2:
            return letters[at]
    return "?"
