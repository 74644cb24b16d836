"""What the fullest worker holds at its peak, term by term.

Sharding follows ZeRO (Rajbhandari, Rasley, Ruwase, He 2020): stage 1 shards the optimizer's state, stage 2 gradients
too, stage 3 parameters too. Shards follow weighted shares: with ``shares=2:1`` the fullest worker has two of three.
Recomputation keeps each block's input and one block's activations (Chen, Xu, Zhang, Guestrin 2016). Masters, gradients
and optimizer state are as wide as the parameters; copies cast by autocast are activations, and in the facts already.
"""

import math
from collections.abc import Sequence

from sheaf.cost.offload import HOST_COPIES
from sheaf.cost.portion import Portion
from sheaf.cost.sizes import Sizes
from sheaf.graph.facts import STATE_BYTES_PER_BYTE, Profile
from sheaf.plans import Plan
from sheaf.plans.local import OUTER
from sheaf.plans.offload import OPTIMIZER
from sheaf.plans.shards import shard

MARGIN = 1.1  # allocators, fragments and what no model foresees
PROCESS_BYTES = 300 * 2**20  # a CPU worker's Python and torch, before any tensor
GATHERED_BLOCKS = 2  # ZeRO-3: the block that computes and the one fetched ahead
BUCKETS_IN_FLIGHT = 2  # one is laid out while one travels
BATCHES_HELD = 2  # the one in use and the one fetched next


def memory(
    plan: Plan,
    portion: Portion,
    profile: Profile | None,
    sizes: Sequence[int],
    *,
    shared: Portion | None = None,
    kept: float = 1.0,
) -> dict[str, int]:
    """Peak bytes of one worker by term; ``sizes`` are the samples of a step's microbatches.

    ``portion`` is what the worker computes and holds, ``shared`` what of it replicas hold too (all of it where not
    given), ``kept`` how many microbatches it keeps for backward at once.
    """
    facts, replicated = portion.facts, shared or portion
    scale = (Sizes.of(sizes).largest if sizes else facts.samples) / facts.samples
    state = profile.optimizer_state_bytes_per_byte if profile else STATE_BYTES_PER_BYTE
    own = portion.trainable_bytes - replicated.trainable_bytes
    stepped = shard(plan, replicated.trainable_bytes) if plan.zero else replicated.trainable_bytes
    served = _served(plan, replicated.trainable_bytes, state) if plan.server else 0
    apart = plan.serves.apart
    here = (0 if apart else served) + (round(stepped * state) if plan.local else 0)
    held = {
        "parameters": _parameters(plan, portion),
        "gradients": own + _gradients(plan, replicated),
        "optimizer_state": here if plan.server else round((stepped + own) * state * (plan.offload != OPTIMIZER)),
        "activations": round(activation_bytes(plan, portion, kept) * scale),
        "buffers": sum(buffer.size_bytes for buffer in facts.buffers),
        "workspace": _workspace(plan, portion, replicated, scale),
    }
    if apart and served > sum(held.values()):  # the fullest is one that only serves
        return dict.fromkeys(held, 0) | {"optimizer_state": served, "buffers": held["buffers"]}
    return held


def host_bytes(plan: Plan, portion: Portion, profile: Profile | None, shared: Portion | None = None) -> int:
    """What one worker has in its host's memory where the optimizer steps there: state, values and gradients."""
    if plan.offload != OPTIMIZER:
        return 0
    replicated = (shared or portion).trainable_bytes
    stepped = portion.trainable_bytes - replicated + (shard(plan, replicated) if plan.zero else replicated)
    state = profile.optimizer_state_bytes_per_byte if profile else STATE_BYTES_PER_BYTE
    return math.ceil(stepped * (state + HOST_COPIES))


def needed_bytes(peak_bytes: int, device_kind: str) -> int:
    """What a worker must find free for this peak: a tenth to spare, and on a CPU host the process itself."""
    return round(peak_bytes * MARGIN) + (PROCESS_BYTES if device_kind == "cpu" else 0)


def activation_bytes(plan: Plan, portion: Portion, microbatches: float = 1.0) -> float:
    """What is kept from forward for backward, for so many microbatches of the portion's facts at once."""
    kept, most = portion.kept_again if plan.again else portion.kept_once
    return kept * microbatches + most


def _parameters(plan: Plan, portion: Portion) -> int:
    if plan.zero < 3:
        return portion.parameter_bytes
    held = portion.units(plan.bucket_bytes)
    gathered = sum(sorted(held.block_bytes, reverse=True)[:GATHERED_BLOCKS])
    # The glue's own shard is counted beside its gathered copy: the optimizer steps on the shard.
    return math.ceil(shard(plan, portion.parameter_bytes)) + held.glue_bytes + gathered


def _gradients(plan: Plan, portion: Portion) -> int:
    trainable_bytes = portion.trainable_bytes
    own = math.ceil(shard(plan, trainable_bytes)) if plan.zero else 0
    if plan.zero < 2:
        return trainable_bytes + own
    if plan.zero == 2:
        return own + max(portion.buckets(plan.bucket_bytes), default=0)
    held = portion.units(plan.bucket_bytes)
    return own + max(held.block_trainable_bytes, default=0) + held.glue_trainable_bytes


def _served(plan: Plan, trainable_bytes: int, state: float) -> int:
    """What the worker with most seats of shards holds: values, optimizer state, room for everyone's gradient.

    With steps between meetings the optimizer is the outer one, whose state is a velocity.
    """
    served = plan.serves
    if plan.local:
        state = 1.0 if plan.meets_locally.momentum else 0.0
    seats = min(2, served.shards)  # a shard, and the backup of another
    copies = 1 + state + plan.dp + 1 + (plan.dp if served.late == "compensated" else 0)
    return round(seats * trainable_bytes / served.shards * copies)


def _workspace(plan: Plan, portion: Portion, replicated: Portion, scale: float) -> int:
    travelling = 0
    if plan.alike > 1 and plan.zero == 0:
        travelling = replicated.trainable_bytes  # all-reduced buckets are kept from step to step
        travelling *= 1 + _relaxed_copies(plan)
    if plan.server:  # what is pushed, what was pulled, and between meetings what it began with
        travelling = (3 if plan.local else 2) * replicated.trainable_bytes
    elif plan.zero:
        held = replicated.units(plan.bucket_bytes)
        sent = (*held.block_trainable_bytes, held.glue_trainable_bytes)
        largest = sorted(sent if plan.zero == 3 else replicated.buckets(plan.bucket_bytes), reverse=True)[
            :BUCKETS_IN_FLIGHT
        ]
        travelling = sum(largest) + math.ceil(shard(plan, sum(largest)))
    # A block's backward holds the gradients of its output and of its input at once.
    return travelling + round((portion.passing_bytes + BATCHES_HELD * portion.facts.batch_bytes) * scale)


def _relaxed_copies(plan: Plan) -> int:
    """How many more copies of trained parameters relaxed plans keep: what was lost; what travels, anchor, velocity."""
    local, compressed = plan.meets_locally, plan.compress != "none"
    keeps = local.kind in OUTER
    if local.rounds:  # what is brought, and was late; of backup workers, the gradients
        return 1 if local.kind == "backup" else 2 + 1 + keeps
    anchored = keeps or local.kind == "adasum" or compressed or local.overlap > 0
    meeting = 1 + anchored + keeps if local.every else 0
    return compressed + meeting
