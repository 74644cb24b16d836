"""Facts and times of a model of which only some blocks run again in backward."""

from dataclasses import replace

from sheaf.graph.facts import GLUE, LOSS, ModelFacts, Profile
from sheaf.plans import Plan
from sheaf.plans.again import is_again

EVERY_BLOCK = Plan(dp=2, recompute="full")  # what is rehearsed of recomputation


def narrowed(plan: Plan, facts: ModelFacts, profile: Profile | None) -> tuple[ModelFacts, Profile | None]:
    """The same, with no other blocks taken for such that recomputation spares anything of than those the plan names.

    What running blocks again adds to each microbatch was measured for all of them, and is the less.
    """
    if not plan.again or plan.recompute == "full":
        return facts, profile
    blocks = [
        replace(block, composite=False) if block.composite and not is_again(plan, block.name) else block
        for block in facts.blocks
    ]
    all_of, some = (
        sum(one.composite for one in given if one.name not in (GLUE, LOSS)) for given in (facts.blocks, blocks)
    )
    key = str(EVERY_BLOCK)
    if profile is not None and key in profile.overheads:
        profile = replace(profile, overheads=profile.overheads | {key: profile.overheads[key] * some / max(1, all_of)})
    return replace(facts, blocks=tuple(blocks)), profile
