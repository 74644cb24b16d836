"""How the layers of a published run are dealt out to its pipeline stages."""

import math

from sheaf.cost.analytic.workload import Workload


def stage_layers(work: Workload) -> tuple[float, ...]:
    """Transformer layers of each stage, those that predict further ahead among them: as published, or as usual."""
    split, layers = work.split, max(1, work.shape.layers) + work.shape.ahead
    if split.stages:
        return tuple(float(count) for count in split.stages)
    if split.pp == 1:
        return (float(layers),)
    chunks = split.pp * split.virtual
    if work.shape.latent and layers > chunks:
        return _last_shorter(work, chunks)
    balanced = split.balanced or (layers % chunks > 0 and (layers + 2) % chunks == 0)
    ends = 2 if balanced else 0
    if split.virtual > 1:
        even = [(layers + ends) / split.pp] * split.pp
        even[0] -= ends / 2
        even[-1] -= ends / 2
        return tuple(max(0.0, each) for each in even)
    each, more = divmod(layers + ends, split.pp)
    counts = [each + (1 if split.pp - 1 - more <= stage < split.pp - 1 else 0) for stage in range(split.pp)]
    if more and not balanced and split.pp == 2:
        counts = [each + 1, each]
    counts[0] -= ends // 2
    counts[-1] -= ends // 2
    return tuple(float(max(0, count)) for count in counts)


def _last_shorter(work: Workload, chunks: int) -> tuple[float, ...]:
    """Chunks of equally many layers, the last of what is left: it has the head, and predicts the tokens ahead.

    As "Et*4|(t*4|)*14tmL" lays 61 layers out: NVIDIA-NeMo/Megatron-Bridge scripts/performance/configs/deepseek.
    """
    split, layers = work.split, work.shape.layers
    each = math.ceil(layers / chunks)
    full = min(chunks - 1, layers // each)  # chunks before the last one that has what is left
    counts = [0.0] * split.pp
    for chunk in range(full):
        counts[chunk % split.pp] += each
    counts[full % split.pp if full < chunks - 1 else -1] += layers - full * each
    counts[-1] += work.shape.ahead
    return tuple(counts)
