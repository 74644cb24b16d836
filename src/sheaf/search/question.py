"""What a search is asked: a model's facts, a cluster, measured times; and the price of any plan under them."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from sheaf.cluster.cluster import Cluster
from sheaf.cost import Price, microbatch_sizes, priced
from sheaf.cost.basis import Basis
from sheaf.cost.estimate import holding, on_hosts, timed
from sheaf.cost.seating import Seating
from sheaf.graph.facts import GLUE, LOSS, ModelFacts, Profile
from sheaf.plans import Plan
from sheaf.plans.again import AGAIN
from sheaf.plans.offload import ON_DEVICE, OPTIMIZER
from sheaf.plans.rows import named
from sheaf.plans.split import SplitFacts
from sheaf.plans.stages import default_microbatch
from sheaf.search.measured import Profiles, facts_for, profile_for
from sheaf.search.pieces import Pieces


@dataclass(frozen=True, kw_only=True)
class Question:
    """What a search is asked.

    ``facts`` by samples per microbatch: one size where the task fixes it (``microbatch``), else those worth trying
    or a few of them. ``profiles`` by (samples, busy workers per host); none: a roofline prices. ``elementwise`` says
    whether the optimizer may step flat slices, ``hosted`` whether it steps in a host's memory, ``allow_relaxed``
    whether plans count that are not exact. ``splits`` by (workers that split a layer, sequence 0 or 1; see
    ``Plan.split_kind``): what is not there is not proposed. ``pieces`` of plans whose stages begin inside of blocks, by
    what they name (``Plan.begins``); where they are not there, facts are taken to be traced for the plan.
    """

    batch: int
    facts: Mapping[int, ModelFacts]
    cluster: Cluster
    microbatch: int | None = None
    workers: int | None = None
    profiles: Profiles = field(default_factory=dict)
    elementwise: bool = True
    hosted: bool = True
    precision: str = "fp32"
    splits: Mapping[tuple[int, int], SplitFacts] = field(default_factory=dict)
    allow_relaxed: bool = False
    pieces: Mapping[tuple[str, ...], Pieces] = field(default_factory=dict[tuple[str, ...], Pieces])
    _bases: dict[object, Basis] = field(default_factory=dict[object, Basis], init=False, repr=False, compare=False)
    _elsewhere: dict[object, Basis] = field(default_factory=dict[object, Basis], init=False, repr=False, compare=False)
    _found: dict[object, Basis] = field(default_factory=dict[object, Basis], init=False, repr=False, compare=False)
    _seatings: list[Seating] = field(default_factory=list[Seating], init=False, repr=False, compare=False)

    @property
    def available(self) -> int:
        """Workers that a plan may use."""
        return self.cluster.workers if self.workers is None else min(self.workers, self.cluster.workers)

    def size(self, plan: Plan) -> int:
        """Samples per microbatch under a plan."""
        return self.microbatch or plan.microbatch or default_microbatch(plan, self.batch)

    @property
    def offloadable(self) -> bool:
        """Whether optimizers can be moved out of the devices' memory: that of a CPU is its host's."""
        return self.hosted and all(host.device.kind != "cpu" for host in self.cluster.hosts)

    @property
    def recomputable(self) -> bool:
        """Whether any block keeps more than its input, so that running it again would save memory."""
        blocks = next(iter(self.facts.values())).blocks
        return any(block.composite for block in blocks if block.name not in (GLUE, LOSS))

    def may_repeat(self, plan: Plan) -> bool:
        """Whether blocks may run again under a plan, and that saves memory; rows sent to listed experts may not."""
        split = self.splits.get(plan.split_kind) if plan.expert_parts else None
        return self.recomputable and not (split is not None and split.dealt)

    def price(self, plan: Plan) -> Price:
        """The price of one plan, with a pipeline's timeline.

        Raises ValueError for a plan that splits layers in a way that ``splits`` does not hold.
        """
        return priced(plan, self.basis(plan), microbatch_sizes(self.batch, self.size(plan)), drawn=True)

    def rough(self, plan: Plan) -> Price:
        """The price without timeline."""
        return priced(plan, self.basis(plan), microbatch_sizes(self.batch, self.size(plan)))

    def timed(self, plan: Plan) -> Price:
        """The price as far as the step's seconds go, not all of them told apart: without memory."""
        return timed(plan, self.basis(plan), microbatch_sizes(self.batch, self.size(plan)))

    def held(self, plan: Plan) -> Price:
        """The price as far as memory goes: without seconds."""
        basis, sizes = self.basis(plan), microbatch_sizes(self.batch, self.size(plan))
        return Price(plan, {}, holding(plan, basis, sizes), 0.0, host_bytes=on_hosts(plan, basis, sizes))

    def basis(self, plan: Plan) -> Basis:
        """What the price of this plan has in common with others."""
        if plan.parts or self.pieces or self.profiles:
            return self._basis(plan)
        key = (self.size(plan), plan.tp, plan.cp, plan.sequence, plan.offload)
        found = self._found.get(key)
        if found is None:
            found = self._found[key] = self._basis(plan)
        return found

    def _basis(self, plan: Plan) -> Basis:
        size = self.size(plan)
        begins = plan.begins if self.pieces else ()
        pieces = self.pieces.get(begins)
        facts = facts_for(self.facts, size) if pieces is None else pieces.facts
        split = self.split_key(plan)
        measured = (size, self._busy(plan)) if self.profiles else None
        key = (facts.samples, measured, split, plan.parts, begins)
        if plan.offload == OPTIMIZER:
            key = (*key, plan.offload)
        if key not in self._bases:
            known = self._elsewhere.get(key)
            self._bases[key] = known.elsewhere(self.cluster, self.seating) if known else self._made(plan, facts, pieces)
        return self._bases[key]

    def _made(self, plan: Plan, facts: ModelFacts, pieces: Pieces | None) -> Basis:
        """A new basis: as far as it goes that of a plan with less to say."""
        if plan.offload == OPTIMIZER:
            return self.basis(replace(plan, offload=ON_DEVICE)).offloading()
        if plan.parts and len(named(plan.parts, AGAIN)) == len(plan.parts):
            return self.basis(replace(plan, parts=())).repeating(plan)
        return Basis.of(
            plan,
            facts,
            self.profile(plan) if pieces is None else pieces.profile(self.profile(plan)),
            self.cluster,
            precision=self.precision,
            split=self.splits.get(self.split_key(plan)),
            seating=self.seating,
        )

    def take_over(self, other: "Question") -> None:
        """Take from another question about the same model, without measured times, what its prices found out of it, as
        far as it is asked for.
        """
        self._elsewhere.update(other._elsewhere | other._bases)

    @property
    def seating(self) -> Seating:
        """Who sits where on the cluster."""
        if not self._seatings:
            self._seatings.append(Seating(self.cluster, self.precision))
        return self._seatings[0]

    def split_key(self, plan: Plan) -> tuple[int, int]:
        """Where in ``splits`` stands how a plan splits layers."""
        return plan.split_kind

    def profile(self, plan: Plan) -> Profile | None:
        """Measured times under as much company as the plan's workers have."""
        return profile_for(self.profiles, self.size(plan), self._busy(plan))

    def _busy(self, plan: Plan) -> int:
        return max(seat.busy for seat in self.seating.kinds(plan.workers))
