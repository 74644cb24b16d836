"""What is known of a model before it runs: values only, as the cost model and the executors read them."""

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

LOSS = "<loss>"  # the name of the block that stands for the loss function
STATE_BYTES_PER_BYTE = 2.0  # of an optimizer that nobody looked at: Adam's two moments
GLUE = "<glue>"  # the name of the block that stands for work done in no block: the root's own operations


def within(module: str, block: str) -> bool:
    """Whether a module is inside of a block, by their names; the model's own is empty.

    >>> within("a.1", "a"), within("ab", "a"), within("a", "a"), within("a", "")
    (True, False, False, True)
    """
    return module != block and (not block or module.startswith(f"{block}."))


@dataclass(frozen=True)
class ParameterFact:
    """One parameter: its canonical name, shape, and the other names under which modules share it."""

    name: str
    shape: tuple[int, ...]
    dtype: str  # "float32", as in torch.float32
    itemsize_bytes: int
    requires_grad: bool
    aliases: tuple[str, ...] = ()

    @cached_property
    def num_elements(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)

    @cached_property
    def size_bytes(self) -> int:
        """What it weighs."""
        return self.num_elements * self.itemsize_bytes


@dataclass(frozen=True)
class TableFact:
    """A parameter whose rows are looked up. ``distinct``: how many different rows 1, 2, 3, ... microbatches of
    ``samples`` look up together, the mean of those that were sampled. ``whole``: something else uses it too, so that
    every row may have a gradient.
    """

    name: str
    rows: int
    row_bytes: int
    samples: int
    distinct: tuple[float, ...]
    whole: bool = False

    def touched(self, samples: float) -> float:
        """Different rows that so many samples look up; between and beyond what was sampled, by a power law."""
        known, wanted = self.distinct, samples / self.samples
        if not known or not wanted:
            return 0.0
        place = min(max(1, int(wanted)), max(1, len(known) - 1))
        if place == len(known):
            return min(float(self.rows), known[-1] * min(1.0, wanted))
        low, high = known[place - 1], known[place]
        power = math.log(high / low) / math.log((place + 1) / place) if low > 0 else 1.0
        return min(float(self.rows), low * (wanted / place) ** power)


@dataclass(frozen=True)
class BufferFact:
    """One buffer; ``updated`` when a training forward changes it."""

    name: str
    size_bytes: int
    persistent: bool
    updated: bool
    module_kind: str


@dataclass(frozen=True)
class BlockFact:
    """One block of the model, for one microbatch. Every parameter belongs to exactly one block.

    ``*_flops`` are floating-point operations of matrix and convolution kernels; ``*_bytes`` what all kernels of that
    direction read and write; ``saved_bytes`` what autograd keeps for backward beyond parameters and the block's own
    inputs; ``signature`` is equal for blocks that do the same work on the same shapes.
    """

    name: str
    kind: str
    parameters: tuple[str, ...]
    forward_flops: float
    backward_flops: float
    forward_bytes: float
    backward_bytes: float
    forward_kernels: int
    backward_kernels: int
    saved_bytes: int
    input_bytes: int
    output_bytes: int
    parameter_bytes: int
    signature: str
    calls: int = 1  # 0: the model uses its parameters without calling it, or not at all
    draws: bool = False
    batch_dependent: bool = False
    saved_input_bytes: int = 0  # of its inputs, what it keeps for backward and no earlier block has counted
    composite: bool = True  # made of other modules; one that is not keeps little but its input, and is not recomputed
    fresh_input_bytes: int = 0  # of its inputs, what is no earlier block's input: kept when a block is recomputed
    crossing_bytes: int | None = None  # computed up to here and used later, whoever gave it; None: not known


@dataclass(frozen=True)
class ModelFacts:
    """Everything the planner knows of a task's model at one microbatch size.

    ``blocks`` are in forward order and end with GLUE and LOSS. ``draws`` and ``batch_dependent`` name modules.
    ``begins`` are modules inside of blocks, which are told of as what they are made of (see ``graph.cut``); their
    ``output_bytes`` are what crosses behind them.
    """

    samples: int  # per microbatch
    blocks: tuple[BlockFact, ...]
    parameters: tuple[ParameterFact, ...]
    buffers: tuple[BufferFact, ...]
    draws: tuple[str, ...]
    batch_dependent: tuple[str, ...]
    batch_bytes: int  # one collated microbatch
    tables: tuple[TableFact, ...] = ()  # parameters whose rows are looked up
    begins: tuple[str, ...] = ()

    @cached_property
    def num_parameters(self) -> int:
        """Distinct parameter elements, shared ones once."""
        return sum(parameter.num_elements for parameter in self.parameters)

    @cached_property
    def parameter_bytes(self) -> int:
        """Bytes of all distinct parameters."""
        return sum(parameter.size_bytes for parameter in self.parameters)

    @cached_property
    def trainable_bytes(self) -> int:
        """Bytes of the parameters that get gradients."""
        return sum(parameter.size_bytes for parameter in self.parameters if parameter.requires_grad)

    @cached_property
    def saved_bytes(self) -> int:
        """All that autograd keeps for backward of one microbatch beyond parameters and buffers, each storage once."""
        return sum(block.saved_bytes + block.saved_input_bytes for block in self.blocks)

    @cached_property
    def flops(self) -> float:
        """Forward and backward operations of one microbatch."""
        return sum(block.forward_flops + block.backward_flops for block in self.blocks)

    @cached_property
    def called(self) -> tuple[BlockFact, ...]:
        """The blocks that the model calls, in forward order, without glue and loss."""
        return tuple(block for block in self.blocks if block.name not in (GLUE, LOSS) and block.calls)

    @cached_property
    def places(self) -> dict[str, int]:
        """Where among the parameters each stands, by name."""
        return {parameter.name: place for place, parameter in enumerate(self.parameters)}

    @cached_property
    def shared(self) -> tuple[ParameterFact, ...]:
        """The parameters that have other names too."""
        return tuple(parameter for parameter in self.parameters if parameter.aliases)

    def parameter(self, name: str) -> ParameterFact:
        """The parameter of that canonical name."""
        return next(parameter for parameter in self.parameters if parameter.name == name)

    def block(self, name: str) -> BlockFact:
        """The block of that name."""
        return next(block for block in self.blocks if block.name == name)


@dataclass(frozen=True)
class BlockTime:
    """Measured seconds of one block for one microbatch."""

    forward_seconds: float
    backward_seconds: float


@dataclass(frozen=True)
class Profile:
    """Times measured on a real worker while ``concurrency`` workers of the same host did the same.

    ``blocks`` maps block names (GLUE and LOSS included) to times; ``optimizer_seconds_per_byte`` is the task's own
    optimizer stepping on trainable parameters; ``fetch_seconds`` fetches and collates one microbatch;
    ``host_seconds`` is what a step costs beside all that.
    """

    samples: int
    concurrency: int
    threads: int
    precision: str
    blocks: dict[str, BlockTime]
    optimizer_seconds_per_byte: float
    optimizer_state_bytes_per_byte: float
    fetch_seconds: float
    host_seconds: float
    exposed_seconds: float = 0.0  # communication of a real dp step that nothing hid; 0: not measured
    uneven_seconds: float = 0.0  # of a real dp step, in which equally fast workers waited for the last of them
    collective_factor: float = 1.0  # how much longer a collective takes in a step than when it was measured alone
    overheads: dict[str, float] = field(default_factory=dict[str, float])  # seconds by rehearsed plan: cost.overheads
    cores_taken: float = 0.0  # by other programs while this was measured, of those that the workers wanted

    def to_dict(self) -> dict[str, Any]:
        """What JSON knows; of each block the seconds of forward and of backward."""
        blocks = {name: [time.forward_seconds, time.backward_seconds] for name, time in self.blocks.items()}
        return {**asdict(self), "blocks": blocks}

    @classmethod
    def from_dict(cls, told: Mapping[str, Any]) -> "Profile":
        """What ``to_dict`` gave.

        Raises KeyError, ValueError, TypeError, AttributeError or IndexError for what is not whole.
        """
        return cls(
            samples=int(told["samples"]),
            concurrency=int(told["concurrency"]),
            threads=int(told["threads"]),
            precision=str(told["precision"]),
            blocks={str(name): BlockTime(float(pair[0]), float(pair[1])) for name, pair in told["blocks"].items()},
            optimizer_seconds_per_byte=float(told["optimizer_seconds_per_byte"]),
            optimizer_state_bytes_per_byte=float(told["optimizer_state_bytes_per_byte"]),
            fetch_seconds=float(told["fetch_seconds"]),
            host_seconds=float(told["host_seconds"]),
            exposed_seconds=float(told["exposed_seconds"]),
            uneven_seconds=float(told["uneven_seconds"]),
            collective_factor=float(told["collective_factor"]),
            overheads={str(plan): float(seconds) for plan, seconds in told["overheads"].items()},
            cores_taken=float(told.get("cores_taken", 0.0)),
        )
