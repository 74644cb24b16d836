"""What the prices of many plans for one model and cluster share: portions, paces, links."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from operator import attrgetter
from typing import Any, TypeVar

from sheaf.cluster.cluster import Cluster
from sheaf.cost.again import narrowed
from sheaf.cost.communication import Fabric
from sheaf.cost.compute import Pace, Pacer, block_seconds
from sheaf.cost.offload import Stepping
from sheaf.cost.placement import Seat, Seats
from sheaf.cost.portion import Portion, bounded, in_part, portion, scoped, together
from sheaf.cost.seating import Seating
from sheaf.cost.tensor import Crossing
from sheaf.graph.facts import GLUE, LOSS, BlockFact, ModelFacts, Profile
from sheaf.plans import Plan
from sheaf.plans.mesh import Mesh
from sheaf.plans.offload import OPTIMIZER
from sheaf.plans.shares import updates_alone
from sheaf.plans.split import Move, SplitFacts
from sheaf.plans.stages import passed_on, placed

T = TypeVar("T")
_NAMELESS = attrgetter(*(one.name for one in fields(BlockFact) if one.name not in ("name", "parameters")))
_MODELS = {
    "whole", "middle", "stages", "names", "default", "default costs", "placed", "kinds", "together", "replicated",
    "parts", "crossing in",
}  # fmt: skip


@dataclass(frozen=True, eq=False)
class Basis:
    """One model on one cluster, split in one way, with everything that was worked out for it once.

    Good for all plans with the ``tp``, ``cp`` and ``parts`` it was made for (``Basis.of``).
    """

    facts: ModelFacts
    profile: Profile | None
    cluster: Cluster
    precision: str
    split: SplitFacts | None
    seating: Seating
    offloaded: bool = False  # whether optimizers step in the hosts' memory
    _known: dict[Any, Any] = field(default_factory=dict[Any, Any])

    @classmethod
    def of(
        cls,
        plan: Plan,
        facts: ModelFacts,
        profile: Profile | None,
        cluster: Cluster,
        *,
        precision: str = "fp32",
        split: SplitFacts | None = None,
        seating: Seating | None = None,
    ) -> "Basis":
        """The basis for a plan; raises ValueError when it splits layers and ``split`` does not say how.

        ``seating`` is that of another basis on the same cluster, to be shared.
        """
        facts, profile = narrowed(plan, facts, profile)
        seating = seating or Seating(cluster, precision)
        split, offloaded = scoped(plan, facts, split), plan.offload == OPTIMIZER
        return cls(facts, profile, cluster, precision, split, seating, offloaded)

    def offloading(self) -> "Basis":
        """The same where optimizers step in the hosts' memory."""
        kept = {key: value for key, value in self._known.items() if _of_the_model(key)}
        return replace(self, offloaded=True, _known=kept)

    def repeating(self, plan: Plan) -> "Basis":
        """The same where none but the blocks that the plan names run again."""
        facts, profile = narrowed(plan, self.facts, self.profile)
        return replace(self, facts=facts, profile=profile, _known={})

    def elsewhere(self, cluster: Cluster, seating: Seating) -> "Basis":
        """The same model on a cluster whose kernels launch as fast; what only the model decides is taken over."""
        kept = {key: value for key, value in self._known.items() if _of_the_model(key)}
        return replace(self, cluster=cluster, seating=seating, _known=kept)

    def seats(self, workers: int) -> Seats:
        """One seat per rank; raises PlanError when the cluster has fewer."""
        return self.seating.seats(workers)

    def alike(self, workers: int) -> bool:
        """Whether so many workers are equally fast, and none is slower than the first where optimizers step."""
        return self.seating.alike(workers, offloaded=self.offloaded)

    def updates_apart(self, plan: Plan) -> bool:
        """Whether replicas update in unlike times that the others do not wait for: the pace of each has its own."""
        return updates_alone(plan) and not self.alike(plan.workers)

    def fabric(self, plan: Plan, kind: str) -> Fabric:
        """The links among the plan's workers of one ``kind`` of group: ``dp``, ``tp`` or ``pp``.

        Those that split sequences are in the place of ``tp``; their gradients meet among all of ``dp`` and ``cp``.
        """
        key = ("fabric", kind, plan.pp, plan.dp, plan.tp, plan.cp)
        found = self._known.get(key)
        if found is None:
            mesh = Mesh.of(plan)
            found = self.seating.fabric(mesh, "stage" if kind == "dp" and plan.cp > 1 else kind, self.factor)
            self._known[key] = found
        return found

    def between(self, ranks: Sequence[int]) -> Fabric:
        """The links among these ranks."""
        return self.seating.between(tuple(ranks), self.factor)

    @property
    def factor(self) -> float:
        """How much longer a collective takes in a step than alone."""
        return self.profile.collective_factor if self.profile is not None else 1.0

    @property
    def whole(self) -> Portion:
        """The model in one piece, as one of the workers that split its layers has it."""
        found = self._known.get("whole")
        if found is None:
            everything = tuple(block.name for block in placed(self.facts))
            found = Portion(self.facts, self.profile) if self.split is None else self.stage(everything, 0, 1)
            self._known["whole"] = found
        return found

    def stage(self, names: tuple[str, ...], number: int, stages: int, turn: int = 0) -> Portion:
        """Stage ``number`` of a pipeline, made of the blocks of these names.

        Those of one ``turn`` (of a worker's stages the first, the second) that are made of the same kinds of blocks
        may be one portion, with the names of the first of them.
        """
        first, last = number == 0, number == stages - 1
        entering = 0 if first else self._crossing_in[names[0]]

        def made() -> Portion:
            return bounded(self._portion(names, 1 / stages, first=first, last=last), entering, last=last)

        kinds = () if first or last else tuple(map(self._kinds.get, names))
        if first or last or None in kinds:
            return self.once((names, number, stages), made)
        return self.once(("middle", kinds, entering, stages, turn), made)

    @property
    def _crossing_in(self) -> dict[str, int]:
        """Bytes that cross in front of each block but the first; of a split sequence those of one worker."""

        def made() -> dict[str, int]:
            along = self.split.activations if self.split and not self.split.slices else {}
            return {
                block.name: round(passed_on(before) * along.get(before.name, 1.0))
                for before, block in pairwise(placed(self.facts))
            }

        return self.once("crossing in", made)

    @property
    def _kinds(self) -> dict[str, Any]:
        """What kind of block each is, for those whose parameters and buffers are nobody else's."""

        def made() -> dict[str, Any]:
            known = {one.name: one for one in self.facts.parameters}
            held_of = {one.name: one.shape for one in self.whole.facts.parameters}  # by the worker that holds most
            shared = [alias for one in self.facts.parameters if one.aliases for alias in (one.name, *one.aliases)]
            moved: dict[str, list[Any]] = {}
            for move in self.split.moves if self.split else ():
                moved.setdefault(move.block, []).append((move.operation, move.size_bytes, move.backward))
            kinds: dict[str, Any] = {}
            for block in placed(self.facts):
                apart = f"{block.name}."
                if any(name.startswith(apart) for name in shared) or any(
                    buffer.name.startswith(apart) for buffer in self.facts.buffers
                ):
                    continue
                held = [known[name] for name in block.parameters]
                kinds[block.name] = (
                    _NAMELESS(block),
                    tuple((one.shape, one.dtype, one.requires_grad, held_of[one.name]) for one in held),
                    self.split and (self.split.work.get(block.name), self.split.activations.get(block.name)),
                    tuple(moved.get(block.name, ())),
                    self.profile and self.profile.blocks.get(block.name),
                )
            numbers: dict[Any, int] = {}
            return {name: numbers.setdefault(kind, len(numbers)) for name, kind in kinds.items()}

        return self.once("kinds", made)

    def together(self, parts: Sequence[Portion]) -> Portion:
        """Several portions of one worker."""
        return self.once(("together", *map(id, parts)), lambda: together(parts, self.facts))

    def parts(self, plan: Plan) -> tuple[Portion, Portion]:
        """What each replica computes alone, and the parts that all of them split."""

        def made() -> tuple[Portion, Portion]:
            inside = {block.name for block in self.facts.blocks if in_part(plan, block) == "tp"}
            outside = [block.name for block in self.facts.blocks if block.name not in inside]
            return (
                self._portion(tuple(outside), 1.0, first=True, last=True),
                self._portion(tuple(inside), 0.0, first=False, last=False),
            )

        return self.once(("parts", plan.parts), made)

    def pace(self, part: Portion, seat: Seat) -> Pace:
        """How fast a seat computes a portion."""
        known = self.once((id(part), "pacer"), lambda: Pacer(part.facts, part.profile)).pace(seat)
        if not self.offloaded:
            return known

        def made() -> Pace:
            stepping = self.stepping(seat, known.optimizer_seconds_per_byte)
            return replace(known, optimizer_seconds_per_byte=stepping.together)

        return self.once((id(part), "offloaded", seat), made)

    def stepping(self, seat: Seat, here: float) -> Stepping:
        """What a byte of parameters takes to be stepped in the host's memory; ``here`` on the device."""
        return Stepping.of(seat, self.state, here)

    @property
    def state(self) -> float:
        """Bytes of the optimizer's state for a byte of parameters."""
        return self.whole.state

    def crossing(self, part: Portion, fabric: Fabric, more: tuple[Move, ...] = ()) -> Crossing:
        """The collectives that splitting a portion's layers takes, over these links; ``more`` are of the facts."""

        def made() -> Crossing:
            scaled = tuple(
                replace(move, size_bytes=round(move.size_bytes * part.samples / self.facts.samples)) for move in more
            )
            return Crossing(fabric, (*part.moves, *scaled), part.samples, part.repeated)

        return self.once((id(part), id(fabric), "crossing"), made)

    def block_seconds(self, plan: Plan) -> tuple[float, ...]:
        """Forward and backward of each placed block on the first seat, for a microbatch of the facts.

        What splitting it takes is included; the loss counts with the last block.
        """

        def made() -> tuple[float, ...]:
            again = plan.again
            whole, seat = self.whole, self.seats(plan.workers)[0]
            seconds = block_seconds(whole.facts, whole.profile, seat, again=again)
            crossing = self.crossing(whole, self.fabric(plan, "tp"))
            known: dict[Any, float] = {}  # by what is moved: alike blocks take as long
            for name, moves in crossing.by_block.items():
                kind = (name in crossing.repeated, *((one.operation, one.size_bytes, one.backward) for one in moves))
                if kind not in known:
                    known[kind] = crossing.of(name).seconds(self.facts.samples, again=again)
                seconds[name] = seconds.get(name, 0.0) + known[kind]
            names = [block.name for block in placed(self.facts)]
            found = [seconds[name] for name in names]
            if found:
                found[-1] += seconds.get(LOSS, 0.0)
            return tuple(found)

        return self.once(("seconds", plan.recompute, id(self.fabric(plan, "tp")), self.seats(plan.workers)[0]), made)

    def _portion(self, names: tuple[str, ...], glue_share: float, *, first: bool, last: bool) -> Portion:
        host = self.cluster.hosts[0]
        return portion(
            self.facts,
            self.profile,
            self.split,
            frozenset(names) - {GLUE, LOSS},
            glue_share=glue_share,
            first=first,
            last=last,
            kernel_seconds=host.device.kernel_seconds / host.speed,
        )

    def once(self, key: Any, make: Callable[[], T]) -> T:
        """What was made for this key before, or now."""
        if key not in self._known:
            self._known[key] = make()
        return self._known[key]


def _of_the_model(key: Any) -> bool:
    """Whether what is known under a key holds on any cluster: portions of the model, and its default cuts."""
    first = key[0] if isinstance(key, tuple) else key
    return first in _MODELS if isinstance(first, str) else isinstance(first, tuple)
