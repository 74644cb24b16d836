"""How fast this process computes: matrix products per precision, copies, and the launch of one kernel."""

import statistics
import time

import torch

WINDOWS = 3  # a rate is the median of this many windows
_COPIED_BYTES = 64 * 2**20  # past any cache


def matmul_size(dtype: torch.dtype, device: torch.device) -> int:
    """The side of square matrices whose product takes about 30 ms on a CPU, 10 ms on an accelerator."""
    probe, largest, target_seconds = (256, 1024, 0.03) if device.type == "cpu" else (1024, 8192, 0.01)
    seconds = min(_products(dtype, device, probe, 0.0)[1] for _ in range(3))
    side = probe * (target_seconds / max(seconds, 1e-9)) ** (1 / 3)
    return max(probe, min(largest, int(side) // 128 * 128))


def matmul_rate(
    dtype: torch.dtype, device: torch.device, seconds: float, side: int, *, windows: int = WINDOWS
) -> float:
    """FLOP/s of products of two square matrices with ``side`` rows, each window lasting ``seconds`` or one product."""
    rates: list[float] = []
    for _ in range(windows):
        products, elapsed_seconds = _products(dtype, device, side, seconds)
        rates.append(2 * side**3 * products / elapsed_seconds)
    return statistics.median(rates)


def copy_rate(device: torch.device) -> float:
    """Bytes read and written per second by a copy that no cache holds."""
    source = torch.ones(_COPIED_BYTES // 4, device=device)
    target = torch.empty_like(source)
    target.copy_(source)
    synchronize(device)
    times: list[float] = []
    for _ in range(7):
        started = time.perf_counter()
        target.copy_(source)
        synchronize(device)
        times.append(time.perf_counter() - started)
    return 2 * _COPIED_BYTES / statistics.median(times)


def kernel_seconds(device: torch.device, launches: int = 500) -> float:
    """Seconds that eager Python takes to launch one kernel on a tensor of one element."""
    one = torch.zeros(1, device=device)
    times: list[float] = []
    for _ in range(5):
        synchronize(device)
        started = time.perf_counter()
        for _ in range(launches):
            one.add_(1.0)
        times.append((time.perf_counter() - started) / launches)
    synchronize(device)
    return statistics.median(times)


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was given; a CPU always has."""
    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def _products(dtype: torch.dtype, device: torch.device, side: int, seconds: float) -> tuple[int, float]:
    left = torch.ones(side, side, dtype=dtype, device=device)
    right = torch.full((side, side), 1 / side, dtype=dtype, device=device)
    product = torch.mm(left, right)
    synchronize(device)
    started, products = time.perf_counter(), 0
    while True:
        torch.mm(left, right, out=product)
        synchronize(device)
        products += 1
        elapsed_seconds = time.perf_counter() - started
        if elapsed_seconds >= seconds:
            return products, elapsed_seconds
