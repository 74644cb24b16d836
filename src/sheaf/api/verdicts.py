"""What a ranking is completed with, what it would be on other machines, and how strategies do as those change."""

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor

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
    """Step seconds and cost of the best plan of each strategy against workers, and against bandwidth.

    Each holds ``figure``, ``at`` (what the ranking was made for), ``x``, ``currency`` and ``lines``: by strategy,
    ``seconds`` and ``cost`` per step at each x, None where no plan of it fits.
    """
    question = _asked(ranking)
    several = sum(host.count for host in question.cluster.hosts) > 1
    tier = "inter" if several and question.cluster.inter is not None else "intra"
    link = question.cluster.inter if tier == "inter" else question.cluster.intra
    assert link is not None
    most = question.available
    counts = sorted({*(2**power for power in range(most.bit_length()) if 2**power <= most), most})
    counts = [count for count in counts if count >= most // 64]
    rates = [link.bytes_per_second * factor for factor in FACTORS]
    return [
        _sweep(question, "workers", most, counts, lambda x: Change("workers", x)),
        _sweep(question, f"bandwidth of {link.name}, GB/s", link.bytes_per_second, rates, lambda x: Change(tier, x)),
    ]


def _sweep(
    question: Question, figure: str, at: float, places: Sequence[float], change: Callable[[float], Change]
) -> dict[str, Any]:
    found: list[dict[str, tuple[float, float]]] = []
    for x in places:
        asked = changed(question, [change(x)])
        best: dict[str, tuple[float, float]] = {}
        for entry in search(asked).ranked:
            cost = per_hour(asked, entry.plan) * entry.price.step_seconds / 3600
            step = entry.price.step_seconds
            name = strategy(entry.plan)
            best[name] = min(best.get(name, (step, cost)), (step, cost))
        found.append(best)
    names = sorted({name for best in found for name in best})
    return {
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
