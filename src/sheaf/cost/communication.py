"""How long gradients and parameters travel, how much of it hides behind computation, and what one worker sends."""

from collections.abc import Sequence
from dataclasses import dataclass, field

from sheaf.cluster.cluster import Cluster, Link
from sheaf.cluster.links import collective_seconds
from sheaf.cost.placement import Seat, machines
from sheaf.graph.facts import GLUE, LOSS, ModelFacts
from sheaf.plans import Plan, layout
from sheaf.plans.layout import Held

ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, BROADCAST = "all_reduce", "reduce_scatter", "all_gather", "broadcast"
ALL_TO_ALL, TRADE = "all_to_all", "trade"
COUNTER_SECONDS = 100e-6  # one round trip to the counter from which microbatches are stolen


@dataclass(frozen=True)
class Fabric:
    """The links among a plan's workers; a group that spans machines goes at the pace of the slower link."""

    links: tuple[Link, ...]
    workers: int
    factor: float = 1.0  # of what a collective takes alone
    _known: dict[tuple[str, int], float] = field(default_factory=dict[tuple[str, int], float], compare=False)

    def seconds(self, operation: str, size_bytes: int) -> float:
        """One collective over all workers; no time for nothing or for one worker.

        An all-to-all sends what an all-gather of the same size does, and is not measured by itself.
        """
        operation = ALL_GATHER if operation == ALL_TO_ALL else operation
        if operation == TRADE:  # of pairs, each with one message each way
            return self.passing_seconds(size_bytes)
        if self.workers < 2 or size_bytes <= 0:
            return 0.0
        if (operation, size_bytes) not in self._known:
            self._known[operation, size_bytes] = self.factor * max(
                collective_seconds(link, operation, self.workers, float(size_bytes)) for link in self.links
            )
        return self._known[operation, size_bytes]

    def sent_bytes(self, operation: str, size_bytes: int) -> float:
        """What one worker sends in a bandwidth-optimal ring (Patarasuk and Yuan 2009).

        Reduce-scatter and all-gather send (n - 1)/n of the size, an all-reduce both.
        """
        if operation == TRADE:
            return float(size_bytes)
        once = size_bytes * (self.workers - 1) / self.workers
        return 2 * once if operation == ALL_REDUCE else once

    def passing_seconds(self, size_bytes: int) -> float:
        """One message from one worker to another over the slowest of the links."""
        if ("", size_bytes) not in self._known:
            # A broadcast between two is one message.
            self._known["", size_bytes] = self.factor * max(
                (collective_seconds(link, BROADCAST, 2, float(size_bytes)) for link in self.links if size_bytes),
                default=0.0,
            )
        return self._known["", size_bytes]


def fabric(cluster: Cluster, placed: tuple[Seat, ...], factor: float = 1.0) -> Fabric:
    """The links that workers on these seats use."""
    spans = machines(placed) > 1
    links = (cluster.intra, *((cluster.inter,) if spans and cluster.inter else ()))
    if spans and cluster.inter and machines(placed) == len(placed):
        links = (cluster.inter,)  # one worker per machine: the link inside a machine is not used
    return Fabric(links, len(placed), factor)


def fabric_of_groups(
    cluster: Cluster, placed: tuple[Seat, ...], groups: Sequence[Sequence[int]], factor: float = 1.0
) -> Fabric:
    """The links of groups of as many ranks each, which communicate at once and wait for the slowest."""
    fabrics = [fabric(cluster, tuple(placed[rank] for rank in group), factor) for group in groups]
    links = {id(link): link for one in fabrics for link in one.links}
    return Fabric(tuple(links.values()), fabrics[0].workers, factor)


def exposed(pieces: Sequence[float], window_seconds: float, overlap: float) -> float:
    """What is left of communication that runs beside computation.

    ``pieces`` are in the order they start; the last one starts when computation ends (or, for gathering, the first
    one before it starts), so it has nothing to hide behind. Of the others the share ``overlap`` hides, as far as the
    ``window_seconds`` of computation reach. A negative ``overlap`` adds: on cores that are busy computing, sending
    takes longer than it does alone.
    """
    total = sum(pieces, 0.0)
    hideable = total - (pieces[-1] if pieces else 0.0)
    return total - min(overlap * hideable, window_seconds)


def buckets(facts: ModelFacts, bucket_bytes: int) -> tuple[int, ...]:
    """Sizes of the gradient buckets that the executors fill, in the order they fill."""
    itemsizes = {parameter.dtype: parameter.itemsize_bytes for parameter in facts.parameters}
    grouped = _grouped(facts, bucket_bytes)
    return tuple(sum(one.num_elements * itemsizes[one.dtype] for one in bucket) for bucket in grouped)


def meetings(facts: ModelFacts, plan: Plan, workers: int) -> list[tuple[tuple[str, int], ...]]:
    """For each bucket of gradients, or fragment of weights that met after local steps: the collectives, with bytes."""
    known = {one.name: one for one in facts.parameters}
    local = plan.meets_locally
    if local.every:
        trained = [one for one in facts.parameters if one.requires_grad]
        groups = layout.fragments([(one.name, one.num_elements, one.dtype) for one in trained], local.fragments)
    else:
        groups = [[one.name for one in bucket] for bucket in _grouped(facts, plan.bucket_bytes)]
    return [
        plan.compression.messages([known[name].shape for name in names], known[names[0]].itemsize_bytes, workers)
        for names in groups
    ]


def _grouped(facts: ModelFacts, bucket_bytes: int) -> tuple[tuple[Held, ...], ...]:
    itemsizes = {parameter.dtype: parameter.itemsize_bytes for parameter in facts.parameters}
    held = [Held(one.name, one.num_elements, one.dtype, one.requires_grad) for one in facts.parameters]
    return layout.buckets(held, itemsizes, bucket_bytes)


@dataclass(frozen=True)
class Units:
    """Parameters as ZeRO-2 and 3 move them: block by block in forward order, and what stays gathered for the step.

    Parameters used outside their block (shared ones, the glue's, those of modules never called) stay gathered, and so
    do blocks that are too small to be worth a collective of their own.
    """

    block_bytes: tuple[int, ...]
    block_trainable_bytes: tuple[int, ...]
    glue_bytes: int
    glue_trainable_bytes: int


def units(facts: ModelFacts, bucket_bytes: int) -> Units:
    """The units of a model; blocks too small to be worth a collective of their own are glue."""
    known = {parameter.name: parameter for parameter in facts.parameters}
    own: list[tuple[int, int]] = []
    for block in facts.blocks:
        if block.name not in (GLUE, LOSS) and block.calls:
            held = [known[name] for name in block.parameters if not known[name].aliases]
            own.append((sum(one.size_bytes for one in held), sum(one.size_bytes for one in held if one.requires_grad)))
    own = [pair for pair in own if not layout.kept_whole(pair[0], bucket_bytes)]
    return Units(
        block_bytes=tuple(size for size, _ in own),
        block_trainable_bytes=tuple(size for _, size in own),
        glue_bytes=facts.parameter_bytes - sum(size for size, _ in own),
        glue_trainable_bytes=facts.trainable_bytes - sum(size for _, size in own),
    )
