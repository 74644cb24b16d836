"""How long gradients and parameters travel, how much of it hides behind computation, and what one worker sends."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from sheaf.cluster.cluster import Cluster, Link
from sheaf.cluster.links import collective_seconds
from sheaf.cluster.traffic import CONTROL_BYTES, messages, share
from sheaf.cost.placement import Seats
from sheaf.graph.facts import GLUE, LOSS, STATE_BYTES_PER_BYTE, ModelFacts
from sheaf.plans import Plan, layout
from sheaf.plans.layout import Held
from sheaf.plans.local import OUTER, Local

ALL_REDUCE, REDUCE_SCATTER, ALL_GATHER, BROADCAST = "all_reduce", "reduce_scatter", "all_gather", "broadcast"
ALL_TO_ALL, TRADE = "all_to_all", "trade"
OUTCOME = "outcome"  # of a meeting, for those who were late
COUNTER_SECONDS = 200e-6  # two round trips to the counter for a microbatch that is stolen: how many are left, and one


@dataclass(frozen=True)
class Fabric:
    """The links among a plan's workers; a group that spans machines goes at the pace of the slower link."""

    links: tuple[Link, ...]
    workers: int
    factor: float = 1.0  # of what a collective takes alone
    gloo: bool = False  # which says something about each message
    fullest: float = 0.0  # the part of what is sharded that one worker has, where parts differ
    _known: dict[tuple[str, int], float] = field(default_factory=dict[tuple[str, int], float], compare=False)

    def seconds(self, operation: str, size_bytes: int) -> float:
        """One collective over all workers; no time for nothing or for one worker.

        An all-to-all sends what an all-gather of the same size does, and is not measured by itself. Where shards
        differ, the others wait for what the fullest sends, or gets, as if all were as full.
        """
        if self.fullest and operation in (REDUCE_SCATTER, ALL_GATHER):
            size_bytes = round(size_bytes * self.fullest * self.workers)
        if operation == OUTCOME:  # goes through the run's store, and nobody who was there waits for it
            return 0.0
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
        """What one worker sends in a collective, as ``sheaf.cluster.traffic`` counts it where it is sent: the fullest,
        where shards differ.
        """
        part = 1.0 if operation == OUTCOME else share(operation, self.workers)
        if self.fullest and operation == REDUCE_SCATTER:
            part = 1 - self.fullest
        elif self.fullest and operation == ALL_GATHER:
            part = (self.workers - 1) * self.fullest
        return part * size_bytes + CONTROL_BYTES * self.messages(operation, size_bytes)

    def messages(self, operation: str, size_bytes: int) -> float:
        """How many messages of gloo that is."""
        by_gloo = self.gloo and size_bytes > 0 and operation != OUTCOME
        return messages(operation, self.workers, size_bytes) if by_gloo else 0

    def passing_seconds(self, size_bytes: int) -> float:
        """One message from one worker to another over the slowest of the links."""
        if ("", size_bytes) not in self._known:
            # A broadcast between two is one message.
            self._known["", size_bytes] = self.factor * max(
                (collective_seconds(link, BROADCAST, 2, float(size_bytes)) for link in self.links if size_bytes),
                default=0.0,
            )
        return self._known["", size_bytes]


@dataclass(frozen=True)
class Neighbourhood:
    """Who is near whom: for each tier from the smallest, in which unit of it each rank is, and its link.

    The links of the hosts are those of a tier of their own; the last link is between units of the largest.
    """

    units: tuple[np.ndarray, ...]
    links: tuple[Link, ...]
    inside: int  # the place of the link within a host
    gloo: bool = False

    @classmethod
    def of(cls, cluster: Cluster, placed: Seats) -> "Neighbourhood":
        """That of the workers on the first seats of a cluster."""
        ranks = np.arange(len(placed), dtype=np.int32)
        largest = max(host.workers for host in cluster.hosts)
        tiers = sorted(cluster.tiers, key=lambda tier: tier.workers)
        inner = [tier for tier in tiers if tier.workers < largest]
        outer = [tier for tier in tiers if tier.workers >= largest]
        return cls(
            (*(ranks // tier.workers for tier in inner), placed.machines, *(ranks // tier.workers for tier in outer)),
            (
                *(tier.link for tier in inner),
                cluster.intra,
                *(tier.link for tier in outer),
                cluster.inter or cluster.intra,
            ),
            len(inner),
            cluster.backend == "gloo",
        )

    def apart(self, stride: int) -> np.ndarray:
        """Over which link each rank reaches the one ``stride`` ranks on; the last ones, which have none, over the
        first.
        """
        found = np.zeros(len(self.units[0]), dtype=np.int8)
        for unit in self.units:
            found[:-stride] += unit[:-stride] != unit[stride:]
        return found

    def levels(self, groups: np.ndarray) -> np.ndarray:
        """Over which link each rank of a group reaches the next: that of the smallest tier that holds both."""
        left, right = groups[:, :-1], groups[:, 1:]
        apart = np.zeros(left.shape, dtype=np.int64)  # how many tiers do not hold both
        for unit in self.units:
            apart += unit[left] != unit[right]
        return apart


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
    if local.graph:  # to each neighbour, whole
        to = 2 if local.kind == "ring" and workers > 2 else 1
        return [tuple([(TRADE, sum(known[name].size_bytes for name in names))] * to) for names in groups]
    if local.rounds:
        return [_among_those_there(local, sum(known[name].size_bytes for name in names), workers) for names in groups]
    found = [
        plan.compression.messages([known[name].shape for name in names], known[names[0]].itemsize_bytes, workers)
        for names in groups
    ]
    if local.kind == "adasum":  # halves are exchanged as in an all-reduce; at each level, sums of products by layer
        levels = workers.bit_length() - 1
        return [
            (*sent, *((ALL_REDUCE, 24 * len(names) * (2**levels >> level + 1)) for level in range(levels)))
            for sent, names in zip(found, groups, strict=True)
        ]
    return found


def _among_those_there(local: Local, size_bytes: int, workers: int) -> tuple[tuple[str, int], ...]:
    """A meeting that some may miss: each who is there adds up a part and tells the others; late ones get the outcome.

    Without a grace no more are there than the quorum, as no two come at the same moment; with one, all are. The outcome
    is what the weights were after the meeting, and the momentum; or, where gradients meet, weights and optimizer state.
    """
    there = local.quorum if local.quorum and not local.grace else workers
    told = 1 + STATE_BYTES_PER_BYTE if local.kind == "backup" else 1 + (local.kind in OUTER)
    trades = [(TRADE, -(-size_bytes // there))] * (2 * (there - 1))
    return (*trades, *[(OUTCOME, round(told * size_bytes))] * (workers - there))


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
