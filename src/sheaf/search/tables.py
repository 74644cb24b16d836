"""Plans in which gradients of tables travel as rows, each table as costs least, worth pricing."""

from collections.abc import Iterator, Sequence

from sheaf.cost.deals import dealt
from sheaf.cost.rows import cheapest
from sheaf.graph.facts import GLUE, LOSS, ModelFacts
from sheaf.plans import Plan
from sheaf.search import space
from sheaf.search.measured import facts_for
from sheaf.search.question import Question

HEAVY = 0.15  # of all parameters, in a block beside the tables: it may be split where rows travel
_MOST_HEAVY = 2


def table_plans(question: Question) -> Iterator[tuple[Plan, Sequence[int | None]]]:
    """Replicas whose tables travel as rows, where that is the cheapest for some, with the microbatches to try.

    A heavy block that is no table, such as a head over a vocabulary, is also tried split among them.
    """
    if not facts_for(question.facts, 1).tables:
        return
    for workers in space.degrees(question.available, question.batch):
        if workers == 1:
            continue
        sizes: Sequence[int | None] = (
            [None] if question.microbatch else list(space.microbatch_choices(question.batch, workers))
        )
        size = question.microbatch or -(-question.batch // workers)
        facts = facts_for(question.facts, size)
        fabric = question.basis(Plan(dp=workers)).fabric(Plan(dp=workers), "dp")
        shares = dealt(Plan(dp=workers), [size] * max(workers, question.batch // size))
        heads = _heads(question, workers, facts)
        seen: set[Plan] = set()
        for slices in (True, False) if question.elementwise else (False,):
            found = cheapest(facts, fabric, shares, slices=slices)
            if not found:
                continue
            parts = tuple((name.rpartition(".")[0], answer) for name, answer in found.items())
            for heavy in ((), heads) if heads else ((),):
                plan = Plan(dp=workers, parts=(*parts, *((name, "tp") for name in heavy)))
                if plan not in seen:
                    seen.add(plan)
                    yield plan, sizes


def _heads(question: Question, workers: int, facts: ModelFacts) -> tuple[str, ...]:
    """Blocks that hold much of the model, are no tables, and can be split."""
    split = question.splits.get((workers, 0))
    tables = {table.name for table in facts.tables}
    if split is None or not question.elementwise:
        return ()
    heavy = [
        block
        for block in facts.blocks
        if block.name not in (GLUE, LOSS)
        and block.parameter_bytes > HEAVY * facts.parameter_bytes
        and tables.isdisjoint(block.parameters)
        and any(name in split.slices for name in block.parameters)
    ]
    heavy.sort(key=lambda block: -block.parameter_bytes)
    return tuple(block.name for block in heavy[:_MOST_HEAVY])
