"""How long one worker computes on a microbatch: from a measured profile, or from a roofline over the blocks.

The roofline (Williams, Waterman, Patterson 2009) takes for each block the longer of its arithmetic at the device's
rate and its memory traffic at the device's bandwidth; launching its kernels from eager Python comes on top.
"""

from dataclasses import dataclass
from functools import cached_property

from sheaf.cost.placement import Seat
from sheaf.cost.tensor import NOTHING, Crossing
from sheaf.graph.facts import GLUE, LOSS, STATE_BYTES_PER_BYTE, BlockFact, BlockTime, ModelFacts, Profile

UNKNOWN = BlockTime(0.0, 0.0)
Work = tuple[float, float, int]  # of a block in one direction: operations, bytes moved, kernels launched


@dataclass(frozen=True)
class Direction:
    """Seconds of one microbatch of ``samples``: work grows with samples, launching kernels does not."""

    samples: int
    work_seconds: float
    launch_seconds: float = 0.0

    def seconds(self, size: int) -> float:
        """Seconds for a microbatch of another size."""
        return self.work_seconds * size / self.samples + self.launch_seconds


@dataclass(frozen=True)
class Pace:
    """What one worker needs for each part of its work on its seat."""

    forward: Direction
    backward: Direction
    again: Direction  # forward of the blocks alone, as recomputation runs it
    optimizer_seconds_per_byte: float  # of trainable parameters stepped
    fetch: Direction
    host_seconds: float
    crossing: Crossing = NOTHING  # with the workers that split its layers
    dispatch_seconds: float = 0.0  # of executors, for each microbatch
    update_seconds: float = 0.0  # of its own update, where workers are unlike and the others do not wait for that


@dataclass(frozen=True)
class Pacer:
    """Gives the pace of each seat; equal seats share one."""

    facts: ModelFacts
    profile: Profile | None

    @cached_property
    def _known(self) -> dict[Seat, Pace]:
        return {}

    def pace(self, seat: Seat) -> Pace:
        """The pace on this seat."""
        if seat not in self._known:
            self._known[seat] = (
                _measured(self.facts, self.profile, seat.speed) if self.profile else _roofline(self.facts, seat)
            )
        return self._known[seat]


def block_seconds(facts: ModelFacts, profile: Profile | None, seat: Seat, *, again: bool) -> dict[str, float]:
    """Forward and backward of each block for one microbatch of the facts; with ``again``, recomputation included."""
    repeated = {block.name for block in _recomputed(facts)} if again else set[str]()
    seconds: dict[str, float] = {}
    known: dict[Work, float] = {}  # blocks that do the same take as long

    def takes(work: Work) -> float:
        if work not in known:
            known[work] = _direction(facts, [work], seat).seconds(facts.samples)
        return known[work]

    for block in facts.blocks:
        if profile is None:
            forward, backward = takes(_forward(block)), takes(_backward(block))
        else:
            time = profile.blocks.get(block.name, UNKNOWN)
            forward, backward = time.forward_seconds / seat.speed, time.backward_seconds / seat.speed
        seconds[block.name] = forward * (2 if block.name in repeated else 1) + backward
    return seconds


def _measured(facts: ModelFacts, profile: Profile, speed: float) -> Pace:
    samples = profile.samples
    times = profile.blocks
    blocks = [block.name for block in _recomputed(facts) if block.name in times]
    return Pace(
        forward=Direction(samples, sum((time.forward_seconds for time in times.values()), 0.0) / speed),
        backward=Direction(samples, sum((time.backward_seconds for time in times.values()), 0.0) / speed),
        again=Direction(samples, sum((times[name].forward_seconds for name in blocks), 0.0) / speed),
        optimizer_seconds_per_byte=profile.optimizer_seconds_per_byte / speed,
        fetch=Direction(samples, profile.fetch_seconds / speed),
        host_seconds=profile.host_seconds / speed,
    )


def _roofline(facts: ModelFacts, seat: Seat) -> Pace:
    state = STATE_BYTES_PER_BYTE
    # Reads weight, gradient and state, writes weight and state; the gradient is zeroed too.
    optimizer = (4 + 2 * state) / seat.memory_bytes_per_second
    return Pace(
        forward=_direction(facts, [_forward(block) for block in facts.blocks], seat),
        backward=_direction(facts, [_backward(block) for block in facts.blocks], seat),
        again=_direction(facts, [_forward(block) for block in _recomputed(facts)], seat),
        optimizer_seconds_per_byte=optimizer,
        fetch=Direction(facts.samples, 0.0),
        host_seconds=0.0,
    )


def _recomputed(facts: ModelFacts) -> list[BlockFact]:
    return [block for block in facts.blocks if block.name not in (GLUE, LOSS) and block.composite]


def _forward(block: BlockFact) -> Work:
    return block.forward_flops, block.forward_bytes, block.forward_kernels


def _backward(block: BlockFact) -> Work:
    return block.backward_flops, block.backward_bytes, block.backward_kernels


def _direction(facts: ModelFacts, blocks: list[Work], seat: Seat) -> Direction:
    needed = (max(flops / seat.flops_per_second, size / seat.memory_bytes_per_second) for flops, size, _ in blocks)
    work = sum(needed, 0.0)
    return Direction(facts.samples, work, sum(kernels for *_, kernels in blocks) * seat.kernel_seconds)
