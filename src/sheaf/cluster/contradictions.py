"""What does not go together in a cluster's table, though each field may be sound: told beside fields that are wrong."""

import math
from collections.abc import Iterator
from itertools import combinations, pairwise
from typing import Any

MOST_WORKERS = 2**24  # of a cluster: beyond, a planner holds more of them than it has memory for
NO_INTER = "inter is missing: several hosts need the link between them; add a table [inter]"
_BACKENDS = {"gloo": ("cpu", "cuda"), "nccl": ("cuda",), "xla": ("xla",)}
_TAKEN = {"intra", "inter", "links", "workers", "memory", "flops", "batch"}  # names that mean something else
_ALIASES = {"intra_node", "inter_node", "bandwidth"}


def contradictions(table: dict[str, Any]) -> list[str]:
    """Every contradiction of a cluster's table as TOML gives it; fields that are missing or wrong are left aside.

    >>> contradictions({"tiers": [{"name": "rack", "workers": 3}], "hosts": [{"workers": 4}]})
    ['tiers[0].workers: 3 is no part of a host of 4 workers and no number of whole hosts: use a divisor, or a multiple']
    """
    hosts = _tables(table, "hosts")
    return [*_of_hosts(table, hosts), *_of_prices(table, hosts), *_of_links(table, hosts), *_of_tiers(table, hosts)]


def _of_hosts(table: dict[str, Any], hosts: list[dict[str, Any]]) -> Iterator[str]:
    counts = [_number(host, "count") or 0 for host in hosts]
    if sum(counts) > 1 and "inter" not in table:
        yield NO_INTER
    there = sum(count * (_number(host, "workers") or 0) for count, host in zip(counts, hosts, strict=True))
    if there > MOST_WORKERS:
        yield f"hosts have {there:.0f} workers together, and no more than {MOST_WORKERS} are planned for: lower count"
    for index, host in enumerate(hosts):
        place, device = f"hosts[{index}]", _table(host, "device")
        if device.get("flops_per_second") == {}:
            yield f"{place}.device.flops_per_second is empty: give a rate, such as fp32 = 19.5e12"
        own, shared = _number(device, "memory_bytes"), _number(host, "memory_bytes")
        if device.get("kind") == "cpu" and own and shared and own > shared:
            yield (
                f"{place}: the device has {own:.0f} bytes of memory and its host {shared:.0f}, which CPU workers "
                "share: give the host at least as many"
            )
        backend, kind = str(table.get("backend")), device.get("kind")
        wanted = _BACKENDS.get(backend, ())
        if wanted and kind not in wanted and kind in ("cpu", "cuda", "xla"):
            yield f"backend {backend} is for {' or '.join(wanted)}, {place}.device.kind is {kind}"


def _of_prices(table: dict[str, Any], hosts: list[dict[str, Any]]) -> Iterator[str]:
    priced = [host for host in hosts if _number(_table(host, "device"), "price_per_hour")]
    if priced and not table.get("currency"):
        yield 'price_per_hour is given and currency is not: name it, such as currency = "USD"'
    if priced and len(priced) < len(hosts):
        yield "price_per_hour is given for some hosts' devices and not for others: give all of them, or none"


def _of_links(table: dict[str, Any], hosts: list[dict[str, Any]]) -> Iterator[str]:
    direct, most = _number(_table(table, "intra"), "direct"), max(_sizes(hosts), default=0)
    if direct is not None and most and not 2 <= direct <= most:
        yield (
            f"intra.direct: {direct:.0f} workers with links of their own to each other, and a host has {most:.0f}: "
            "give from 2 to as many, or leave it out"
        )


def _of_tiers(table: dict[str, Any], hosts: list[dict[str, Any]]) -> Iterator[str]:
    tiers = _tables(table, "tiers")
    names = [tier["name"] for tier in tiers if isinstance(tier.get("name"), str)]
    yield from (f"two tiers are called {one!r}: name each once" for one in sorted(set(names)) if names.count(one) > 1)
    yield from (f"a tier is called {one!r}, which is a table of its own" for one in sorted(set(names) & _TAKEN))
    for one in sorted(set(names)):
        if not one.strip() or set(one) & {"=", ","} or one in _ALIASES:
            yield f"a tier is called {one!r}: --what-if cannot speak of it; use another word"
    hosting = _sizes(hosts)
    sizes = {index: size for index, tier in enumerate(tiers) if (size := _number(tier, "workers"))}
    sound: dict[int, float] = {}
    for index, size in sizes.items():
        apart = [host for host in hosting if max(host, size) % min(host, size)]
        if size == 1:
            yield f"tiers[{index}].workers: one worker has no link to itself; use 2 or more"
        elif apart or (hosting and (min(hosting) < size < max(hosting) or size in hosting)):
            several = " or ".join(f"{host:.0f}" for host in sorted(hosting))
            yield (
                f"tiers[{index}].workers: {size:.0f} is no part of a host of {several} workers and no number of whole "
                "hosts: use a divisor, or a multiple"
            )
        else:
            sound[index] = size
    yield from _apart(sound)


def _apart(sizes: dict[int, float]) -> Iterator[str]:
    """Tiers of which neither lies within the other."""
    for (one, size), (other, as_many) in combinations(sizes.items(), 2):
        if size == as_many:
            yield f"tiers[{one}] and tiers[{other}] both hold {size:.0f} workers: leave one out"
    for (one, size), (other, larger) in pairwise(sorted(sizes.items(), key=lambda each: each[1])):
        if larger % size:
            yield (
                f"tiers[{other}].workers: {larger:.0f} is no number of whole tiers[{one}], which hold {size:.0f}: use "
                f"a multiple of {size:.0f}"
            )


def _sizes(hosts: list[dict[str, Any]]) -> set[float]:
    return {size for host in hosts if (size := _number(host, "workers"))}


def _tables(table: dict[str, Any], key: str) -> list[dict[str, Any]]:
    """The list of tables under a key, an empty one in the place of what is none."""
    found = table.get(key)
    return [one if isinstance(one, dict) else {} for one in found] if isinstance(found, list) else []


def _table(table: dict[str, Any], key: str) -> dict[str, Any]:
    found = table.get(key)
    return found if isinstance(found, dict) else {}


def _number(table: dict[str, Any], key: str) -> float | None:
    """A number above zero; None for what is missing or no such number."""
    found = table.get(key)
    sound = isinstance(found, int | float) and not isinstance(found, bool) and math.isfinite(found) and found > 0
    return found if sound else None
