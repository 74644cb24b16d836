"""What software reaches on a machine: named constants with where they come from, read from the cluster room's files."""

import json
import math
import re
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import cache
from importlib import resources
from pathlib import Path
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Constants:
    """Shares of what the machine's file says, and times that no file of a machine can know; all above zero."""

    matmul: float  # of the matrix rate, in large products
    grouped: float  # further share of it in the experts' products, computed in groups of unlike sizes
    narrow: float  # further share of it with eight bits and fewer, where copies must be scaled and cast
    attention: float  # of the matrix rate, in fused attention
    memory: float  # of the memory bandwidth, in element-wise kernels
    layer_seconds: float  # host: launching one layer's forward
    lockstep: float  # further share of it where all workers of a host wait for each other in each layer
    intra: float  # of the link inside a host, in collectives of a split layer
    intra_seconds: float  # one such collective, of no bytes
    inter: float  # of the link between hosts
    exposed: float  # of gradient and parameter traffic that could hide, does not
    exposed_tensor: float  # of collectives of a split layer
    exposed_experts: float  # of tokens sent to experts and back
    optimizer: float  # of the memory bandwidth, in the update
    step_seconds: float  # once a step: fetching data, clipping, scaling, logging
    head: float  # times what projection and loss take by themselves
    transfer: float  # of a stage's message, shown
    spread: float  # slower per doubling of the number of hosts: the slowest of many sets the pace

    @classmethod
    def names(cls) -> tuple[str, ...]:
        """All of them, in order."""
        return tuple(one.name for one in fields(cls))


@dataclass(frozen=True, kw_only=True)
class Stack:
    """A training software: how it is known, and facts of it that are not fitted."""

    name: str
    software: tuple[str, ...] = ()  # patterns of what runs call it; the first stack that matches counts
    notes: tuple[str, ...] = ()  # patterns that a run's notes must match too
    like: str = ""  # the stack whose constants are expected before any run was seen
    flash: bool = True  # attention never writes its scores
    fused_in_halves: bool = False  # scale, mask and softmax of scores are one kernel, for numbers of two bytes alone
    apart: bool = False  # each element-wise operation is a kernel of its own: biases, masks, dropout, sums
    gradient_bytes: int = 2  # of what travels, per parameter
    backward_bytes: int = 0  # per parameter: gradients as backward makes them, kept beside those that are added up
    overlaps: bool = True  # gradients travel during backward
    hides: bool = False  # collectives of a split layer run beside its products
    hides_nothing: bool = False  # such collectives run by themselves, where sequences are split along too
    distributed: bool = False  # each replica updates its shard of the masters though ZeRO is not named
    compiled: bool = False  # element-wise operations are fused
    tf32: bool = False  # products of fp32 numbers run on matrix units that round them
    padded: int = 128  # the vocabulary is filled up to a multiple of this times tp
    padded_whole: int = 0  # the same where layers are not split; 0: as there
    counted: float = 1.0  # share of what a process holds beside its tensors that the stack's figures of memory count
    dropout: bool = False  # masks are kept for backward
    masked: float = 1.0  # share of a masked model's tokens that are projected to the vocabulary
    filled: float = 1.0  # share of a masked model's tokens in long sequences that are no padding, and computed
    recompute: str = "none"  # where the run does not say
    launched: float = 1.0  # share of a layer's kernels that the host launches one by one; the rest are graphs
    sends_beside: bool = False  # tokens travel to experts while another microbatch computes
    scatter: bool = False  # stages send each other 1/tp of a tensor from each worker of a layer
    source: str = ""


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """What a stack's own scripts set for some of its runs though no table says so; patterns must all be found."""

    stack: str
    model: str = ""
    device: str = ""
    precision: str = ""
    facts: dict[str, Any]  # of a Stack, in place of its own
    source: str


@dataclass(frozen=True, kw_only=True)
class Prior:
    """What is expected of a constant, and how far (in natural logarithms) it may be from it before it counts."""

    value: float
    width: float
    source: str


@dataclass(frozen=True)
class Measured:
    """How layers of one shape did beside the model, in runs that were measured: times as long, and how many runs."""

    factor: float
    runs: int


@dataclass(frozen=True)
class Book:
    """All stacks, what is expected of the constants, and what was fitted.

    ``fitted`` holds factors beside what is expected, by stack and kind of device; "" is all of them. A run's constants
    are what is expected times the factors of all that it is: see ``effects``. ``measured`` goes by stack, kind and
    shape of a layer (see ``layer_key``).
    """

    stacks: tuple[Stack, ...]
    priors: dict[str, Prior]
    kernels: dict[str, float]
    recipes: tuple[Recipe, ...] = ()
    memory_priors: dict[str, Prior] = field(default_factory=dict[str, Prior])
    fitted: dict[tuple[str, str], Constants] = field(default_factory=dict[tuple[str, str], Constants])
    measured: dict[tuple[str, str, str], Measured] = field(default_factory=dict[tuple[str, str, str], Measured])
    held: dict[str, dict[str, float]] = field(default_factory=dict[str, dict[str, float]])
    kin: dict[str, tuple[str, ...]] = field(default_factory=dict[str, tuple[str, ...]])  # of a kind of device
    alike: dict[str, str] = field(default_factory=dict[str, str])  # kinds of device that a stack is taken as one on
    loose: dict[str, dict[str, float]] = field(
        default_factory=dict[str, dict[str, float]]
    )  # times a constant's width, by kind

    def stack(self, software: str, notes: Sequence[str] = ()) -> Stack:
        """The stack that a run's words mean."""
        said = " ".join(notes)
        for stack in self.stacks:
            known = any(re.search(pattern, software, re.IGNORECASE) for pattern in stack.software)
            if known and all(re.search(pattern, said, re.IGNORECASE) for pattern in stack.notes):
                return stack
        return self.stacks[-1]

    def facts(self, stack: Stack, *, model: str, device: str, precision: str) -> Stack:
        """The stack as the first of its recipes sets it for such a run; as it is where there is none."""
        for recipe in self.recipes:
            said = ((recipe.stack, stack.name), (recipe.model, model), (recipe.device, device))
            if all(re.search(pattern, word, re.IGNORECASE) for pattern, word in (*said, (recipe.precision, precision))):
                return replace(stack, **recipe.facts)
        return stack

    def memory(self, stack: Stack) -> dict[str, float]:
        """What an allocator holds beside what is asked of it: this stack's, one's it is like, or all others'."""
        by_name = {each.name: each for each in self.stacks}
        looked: Stack | None = stack
        while looked is not None:
            if looked.name in self.held:
                return self.held[looked.name]
            looked = by_name.get(looked.like)
        return self.held.get("") or {name: prior.value for name, prior in self.memory_priors.items()}

    def expected(self) -> Constants:
        """Where nothing is known of a stack or a device."""
        return Constants(**{name: prior.value for name, prior in self.priors.items()})

    def constants(self, stack: Stack, kind: str) -> Constants:
        """What is expected, times what was found of every effect that this stack and kind of device share.

        So a stack that no run showed gets what its device and the stacks that it is like do, and a device that no run
        showed what its kin and the stack do elsewhere.
        """
        found = [self.fitted[effect] for effect in self.effects(stack, kind) if effect in self.fitted]
        return Constants(
            **{
                name: prior.value * math.prod(getattr(each, name) for each in found)
                for name, prior in self.priors.items()
            }
        )

    def effects(self, stack: Stack, kind: str) -> tuple[tuple[str, str], ...]:
        """Everything that says something of its constants, from all runs to this stack on this device."""
        stacks = [each.name for each in self.lineage(stack)]
        kinds = [*self.kin.get(kind, ()), kind]
        one = self.alike.get(kind, kind)
        return (
            ("", ""),
            *(("", each) for each in kinds),
            *((each, "") for each in stacks),
            *((each, one) for each in stacks),
        )

    def lineage(self, stack: Stack) -> tuple[Stack, ...]:
        """The stacks that it is like, the furthest first, and itself."""
        by_name = {each.name: each for each in self.stacks}
        found = [stack]
        while found[0].like:
            found.insert(0, by_name[found[0].like])
        return tuple(found)


def kind_of(device: str) -> str:
    """The generation of a device, by its name.

    >>> kind_of("A100-SXM4-80GB"), kind_of("GB300"), kind_of("TPU v5e")
    ('A100', 'GB300', 'TPU v5e')
    """
    found = re.match(r"[A-Z]+\d+(?=-|$)", device)
    return found[0] if found else device


@cache
def book() -> Book:
    """What ships: ``stacks.toml`` and ``fitted.json`` of the cluster room."""
    folder = resources.files("sheaf.cluster")
    table = tomllib.loads((folder / "stacks.toml").read_text(encoding="utf-8"))
    known = _fitted_table()
    return Book(
        stacks=tuple(Stack(**_tuples(one)) for one in table["stacks"]),
        recipes=tuple(Recipe(**one) for one in table["recipes"]),
        priors={name: Prior(**one) for name, one in table["priors"].items()},
        kernels=table["kernels"],
        kin={kind: tuple(kin) for kind, kin in table["kin"].items()},
        alike=table["alike"],
        loose=table["loose"],
        memory_priors={name: Prior(**one) for name, one in table["memory"].items()},
        held=known["memory"],
        fitted={
            (one["stack"], one["device"]): Constants(**dict.fromkeys(Constants.names(), 1.0) | one["factors"])
            for one in known["fitted"]
        },
        measured={
            (one["stack"], one["device"], one["layer"]): Measured(one["factor"], one["runs"])
            for one in known["measured"]
        },
    )


def _fitted_table() -> dict[str, Any]:
    path = resources.files("sheaf.cluster") / "fitted.json"
    if not path.is_file():
        return {"fitted": [], "measured": [], "memory": {}}
    return json.loads(path.read_text(encoding="utf-8"))


def _tuples(table: Mapping[str, Any]) -> dict[str, Any]:
    return {name: tuple(value) if isinstance(value, list) else value for name, value in table.items()}


def unfitted(known: Book) -> Book:
    """The same book with nothing fitted."""
    return replace(known, fitted={}, measured={}, held={})


def write_fitted(known: Book, path: Path, source: str) -> None:
    """Write what was fitted as ``book`` reads it; ``source`` says from which runs, and with which command."""
    table = {
        "source": source,
        "fitted": [
            {
                "stack": stack,
                "device": kind,
                "factors": {name: _rounded(getattr(constants, name)) for name in Constants.names()},
            }
            for (stack, kind), constants in sorted(known.fitted.items())
        ],
        "memory": {
            stack: {name: _rounded(value) for name, value in held.items()} for stack, held in sorted(known.held.items())
        },
        "measured": [
            {"stack": stack, "device": kind, "layer": layer, "factor": _rounded(one.factor), "runs": one.runs}
            for (stack, kind, layer), one in sorted(known.measured.items())
        ],
    }
    lines = json.dumps(table, indent=1).replace("\n   ", " ").replace("\n  }", " }")
    path.write_text(lines + "\n", encoding="utf-8")


def _rounded(value: float) -> float:
    return float(f"{value:.4g}")
