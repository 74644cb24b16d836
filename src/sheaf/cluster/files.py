"""Cluster files: TOML to and from a Cluster, and the machines that ship with Sheaf."""

import os
import re
import tomllib
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cache
from importlib import resources
from itertools import groupby
from pathlib import Path
from typing import Any

import tomli_w

from sheaf.cluster.cluster import OVERLAP_RANGE, Cluster, Link, Timing
from sheaf.cluster.contradictions import contradictions
from sheaf.cluster.links import OPERATIONS
from sheaf.cluster.tables import decode
from sheaf.errors import ClusterError, nearest
from sheaf.task import PRECISIONS

_KINDS = ("cpu", "cuda", "xla")
_NARROW = ("tf32", "fp8", "fp4")  # precisions of matrix units that no task names, published runs do
_KNOWN = resources.files("sheaf.cluster") / "known"


@dataclass(frozen=True, kw_only=True)
class _Series:
    """Timings of one operation and number of workers, as a file holds them: two lists of equal length."""

    operation: str
    workers: int
    size_bytes: tuple[int, ...]
    seconds: tuple[float, ...]


def known() -> list[str]:
    """The names of the clusters that ship with Sheaf.

    >>> "h100-dgx" in known()
    True
    """
    return sorted(item.name.removesuffix(".toml") for item in _KNOWN.iterdir() if item.name.endswith(".toml"))


def read(source: str | Path, *, hosts: int | None = None) -> Cluster:
    """A cluster from a TOML file or by a known name; ``hosts`` sets how many hosts there are.

    A known name may carry the number itself, ``h100-dgx:16``. Raises ClusterError listing everything wrong with the
    file, or naming the nearest known cluster when there is no such file.

    >>> read("a100-dgx", hosts=128).workers
    1024
    """
    text, name, hosts = _text(source, hosts)
    try:
        table = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise ClusterError(f"{name} is not TOML: {error}") from None
    problems: list[str] = []
    if hosts is not None:
        table = _with_hosts(table, hosts, problems)
    cluster = _cluster(table, problems)
    if problems or cluster is None:
        raise ClusterError([f"{name}: {problem}" for problem in problems])
    return cluster


def write(cluster: Cluster, path: Path | str) -> None:
    """Write a cluster as TOML, so that ``read`` gives an equal one; the file is whole or the old one stays."""
    path = Path(path)
    table = asdict(cluster)
    for tier, link in (("intra", cluster.intra), ("inter", cluster.inter)):
        if link is not None:
            table[tier] = {**table[tier], "timings": _series(link.timings)}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        part = path.with_name(f"{path.name}.{os.getpid()}.part")
        part.write_text(_on_one_line(tomli_w.dumps(_pruned(table))), encoding="utf-8")
        part.replace(path)
    except OSError as error:
        raise ClusterError(f"cannot write the cluster file {path}: {error.strerror}; choose another place") from None


def _text(source: str | Path, hosts: int | None) -> tuple[str, str, int | None]:
    path = Path(source)
    try:
        if path.is_file():
            return path.read_text(encoding="utf-8"), str(path), hosts
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(f"cannot read the cluster file {path}: {error}") from None
    name, colon, number = str(source).partition(":")
    if name not in known():
        raise ClusterError(
            f"{str(source)!r} is neither a file nor a known cluster; {nearest(name, known())} "
            "(`sheaf measure` writes a file for this machine)"
        )
    if colon:
        if not re.fullmatch(r"[0-9]+", number):
            raise ClusterError(f"{source}: found {number!r} after the colon, wanted how many hosts, as in {name}:4")
        hosts = int(number) if hosts is None else hosts
    return (_KNOWN / f"{name}.toml").read_text(encoding="utf-8"), name, hosts


def _cluster(table: dict[str, Any], problems: list[str]) -> Cluster | None:
    timings: dict[str, tuple[Timing, ...]] = {}
    for tier in ("intra", "inter"):
        link = table.get(tier)
        if isinstance(link, dict) and "timings" in link:
            timings[tier] = _timings(link["timings"], f"{tier}.timings", problems)
            table = {**table, tier: {key: value for key, value in link.items() if key != "timings"}}
    named = _with_devices(table, problems)
    cluster: Cluster | None = decode(Cluster, _stood_in(named), "", problems, _RULES)
    problems += contradictions(named)
    if cluster is None:
        return None
    if not cluster.hosts:
        problems.append("hosts is empty: add at least one [[hosts]]")
    return replace(cluster, **{tier: replace(_link(cluster, tier), timings=found) for tier, found in timings.items()})


def _with_devices(table: dict[str, Any], problems: list[str]) -> dict[str, Any]:
    """The table with known devices in the place of their names; names that are not known stay."""
    hosts = table.get("hosts")
    if not isinstance(hosts, list):
        return table
    filled: list[Any] = []
    for index, host in enumerate(hosts):
        name = host.get("device") if isinstance(host, dict) else None
        if not isinstance(name, str):
            filled.append(host)
            continue
        devices = _devices()
        if name not in devices:
            problems.append(f"hosts[{index}].device: {name!r} is not known; {nearest(name, devices)}")
        filled.append({**host, "device": devices.get(name, name)})
    return {**table, "hosts": filled}


def _stood_in(table: dict[str, Any]) -> dict[str, Any]:
    """The table with some device wherever a name stands that is not known, which has been told."""
    hosts = table.get("hosts")
    if not isinstance(hosts, list):
        return table
    some = next(iter(_devices().values()))
    named = [isinstance(host, dict) and isinstance(host.get("device"), str) for host in hosts]
    return {
        **table,
        "hosts": [{**host, "device": some} if one else host for host, one in zip(hosts, named, strict=True)],
    }


@cache
def _devices() -> dict[str, dict[str, Any]]:
    """The devices of the known clusters by name, as their files have them."""
    found: dict[str, dict[str, Any]] = {}
    for name in known():
        for host in tomllib.loads((_KNOWN / f"{name}.toml").read_text(encoding="utf-8"))["hosts"]:
            found.setdefault(host["device"]["name"], host["device"])
    return found


def _link(cluster: Cluster, tier: str) -> Link:
    link = cluster.intra if tier == "intra" else cluster.inter
    assert link is not None  # its timings were found in its table
    return link


def _timings(series: Any, where: str, problems: list[str]) -> tuple[Timing, ...]:
    if not isinstance(series, list):
        problems.append(f"{where}: wanted a list of tables with operation, workers, size_bytes and seconds")
        return ()
    timings: list[Timing] = []
    for index, table in enumerate(series):
        place = f"{where}[{index}]"
        found: _Series | None = decode(_Series, table, place, problems, _RULES)
        if found is None:
            continue
        if len(found.size_bytes) != len(found.seconds):
            problems.append(
                f"{place}: found {len(found.size_bytes)} size_bytes and {len(found.seconds)} seconds, wanted as many"
            )
        timings.extend(
            Timing(operation=found.operation, workers=found.workers, size_bytes=size_bytes, seconds=seconds)
            for size_bytes, seconds in zip(found.size_bytes, found.seconds, strict=False)
        )
    return tuple(timings)


def _series(timings: tuple[Timing, ...]) -> list[dict[str, Any]]:
    series: list[dict[str, Any]] = []
    for (operation, workers), group in groupby(timings, key=lambda timing: (timing.operation, timing.workers)):
        points = list(group)
        series.append(
            {
                "operation": operation,
                "workers": workers,
                "size_bytes": [point.size_bytes for point in points],
                "seconds": [point.seconds for point in points],
            }
        )
    return series


def _with_hosts(table: dict[str, Any], hosts: int, problems: list[str]) -> dict[str, Any]:
    """The table with so many hosts of its one kind."""
    there = table.get("hosts")
    if hosts < 1:
        problems.append(f"hosts={hosts}: wanted at least one host")
    elif isinstance(there, list) and len(there) > 1:
        problems.append(f"hosts={hosts} is given, and there are {len(there)} kinds of them: edit their counts")
    elif isinstance(there, list) and there and isinstance(there[0], dict):
        return {**table, "hosts": [{**there[0], "count": hosts}]}
    return table


def _pruned(value: Any) -> Any:
    """The value as TOML can hold it: without None, keys as text, tuples as lists."""
    if isinstance(value, dict):
        return {str(key): _pruned(item) for key, item in value.items() if item is not None}
    if isinstance(value, list | tuple):
        return [_pruned(item) for item in value]
    return value


def _on_one_line(text: str) -> str:
    """TOML with each list of numbers on one line."""

    def joined(match: re.Match[str]) -> str:
        return f"[{', '.join(match[1].replace(',', ' ').split())}]"

    return re.sub(r"(?<= = )\[\n((?: +[-+.\deE]+,\n)+)\]", joined, text)


def _one_of(words: tuple[str, ...]) -> Callable[[Any], str | None]:
    return lambda value: None if value in words else f"found {value!r}; {nearest(value, words)}"


def _kind(value: Any) -> str | None:
    """All are told: of `gpu` the nearest is cpu, and cuda is meant."""
    return None if value in _KINDS else f"found {value!r}; known: {', '.join(_KINDS)}"


def _above_zero(value: Any) -> str | None:
    return None if value > 0 else f"found {value}, wanted a number above zero"


def _share(value: Any) -> str | None:
    return None if 0 < value <= 1 else f"found {value}, wanted a share above 0, up to 1"


def _overlap(value: Any) -> str | None:
    low, high = OVERLAP_RANGE
    return None if low <= value <= high else f"found {value}, wanted a share from {low} to {high}"


_RULES: dict[str, Callable[[Any], str | None]] = {
    "kind": _kind,
    "backend": _one_of(("gloo", "nccl", "xla")),
    "operation": _one_of(OPERATIONS),
    "flops_per_second key": _one_of((*PRECISIONS, *_NARROW)),
    "contention": _share,
    "overlap": _overlap,
    **dict.fromkeys(("count", "workers", "cores", "threads", "speed", "memory_bytes", "contention key"), _above_zero),
    **dict.fromkeys(("bytes_per_second", "memory_bytes_per_second", "flops_per_second"), _above_zero),
    **dict.fromkeys(("thread_speedup", "thread_speedup key"), _above_zero),
}
