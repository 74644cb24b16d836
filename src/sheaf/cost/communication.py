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
OUTCOME = "outcome"  # of a meeting, on its way to one who was late
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


def meetings(
    facts: ModelFacts, plan: Plan, workers: int, state: float = STATE_BYTES_PER_BYTE
) -> list[tuple[tuple[str, int], ...]]:
    """For each bucket of gradients, or fragment of weights that met after local steps: the collectives, with bytes.

    Where some may miss a meeting, the trades of each who is there, and last what those get who were late. ``state`` is
    what the optimizer keeps, bytes for a byte of parameters.
    """
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
        count = there(local, workers)
        sizes = [sum(known[name].size_bytes for name in names) for names in groups]
        trades = [((TRADE, -(-size // count)),) * (2 * (count - 1)) for size in sizes]
        return [*trades, ((OUTCOME, _outcome_bytes(facts, local, state)),) * (workers - count)]
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


def there(local: Local, workers: int) -> int:
    """How many of so many workers are at a meeting: without a grace no more than its quorum, as no two come at the same
    moment; with one, all of them.

    >>> [there(Local.parse(text), 4) for text in ("8", "8:quorum=3", "8:quorum=3:grace=2", "8:steps=speed")]
    [4, 3, 4, 4]
    """
    return local.quorum if local.quorum and not local.grace else workers


def sending(operation: str, local: Local, workers: int) -> float:
    """The share of the workers that send what a meeting takes, as a mean: those who are there, and of an outcome one.

    Who is late is chance; what all send together is not. What came of a meeting goes through the run's store, which is
    beside worker 0: on a link once for each who was late, as its fetch, or where worker 0 was, to the store. Who is so
    late that the next meeting is over, too, does not fetch it; that is not known before, and not in this.
    """
    return (1 if operation == OUTCOME else there(local, workers)) / workers


def _outcome_bytes(facts: ModelFacts, local: Local, state: float) -> int:
    """What came of a meeting: the weights and the momentum; or, where gradients meet, all weights and the optimizer's
    state.
    """
    if local.kind == "backup":
        return facts.parameter_bytes + round(state * facts.trainable_bytes)
    return facts.trainable_bytes * (1 + (local.kind in OUTER))


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
