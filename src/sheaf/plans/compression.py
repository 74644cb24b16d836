"""How gradients are made smaller on their way: what a plan's ``compress`` says, and how many bytes it leaves."""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

from sheaf.errors import PlanError, nearest

KINDS = ("none", "bf16", "fp16", "int8", "topk", "powersgd")
DEFAULT_RATIO, DEFAULT_RANK = 0.01, 4
INT8_CHUNK = 256  # numbers that share a scale


@dataclass(frozen=True)
class Compression:
    """``kind`` is one of ``KINDS``; ``ratio`` the share of numbers that top-k sends, ``rank`` PowerSGD's.

    >>> Compression.parse("topk:0.05")
    Compression(kind='topk', ratio=0.05, rank=4)
    >>> Compression.parse("powersgd:2").rank
    2
    """

    kind: str = "none"
    ratio: float = DEFAULT_RATIO
    rank: int = DEFAULT_RANK

    @classmethod
    def parse(cls, text: str) -> "Compression":
        """Read what ``compress=`` says. Raises PlanError with what was wanted."""
        kind, _, setting = text.partition(":")
        if kind not in KINDS:
            raise PlanError(f"compress={text}: {nearest(kind, KINDS)}")
        if not setting:
            if ":" in text:
                raise PlanError(f"compress={text}: a setting belongs after the colon, or drop the colon")
            return cls(kind)
        if kind == "topk":
            if not re.fullmatch(r"0?\.\d+|1(\.0*)?", setting) or float(setting) == 0:
                raise PlanError(f"compress={text}: write the share of numbers to send, such as topk:0.01")
            return cls(kind, ratio=float(setting))
        if kind == "powersgd":
            if not re.fullmatch(r"[1-9]\d*", setting):
                raise PlanError(f"compress={text}: write the rank of the factors, such as powersgd:4")
            return cls(kind, rank=int(setting))
        raise PlanError(f"compress={text}: {kind} has no setting: write compress={kind}")

    def messages(
        self, shapes: Sequence[tuple[int, ...]], itemsize_bytes: int, workers: int
    ) -> tuple[tuple[str, int], ...]:
        """The collectives that sum tensors of ``shapes`` laid end to end: each one's name, and its size in bytes.

        >>> Compression("bf16").messages([(100,)], 4, 2)
        (('reduce_scatter', 200), ('all_gather', 200))
        >>> Compression("powersgd", rank=2).messages([(100, 50), (10,)], 4, 2)
        (('all_reduce', 840), ('all_reduce', 400))
        """
        numbers = sum(math.prod(shape) for shape in shapes)
        if self.kind == "none":
            return (("all_reduce", numbers * itemsize_bytes),)
        if self.kind == "topk":
            return (("all_gather", workers * top_count(self.ratio, numbers) * (itemsize_bytes + 4)),)
        if self.kind == "powersgd":
            found = [matrix(shape, self.rank) for shape in shapes]
            left = sum(one[0] * self.rank for one in found if one)
            right = sum(one[1] * self.rank for one in found if one)
            whole = sum(math.prod(shape) for shape, one in zip(shapes, found, strict=True) if not one)
            sizes = ((left + whole) * itemsize_bytes, right * itemsize_bytes)
            return tuple(("all_reduce", size) for size in sizes if size)
        shard = math.ceil(numbers / workers / INT8_CHUNK) * (INT8_CHUNK + 4) if self.kind == "int8" else 0
        size = workers * (shard or math.ceil(numbers / workers) * 2)
        return (("reduce_scatter", size), ("all_gather", size))


def uncodable(text: str, *, alike: int, zero: int) -> list[str]:
    """Every rule that a plan with this ``compress`` breaks, of whose workers ``alike`` hold the same parameters."""
    try:
        coded = Compression.parse(text).kind != "none"
    except PlanError as error:
        return list(error.broken)
    if coded and (alike == 1 or zero):
        return [f"compress={text} makes smaller what replicas sum in whole: use it with dp=2 or more and zero=0"]
    return []


def top_count(ratio: float, numbers: int) -> int:
    """How many numbers top-k sends of so many."""
    return max(1, round(ratio * numbers))


def matrix(shape: Sequence[int], rank: int) -> tuple[int, int] | None:
    """The (rows, columns) as which PowerSGD takes a tensor; None where two factors would not be smaller.

    A tensor of more dimensions is a matrix of its first by all others.
    """
    if len(shape) < 2:
        return None
    rows, columns = shape[0], math.prod(shape[1:])
    return (rows, columns) if rank * (rows + columns) < rows * columns else None
