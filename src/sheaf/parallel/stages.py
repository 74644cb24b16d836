"""Which stage of a pipeline holds which block and which parameters."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from sheaf.errors import PlanError
from sheaf.graph import cut, trace
from sheaf.parallel.microbatch import with_microbatch
from sheaf.parallel.portion import Portion
from sheaf.parallel.rehearsal import Rehearsal, homes_of, rehearse
from sheaf.parallel.world import World
from sheaf.plans import Plan
from sheaf.plans.stages import stages_of
from sheaf.task import Blueprint, Task


@dataclass(frozen=True)
class Stages:
    """``blocks`` maps block names to the stages of their calls; ``holders`` canonical parameter names to the stages
    that hold them, and ``homes`` to the one that computes with them where they are used between blocks.
    ``complete``: no control flow depends on data.
    """

    blocks: dict[str, tuple[int, ...]]
    holders: dict[str, tuple[int, ...]]
    homes: dict[str, int]
    complete: bool

    def held(self, stages: Sequence[int]) -> set[str]:
        """Parameters of which one of these stages is a holder."""
        return {name for name, holders in self.holders.items() if set(holders) & set(stages)}

    def second(self, stages: Sequence[int], pp: int) -> set[str]:
        """Parameters that another worker's stage holds before any of these."""
        return {
            name
            for name, holders in self.holders.items()
            if set(holders) & set(stages) and holders[0] % pp not in {stage % pp for stage in stages}
        }

    @property
    def tied(self) -> tuple[str, ...]:
        """Parameters that several stages hold."""
        return tuple(name for name, holders in self.holders.items() if len(holders) > 1)


def placed(task: Task, plan: Plan, blueprint: Blueprint, blocks: dict[str, nn.Module], world: World) -> Stages:
    """The stages that the plan says, or balanced ones, the same on every worker (collective).

    A block that runs again after blocks of a later stage runs in that stage then, and shares its parameters with
    itself; unless what it is given comes of the batch alone. Raises PlanError where there are too few blocks, and
    where a block's tensor gets elsewhere by a way that is not its output.
    """
    assert task.microbatch is not None
    samples = min(task.microbatch, task.num_samples)

    def found() -> dict[str, Any]:
        named = stages_of(plan, trace(task, samples, begins=plan.begins))
        rehearsal = rehearse(Portion(blueprint), blocks)
        where = {name: stage for stage, names in enumerate(named) for name in names}
        _refuse_leaks(rehearsal, _by_call(where, rehearsal))
        return {
            "where": _by_call(where, rehearsal),
            "complete": rehearsal.complete,
        }

    told = world.agreed(found)
    where = {name: tuple(calls) for name, calls in told["where"].items()}
    users = {
        name: sorted({stage for block in found for stage in where.get(block, ())})
        for name, found in homes_of(Portion(blueprint), blocks).items()
    }
    holders: dict[str, tuple[int, ...]] = {name: tuple(stages) or (0,) for name, stages in users.items()}
    homes = {name: stages[0] for name, stages in holders.items()}
    return Stages(where, holders, homes, bool(told["complete"]))


def refuse_stages(task: Task, plan: Plan) -> None:
    """Raise PlanError where the model cannot be cut into the plan's stages, without workers."""
    blueprint = Blueprint(task)
    task = blueprint.task = with_microbatch(task, plan, blueprint.model)
    placed(task, plan, blueprint, cut(blueprint.model, plan.begins), World.alone())


def _refuse_leaks(rehearsal: Rehearsal, where: dict[str, tuple[int, ...]]) -> None:
    for writer, reader, line in rehearsal.leaks:
        if set(where.get(writer, ())) == set(where.get(reader, ())) and len(where.get(reader, ())) == 1:
            continue
        raise PlanError(
            f"{line} uses in {reader or 'the model itself'} a tensor that {writer} computed and did not return (an "
            "attribute, a list, a cache), and another pipeline stage may compute it: return it from forward, "
            + ("or name stages= that keep both in one stage" if reader in where else "or train without pp")
        )


def _by_call(where: dict[str, int], rehearsal: Rehearsal) -> dict[str, tuple[int, ...]]:
    """The stage of each call of a block: its own, or a later one that forward has reached and that it depends on."""
    reached = 0
    calls: dict[str, tuple[int, ...]] = {}
    for name, free in zip(rehearsal.order, rehearsal.free, strict=True):
        if name in where:
            stage = where[name] if free else max(where[name], reached)
            calls[name] = (*calls.get(name, ()), stage)
            reached = max(reached, stage)
    return {name: calls.get(name, (stage,)) for name, stage in where.items()}
