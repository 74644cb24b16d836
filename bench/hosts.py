"""Several hosts on one: network namespaces joined by a switch, each behind a link of a given rate.

Needs Linux, root, and `ip` and `tc` of iproute2; ``unavailable`` says what is missing. Links are shaped both ways by a
token bucket. Its burst must hold what a kernel sends at once: at 1 Gbit/s, 256 kB let an all-reduce reach 96 % of the
rate, 64 kB only 63 %.
"""

import os
import platform
import shutil
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path
from types import TracebackType
from typing import Self

from sheaf.cluster.cluster import Cluster, Device, Host, Link

NETWORK, PORT = "10.77.0", 29517
BURST, LATENCY = "256kb", "50ms"
COUNTERS = Path("/sys/class/net/eth0/statistics")


class HostsError(Exception):
    """Hosts cannot be made here, or a worker on one of them failed."""


def unavailable() -> str | None:
    """Why there can be no hosts here; None where there can."""
    if platform.system() != "Linux":
        return f"network namespaces are of Linux, and this is {platform.system()}"
    missing = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
    if missing:
        return f"{' and '.join(missing)} of iproute2 cannot be found"
    if os.geteuid() != 0:
        return "making network namespaces needs root"
    try:
        with Hosts(1, "1gbit"):
            return None
    except HostsError as error:
        return f"making a host failed: {error}"


def sent_bytes() -> int:
    """What this host has put on its link so far, headers included; call it on a host."""
    return int((COUNTERS / "tx_bytes").read_text())


def cluster(count: int, rate: str, flops_per_second: float = 3e10) -> Cluster:
    """Such hosts as the planner knows them: one worker each, links of a rate such as ``100mbit`` or ``1gbit``.

    ``flops_per_second`` of a worker is a guess; what is sent does not depend on it.
    """
    number, unit = float(rate.rstrip("bgitmk")), rate.lstrip("0123456789.")
    bits = number * {"kbit": 1e3, "mbit": 1e6, "gbit": 1e9}[unit]
    device = Device(
        name="a share of a core",
        kind="cpu",
        flops_per_second={"fp32": flops_per_second},
        memory_bytes_per_second=1e10,
        memory_bytes=64 * 2**30,
    )
    link = Link(name=rate, latency_seconds=1e-4, bytes_per_second=bits / 8)
    host = Host(name="host", count=count, workers=1, device=device, cores=1, memory_bytes=64 * 2**30)
    return Cluster(name=f"{count} hosts at {rate}", backend="gloo", hosts=(host,), intra=link, inter=link)


class Hosts:
    """``count`` hosts with addresses 10.77.0.1 and up, gone when the ``with`` block ends.

    ``burst`` is what a link that was idle sends at once, faster than its rate, in the words of `tc`. Raises HostsError
    when they cannot be made.
    """

    def __init__(self, count: int, rate: str, *, burst: str = BURST) -> None:
        self.names = [f"sheaf-{os.getpid()}-{index}" for index in range(count)]
        self._switch, self._rate, self._burst = f"sheaf-{os.getpid()}-switch", rate, burst
        self._made: list[str] = []

    def __enter__(self) -> Self:
        try:
            self._namespace(self._switch)
            _do(f"ip -n {self._switch} link add bridge type bridge")
            _do(f"ip -n {self._switch} link set bridge up")
            for index, name in enumerate(self.names):
                self._namespace(name)
                _do(f"ip -n {self._switch} link add port{index} type veth peer name eth0 netns {name}")
                _do(f"ip -n {self._switch} link set port{index} master bridge")
                _do(f"ip -n {self._switch} link set port{index} up")
                _do(f"ip -n {name} addr add {NETWORK}.{index + 1}/24 dev eth0")
                _do(f"ip -n {name} link set eth0 up")
                for namespace, device in ((name, "eth0"), (self._switch, f"port{index}")):
                    shape = f"tbf rate {self._rate} burst {self._burst} latency {LATENCY}"
                    _do(f"ip netns exec {namespace} tc qdisc replace dev {device} root {shape}")
        except BaseException:
            self._remove()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._remove()

    def run(self, command: Sequence[str], *, timeout_s: float) -> list[str]:
        """Run a command on every host, as workers of one group that find each other by torchrun's variables.

        What each wrote, by host. Raises HostsError with the end of what the first that failed wrote, and after
        ``timeout_s`` seconds; the others are killed.
        """
        started = [
            subprocess.Popen(
                ["ip", "netns", "exec", name, *command],
                env=os.environ | self._environment(index),
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for index, name in enumerate(self.names)
        ]
        until = time.monotonic() + timeout_s
        try:
            while any(one.poll() is None for one in started) and not any(one.poll() for one in started):
                if time.monotonic() > until:
                    raise HostsError(f"{' '.join(command)} took more than {timeout_s:g} s")
                time.sleep(0.2)
            failed = next((index for index, one in enumerate(started) if one.poll()), None)
        finally:
            for one in started:
                if one.poll() is None:
                    one.kill()
            told = [one.communicate()[0] for one in started]
        if failed is not None:
            raise HostsError(
                f"host {failed} ended with exit code {started[failed].returncode}:\n{told[failed][-2000:]}"
            )
        return told

    def _environment(self, index: int) -> dict[str, str]:
        return {
            "RANK": str(index),
            "WORLD_SIZE": str(len(self.names)),
            "LOCAL_RANK": "0",
            "LOCAL_WORLD_SIZE": "1",
            "MASTER_ADDR": f"{NETWORK}.1",
            "MASTER_PORT": str(PORT),
            "GLOO_SOCKET_IFNAME": "eth0",
            "OMP_NUM_THREADS": "1",
        }

    def _namespace(self, name: str) -> None:
        _do(f"ip netns add {name}")
        self._made.append(name)
        _do(f"ip -n {name} link set lo up")

    def _remove(self) -> None:
        while self._made:
            subprocess.run(["ip", "netns", "del", self._made.pop()], check=False, capture_output=True)


def _do(command: str) -> None:
    done = subprocess.run(command.split(), check=False, capture_output=True, text=True)
    if done.returncode:
        raise HostsError(f"`{command}`: {done.stderr.strip() or f'exit code {done.returncode}'}")
