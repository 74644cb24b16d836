"""Steps in which gradients of tables travel as rows: what travels, how much of it hides, and what each worker holds.

Of a shared table every worker sends the rows that it touched to all; of a dealt one to their owners, who give rows back
before they are looked up. How many that is, is counted in the task's own microbatches (``graph.lookups``). Beside
all-reduce, the choice for each table is that of Parallax (Kim et al., 2019, arXiv:1808.02621), with measured links.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

from sheaf.cost.basis import Basis
from sheaf.cost.communication import ALL_GATHER, ALL_REDUCE, ALL_TO_ALL, Fabric
from sheaf.cost.deals import dealt
from sheaf.cost.portion import Portion
from sheaf.cost.step import StepTimes
from sheaf.graph.facts import ModelFacts, ParameterFact, TableFact
from sheaf.plans import Plan
from sheaf.plans.rows import ANSWERS, ROWS, SPARSE

ID_BYTES, COUNT_BYTES = 4, 8
WORTH = 0.9  # of what all-reduce takes; rows that take more are not worth another plan
_PASSES = 3  # over a table that every worker holds: its gradient is looked through, and laid out anew


@dataclass(frozen=True)
class Traffic:
    """What one worker sends for one table in a step, and how long that shows."""

    seconds: float
    sent_bytes: float


def answers(plan: Plan, facts: ModelFacts) -> dict[str, str]:
    """By parameter, which tables travel as rows, and how."""
    if not any(answer in ANSWERS for _, answer in plan.parts):
        return {}
    tables = {table.name for table in facts.tables}
    found: dict[str, str] = {}
    for one in facts.parameters:
        said = next((said for name in (one.name, *one.aliases) if (said := plan.part(name)) is not None), None)
        if one.name in tables and said in ANSWERS:
            found[one.name] = said
    return found


def kept(plan: Plan, portion: Portion, facts: ModelFacts) -> Portion:
    """The portion without tables that travel as rows: what replicas sum whole."""
    found = answers(plan, facts)
    return _with(portion, [one for one in portion.facts.parameters if one.name not in found]) if found else portion


def held(plan: Plan, portion: Portion, facts: ModelFacts) -> Portion:
    """The portion with a worker's block of each table that is dealt out."""
    found = answers(plan, facts)
    if ROWS not in found.values():
        return portion
    parameters = portion.facts.parameters
    return _with(portion, [_block(one, plan.dp) if found.get(one.name) == ROWS else one for one in parameters])


def add_rows(times: StepTimes, plan: Plan, basis: Basis, sizes: Sequence[int]) -> None:
    """Count what tables that travel as rows take in a step; ``sizes`` are the samples of each microbatch in order."""
    found = answers(plan, basis.facts)
    if not found:
        return
    fabric, shares = basis.fabric(plan, "dp"), dealt(plan, sizes)
    window = times.seconds["compute"] * (1 - 1 / max(1, *(len(share) for share in shares)))
    trained = {one.name: one for one in basis.facts.parameters if one.requires_grad}
    stepped = 0.0
    for table in basis.facts.tables:
        if table.name not in found:
            continue
        one = traffic(table, found[table.name], fabric, shares, window, trained=table.name in trained)
        times.seconds["rows"] += one.seconds
        times.traffic_bytes += one.sent_bytes
        if table.name in trained:
            parameter = trained[table.name]
            share = _block(parameter, plan.dp) if found[table.name] == ROWS else parameter
            stepped += share.size_bytes
            passes = _PASSES * share.size_bytes / basis.cluster.hosts[0].device.memory_bytes_per_second
            times.seconds["rows"] += passes
    times.seconds["rows"] += fabric.seconds(ALL_TO_ALL, COUNT_BYTES * len(found) * plan.dp)
    if not basis.updates_apart(plan):  # where they are, paces have it
        pace = basis.pace(basis.whole, basis.seats(plan.workers)[0])
        times.seconds["optimizer"] += stepped * pace.optimizer_seconds_per_byte


def traffic(
    table: TableFact,
    answer: str,
    fabric: Fabric,
    shares: Sequence[Sequence[int]],
    window_seconds: float = 0.0,
    *,
    trained: bool = True,
) -> Traffic:
    """One table under an answer; ``shares`` are the samples of each worker's microbatches.

    What of a dealt table is looked up in the first microbatch has nothing to hide behind: it is asked for ahead, and
    comes when its owners have made their update. The rest comes beside ``window_seconds`` of computing.
    """
    busiest = max(shares, key=sum)
    first = _touched(table, busiest[0]) if busiest else 0.0
    touched = _touched(table, sum(busiest))
    workers, row = fabric.workers, table.row_bytes + ID_BYTES
    if answer == SPARSE:
        size = round(workers * touched * row) if trained else 0
        return Traffic(fabric.seconds(ALL_GATHER, size), fabric.sent_bytes(ALL_GATHER, size))
    push = round(touched * row) if trained else 0
    sent = fabric.sent_bytes(ALL_TO_ALL, push) + fabric.sent_bytes(ALL_TO_ALL, round(touched * row))
    rest = fabric.seconds(ALL_TO_ALL, round((touched - first) * row))
    seconds = fabric.seconds(ALL_TO_ALL, push) + fabric.seconds(ALL_TO_ALL, round(first * row))
    return Traffic(seconds + max(0.0, rest - window_seconds), sent)


def cheapest(facts: ModelFacts, fabric: Fabric, shares: Sequence[Sequence[int]], *, slices: bool) -> dict[str, str]:
    """For each trained table the answer that takes least time on these links; tables best all-reduced are left out.

    ``slices``: whether the optimizer may step blocks of a table.
    """
    trained = {one.name: one for one in facts.parameters if one.requires_grad}
    found: dict[str, str] = {}
    for table in facts.tables:
        if table.name not in trained or "." not in table.name:
            continue
        options = {"": WORTH * fabric.seconds(ALL_REDUCE, trained[table.name].size_bytes)}
        options |= {SPARSE: traffic(table, SPARSE, fabric, shares).seconds}
        if slices and not table.whole:
            options[ROWS] = traffic(table, ROWS, fabric, shares).seconds
        answer = min(options, key=lambda one: options[one])
        if answer:
            found[table.name] = answer
    return found


def _touched(table: TableFact, samples: float) -> float:
    return float(table.rows) if table.whole else table.touched(samples)


def _block(parameter: ParameterFact, workers: int) -> ParameterFact:
    return replace(parameter, shape=(-(-parameter.shape[0] // workers), *parameter.shape[1:]))


def _with(portion: Portion, parameters: Sequence[ParameterFact]) -> Portion:
    facts = replace(portion.facts, parameters=tuple(parameters))
    return replace(portion, facts=facts, _buckets={}, _units={})
