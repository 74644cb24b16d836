"""A slow network: seconds to a fixed validation loss for each way that gradients meet, beside DDP in 16 bits.

Four hosts (bench.hosts) with links of 100 Mbit/s train a GPT of 10 million parameters on the Python language reference,
byte by byte; the last tenth of the text is held out. The peer is DistributedDataParallel with torch's hook that sends
gradients as fp16. All take the same samples in the same order, AdamW and the same learning rate after the same warm-up:
the one of ``RATES_TRIED`` with which training in one process comes to the target in the fewest steps (``python -m
bench.slow rates`` tries them, with the same warm-up: 1e-3 is there after 28, 3e-4 after 32, 3e-3 not in 32). Nothing is
tuned for a mode. Two wide layers rather than many, and a target near the start of training, let the whole fit in less
than half an hour. Backup workers have a grace, since hosts that are equally fast are late by little only, and the first
three would send each late one weights and optimizer state in every step.

After every ``INTERVAL`` steps all hosts meet, the clock and the count of bytes stop, and the held-out loss is taken: of
the workers' mean weights after local steps (they are averaged through files, not over the links), of each worker's own
elsewhere. Who was late for the last meeting fetches what came of it before that, as it would before its next step. A
mode ends at the target, or when it has trained ``BUDGET_SECONDS``. The hosts share this machine's cores, so that
computing takes longer than on four machines, and sending counts for less.

``sent_bytes`` of a row is the mean over the hosts, ``most_sent_bytes`` what the busiest of them sent. All send the same
but where some are late for meetings: those trade nothing, and host 0, beside which the store is, sends to most of them
what came of it. There the prediction is a mean too, elsewhere that of the worker that sends most.
"""

import math
import statistics
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import fp16_compress_hook
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

from bench.hosts import HostsError, sent_bytes, unavailable
from bench.on_hosts import Broken, found_by, joined, predicted_bytes, tell
from sheaf import Plan, Task, build
from sheaf.cluster.machine import available_cores
from sheaf.task import Blueprint, Order, fetch
from sheaf.zoo.models.gpt import GPT
from sheaf.zoo.tasks.text import VOCABULARY, Windows, next_byte_loss, reference_text

HOSTS, RATE = 4, "100mbit"
CONTEXT, WIDTH, LAYERS, HEADS = 64, 640, 2, 10  # 10 million parameters
SAMPLES = 4  # windows a step and host
LEARNING_RATE, RATES_TRIED, WARM_UP_STEPS = 1e-3, (3e-4, 1e-3, 3e-3), 10
HELD_OUT, VALIDATED = 0.1, 64  # of the text; windows of it that are looked at
TARGET, BUDGET_SECONDS, PEER_SECONDS = 2.8, 85.0, 240.0  # the peer must come to the target
INTERVAL = 4  # steps between validations
PEER = "DDP with the fp16 hook"
PLANS = (
    "dp=4",
    "dp=4,compress=bf16",
    "dp=4,compress=int8",
    "dp=4,compress=topk:0.01",
    "dp=4,compress=powersgd:4",
    "dp=4,server=4",
    "dp=4,server=4:staleness=4",
    "dp=4,server=4:async",
    "dp=4,local=16",
    "dp=4,local=16:diloco",
    "dp=4,local=16:slowmo",
    "dp=4,local=16:diloco:fragments=4:overlap=2",
    "dp=4,local=16:quorum=3",
    "dp=4,local=1:adasum",
    "dp=4,local=1:ring",
    "dp=4,local=1:exponential",
    "dp=4,local=1:backup:quorum=3:grace=5",
    "dp=4,server=4,local=16:diloco",
    "dp=4,server=4:async,local=16:diloco",
)
TIMEOUT_S = 3000.0


def texts() -> tuple[str, str]:
    """What is trained on, and what is held out."""
    text = reference_text()
    cut = round(len(text) * (1 - HELD_OUT))
    return text[:cut], text[cut:]


def model() -> nn.Module:
    """No dropout, so that held-out and training losses are of one model."""
    return GPT(vocabulary=VOCABULARY, context=CONTEXT, width=WIDTH, layers=LAYERS, heads=HEADS, dropout=0.0)


def adamw(parameters: Any, lr: float = LEARNING_RATE) -> torch.optim.Optimizer:
    """The optimizer of every mode."""
    return torch.optim.AdamW(parameters, lr=lr, betas=(0.9, 0.95), weight_decay=0.1)


def warm_up(optimizer: torch.optim.Optimizer) -> torch.optim.lr_scheduler.LRScheduler:
    """Up to the learning rate in equal steps."""
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1.0, (step + 1) / WARM_UP_STEPS))


def task(lr: float = LEARNING_RATE) -> Task:
    """One microbatch of ``SAMPLES`` windows per host and step."""
    return Task(
        model=model,
        loss=next_byte_loss,
        optimizer=partial(adamw, lr=lr),
        scheduler=warm_up,
        data=Windows(texts()[0], CONTEXT),
        batch=SAMPLES * HOSTS,
        microbatch=SAMPLES,
    )


class Validation:
    """The held-out loss, each worker having its part of the windows."""

    def __init__(self, rank: int, workers: int) -> None:
        windows = Windows(texts()[1], CONTEXT)
        taken = torch.linspace(0, len(windows) - 1, VALIDATED).long().tolist()[rank::workers]
        self._inputs, self._targets = (torch.stack(each) for each in zip(*(windows[one] for one in taken), strict=True))

    @torch.no_grad()
    def __call__(self, module: nn.Module) -> float:
        """Nats per byte over all workers' windows (collective where there are others)."""
        logits = module(self._inputs)
        total = F.cross_entropy(logits.flatten(0, 1), self._targets.flatten(), reduction="sum")
        told = torch.stack([total, torch.tensor(float(self._targets.numel()))]).double()
        if dist.is_initialized():
            dist.all_reduce(told)
        return float(told[0] / told[1])


class Mean:
    """The mean of the workers' weights, which go through files in ``folder``."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._module = folder, model()

    def __call__(self, own: nn.Module) -> nn.Module:
        rank, workers = dist.get_rank(), dist.get_world_size()
        save_file({"own": _flat(own)}, self._folder / f"{rank}.safetensors")
        dist.barrier()
        mean = sum(load_file(self._folder / f"{other}.safetensors")["own"] for other in range(workers)) / workers
        dist.barrier()
        assert isinstance(mean, Tensor)
        torch.nn.utils.vector_to_parameters(mean, self._module.parameters())
        return self._module


def _flat(module: nn.Module) -> Tensor:
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach()


def by_hand(given: Task, rank: int) -> tuple[Callable[[], object], nn.Module]:
    """DDP with the hook, as people write it, on the samples of Sheaf's steps."""
    count = 0
    module = DistributedDataParallel(Blueprint(given).fill(torch.device("cpu")), gradient_as_bucket_view=True)
    module.register_comm_hook(None, fp16_compress_hook)
    optimizer = adamw(module.parameters())
    scheduler = warm_up(optimizer)
    order = Order(given.num_samples, given.batch, SAMPLES, given.seed, shuffle=given.shuffle)

    def step() -> None:
        nonlocal count
        inputs, targets = fetch(given, order.step(count)[rank].samples, 0)
        optimizer.zero_grad()
        F.cross_entropy(module(inputs).flatten(0, 1), targets.flatten()).backward()
        optimizer.step()
        scheduler.step()
        count += 1

    return step, module.module


def trained(
    step: Callable[[], object],
    module: nn.Module,
    validate: Callable[[nn.Module], float],
    budget_seconds: float,
    every: int,
    catch_up: Callable[[], object] = lambda: None,
) -> dict[str, Any]:
    """Train to the target, or as long as the budget lasts, but ``every`` steps at least; bytes are those of this host.

    Weights that meet every so many steps are sent in whole rounds of them: bytes are counted up to the last one, after
    ``catch_up``. They are those of the link, headers and what gloo says about its messages included, and so are the
    predicted ones.
    """
    clock, steps, sent = 0.0, 0, 0
    curve: list[tuple[int, float, float]] = []
    counted = (0, 0)
    while True:
        dist.barrier()
        before, start = sent_bytes(), time.perf_counter()
        for _ in range(INTERVAL):
            step()
        catch_up()
        dist.barrier()
        spent = torch.tensor([time.perf_counter() - start], dtype=torch.float64)
        sent += sent_bytes() - before
        dist.broadcast(spent, 0)  # one clock for all
        clock, steps = clock + float(spent), steps + INTERVAL
        curve.append((steps, clock, validate(module)))
        counted = (steps, sent) if steps % every == 0 else counted
        over = min(loss for _, _, loss in curve) <= TARGET or clock > budget_seconds
        if over and steps >= every:
            return {"curve": curve, "bytes_per_step": counted[1] / counted[0]}


def work(folder: Path, modes: tuple[str, ...], budget_seconds: float) -> None:
    """What a host does: each mode in turn; what was found so far goes to a file in ``folder`` after each."""
    world = joined("slow")
    given, validate = task(), Validation(world.rank, world.workers)
    peer_seconds = max(budget_seconds, PEER_SECONDS) if budget_seconds >= BUDGET_SECONDS else budget_seconds
    found: dict[str, Any] = {}
    for text in modes:
        if text == PEER:
            found[text] = trained(*by_hand(given, world.rank), validate, peer_seconds, 1)
            tell(folder, world.rank, found)
            continue
        plan = Plan.parse(text)
        step = build(given, plan)
        local = plan.meets_locally
        judge: Callable[[nn.Module], float] = validate
        if local.every:
            mean = Mean(folder)
            judge = lambda module, mean=mean: validate(mean(module))  # noqa: E731
        more = {"catch_up": step.state} if local.rounds else {}  # as a checkpoint has it
        found[text] = trained(step, step.model, judge, budget_seconds, max(1, local.every), **more)
        step.close()
        tell(folder, world.rank, found)


def told(name: str, found: list[dict[str, Any]]) -> dict[str, Any]:
    """A mode as a row: seconds and steps to the target (None: not reached), bytes sent, bytes predicted.

    ``found`` is what each host noted, by rank; seconds are those of host 0, whose clock all go by.
    """
    sent = [one["bytes_per_step"] for one in found]
    curve: list[list[float]] = found[0]["curve"]
    reached = next((one for one in curve if one[2] <= TARGET), None)
    steps, seconds, _ = curve[-1]
    return {
        "mode": name,
        "seconds": reached[1] if reached else None,
        "steps": reached[0] if reached else None,
        "step_seconds": seconds / steps,
        "trained_steps": steps,
        "trained_seconds": seconds,
        "best_loss": min(loss for _, _, loss in curve),
        "curve": curve,
        "sent_bytes": statistics.mean(sent),
        "most_sent_bytes": max(sent),
        "predicted_bytes": None if name == PEER else predicted_bytes(task(), name, HOSTS, RATE),
    }


def found(modes: tuple[str, ...], budget_seconds: float) -> dict[str, list[dict[str, Any]]]:
    """What each host found, by mode. When hosts break, they begin again with the modes that are left, and it is told.

    Raises Broken when they break in the first of them.
    """
    whole: dict[str, list[dict[str, Any]]] = {}
    while left := [mode for mode in modes if mode not in whole]:
        broken = None
        try:
            each = found_by("slow", HOSTS, RATE, budget_seconds, *left, timeout_s=TIMEOUT_S)
        except Broken as error:
            broken, each = error, [one or {} for one in error.told]
        new = {mode: [one[mode] for one in each] for mode in left if all(mode in one for one in each)}
        whole |= new
        if broken is not None:
            print(f"hosts broke after {len(whole)} of {len(modes)} modes: {broken}", file=sys.stderr, flush=True)
        if not new:
            raise broken or HostsError("no host told of any mode")
    return whole


def run(count: int = 1, plans: tuple[str, ...] = PLANS, budget_seconds: float = BUDGET_SECONDS) -> list[dict[str, Any]]:
    """A row for the peer and for each plan; one that says why, under ``skipped``, where there can be no hosts.

    ``count`` runs; a mode's row is that of its median run by seconds to the target.
    """
    reason = unavailable()
    if reason:
        return [{"skipped": reason}]
    rows: dict[str, list[dict[str, Any]]] = {}
    for _ in range(count):
        for name, each in found((PEER, *plans), budget_seconds).items():
            rows.setdefault(name, []).append(told(name, each))
    where = {
        "hosts": HOSTS, "rate": RATE, "cores": available_cores(), "target": TARGET, "budget_seconds": budget_seconds,
        "learning_rate": LEARNING_RATE, "runs": count,
    }  # fmt: skip
    median = [sorted(one, key=lambda row: row["seconds"] or math.inf)[(len(one) - 1) // 2] for one in rows.values()]
    return [row | where for row in median]


def rates(steps: int = 32) -> None:
    """Print the held-out loss by steps for each learning rate, as one process trains."""
    for lr in RATES_TRIED:
        given = task(lr)
        step, validate = build(given, Plan()), Validation(0, 1)
        losses: list[str] = []
        for number in range(1, steps + 1):
            step()
            if number % INTERVAL == 0:
                losses.append(f"{number}: {validate(step.model):.3f}")
        step.close()
        print(f"learning rate {lr:g}: {', '.join(losses)}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:] == ["rates"]:
        with suppress(KeyboardInterrupt):
            rates()
    else:
        work(Path(sys.argv[1]), tuple(sys.argv[3:]), float(sys.argv[2]))
