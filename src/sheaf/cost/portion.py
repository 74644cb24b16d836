"""What one worker computes and holds of a model under a plan: its blocks, its slices, and measured times of both."""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property

from sheaf.cost.communication import Units, buckets, units
from sheaf.graph.facts import (
    GLUE,
    LOSS,
    STATE_BYTES_PER_BYTE,
    BlockFact,
    BlockTime,
    ModelFacts,
    ParameterFact,
    Profile,
    within,
)
from sheaf.plans import Plan
from sheaf.plans.split import Move, SplitFacts
from sheaf.plans.stages import passed_on


@dataclass(frozen=True, eq=False)
class Portion:
    """Facts and times of a part of a model, and the collectives that splitting its layers needs.

    Parameters are as large as the slices of the worker that holds most; work and activations are those of the busiest.
    ``samples`` is the microbatch size of ``moves``.
    """

    facts: ModelFacts
    profile: Profile | None
    moves: tuple[Move, ...] = ()
    samples: int = 1
    _buckets: dict[int, tuple[int, ...]] = field(default_factory=dict[int, tuple[int, ...]])
    _units: dict[int, Units] = field(default_factory=dict[int, Units])

    @cached_property
    def parameter_bytes(self) -> int:
        """What its parameters weigh."""
        return self.facts.parameter_bytes

    @cached_property
    def trainable_bytes(self) -> int:
        """What those of them weigh that get gradients."""
        return self.facts.trainable_bytes

    @cached_property
    def kept_once(self) -> tuple[float, float]:
        """What each microbatch keeps for backward; beside that, nothing."""
        return float(self.facts.saved_bytes), 0.0

    @cached_property
    def kept_again(self) -> tuple[float, float]:
        """What each microbatch keeps where blocks run again, and beside that what the one that runs again keeps."""
        real = [block for block in self.facts.blocks if block.name not in (GLUE, LOSS)]
        saved = [block.saved_bytes + block.saved_input_bytes for block in real]
        kept = [block.fresh_input_bytes if block.composite else size for block, size in zip(real, saved, strict=True)]
        rest = self.facts.saved_bytes - sum(saved)
        again = [size for block, size in zip(real, saved, strict=True) if block.composite]
        return float(sum(kept) + rest), float(max(again, default=0))

    @cached_property
    def passing_bytes(self) -> int:
        """The gradients of a block's output and of its input, which its backward holds at once: of the largest."""
        return max((block.output_bytes + block.input_bytes for block in self.facts.blocks), default=0)

    def buckets(self, bucket_bytes: int) -> tuple[int, ...]:
        """Sizes of its gradient buckets, in the order they fill."""
        if bucket_bytes not in self._buckets:
            self._buckets[bucket_bytes] = buckets(self.facts, bucket_bytes)
        return self._buckets[bucket_bytes]

    def units(self, bucket_bytes: int) -> Units:
        """Its parameters as ZeRO-2 and 3 move them."""
        if bucket_bytes not in self._units:
            self._units[bucket_bytes] = units(self.facts, bucket_bytes)
        return self._units[bucket_bytes]

    @property
    def state(self) -> float:
        """Bytes of the optimizer's state for a byte of parameters."""
        return self.profile.optimizer_state_bytes_per_byte if self.profile else STATE_BYTES_PER_BYTE

    @property
    def repeated(self) -> frozenset[str]:
        """The blocks that recomputation runs again."""
        return frozenset(block.name for block in self.facts.blocks if block.composite)


def in_part(plan: Plan, block: BlockFact) -> str | None:
    """What the plan says of a block by name, or of any parameter it holds."""
    if not plan.parts or block.name in (GLUE, LOSS):
        return None
    answers = (plan.part(name) for name in (block.name, *block.parameters))
    return next((answer for answer in answers if answer), None)


def scoped(plan: Plan, facts: ModelFacts, split: SplitFacts | None) -> SplitFacts | None:
    """The split as far as the plan asks for it: without the parts kept whole under tp; under dp, its own parts only.

    Raises ValueError when the plan splits layers and no facts say how, or they are of another number of workers.
    """
    parts, degree = plan.split_parts, plan.cp if plan.cp > 1 else plan.split_degree
    if degree == 1:
        return None
    if split is None or split.degree != degree:
        there = "none are given" if split is None else f"those given are of {split.degree}"
        raise ValueError(
            f"{plan} splits layers among {degree} workers; pricing it needs their split facts, and {there}"
        )
    names = {block.name for block in facts.blocks}
    moves = [move if move.block in names else replace(move, block=_owner(names, move.block)) for move in split.moves]
    split = _inherited(split, facts)
    if plan.cp > 1:
        return replace(split, moves=tuple(moves))
    if plan.expert_parts:
        slices = {name: cut for name, cut in split.slices.items() if plan.part(name) == "ep"}
        dealt = {block.name for block in facts.blocks if not slices.keys().isdisjoint(block.parameters)}
        return replace(
            split,
            slices=slices,
            moves=tuple(move for move in moves if move.block in dealt),
            work={name: share for name, share in split.work.items() if name in dealt},
            activations={name: share for name, share in split.activations.items() if name in dealt},
        )
    inside = {block.name for block in facts.blocks if (in_part(plan, block) == "tp") == parts}
    if not parts:
        inside -= {block.name for block in facts.blocks if in_part(plan, block) == "whole"}
    names = {name for block in facts.blocks if block.name in inside for name in block.parameters}
    if parts:
        names = {name for name in names if plan.part(name) == "tp"}
    return replace(
        split,
        slices={name: cut for name, cut in split.slices.items() if name in names},
        moves=tuple(move for move in moves if move.block in inside),
        work={name: share for name, share in split.work.items() if name in inside},
        activations={name: share for name, share in split.activations.items() if name in inside},
    )


def portion(
    facts: ModelFacts,
    profile: Profile | None,
    split: SplitFacts | None,
    names: Collection[str],
    *,
    glue_share: float = 1.0,
    first: bool = True,
    last: bool = True,
    kernel_seconds: float = 0.0,
) -> Portion:
    """A run of blocks as one worker has it.

    The loss belongs to the ``last`` run. The glue's work is shared evenly among runs; its parameters, and those of
    blocks that are never called, are held with the ``first``. A shared parameter is held with every block that uses
    it. Splitting shortens the work of a block, not the launching of its kernels (``kernel_seconds`` each).
    """
    work = split.work if split else {}
    chosen: list[BlockFact] = []
    for block in facts.blocks:
        if block.name == GLUE:
            if glue_share:
                chosen.append(_glue(block, glue_share, holding=first))
        elif block.name == LOSS:
            if last:
                chosen.append(_busiest(block, split))
        elif block.name in names or (first and not block.calls):
            chosen.append(_busiest(block, split))
    present = {block.name for block in chosen}
    blocks = {block.name: block for block in facts.blocks}
    return Portion(
        facts=replace(
            facts,
            blocks=tuple(chosen),
            parameters=_held(facts, chosen, split),
            buffers=tuple(one for one in facts.buffers if _within(one.name, present, blocks, elsewhere=first)),
        ),
        profile=profile
        and replace(
            profile,
            blocks={
                name: _time(time, blocks.get(name), glue_share if name == GLUE else 1.0, work, kernel_seconds)
                for name, time in profile.blocks.items()
                if name in present
            },
        ),
        moves=tuple(move for move in split.moves if move.block in present) if split else (),
        samples=split.samples if split else facts.samples,
    )


def bounded(part: Portion, entering_bytes: int, *, last: bool) -> Portion:
    """A stage of a pipeline: what it receives and what it sends is kept until its backward.

    ``entering_bytes`` cross in front of it, what only passes through it among them; 0 for the first.
    """
    blocks = list(part.facts.blocks)
    inner = [place for place, block in enumerate(blocks) if block.name not in (GLUE, LOSS) and block.calls]
    if not inner:
        return replace(part, _buckets={}, _units={})
    through = 0
    if entering_bytes:
        block = blocks[inner[0]]
        through = max(0, entering_bytes - block.input_bytes)
        received = max(block.input_bytes, entering_bytes)
        blocks[inner[0]] = replace(
            block,
            saved_input_bytes=max(block.saved_input_bytes, received),
            fresh_input_bytes=max(block.fresh_input_bytes, received),
        )
    if not last:
        block = blocks[inner[-1]]
        # What it sends counts with what it receives, as recomputation drops neither.
        sent = max(block.output_bytes, passed_on(block) - through)
        blocks[inner[-1]] = replace(
            block,
            saved_input_bytes=block.saved_input_bytes + sent,
            fresh_input_bytes=block.fresh_input_bytes + sent,
        )
    return replace(part, facts=replace(part.facts, blocks=tuple(blocks)), _buckets={}, _units={})


def together(parts: Sequence[Portion], facts: ModelFacts) -> Portion:
    """Several runs of one worker; ``facts`` of the whole model give the order of parameters."""
    if len(parts) == 1:
        return parts[0]
    held = {parameter.name: parameter for part in parts for parameter in part.facts.parameters}
    buffers = {buffer.name for part in parts for buffer in part.facts.buffers}
    first = parts[0]
    merged = replace(
        facts,
        blocks=tuple(block for part in parts for block in part.facts.blocks),
        parameters=tuple(held[one.name] for one in facts.parameters if one.name in held),
        buffers=tuple(buffer for buffer in facts.buffers if buffer.name in buffers),
    )
    return Portion(merged, first.profile, tuple(move for part in parts for move in part.moves), first.samples)


def _owner(names: Collection[str], module: str) -> str:
    """The block that a module is in, of the blocks of these names; the glue where it is in none."""
    parts = module.split(".")
    inner = (".".join(parts[:count]) for count in range(len(parts), -1, -1))
    return next((name for name in inner if name in names), GLUE)


def _inherited(split: SplitFacts, facts: ModelFacts) -> SplitFacts:
    """The split with what it says of a block said of the modules that the facts tell of in its place."""
    if not facts.begins:
        return split

    def spread(shares: dict[str, float]) -> dict[str, float]:
        found = dict(shares)
        for block in facts.blocks:
            around = (name for name in shares if within(block.name, name))
            if block.name not in shares and (name := next(around, None)) is not None:
                found[block.name] = shares[name]
        return found

    return replace(split, work=spread(split.work), activations=spread(split.activations))


def _busiest(block: BlockFact, split: SplitFacts | None) -> BlockFact:
    """A block as the busiest of those that split it has it; worked out once."""
    if split is None:
        return block
    whole, local = split.done.get(block.name, (None, block))
    if whole is not block:
        along = not split.slices  # sequences are split: so is what crosses between blocks
        work, kept = split.work.get(block.name, 1.0), split.activations.get(block.name, 1.0)
        local = _scaled(block, work, kept, along=along)
        split.done[block.name] = block, local
    return local


def _scaled(block: BlockFact, work: float, kept: float, *, along: bool = False) -> BlockFact:
    if work == 1.0 and kept == 1.0:
        return block
    if along:
        block = replace(
            block,
            input_bytes=round(block.input_bytes * kept),
            output_bytes=round(block.output_bytes * kept),
            fresh_input_bytes=round(block.fresh_input_bytes * kept),
            crossing_bytes=None if block.crossing_bytes is None else round(block.crossing_bytes * kept),
        )
    return replace(
        block,
        forward_flops=block.forward_flops * work,
        backward_flops=block.backward_flops * work,
        forward_bytes=block.forward_bytes * work,
        backward_bytes=block.backward_bytes * work,
        saved_bytes=round(block.saved_bytes * kept),
        saved_input_bytes=round(block.saved_input_bytes * kept),
    )


def _glue(block: BlockFact, share: float, *, holding: bool) -> BlockFact:
    if share == 1.0 and holding:
        return block
    return replace(
        _scaled(block, share, share),
        forward_kernels=round(block.forward_kernels * share),
        backward_kernels=round(block.backward_kernels * share),
        parameters=block.parameters if holding else (),
        parameter_bytes=block.parameter_bytes if holding else 0,
    )


def _time(
    time: BlockTime, block: BlockFact | None, share: float, work: dict[str, float], kernel_seconds: float
) -> BlockTime:
    if block is None:
        return time
    split = work.get(block.name, 1.0)
    if split == 1.0:
        return time if share == 1.0 else BlockTime(time.forward_seconds * share, time.backward_seconds * share)

    def shorter(seconds: float, kernels: int) -> float:
        launching = min(seconds, kernels * kernel_seconds)
        return share * (launching + split * (seconds - launching))

    return BlockTime(
        shorter(time.forward_seconds, block.forward_kernels), shorter(time.backward_seconds, block.backward_kernels)
    )


def _held(facts: ModelFacts, chosen: Iterable[BlockFact], split: SplitFacts | None) -> tuple[ParameterFact, ...]:
    owned = {name for block in chosen for name in block.parameters}
    used = tuple(f"{block.name}." for block in chosen if block.name not in (GLUE, LOSS))
    owned |= {one.name for one in facts.shared if any(alias.startswith(used) for alias in one.aliases)}
    held = sorted(facts.places[name] for name in owned if name in facts.places)
    return tuple(_local(facts.parameters[place], split) for place in held)


def _local(parameter: ParameterFact, split: SplitFacts | None) -> ParameterFact:
    if split is None or parameter.name not in split.slices:
        return parameter
    whole, local = split.held.get(parameter.name, (None, parameter))
    if whole is not parameter:
        cut = split.slices[parameter.name]
        sizes = cut.cut.sizes
        local = replace(parameter, shape=cut.local_shape(parameter.shape, sizes.index(max(sizes))))
        split.held[parameter.name] = parameter, local
    return local


def _within(name: str, present: set[str], blocks: dict[str, BlockFact], *, elsewhere: bool) -> bool:
    """Whether a buffer is in a block that is present; one in no block goes with the first run."""
    owner = max((block for block in blocks if name.startswith(f"{block}.") or not block), key=len, default=None)
    return elsewhere if owner is None else owner in present
