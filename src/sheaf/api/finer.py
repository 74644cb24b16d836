"""Stages that begin inside of a block, where that balances a pipeline clearly better than any cut in whole blocks."""

from collections.abc import Callable
from dataclasses import dataclass, replace

from sheaf.cost.basis import Basis
from sheaf.cost.pipeline import cut_seconds, finer_stages, perfect_seconds
from sheaf.errors import SheafError, first_line
from sheaf.graph import BlockFact, BlockTime, ModelFacts, Profile, trace
from sheaf.graph.cut import finer
from sheaf.graph.drawn import Drawn
from sheaf.parallel.stages import refuse_stages
from sheaf.plans import Plan
from sheaf.plans.stages import default_cost
from sheaf.search import Question
from sheaf.search.pieces import Pieces
from sheaf.task import Task
from sheaf.units import pretty_seconds

CLEAR = 0.02  # a stage begins inside of a block where the slowest stage is faster by more


@dataclass(frozen=True)
class Finer:
    """A plan whose stages begin inside of blocks, with the facts of its pieces and what they take."""

    plan: Plan
    pieces: Pieces

    def asked(self, question: Question) -> Question:
        """The question as it is for this plan too."""
        return replace(question, pieces={**question.pieces, self.plan.begins: self.pieces})


def finer_cut(
    task: Task,
    plan: Plan,
    question: Question,
    measured: Callable[[ModelFacts], Profile | None],
    say: Callable[[str], None],
) -> Finer | None:
    """The plan cut inside of blocks; None where whole blocks are as good within 2 %, or nothing can be cut so.

    ``plan`` has the best stages of whole blocks, ``question`` profiles of its microbatch and workers; ``measured``
    gives a profile of other facts of the same model. Nothing is traced where equal stages would gain no more, and
    nothing is measured where counted operations of the pieces promise no more.
    """
    basis = question.basis(plan)
    before = cut_seconds(plan, basis)
    if basis.profile is None or before <= perfect_seconds(plan, basis) * (1 + CLEAR):
        return None
    try:
        cut = _cut(task, plan, question, measured, before)
        after = before if cut is None else cut_seconds(cut.plan, cut.asked(question).basis(cut.plan))
    except SheafError as error:
        say(f"stages={plan.stages}: no stage begins inside of a block: {first_line(error)}")
        return None
    if cut is None or before <= after * (1 + CLEAR):
        return None
    say(
        f"stages={cut.plan.stages}, cut inside of a block: the slowest takes {pretty_seconds(after)} a microbatch, "
        f"where {plan.stages} in whole blocks takes {pretty_seconds(before)}"
    )
    return cut


def _cut(
    task: Task, plan: Plan, question: Question, measured: Callable[[ModelFacts], Profile | None], before: float
) -> Finer | None:
    """The best cut inside of blocks, where the slowest stage takes clearly less than ``before`` seconds."""
    drawn, whole = Drawn(task), question.basis(plan).facts
    begins = finer(drawn.blueprint.model)
    if not begins:
        return None
    pieces = trace(task, whole.samples, known=whole.tables, drawn=drawn, begins=begins)
    counted = {block.name: _counted(block) for block in pieces.blocks}
    profile = measured(pieces) if _best(plan, question, Pieces(pieces, counted), before) else None
    stages = _best(plan, question, Pieces(pieces, profile.blocks), before) if profile is not None else ""
    if profile is None or not stages:
        return None
    cut = replace(plan, stages=stages)
    refuse_stages(task, cut)
    facts = trace(task, whole.samples, known=whole.tables, drawn=drawn, begins=cut.begins)
    return Finer(cut, Pieces(facts, profile.blocks))


def _best(plan: Plan, question: Question, pieces: Pieces, before: float) -> str:
    """The best stages of pieces, where the slowest takes clearly less than ``before`` seconds."""
    whole = question.basis(plan)
    basis = Basis.of(
        plan,
        pieces.facts,
        pieces.profile(whole.profile),
        question.cluster,
        precision=question.precision,
        split=question.splits.get(plan.split_kind),
        seating=question.seating,
    )
    found = finer_stages(plan, basis, whole.facts)
    if not found:
        return ""
    after = cut_seconds(replace(plan, stages=found), basis)
    return found if before > after * (1 + CLEAR) else ""


def _counted(block: BlockFact) -> BlockTime:
    """A block's operations, in place of seconds."""
    return BlockTime(
        default_cost(block.forward_flops, block.forward_bytes), default_cost(block.backward_flops, block.backward_bytes)
    )
