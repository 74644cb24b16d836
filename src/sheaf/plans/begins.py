"""How a plan says where a pipeline's stages are cut: blocks in each, or the module with which each later one begins."""

import re
from functools import lru_cache


@lru_cache(maxsize=4096)
def counts_of(stages: str) -> tuple[int, ...]:
    """Blocks of each stage, where all that is written are numbers.

    >>> counts_of("3:4"), counts_of("layers.4.norm")
    ((3, 4), ())
    """
    return tuple(int(part) for part in stages.split(":")) if _counts(stages) else ()


@lru_cache(maxsize=4096)
def begins_of(stages: str) -> tuple[str, ...]:
    """The modules with which the second stage and each later one begin, where any is named.

    >>> begins_of("3:4"), begins_of("encoder.5:decoder.2.look")
    ((), ('encoder.5', 'decoder.2.look'))
    """
    return tuple(stages.split(":")) if stages and not _counts(stages) else ()


def uncuttable(stages: str, *, pp: int, virtual: int) -> list[str]:
    """What is wrong with how the stages are written.

    >>> uncuttable("3:4", pp=2, virtual=1), uncuttable("layers.4.norm", pp=2, virtual=1)
    ([], [])
    """
    if not stages:
        return []
    counts, begins, wanted = counts_of(stages), begins_of(stages), pp * virtual
    why = ""
    if begins and (re.fullmatch(r"[\d:\s-]*", stages) or not all(re.fullmatch(r"\S+", name) for name in begins)):
        why = ": write the number of blocks of each stage, such as 3:4, or the module with which each later one begins"
    elif len(set(begins)) < len(begins):
        why = " names a module twice: each stage begins with one of its own"
    elif begins and len(begins) != wanted - 1:
        why = (
            f" names where {len(begins)} later stages begin, and pp={pp} with virtual={virtual} has {wanted} in all: "
            "name one module for each but the first"
        )
    elif counts and len(counts) != wanted:
        why = (
            f" names {len(counts)} stages, pp={pp} with virtual={virtual} has {wanted}: write one number per stage, or "
            "the module with which each later one begins"
        )
    return [f"stages={stages}{why}"] if why else []


def _counts(stages: str) -> bool:
    return re.fullmatch(r"[1-9]\d*(:[1-9]\d*)*", stages) is not None
