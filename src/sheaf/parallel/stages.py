"""Which stage of a pipeline holds which block and which parameters."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from sheaf.errors import PlanError
from sheaf.graph import trace
from sheaf.graph.facts import GLUE
from sheaf.parallel.portion import Portion
from sheaf.parallel.rehearsal import rehearse
from sheaf.parallel.world import World
from sheaf.plans import Plan
from sheaf.plans.stages import stages_of
from sheaf.task import Blueprint, Task


@dataclass(frozen=True)
class Stages:
    """``blocks`` maps block names to stages; ``holders`` canonical parameter names to the stages that hold them;
    ``between`` parameters that are used between blocks to the one stage that computes with them.
    """

    blocks: dict[str, int]
    holders: dict[str, tuple[int, ...]]
    between: dict[str, int]

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

    Raises PlanError where there are too few blocks, and where a block runs again after blocks of a later stage.
    """
    assert task.microbatch is not None
    samples = min(task.microbatch, task.num_samples)

    def found() -> dict[str, Any]:
        named = stages_of(plan, trace(task, samples))
        rehearsal = rehearse(Portion(blueprint_of(task, blueprint)), blocks)
        where = {name: stage for stage, names in enumerate(named) for name in names}
        _refuse_loops(plan, where, rehearsal.order)
        return {"where": where, "outside": sorted(rehearsal.outside)}

    told = world.agreed(found)
    where, outside = dict[str, int](told["where"]), set(told["outside"])
    holders: dict[str, tuple[int, ...]] = {}
    between: dict[str, int] = {}
    canonical = {alias: name for name, aliases in blueprint.names.items() for alias in (name, *aliases)}
    users: dict[str, set[int]] = {name: set() for name in blueprint.names}
    for name, block in blocks.items():
        for parameter, _ in block.named_parameters(remove_duplicate=False):
            full = canonical[f"{name}.{parameter}" if name else parameter]
            if name in where:
                users[full].add(where[name])
    for name, stages in users.items():
        if not stages or name in outside:
            between[name] = min(stages, default=0)
        holders[name] = tuple(sorted(stages)) or (0,)
    return Stages(where, holders, between)


def blueprint_of(task: Task, blueprint: Blueprint) -> Blueprint:
    """The blueprint with the decided task."""
    blueprint.task = replace(blueprint.task, microbatch=task.microbatch)
    return blueprint


def _refuse_loops(plan: Plan, where: dict[str, int], order: Sequence[str]) -> None:
    reached = 0
    for name in order:
        if name == GLUE or name not in where:
            continue
        if where[name] < reached:
            raise PlanError(
                f"{name} runs again after blocks of stage {reached}, and is of stage {where[name]} under {plan}: name "
                "stages= that keep what runs in a loop together, or use a smaller pp"
            )
        reached = max(reached, where[name])
