"""Another cluster, another batch: a question with some of its figures changed, from text such as ``inter=10Gbit``."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

from sheaf.cluster.cluster import Cluster, Host, Link, Tier
from sheaf.cluster.contradictions import MOST_WORKERS
from sheaf.errors import PlanError, nearest
from sheaf.graph.facts import BlockTime, Profile
from sheaf.search.question import Question
from sheaf.units import parse_bytes

_SCALES = {"": 1.0, "k": 1e3, "m": 1e6, "g": 1e9, "t": 1e12, "p": 1e15}
_ALIASES = {"intra_node": "intra", "inter_node": "inter", "bandwidth": "links", "flops/device": "flops"}
_WANTED = {
    "links": "a bandwidth such as 10Gbit or 25GB/s, or a factor such as x2",
    "workers": f"a whole number such as 64, {MOST_WORKERS} at most, or a factor such as x2",
    "memory": "a size such as 80GiB, or a factor such as x2",
    "flops": "a rate such as 300T, or a factor such as x2",
    "batch": "a whole number such as 512, or a factor such as x2",
}


@dataclass(frozen=True)
class Change:
    """One figure changed: ``key`` is a link's tier, ``links`` (all), ``workers``, ``memory``, ``flops`` or ``batch``.

    ``value`` is the figure itself (bytes per second, bytes, operations per second), or with ``factor`` a multiple.
    """

    key: str
    value: float
    factor: bool = False

    def of(self, figure: float) -> float:
        """The figure, changed."""
        return figure * self.value if self.factor else self.value


def keys(cluster: Cluster) -> tuple[str, ...]:
    """What may be changed: the cluster's links by tier, and figures of its devices and of the question."""
    tiers = ("intra", *(("inter",) if cluster.inter is not None else ()), *(tier.name for tier in cluster.tiers))
    return (*tiers, "links", "workers", "memory", "flops", "batch")


def parse(text: str, cluster: Cluster) -> tuple[Change, ...]:
    """Changes from ``key=value,key=value``.

    Raises PlanError listing every unknown key with the nearest known one, and every value that is none.
    """
    known = keys(cluster)
    found: list[Change] = []
    wrong: list[str] = []
    for part in text.split(","):
        name, equals, said = (word.strip() for word in part.partition("="))
        key = _ALIASES.get(name, name)
        if not equals:
            wrong.append(f"{part.strip()!r}: write key=value, such as workers=64")
        elif key not in known:
            wrong.append(f"{name} cannot be changed; {nearest(name, (*known, 'intra_node', 'inter_node'))}")
        elif (change := _change(key, said)) is None:
            wrong.append(f"{name}={said}: wanted {_WANTED.get(key, _WANTED['links'])}")
        else:
            found.append(change)
    twice = sorted({one.key for one in found if sum(other.key == one.key for other in found) > 1})
    wrong += [f"{key} is given twice: once is enough" for key in twice]
    if wrong:
        raise PlanError([f"what-if: {one}" for one in wrong])
    return tuple(found)


def _change(key: str, said: str) -> Change | None:
    """The change that is said; None where it is no such value."""
    multiple = re.fullmatch(r"[x*](\d+(?:\.\d+)?(?:e-?\d+)?)", said)
    if multiple:
        return Change(key, float(multiple[1]), factor=True) if float(multiple[1]) > 0 else None
    if key in ("workers", "batch"):
        most = MOST_WORKERS if key == "workers" else math.inf
        return Change(key, int(said)) if re.fullmatch(r"[1-9]\d{0,17}", said) and int(said) <= most else None
    if key == "memory":
        try:
            size = parse_bytes(said)
        except ValueError:
            return None
        return Change(key, size) if size > 0 and said[-1].isalpha() else None  # 80 of what?
    unit = r"(?:FLOPS?|FLOP/s)?" if key == "flops" else r"(bit(?:/s|ps)?|bps|B(?:/s)?)"
    rate = re.fullmatch(rf"(\d+(?:\.\d+)?(?:e\d+)?)\s*([kmgtp]?){unit}", said, flags=re.IGNORECASE)
    if rate is None or float(rate[1]) <= 0:
        return None
    bits = 8 if key != "flops" and not rate[3].startswith("B") else 1  # B: bytes; anything else is said of bits
    return Change(key, float(rate[1]) * _SCALES[rate[2].lower()] / bits)


def changed(question: Question, changes: Sequence[Change]) -> Question:
    """The question with these figures. Raises PlanError where hosts of several kinds cannot become so many workers."""
    cluster, profiles = question.cluster, question.profiles
    batch, workers = question.batch, question.workers
    for change in changes:
        if change.key == "batch":
            batch = max(1, round(change.of(batch)))
        elif change.key == "workers":
            workers = max(1, round(change.of(question.available)))
            if workers > MOST_WORKERS:
                raise PlanError(f"what-if: workers={workers}: no more than {MOST_WORKERS} are planned for")
            cluster = _with_workers(cluster, workers)
        elif change.key == "memory":
            cluster = replace(cluster, hosts=tuple(_with_memory(host, change) for host in cluster.hosts))
        elif change.key == "flops":
            first = cluster.hosts[0].device.flops_per_second
            now = first.get(question.precision) or first.get("fp32") or max(first.values())
            times = change.of(now) / now
            cluster = replace(cluster, hosts=tuple(_with_flops(host, times) for host in cluster.hosts))
            profiles = {key: _quicker(profile, times) for key, profile in profiles.items()}
        else:
            cluster = _with_link(cluster, change)
    made = replace(question, cluster=cluster, batch=batch, workers=workers, profiles=profiles)
    if not profiles:
        made.take_over(question)
    return made


def _with_workers(cluster: Cluster, workers: int) -> Cluster:
    if workers <= cluster.workers:
        return cluster
    *others, last = cluster.hosts
    there = sum(host.count * host.workers for host in others)
    return replace(
        cluster,
        hosts=(*others, replace(last, count=-(-(workers - there) // last.workers))),
        inter=cluster.inter or cluster.intra,
    )


def _with_memory(host: Host, change: Change) -> Host:
    if host.device.kind == "cpu":  # shared by the host's workers
        per_worker = host.memory_bytes / host.workers
        return replace(host, memory_bytes=round(change.of(per_worker) * host.workers))
    return replace(host, device=replace(host.device, memory_bytes=round(change.of(host.device.memory_bytes))))


def _with_flops(host: Host, times: float) -> Host:
    rates = {precision: rate * times for precision, rate in host.device.flops_per_second.items()}
    return replace(host, device=replace(host.device, flops_per_second=rates))


def _with_link(cluster: Cluster, change: Change) -> Cluster:
    every = change.key == "links"
    made: Mapping[str, Link] = {
        tier: _faster(link, change)
        for tier, link in (("intra", cluster.intra), ("inter", cluster.inter))
        if link is not None and (every or change.key == tier)
    }
    tiers = tuple(_nearer(tier, change) if every or change.key == tier.name else tier for tier in cluster.tiers)
    return replace(cluster, **made, tiers=tiers)


def _faster(link: Link, change: Change) -> Link:
    """The link with another bandwidth: of measured times, what is above those of the smallest message."""
    rate = change.of(link.bytes_per_second)
    times = rate / link.bytes_per_second
    least: dict[tuple[str, int], float] = {}
    for one in link.timings:
        key = (one.operation, one.workers)
        least[key] = min(least.get(key, one.seconds), one.seconds)
    return replace(
        link,
        bytes_per_second=rate,
        timings=tuple(
            replace(one, seconds=floor + (one.seconds - floor) / times)
            for one in link.timings
            for floor in (least[one.operation, one.workers],)
        ),
    )


def _nearer(tier: Tier, change: Change) -> Tier:
    return replace(tier, bytes_per_second=change.of(tier.bytes_per_second))


def _quicker(profile: Profile, times: float) -> Profile:
    return replace(
        profile,
        blocks={
            name: BlockTime(time.forward_seconds / times, time.backward_seconds / times)
            for name, time in profile.blocks.items()
        },
    )
