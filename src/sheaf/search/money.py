"""What plans cost where the cluster's file gives a price per hour, and how many workers a model needs at least."""

from sheaf.plans import Plan
from sheaf.search.change import Change, changed
from sheaf.search.question import Question
from sheaf.search.ranking import Ranking
from sheaf.search.search import search
from sheaf.search.verdicts import Costs

MOST_WORKERS = 2**20  # a model that more are needed for is not for anybody


def per_hour(question: Question, plan: Plan) -> float:
    """Of all that the plan uses: each accelerator, or each CPU host on which it has a worker."""
    left, total = plan.workers, 0.0
    for host in question.cluster.hosts:
        used = min(left, host.count * host.workers)
        units = -(-used // host.workers) if host.device.kind == "cpu" else used
        total += units * host.device.price_per_hour
        left -= used
    return total


def costs(question: Question, ranking: Ranking, target_samples: int = 0) -> Costs | None:
    """Of every ranked plan; None where no device has a price."""
    if not any(host.device.price_per_hour for host in question.cluster.hosts):
        return None
    hourly = {str(entry.plan): per_hour(question, entry.plan) for entry in ranking.ranked}
    each = {str(entry.plan): hourly[str(entry.plan)] * entry.price.step_seconds / 3600 for entry in ranking.ranked}
    steps = -(-target_samples // question.batch)
    return Costs(
        currency=question.cluster.currency,
        per_hour=hourly,
        per_step=each,
        target=target_samples,
        steps=steps,
        to_target={text: steps * cost for text, cost in each.items()} if steps else None,
    )


def workers_needed(question: Question) -> int | None:
    """With how many workers, more of the cluster's last kind of host, a plan fits; None where a million do not.

    Doubled until one fits, then halved the interval down to whole hosts. Layers are split as far as was rehearsed.
    """
    host = question.cluster.hosts[-1]

    def fits(workers: int) -> bool:
        asked = changed(question, [Change("workers", workers)])
        return bool(search(asked, first=True).ranked)

    low, high = question.available, 2 * question.available
    while not fits(high):
        low, high = high, 2 * high
        if high > MOST_WORKERS:
            return None
    while high - low > max(host.workers, high // 64):
        middle = (low + high) // 2 // host.workers * host.workers
        if middle <= low:
            break
        low, high = (low, middle) if fits(middle) else (middle, high)
    return high
