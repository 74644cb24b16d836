"""Peak bytes of the fullest worker of a published run, as a sum of named terms.

States follow ZeRO (Rajbhandari et al. 2020), activations Korthikanti et al. 2022, counted array by array.
"""

from sheaf.cost.analytic.layers import element_bytes, layer_parameters, padded_vocabulary
from sheaf.cost.analytic.networks import networks
from sheaf.cost.analytic.step import Job

BYTES = ("parameters", "gradients", "optimizer_state", "activations", "logits", "gathered", "reserve")
MARGIN = 0.3  # stated for every peak: wide enough that the published run out of memory is never called safe
_WIDE = 4.0  # arrays of the hidden size that a layer keeps: what enters each norm, and what leaves it
_MASKS = 1.0  # two dropout masks of a byte, as elements of two bytes
_SCORES, _SCORES_DROPPED = 1.0, 2.5  # arrays of attention's scores kept where they are written
# Share of a layer's arrays.
_KEPT = {"none": 1.0, "selective": 1.0, "latent": 0.8, "elementwise": 0.6, "alternate": 0.5, "full": 0.0}
_LORA_SHARE = 0.005


def peak(job: Job) -> dict[str, float]:
    """Bytes by term; every term of BYTES is there."""
    constants = job.book.memory(job.stack)
    stages = range(len(job.stages))
    found = [_stage(job, stage) for stage in stages]
    terms = max(found, key=lambda each: sum(each.values()))
    own, experts = job.parameters
    terms["activations"] *= constants["activation_slack"]
    terms["logits"] *= constants["activation_slack"]
    beside = constants["reserve_bytes"] * job.stack.counted
    terms["reserve"] = beside + constants["flat_bytes"] * (own + experts) / _copies(job)
    return terms


def upper_bytes(peak_bytes: float) -> float:
    """What must be free for this peak."""
    return peak_bytes * (1 + MARGIN)


def spread_out(zero: int, *, distributed: bool) -> bool:
    """Whether each replica updates its own share."""
    return zero in (1, 2) or distributed


def _copies(job: Job) -> float:
    return float(job.work.split.shards) if job.work.split.zero == 3 else 1.0


def _stage(job: Job, stage: int) -> dict[str, float]:
    work, stack = job.work, job.stack
    split, shape = work.split, work.shape
    full = work.precision in ("fp32", "tf32")
    size = element_bytes(work)
    count, layers = _held(job, stage)
    spread = split.shards if split.zero else split.dp * split.cp if stack.distributed else 1
    trained = count * (_LORA_SHARE if work.adapters else 1.0)
    masters = 0.0 if full or not work.mixed else 4.0
    weights = count * (4.0 if full or (split.zero == 3 and work.mixed) else size)
    if split.zero == 3:
        weights /= split.shards
        masters = 0.0  # the shards are the masters
    gradient = float(max(stack.gradient_bytes, size)) if split.zero < 3 else 4.0 if work.mixed else size
    states = trained * ((8.0 if not (work.precision == "bf16" and not work.mixed) else 4.0) + masters)
    if masters and gradient < 4.0 and spread_out(split.zero, distributed=stack.distributed):
        states += 4.0 * trained  # the update needs its own share of the gradients in fp32
    return {
        "parameters": weights,
        "gradients": trained * (gradient + stack.backward_bytes) / (split.shards if split.zero >= 2 else 1),
        "optimizer_state": 0.0 if split.offload else states / spread,
        "activations": _activations(job, stage, layers),
        "logits": _logits(job, size) if stage == len(job.stages) - 1 and not shape.network else 0.0,
        "gathered": 2 * size * count / max(1.0, layers) if split.zero == 3 else 0.0,
        "reserve": 0.0,
    }


def _held(job: Job, stage: int) -> tuple[float, float]:
    """Parameters and layers of one worker of a stage."""
    shape, split = job.work.shape, job.work.split
    if shape.network:
        return networks()[shape.network].parameters, 1.0
    layers = job.stages[stage]
    own, experts = layer_parameters(shape)
    if shape.expert_layers:
        share = shape.expert_layers / shape.layers
        routed = layer_parameters(shape, expert=True)
        own, experts = own * (1 - share) + routed[0] * share, routed[1] * share / split.ep
    count = layers * (own + experts) / split.tp
    table = padded_vocabulary(job.work, job.stack) * shape.hidden / split.tp
    first, last = stage == 0, stage == len(job.stages) - 1
    tables = int(first) + int(last) - int(first and last and shape.tied)
    return count + tables * table, layers


def _activations(job: Job, stage: int, layers: float) -> float:
    work, stack = job.work, job.stack
    shape, split = work.shape, work.split
    size = element_bytes(work)
    if shape.network:
        return networks()[shape.network].activations * work.micro * size * 2.5  # out, normed, activated (in place)
    tokens = work.micro * shape.sequence / split.cp
    along = split.tp if split.sequence else 1
    entering = tokens * shape.hidden * size / along
    arrays_inside = (3 if shape.gated else 2) - stack.compiled  # fused backward computes the activation's output again
    inside = shape.ffn * arrays_inside
    if shape.expert_layers:
        inside = (shape.expert_ffn * arrays_inside + 2 * shape.hidden) * shape.experts_per_token
    attention = (2 * shape.heads + 2 * shape.kv_heads) * shape.head_width
    masks = _MASKS if stack.dropout else 0.0
    arrays = (
        entering * _WIDE + tokens * shape.hidden * 2.0 * masks / along + tokens * size * (attention + inside) / split.tp
    )
    scores = 0.0
    if not stack.flash:
        scores = (
            tokens * shape.sequence * shape.heads / split.tp * size * (_SCORES_DROPPED if stack.dropout else _SCORES)
        )
    kind = stack.recompute if split.recompute == "none" else split.recompute
    kept = arrays * _KEPT[kind] + (scores if kind == "none" else 0.0)
    if kind != "none":
        kept = max(kept, entering)
    flying = min(float(work.accumulated), len(job.stages) - stage)
    if split.virtual > 1:  # Narayanan et al. 2021: (p - 1)/(p v) more of them
        flying = len(job.stages) * (1 + (len(job.stages) - 1) / (len(job.stages) * split.virtual))
    if split.schedule == "gpipe":
        flying = float(work.accumulated)
    working = 0.0 if kind == "none" else arrays + scores  # of the layer that runs again
    return flying * layers * kept + working


def _logits(job: Job, size: float) -> float:
    """Logits, their fp32 copy, and the gradients of both."""
    work = job.work
    tokens = work.micro * work.shape.sequence / work.split.cp
    if work.shape.family == "bert":
        tokens *= job.stack.masked
    return tokens * padded_vocabulary(work, job.stack) / work.split.tp * (4.0 + 4.0 + 2 * size)
