"""What the fullest worker holds at its peak, term by term.

Sharding follows ZeRO (Rajbhandari, Rasley, Ruwase, He 2020): stage 1 shards the optimizer's state, stage 2 gradients
too, stage 3 parameters too. Recomputation keeps each block's input and one block's activations (Chen, Xu, Zhang,
Guestrin 2016). Masters, gradients and optimizer state are as wide as the parameters; copies cast by autocast are
activations, and in the facts already.
"""

from collections.abc import Sequence

from sheaf.cost.communication import buckets, units
from sheaf.cost.compute import STATE_BYTES_PER_BYTE
from sheaf.graph.facts import GLUE, LOSS, ModelFacts, Profile
from sheaf.plans import Plan

MARGIN = 1.1  # allocators, fragments and what no model foresees
PROCESS_BYTES = 300 * 2**20  # a CPU worker's Python and torch, before any tensor
GATHERED_BLOCKS = 2  # ZeRO-3: the block that computes and the one fetched ahead
BUCKETS_IN_FLIGHT = 2  # one is laid out while one travels
BATCHES_HELD = 2  # the one in use and the one fetched next


def memory(plan: Plan, facts: ModelFacts, profile: Profile | None, sizes: Sequence[int]) -> dict[str, int]:
    """Peak bytes of one worker by term; ``sizes`` are the samples of a step's microbatches."""
    scale = max(sizes, default=facts.samples) / facts.samples
    state = profile.optimizer_state_bytes_per_byte if profile else STATE_BYTES_PER_BYTE
    sharded = plan.dp if plan.zero >= 1 else 1
    return {
        "parameters": _parameters(plan, facts),
        "gradients": _gradients(plan, facts),
        "optimizer_state": round(facts.trainable_bytes * state / sharded),
        "activations": round(activation_bytes(plan, facts) * scale),
        "buffers": sum(buffer.size_bytes for buffer in facts.buffers),
        "workspace": _workspace(plan, facts, scale),
    }


def needed_bytes(peak_bytes: int, device_kind: str) -> int:
    """What a worker must find free for this peak: a tenth to spare, and on a CPU host the process itself."""
    return round(peak_bytes * MARGIN) + (PROCESS_BYTES if device_kind == "cpu" else 0)


def activation_bytes(plan: Plan, facts: ModelFacts) -> int:
    """What is kept from forward for backward, for one microbatch of the facts."""
    real = [block for block in facts.blocks if block.name not in (GLUE, LOSS)]
    rest = sum(block.saved_bytes + block.saved_input_bytes for block in facts.blocks if block.name in (GLUE, LOSS))
    saved = [block.saved_bytes + block.saved_input_bytes for block in real]
    if plan.recompute == "none":
        return sum(saved) + rest
    kept = [
        block.fresh_input_bytes if block.composite else block.saved_bytes + block.saved_input_bytes for block in real
    ]
    return sum(kept) + max(saved, default=0) + rest


def _parameters(plan: Plan, facts: ModelFacts) -> int:
    if plan.zero < 3:
        return facts.parameter_bytes
    held = units(facts, plan.bucket_bytes)
    gathered = sum(sorted(held.block_bytes, reverse=True)[:GATHERED_BLOCKS])
    # The glue's own shard is counted beside its gathered copy: the optimizer steps on the shard.
    return -(-facts.parameter_bytes // plan.dp) + held.glue_bytes + gathered


def _gradients(plan: Plan, facts: ModelFacts) -> int:
    shard = -(-facts.trainable_bytes // plan.dp) if plan.zero else 0
    if plan.zero < 2:
        return facts.trainable_bytes + shard
    if plan.zero == 2:
        return shard + max(buckets(facts, plan.bucket_bytes), default=0)
    held = units(facts, plan.bucket_bytes)
    return shard + max(held.block_trainable_bytes, default=0) + held.glue_trainable_bytes


def _workspace(plan: Plan, facts: ModelFacts, scale: float) -> int:
    travelling = 0
    if plan.dp > 1 and plan.zero == 0:
        travelling = facts.trainable_bytes  # all-reduced buckets are kept from step to step
    elif plan.zero:
        held = units(facts, plan.bucket_bytes)
        sent = (*held.block_trainable_bytes, held.glue_trainable_bytes)
        largest = sorted(sent if plan.zero == 3 else buckets(facts, plan.bucket_bytes), reverse=True)[
            :BUCKETS_IN_FLIGHT
        ]
        travelling = sum(largest) + -(-sum(largest) // plan.dp)
    # A block's backward holds the gradients of its output and of its input at once.
    passing = max((block.output_bytes + block.input_bytes for block in facts.blocks), default=0)
    return travelling + round((passing + BATCHES_HELD * facts.batch_bytes) * scale)
