"""This machine as it can be known without measuring: cores, memory that is free, the processor's name."""

import os
import platform
import socket
from dataclasses import replace
from pathlib import Path

import psutil
import torch

from sheaf.cluster.cluster import Cluster, Device, Host, Link
from sheaf.errors import ClusterError

# What a process may count on where nothing was measured; a core of the last ten years does more.
_CPU_FLOPS_PER_THREAD = {"fp64": 10e9, "fp32": 20e9, "bf16": 20e9, "fp16": 5e9}
_CPU_MEMORY_BYTES_PER_SECOND = 5e9
_CUDA_FLOPS = {"fp64": 0.2e12, "fp32": 8e12, "bf16": 30e12, "fp16": 50e12}  # about an NVIDIA T4 or better
_CUDA_MEMORY_BYTES_PER_SECOND = 300e9

LOOPBACK = Link(
    name="loopback",
    latency_seconds=60e-6,
    bytes_per_second=2e9,
    source="not measured: gloo between two processes of one ordinary host",
)
_PCI = Link(
    name="PCI Express", latency_seconds=20e-6, bytes_per_second=10e9, source="not measured: PCI Express 3, 16 lanes"
)


def describe_local(workers: int) -> Cluster:
    """This machine with ``workers`` workers, with cautious default rates: for when nothing was measured.

    Accelerators when there are enough of them, CPU workers otherwise. Raises ClusterError for less than one worker.
    """
    if workers < 1:
        raise ClusterError(f"workers={workers}: at least one worker is needed")
    accelerators = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    cores = available_cores()
    device = _cpu(workers, cores)
    contention = {n: min(1.0, cores / (n * device.threads)) for n in range(1, workers + 1)}
    host = Host(
        name=host_name(), count=1, workers=workers, device=device, cores=cores, memory_bytes=device.memory_bytes
    )
    cluster = Cluster(
        name="local",
        backend="gloo",
        hosts=(host,),
        intra=LOOPBACK,
        contention=contention,
        source="described, not measured: `sheaf measure` gives this machine's own figures",
    )
    if not (torch.cuda.is_available() and 1 <= workers <= accelerators):
        return cluster
    return replace(cluster, backend="nccl", hosts=(replace(host, device=_cuda()),), intra=_PCI, contention={})


def host_name() -> str:
    """The name under which this machine's workers know that they share it."""
    return socket.gethostname()


def processor_name() -> str:
    """The processor's model, as the kernel tells it."""
    information = Path("/proc/cpuinfo")
    if information.exists():
        for line in information.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def available_cores() -> int:
    """Cores that this process may use: its affinity, and its control group's quota if lower."""
    present = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else (os.cpu_count() or 1)
    quota = cgroup_cores()
    return present if quota is None else max(1, min(present, round(quota)))


def cores_taken(seconds: float = 0.2) -> float:
    """How many cores of this machine are busy just now, watched for ``seconds`` while this process sleeps."""
    return psutil.cpu_percent(interval=seconds) / 100 * (psutil.cpu_count() or 1)


def free_memory_bytes() -> int:
    """Bytes that new processes of this machine may use now: what is available, or what the control group leaves."""
    available = psutil.virtual_memory().available
    left = cgroup_free_bytes()
    return available if left is None else max(0, min(available, left))


def cgroup_cores(root: Path = Path("/")) -> float | None:
    """Cores that the strictest control group of this process allows; None when none limits it."""
    quotas: list[float] = []
    for folder in _cgroups(root, "cpu"):
        words = _text(folder / "cpu.max").split()  # version 2: quota and period
        if not words:
            words = [*_text(folder / "cpu.cfs_quota_us").split(), *_text(folder / "cpu.cfs_period_us").split()]
        if len(words) == 2 and words[0].isdigit() and int(words[1]) > 0:
            quotas.append(int(words[0]) / int(words[1]))
    return min(quotas, default=None)


def cgroup_free_bytes(root: Path = Path("/")) -> int | None:
    """Bytes that the strictest control group of this process leaves; None when none limits it.

    File pages that can be dropped (``inactive_file``) count as free.
    """
    left: list[int] = []
    for folder in _cgroups(root, "memory"):
        limit = _text(folder / "memory.max") or _text(folder / "memory.limit_in_bytes")
        used = _text(folder / "memory.current") or _text(folder / "memory.usage_in_bytes")
        if limit.isdigit() and used.isdigit() and int(limit) < 2**60:  # version 1 writes "no limit" as about 2**63
            statistics = dict(line.split(" ", 1) for line in _text(folder / "memory.stat").splitlines() if " " in line)
            droppable = statistics.get("total_inactive_file", statistics.get("inactive_file", "0"))
            left.append(int(limit) - max(0, int(used) - int(droppable)))
    return min(left, default=None)


def _cgroups(root: Path, controller: str) -> list[Path]:
    """Folders of the control groups of this process that may limit ``controller``, its own first."""
    folders: list[Path] = []
    for line in _text(root / "proc/self/cgroup").splitlines():
        _, controllers, group = line.split(":", 2)
        if controllers == "":
            mount = root / "sys/fs/cgroup"
        elif controller in controllers.split(","):
            mount = root / "sys/fs/cgroup" / controller
        else:
            continue
        folder = mount / group.lstrip("/")
        while True:
            folders.append(folder)
            if folder == mount or mount not in folder.parents:
                break
            folder = folder.parent
    return folders


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="ascii").strip()
    except (OSError, UnicodeDecodeError):
        return ""


def _cpu(workers: int, cores: int) -> Device:
    threads = max(1, cores // workers)
    return Device(
        name=processor_name(),
        kind="cpu",
        flops_per_second={precision: rate * threads for precision, rate in _CPU_FLOPS_PER_THREAD.items()},
        memory_bytes_per_second=_CPU_MEMORY_BYTES_PER_SECOND,
        memory_bytes=max(1, free_memory_bytes()),
        kernel_seconds=3e-6,
        threads=threads,
        thread_speedup={n: float(n) for n in range(1, cores + 1)},
        source="cautious defaults, not measured",
    )


def _cuda() -> Device:
    return Device(
        name=torch.cuda.get_device_name(0),
        kind="cuda",
        flops_per_second=dict(_CUDA_FLOPS),
        memory_bytes_per_second=_CUDA_MEMORY_BYTES_PER_SECOND,
        memory_bytes=int(torch.cuda.mem_get_info(0)[0]),
        kernel_seconds=8e-6,
        source="cautious defaults, not measured",
    )
