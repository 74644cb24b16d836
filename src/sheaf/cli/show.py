"""A cluster in a few lines of text."""

from typing import TYPE_CHECKING

from sheaf.units import pretty_bytes, pretty_rate, pretty_seconds

if TYPE_CHECKING:
    from sheaf.cluster import Cluster, Host, Link


def described(cluster: "Cluster") -> list[str]:
    """Who works, how fast each computes (two lines for each kind of host), and one line of links, nearest first."""
    lines: list[str] = []
    for host in cluster.hosts:
        lines.extend(_host(cluster, host))
    inside = max(host.workers for host in cluster.hosts)
    tiers = sorted(cluster.tiers, key=lambda tier: tier.workers)
    near = [_link(tier.link, tier.workers) for tier in tiers if tier.workers < inside]
    far = [_link(tier.link, tier.workers) for tier in tiers if tier.workers > inside]
    links = [*near, _link(cluster.intra), *far]
    links += [f"between {'tiers' if far else 'hosts'} {_link(cluster.inter)}"] if cluster.inter is not None else []
    return [*lines, f"{cluster.backend}: {'; '.join(links)}"]


def _host(cluster: "Cluster", host: "Host") -> list[str]:
    device = host.device
    hosts = f"{host.count} hosts of " if host.count > 1 else ""
    workers = f"{host.workers} worker{'s' * (host.workers != 1)}"
    rates = [f"{precision} {pretty_rate(rate, 'FLOP')}" for precision, rate in device.flops_per_second.items()]
    reached = cluster.contention.get(host.workers)
    company = (
        f"; with {host.workers} busy each reaches {reached:.0%}" if reached is not None and reached < 0.995 else ""
    )
    return [
        f"{cluster.name}: {hosts}{workers} on {device.name}, {pretty_bytes(device.memory_bytes)} each",
        f"{', '.join(rates)}, memory {pretty_rate(device.memory_bytes_per_second, 'B')}{company}",
    ]


def _link(link: "Link", workers: int = 0) -> str:
    name = f"{link.name} of {workers}" if workers else link.name
    return f"{name}, {pretty_seconds(link.latency_seconds)}, {pretty_rate(link.bytes_per_second, 'B')}"
