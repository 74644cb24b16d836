"""Which plans cannot run a task on a cluster, and what would help."""

from sheaf.cluster.cluster import Cluster
from sheaf.cost.memory import needed_bytes
from sheaf.cost.placement import kinds
from sheaf.cost.price import Price
from sheaf.graph.facts import ModelFacts
from sheaf.plans import Plan
from sheaf.plans.server import counted
from sheaf.plans.stages import default_microbatch, misplaced, placed
from sheaf.search.ranking import Refusal
from sheaf.search.words import largest_memory
from sheaf.units import pretty_bytes

MERGED_KINDS = ("BatchNorm", "SyncBatchNorm", "InstanceNorm", "LazyBatchNorm", "LazyInstanceNorm")


def broken(
    plan: Plan, *, facts: ModelFacts, workers: int, batch: int, microbatch: int | None, elementwise: bool
) -> list[Refusal]:
    """Every rule the plan breaks, memory apart; ``microbatch`` is the task's own, None where it leaves it open."""
    found: list[Refusal] = []
    size = microbatch or plan.microbatch or default_microbatch(plan, batch)
    if plan.workers > workers:
        found.append(
            Refusal(
                str(plan),
                f"needs {counted(plan.computing, plan.serves.serving)}, there are {workers}",
                f"dp={max(1, workers - plan.serves.serving)}, or give more workers",
            )
        )
    if microbatch is not None and plan.microbatch not in (None, microbatch):
        found.append(
            Refusal(
                str(plan),
                f"asks for microbatch={plan.microbatch}, the task says microbatch={microbatch}",
                "drop microbatch from the plan: it is part of what is computed",
            )
        )
    if size > batch:
        found.append(
            Refusal(str(plan), f"a microbatch of {size} is larger than the batch of {batch}", f"use at most {batch}")
        )
    count = -(-batch // size)
    if plan.dp > count:
        smaller = batch // plan.dp
        round_whom = f"{plan.dp} {'workers' if plan.dp == plan.computing else 'replicas'}"
        remedy = f"dp={count}" + (f", or microbatch={smaller} in the task" if smaller else ", or a larger batch")
        found.append(
            Refusal(
                str(plan),
                f"{count} microbatch{'es' if count > 1 else ''} of {size} do not go round {round_whom}",
                remedy,
            )
        )
    if plan.zero and not elementwise:
        found.append(
            Refusal(
                str(plan),
                "the optimizer is not elementwise, and ZeRO steps flat slices of parameters",
                "zero=0, or an elementwise optimizer such as AdamW or SGD",
            )
        )
    elif not elementwise and plan.server and not plan.local:
        found.append(
            Refusal(
                str(plan),
                "the optimizer is not elementwise, and shards of a server step pieces of parameters",
                f"dp={plan.dp} without server, or an elementwise optimizer such as AdamW or SGD",
            )
        )
    elif not elementwise and (plan.pp > 1 or _splits(plan)):
        what = "split layers step slices of parameters" if _splits(plan) else "cut stages step some parameters each"
        found.append(
            Refusal(
                str(plan),
                f"the optimizer is not elementwise, and workers that {what}",
                f"dp={plan.dp} alone, or an elementwise optimizer such as AdamW or SGD",
            )
        )
    if plan.server and plan.serves.shards > (trained := sum(one.requires_grad for one in facts.parameters)):
        found.append(
            Refusal(
                str(plan), f"{plan.serves.shards} shards for {trained} trained parameters", f"server={max(1, trained)}"
            )
        )
    found += _unstageable(plan, facts)
    unmerged = unmergeable(facts)
    if unmerged and (plan.workers > 1 or plan.again):
        found.append(
            Refusal(
                str(plan),
                f"training changes {unmerged[0]}, which can neither be merged between workers nor computed twice",
                "serial, or a module whose buffers training does not change",
            )
        )
    return found


def _splits(plan: Plan) -> bool:
    return plan.split_degree > 1


def _unstageable(plan: Plan, facts: ModelFacts) -> list[Refusal]:
    """Why the model cannot be cut into the plan's stages."""
    if plan.pp == 1:
        return []
    count = len(placed(facts))
    if plan.num_stages > count:
        per_worker = f", {plan.virtual} per worker" if plan.virtual > 1 else ""
        most = max(1, count // plan.virtual)
        remedy = f"pp={most}" if most > 1 else "dp or tp in place of pp"
        return [
            Refusal(
                str(plan),
                f"has {plan.num_stages} stages{per_worker}, and the model has {count} "
                f"block{'s' if count != 1 else ''} to make them of",
                remedy,
            )
        ]
    if plan.begins:
        remedy = "drop stages, or name modules that forward calls one after the other"
        return [Refusal(str(plan), why, remedy) for why in misplaced(plan, [block.name for block in placed(facts)])]
    if plan.stages and sum(plan.stage_blocks) != count:
        return [
            Refusal(
                str(plan),
                f"stages={plan.stages} places {sum(plan.stage_blocks)} blocks, the model has {count}",
                "drop stages, or make them add up to that",
            )
        ]
    return []


def unmergeable(facts: ModelFacts) -> tuple[str, ...]:
    """Buffers that training changes in a way that workers cannot merge in microbatch order."""
    return tuple(
        buffer.name for buffer in facts.buffers if buffer.updated and not buffer.module_kind.startswith(MERGED_KINDS)
    )


def too_large(price: Price, cluster: Cluster) -> str | None:
    """Why a plan's peak does not fit its fullest seat, or that seat's host; None when it fits with a tenth to spare."""
    for seat in kinds(cluster, price.plan.workers):
        needed = needed_bytes(price.peak_bytes, seat.device_kind)
        if needed > seat.available_bytes:
            return (
                f"needs {pretty_bytes(needed)} (with a tenth to spare) on each worker of {seat.host_name}, "
                f"{pretty_bytes(seat.available_bytes)} are free; {largest_memory(price)}"
            )
        beside = needed_bytes(price.host_bytes, seat.device_kind)
        if price.host_bytes and beside > seat.host_bytes:
            return (
                f"needs {pretty_bytes(beside)} (with a tenth to spare) of the memory of {seat.host_name} for each "
                f"worker, {pretty_bytes(seat.host_bytes)} are its share; offload keeps optimizer state, parameters and "
                "gradients there"
            )
    return None


def roomier(price: Price) -> str:
    """What a plan needs to fit where no other plan does."""
    return f"give each worker {pretty_bytes(needed_bytes(price.peak_bytes, 'cuda'))}, or more workers"
