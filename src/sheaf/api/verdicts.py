"""What a ranking is completed with, what it would be on other machines, and how strategies do as those change."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

from sheaf.cluster import Cluster
from sheaf.errors import PlanError
from sheaf.graph.example import example
from sheaf.graph.ops import tensors
from sheaf.plans import Plan
from sheaf.search import Question, Ranking, exchanged, search
from sheaf.search.change import Change, changed, parse
from sheaf.search.explain import explained
from sheaf.search.money import costs, per_hour, workers_needed
from sheaf.search.rules import too_large
from sheaf.task import Task

FACTORS = (0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0)  # of a link's bandwidth


def finished(ranking: Ranking, *, target_samples: int = 0, explain: bool = True) -> Ranking:
    """The ranking with its explanation, costs, and where nothing fits how many workers would do."""
    question = ranking.asked
    if question is None:
        return ranking
    if not ranking.ranked:
        return replace(ranking, workers_needed=workers_needed(question) if explain and ranking.starved else None)
    return replace(
        ranking,
        explanation=explained(question, ranking) if explain else None,
        costs=costs(question, ranking, target_samples),
    )


def what_if(ranking: Ranking, changes: str) -> Ranking:
    """The ranking if some figures were others, such as ``inter_node=10Gbit,workers=64``.

    Keys are the links by tier (``intra``, ``inter``, and tiers by name), ``links`` for all of them, ``workers``,
    ``memory`` (of a worker), ``flops`` (of a device) and ``batch``; ``x2`` doubles. Measured times of links and blocks
    are scaled. Raises PlanError listing everything that is wrong with the text.
    """
    question = _asked(ranking)
    other = _cut_alike(search(changed(question, parse(changes, question.cluster))), ranking)
    target = ranking.costs.target if ranking.costs else 0
    return finished(replace(other, splits=ranking.splits), target_samples=target)


def _cut_alike(other: Ranking, ranking: Ranking) -> Ranking:
    """The other ranking with pipelines cut inside of blocks that are cut so in this one, where they are faster."""
    asked = _asked(other)
    for plan in (entry.plan for entry in ranking.ranked if entry.plan.begins):
        whole = other.entry(replace(plan, stages=""))
        if whole is not None:
            found = asked.price(plan)
            if found.step_seconds < whole.price.step_seconds and too_large(found, asked.cluster) is None:
                other = exchanged(other, whole.plan, found, asked)
    return other


def tokens_per_sample(task: Task) -> int:
    """How many tokens a sample of the task has: the length of its longest tensor of whole numbers.

    Raises PlanError where it has none.
    """
    lengths = [int(one.shape[1]) for one in tensors(example(task, 1)) if _is_text(one)]
    if not lengths:
        raise PlanError("the task's samples hold no tokens (a row of whole numbers): give the target in samples")
    return max(lengths)


def _is_text(tensor: Tensor) -> bool:
    return tensor.ndim == 2 and not tensor.is_floating_point()


def strategy(plan: Plan) -> str:
    """The kind of a plan in a few words.

    >>> strategy(Plan.parse("dp=4,tp=2,zero=1")), strategy(Plan())
    ('replicas with ZeRO + split layers', 'serial')
    """
    ways = [("replicas with ZeRO" if plan.zero else "replicas")] if plan.dp > 1 else []
    ways += ["split layers"] if plan.tp > 1 else []
    ways += ["split sequences"] if plan.cp > 1 else []
    ways += ["pipeline"] if plan.pp > 1 else []
    ways += ["split parts"] if plan.by_parts else []
    return " + ".join(ways) + ("" if plan.exact else " (relaxed)") if ways else "serial"


def sweeps(ranking: Ranking) -> list[dict[str, Any]]:
    """Step seconds and cost of the best plan of each strategy against workers, and against bandwidth: of the link
    between hosts, or within the only one; of a cluster with tiers, of every link.

    Each holds ``key`` (as ``what_if`` has it), ``figure``, ``at`` (what the ranking was made for), ``x``, ``currency``
    and ``lines``: by strategy, ``seconds`` and ``cost`` per step at each x, None where no plan of it fits.
    """
    question = _asked(ranking)
    most = question.available
    counts = sorted({*(2**power for power in range(most.bit_length()) if 2**power <= most), most})
    counts = [count for count in counts if count >= most // 64]
    return [
        _sweep(question, "workers", "workers", most, counts),
        *(
            _sweep(question, key, f"bandwidth of {name}, GB/s", rate, [rate * factor for factor in FACTORS])
            for key, (name, rate) in _links(question.cluster).items()
        ),
    ]


def _links(cluster: Cluster) -> dict[str, tuple[str, float]]:
    """The name and the bandwidth of each link that is swept, the nearest first."""
    each = max(host.workers for host in cluster.hosts)
    several = sum(host.count for host in cluster.hosts) > 1
    links = [(one.workers, one.name, one.name, one.bytes_per_second) for one in cluster.tiers]
    if not several or cluster.inter is None or (links and each > 1):
        links.append((each, "intra", cluster.intra.name, cluster.intra.bytes_per_second))
    if several and cluster.inter is not None:
        links.append((cluster.workers, "inter", cluster.inter.name, cluster.inter.bytes_per_second))
    return {key: (name, rate) for _, key, name, rate in sorted(links, key=lambda link: link[0])}


def _sweep(question: Question, key: str, figure: str, at: float, places: Sequence[float]) -> dict[str, Any]:
    found: list[dict[str, tuple[float, float]]] = []
    for x in places:
        asked = changed(question, [Change(key, x)])
        best: dict[str, tuple[float, float]] = {}
        for entry in search(asked).ranked:
            cost = per_hour(asked, entry.plan) * entry.price.step_seconds / 3600
            step = entry.price.step_seconds
            name = strategy(entry.plan)
            best[name] = min(best.get(name, (step, cost)), (step, cost))
        found.append(best)
    names = sorted({name for best in found for name in best})
    return {
        "key": key,
        "figure": figure,
        "at": at,
        "x": list(places),
        "currency": question.cluster.currency,
        "lines": {
            name: {
                "seconds": [best[name][0] if name in best else None for best in found],
                "cost": [best[name][1] if name in best else None for best in found],
            }
            for name in names
        },
    }


def _asked(ranking: Ranking) -> Question:
    if ranking.asked is None:
        raise PlanError("this ranking does not know what it was made for: make it with sheaf.plan")
    return ranking.asked
