"""What every worker of a group measures of itself, its machine and its links."""

import datetime as dt
import json
import time
from typing import Any

import torch
import torch.distributed as dist

from sheaf.cluster import machine, primitives, rates
from sheaf.cluster.collectives import barrier, overlap_share, timed_collectives, within
from sheaf.task import PRECISIONS

SIZES_BYTES = tuple(2**power for power in (10, 14, 17, 20, 23, 25))  # 1 KiB to 32 MiB
SECONDS_BUDGET = 15.0
Measured = tuple[str, str, int, int]  # tier, operation, workers, bytes
OVERLAP_SHARE, LINK_SHARE = 0.1, 0.6  # of the budget: at most for overlap, at least for links


def measure_rank(
    *, sizes_bytes: tuple[int, ...] = SIZES_BYTES, seconds_budget: float = SECONDS_BUDGET
) -> dict[str, Any]:
    """Measure on this worker, inside an initialised default process group; every worker calls it at once.

    Returns what JSON can hold, for ``assemble``. Rates of a lone worker come from the first worker of each host while
    the others wait; ``busy`` holds each worker's rate while n workers of its host compute. Collectives are timed for 2
    workers up to all (powers of two beyond eight); the first worker has their timings. ``seconds_budget`` is kept
    roughly. Without a process group, one worker measures itself.
    """
    world, rank = (dist.get_world_size(), dist.get_rank()) if dist.is_initialized() else (1, 0)
    device = _device()
    free_bytes = machine.free_memory_bytes()
    hosts = _hosts(machine.host_name())
    mine = hosts[machine.host_name()]
    result: dict[str, Any] = {
        "rank": rank,
        "host": machine.host_name(),
        "backend": primitives.backends().get(device.type) or dist.get_default_backend_for_device(device),
        "cores": machine.available_cores(),
        "threads": torch.get_num_threads(),
        "host_memory_bytes": free_bytes,
        "device": _device_facts(device, free_bytes),
        "torch": torch.__version__,
        "date": dt.datetime.now(tz=dt.UTC).date().isoformat(),
    }
    window_seconds = min(0.15, max(0.01, seconds_budget / 100))
    side = rates.matmul_size(torch.float32, device)
    _wait(device)
    if rank == mine[0]:
        result["cores_taken"] = machine.cores_taken()  # by others: this host's workers wait
        result |= _alone(device, window_seconds, side)
    _wait(device)
    result["busy"] = _busy(device, hosts, rank, window_seconds, side)
    result["timings"], result["overlap"] = [], None
    if world > 1:
        started = time.perf_counter()
        size_bytes, repetitions = (8 * 2**20, 5) if seconds_budget > 2 else (2**20, 3)
        size_bytes = within(_world(), device, OVERLAP_SHARE * seconds_budget / repetitions, most_bytes=size_bytes)
        result["overlap"] = overlap_share(_world(), device, size_bytes=size_bytes, repetitions=repetitions)
        left_seconds = max(LINK_SHARE * seconds_budget, 0.75 * seconds_budget - (time.perf_counter() - started))
        result["timings"] = _timings(device, hosts, rank, sizes_bytes, left_seconds)
    return result


def counts_up_to(workers: int) -> list[int]:
    """The numbers of workers that are measured: all from 2 to 8, then powers of two, and all workers.

    >>> counts_up_to(4), counts_up_to(24)
    ([2, 3, 4], [2, 3, 4, 5, 6, 7, 8, 16, 24])
    """
    powers = [2**power for power in range(4, workers.bit_length()) if 2**power < workers]
    return sorted({*range(2, min(8, workers) + 1), *powers, *([workers] if workers > 1 else [])})


def _alone(device: torch.device, window_seconds: float, side: int) -> dict[str, Any]:
    measured: dict[str, Any] = {
        "flops_per_second": {
            precision: rates.matmul_rate(dtype, device, window_seconds, rates.matmul_size(dtype, device))
            for precision, dtype in PRECISIONS.items()
        },
        "memory_bytes_per_second": rates.copy_rate(device),
        "kernel_seconds": rates.kernel_seconds(device),
        "thread_speedup": {},
    }
    cores, threads = machine.available_cores(), torch.get_num_threads()
    if device.type == "cpu" and cores > 1:
        by_threads: dict[int, float] = {}
        try:
            for number in sorted({1, threads, cores, *(2**power for power in range(1, cores.bit_length()))}):
                if number <= cores:
                    torch.set_num_threads(number)
                    by_threads[number] = rates.matmul_rate(torch.float32, device, window_seconds, side)
        finally:
            torch.set_num_threads(threads)
        measured["thread_speedup"] = {str(number): rate / by_threads[1] for number, rate in by_threads.items()}
    return measured


def _busy(
    device: torch.device, hosts: dict[str, list[int]], rank: int, window_seconds: float, side: int
) -> dict[str, float]:
    """Rates of this worker while the first n workers of its host compute; every worker of the world joins the waits."""
    mine = hosts[machine.host_name()]
    most = max(len(ranks) for ranks in hosts.values())
    rates_by_count: dict[str, float] = {}
    for count in [1, *counts_up_to(most)]:
        _wait(device)
        if count <= len(mine) and rank in mine[:count]:
            # One longer window: the operating system takes turns among more workers than cores.
            seconds = 3 * window_seconds
            rates_by_count[str(count)] = rates.matmul_rate(torch.float32, device, seconds, side, windows=1)
    _wait(device)
    return rates_by_count


def _timings(
    device: torch.device, hosts: dict[str, list[int]], rank: int, sizes_bytes: tuple[int, ...], seconds_budget: float
) -> list[dict[str, Any]]:
    everyone = [worker for ranks in hosts.values() for worker in ranks]
    first = next(iter(hosts.values()))
    teams = [("intra", first[:count]) for count in counts_up_to(len(first))]
    teams += [
        ("inter", [worker for ranks in list(hosts.values())[:count] for worker in ranks])
        for count in counts_up_to(len(hosts))
    ]
    best: dict[Measured, float] = {}
    deadline = time.perf_counter() + seconds_budget
    # Other load comes in bursts that outlast one measurement: each is taken twice, well apart, and the better one kept.
    sweeps = [*teams, *teams]
    for index, (tier, team) in enumerate(sweeps):
        whole = len(team) == len(everyone)
        group = _world() if whole else dist.new_group(sorted(team))
        if rank in team and isinstance(group, dist.ProcessGroup):
            share_seconds = max(0.1, deadline - time.perf_counter()) / (len(sweeps) - index)
            for operation, size_bytes, seconds in timed_collectives(group, device, sizes_bytes, share_seconds):
                measured = (tier, operation, len(team), size_bytes)
                best[measured] = min(seconds, best.get(measured, seconds))
            if not whole:
                dist.destroy_process_group(group)
        _wait(device)
    return [
        {"tier": tier, "operation": operation, "workers": workers, "size_bytes": size_bytes, "seconds": seconds}
        for (tier, operation, workers, size_bytes), seconds in never_longer(best).items()
        if rank == first[0]
    ]


def never_longer(seconds: dict[Measured, float]) -> dict[Measured, float]:
    """Of each collective, no message takes longer than a larger one: other load only ever makes one look slower.

    >>> never_longer({("intra", "all_reduce", 2, 8): 3.0, ("intra", "all_reduce", 2, 64): 1.0})
    {('intra', 'all_reduce', 2, 8): 1.0, ('intra', 'all_reduce', 2, 64): 1.0}
    """
    return {
        one: min(taken for other, taken in seconds.items() if other[:3] == one[:3] and other[3] >= one[3])
        for one in seconds
    }


def from_everyone(value: Any) -> list[Any]:
    """What every worker gives, of what JSON knows, by rank (collective). Nothing is unpickled."""
    if not dist.is_initialized():
        return [value]
    content = json.dumps(value).encode()
    device = _device()
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(dist.get_world_size())]
    dist.all_gather(sizes, torch.tensor([len(content)], device=device))
    longest = max(int(size) for size in sizes)
    sent = torch.tensor(list(content.ljust(longest, b" ")), dtype=torch.uint8, device=device)
    arrived = [torch.empty_like(sent) for _ in sizes]
    dist.all_gather(arrived, sent)
    return [json.loads(bytes(letters.tolist())) for letters in arrived]


def _device() -> torch.device:
    accelerator = primitives.carried_accelerator()
    if accelerator is None:
        return torch.device("cpu")
    return torch.device(accelerator.type, torch.accelerator.current_device_index())


def _device_facts(device: torch.device, free_bytes: int) -> dict[str, Any]:
    if device.type == "cuda":
        return {
            "name": torch.cuda.get_device_name(device),
            "kind": "cuda",
            "memory_bytes": int(torch.cuda.mem_get_info(device)[0]),
        }
    return {"name": machine.processor_name(), "kind": "cpu", "memory_bytes": free_bytes}


def _world() -> dist.ProcessGroup:
    world = dist.group.WORLD
    assert world is not None  # only asked for inside a group
    return world


def _wait(device: torch.device) -> None:
    if dist.is_initialized():
        barrier(None, device)


def _hosts(name: str) -> dict[str, list[int]]:
    """Host name -> its ranks, in order of their first rank."""
    hosts: dict[str, list[int]] = {}
    for rank, theirs in enumerate(from_everyone(name)):
        hosts.setdefault(theirs, []).append(rank)
    return hosts
