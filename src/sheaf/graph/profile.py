"""How long a model's blocks, its optimizer and its data take on this process's device, measured on real tensors."""

import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import psutil
import torch
import torch.distributed as dist
from torch import Tensor, nn

from sheaf.errors import TaskError
from sheaf.graph.alone import record_calls, time_block, time_loss
from sheaf.graph.cut import cut, opened
from sheaf.graph.example import example, global_streams_kept, num_samples, precision
from sheaf.graph.facts import LOSS, BlockFact, BlockTime, ModelFacts, Profile
from sheaf.graph.gradients import rows_stepped, with_gradients
from sheaf.graph.stopwatch import Clock, Stopwatch
from sheaf.task import Order, Streams, Task, arguments, as_loss, fetch, key, moved
from sheaf.task.blueprint import Blueprint

COMFORT = 0.4  # of the free memory, which a whole model may take while it is measured
DEPTH = 4  # forwards of one block that run before their backwards, when it is measured alone
SAMPLE_BYTES = 64 * 2**20  # of parameters on which the optimizer is timed


def profile(
    task: Task,
    facts: ModelFacts,
    *,
    threads: int,
    concurrency: int = 1,
    together: Callable[[], None] | None = None,
    budget_seconds: float = 6.0,
) -> Profile:
    """Measure the task on this process's device with ``threads`` CPU threads.

    A model that fits is run whole, each block timed in place, and the blocks' times sum to the whole's. Of a larger
    one each distinct block is run alone, and the rest is estimated from its operations and bytes.
    ``together`` is a barrier, called three times, so that ``concurrency`` workers of a host measure at the same time.
    The time taken is about ``budget_seconds``, more where a single pass takes longer.

    Raises TaskError when the optimizer cannot step.
    """
    device = accelerator()
    wait = together or _alone
    with on_threads(threads), global_streams_kept():
        fits = whole_bytes(facts) < COMFORT * free_bytes(device) / concurrency
        measure = _WholeModel if fits else _Blocks
        model = measure(task, facts, device)
        wait()
        blocks = model.times(0.7 * budget_seconds)
        stepped = rows_stepped(task, facts, model.with_gradients())
        del model
        sample = _Sample(task, facts, device, stepped)
        wait()
        optimizer_seconds, state_bytes, host_seconds = sample.times(0.2 * budget_seconds)
        wait()
        fetch_seconds = _fetch_seconds(task, facts.samples, 0.1 * budget_seconds)
    return Profile(
        samples=facts.samples,
        concurrency=concurrency,
        threads=threads,
        precision=task.precision,
        blocks=blocks,
        optimizer_seconds_per_byte=optimizer_seconds,
        optimizer_state_bytes_per_byte=state_bytes,
        fetch_seconds=fetch_seconds,
        host_seconds=host_seconds,
    )


def accelerator() -> torch.device:
    """The device this process computes on: its accelerator; the CPU without one, and among workers on gloo alone."""
    found = torch.accelerator.current_accelerator(check_available=True)
    shared = dist.is_available() and dist.group.WORLD is not None and dist.get_world_size() > 1
    return torch.device("cpu") if found is None or (shared and dist.get_backend() == "gloo") else found


def whole_bytes(facts: ModelFacts) -> int:
    """Bytes of a whole model with gradients and one microbatch's activations."""
    return facts.parameter_bytes + facts.trainable_bytes + facts.saved_bytes + facts.batch_bytes


def free_bytes(device: torch.device) -> int:
    """Bytes that this process could still take on a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    return psutil.virtual_memory().available


class _WholeModel:
    """Runs the whole model, alternately plain and with a stopwatch on its blocks."""

    def __init__(self, task: Task, facts: ModelFacts, device: torch.device) -> None:
        self._task, self._facts, self._device = task, facts, device
        self._model = Blueprint(task).fill(device)
        self._streams = Streams(self._model, task.seed, device)
        self._batch = moved(example(task, facts.samples), device)
        self._count = num_samples(task, facts.samples)
        self._clock = Clock(device)
        around = opened(self._model, facts.begins)
        self._stopwatch = Stopwatch(cut(self._model, facts.begins), self._clock, around.values())

    def times(self, budget_seconds: float) -> dict[str, BlockTime]:
        """Seconds of every block; they sum to what the plain model takes."""
        end = time.perf_counter() + budget_seconds
        plain: list[tuple[float, float]] = []
        watched: list[tuple[dict[str, float], dict[str, float]]] = []
        self._plain()  # warms up: allocators, caches, gradients
        while len(watched) < 3 or (time.perf_counter() < end and len(watched) < 200):
            plain.append(self._plain())
            watched.append(self._watched())
        forward = self._shared_out([item[0] for item in watched], statistics.median(item[0] for item in plain))
        backward = self._shared_out([item[1] for item in watched], statistics.median(item[1] for item in plain))
        return {block.name: BlockTime(forward[block.name], backward[block.name]) for block in self._facts.blocks}

    def with_gradients(self) -> nn.Module:
        """The model with the gradients that it was timed with."""
        return self._model

    def _run(self, stopwatch: Stopwatch | None) -> tuple[Any, Any, Any]:
        task, clock = self._task, self._clock
        self._streams.enter(0, 0)
        start = clock.now()
        if stopwatch:
            stopwatch.forward()
        with precision(task, self._device):
            positional, named = arguments(task, self._batch)
            output = self._model(*positional, **named)
            if stopwatch:
                stopwatch.loss(output)
            total = as_loss(task.loss(output, self._batch), self._count).sum
        middle = clock.now()
        if stopwatch:
            stopwatch.backward()
        if total.requires_grad:
            total.backward()
        return start, middle, clock.now()

    def _plain(self) -> tuple[float, float]:
        start, middle, stop = self._run(None)
        self._clock.settle()
        return self._clock.seconds(start, middle), self._clock.seconds(middle, stop)

    def _watched(self) -> tuple[dict[str, float], dict[str, float]]:
        with self._stopwatch.watching():
            self._run(self._stopwatch)
            return self._stopwatch.stop()

    def _shared_out(self, rounds: list[dict[str, float]], whole_seconds: float) -> dict[str, float]:
        """Median seconds of each block, equal blocks together, scaled so that they sum to the whole."""
        alike: dict[str, list[float]] = defaultdict(list)
        for block in self._facts.blocks:
            alike[block.signature] += [times.get(block.name, 0.0) for times in rounds]
        times = {block.name: statistics.median(alike[block.signature]) for block in self._facts.blocks}
        total = sum(times.values())
        return {name: seconds * whole_seconds / total if total else 0.0 for name, seconds in times.items()}


class _Blocks:
    """Runs each distinct block alone, and estimates what cannot run alone from the measured ones."""

    def __init__(self, task: Task, facts: ModelFacts, device: torch.device) -> None:
        self._task, self._facts, self._device = task, facts, device
        self._blueprint = Blueprint(task)
        self._batch = example(task, facts.samples)
        modules = cut(self._blueprint.model, facts.begins)
        self._distinct: dict[str, BlockFact] = {}
        for block in facts.blocks:
            if block.calls and block.name in modules:
                self._distinct.setdefault(block.signature, block)
        self._modules = {block.name: modules[block.name] for block in self._distinct.values()}
        self._calls, self._output = record_calls(task, self._blueprint, self._modules, self._batch)

    def times(self, budget_seconds: float) -> dict[str, BlockTime]:
        """Seconds of every block."""
        measured: dict[str, BlockTime] = {}
        share = budget_seconds / (len(self._distinct) + 1)
        for signature, block in self._distinct.items():
            time_alone = self._measured(block, share)
            if time_alone is not None:
                measured[signature] = BlockTime(
                    time_alone.forward_seconds * block.calls, time_alone.backward_seconds * block.calls
                )
        loss = self._facts.block(LOSS)
        if self._output is not None and self._fits(loss):
            time_alone = time_loss(self._task, self._output, self._batch, self._device, share)
            if time_alone is not None:
                measured[loss.signature] = time_alone
        rates = _Rates(self._facts, measured, self._device)
        return {block.name: measured.get(block.signature) or rates.estimate(block) for block in self._facts.blocks}

    def with_gradients(self) -> nn.Module:
        """The model without memory, with gradients where a layer of it asks for rows."""
        narrow = any(getattr(module, "sparse", False) for module in self._blueprint.model.modules())
        return (with_gradients(self._task, self._facts.samples) if narrow else self._blueprint).model

    def _measured(self, block: BlockFact, share_seconds: float) -> BlockTime | None:
        call = self._calls.get(block.name)
        if call is None or not self._fits(block):
            return None
        module = self._modules[block.name]
        room = COMFORT * free_bytes(self._device) - 2 * block.parameter_bytes
        alike = sum(other.calls for other in self._facts.blocks if other.signature == block.signature)
        depth = max(1, min(alike, DEPTH, int(room / max(1, _passing_bytes(block)))))
        return time_block(self._task, self._blueprint, module, call, self._device, share_seconds, depth)

    def _fits(self, block: BlockFact) -> bool:
        return 2 * block.parameter_bytes + _passing_bytes(block) < COMFORT * free_bytes(self._device)


def _passing_bytes(block: BlockFact) -> int:
    return block.saved_bytes + 2 * block.input_bytes + 2 * block.output_bytes


class _Rates:
    """The best rates that measured blocks reached, and what others would take at them (a roofline: Williams, 2009)."""

    def __init__(self, facts: ModelFacts, measured: dict[str, BlockTime], device: torch.device) -> None:
        done = [(block, measured[block.signature]) for block in facts.blocks if block.signature in measured]
        seconds = [(block, times.forward_seconds + times.backward_seconds) for block, times in done]
        rates = [(b.forward_flops + b.backward_flops) / s for b, s in seconds if s > 0]
        launches = [s / (b.forward_kernels + b.backward_kernels) for b, s in seconds if b.forward_kernels]
        speeds = [(b.forward_bytes + b.backward_bytes) / s for b, s in seconds if s > 0]
        self._flops_per_second = max(rates, default=0.0) or _matrix_rate(device)
        self._bytes_per_second = max(speeds, default=0.0) or _copy_rate(device)
        self._kernel_seconds = min(launches, default=0.0)

    def estimate(self, block: BlockFact) -> BlockTime:
        """The slowest of computing, moving and launching, in each direction."""
        return BlockTime(
            self._slowest(block.forward_flops, block.forward_bytes, block.forward_kernels),
            self._slowest(block.backward_flops, block.backward_bytes, block.backward_kernels),
        )

    def _slowest(self, flops: float, moved_bytes: float, kernels: int) -> float:
        computing = flops / self._flops_per_second
        return max(computing, moved_bytes / self._bytes_per_second, kernels * self._kernel_seconds)


def _matrix_rate(device: torch.device, width: int = 512) -> float:
    matrix = torch.ones(width, width, device=device)
    return 2 * width**3 / _repeated(lambda: matrix @ matrix, device)


def _copy_rate(device: torch.device, size_bytes: int = 16 * 2**20) -> float:
    source = torch.ones(size_bytes // 4, device=device)
    return 2 * size_bytes / _repeated(source.clone, device)


def _repeated(action: Callable[[], Any], device: torch.device, budget_seconds: float = 0.1) -> float:
    """Median seconds of an action, after one to warm up."""
    clock = Clock(device)
    times: list[float] = []
    action()
    end = time.perf_counter() + budget_seconds
    while len(times) < 3 or (time.perf_counter() < end and len(times) < 200):
        start = clock.now()
        action()
        stop = clock.now()
        clock.settle()
        times.append(clock.seconds(start, stop))
    return statistics.median(times)


class _Sample:
    """The task's own optimizer on parameters of the model's shapes, as many as are needed to know its pace."""

    def __init__(self, task: Task, facts: ModelFacts, device: torch.device, stepped: Mapping[str, int]) -> None:
        self._task, self._facts, self._device = task, facts, device
        self._parameters: list[nn.Parameter] = []
        self._gradients: list[Tensor] = []  # of rows, what they hold
        for shape, dtype, rows in _sampled(facts, SAMPLE_BYTES, stepped):
            parameter = nn.Parameter(torch.zeros(shape, dtype=getattr(torch, dtype), device=device))
            values = torch.full_like(parameter[:rows] if rows else parameter, 1e-3)
            self._parameters.append(parameter)
            self._gradients.append(values)
            parameter.grad = _as_rows(values, shape) if rows else values

    def times(self, budget_seconds: float) -> tuple[float, float, float]:
        """Optimizer seconds per byte, its state bytes per byte, and seconds of all else a step does to gradients."""
        if not self._parameters:
            return 0.0, 0.0, 0.0
        size_bytes = sum(_bytes(parameter) for parameter in self._parameters)
        try:
            optimizer = self._task.optimizer(self._parameters)
            step_seconds = _repeated(optimizer.step, self._device, budget_seconds / 2)
        except Exception as error:
            raise TaskError(
                f"the optimizer could not step: {type(error).__name__}: {error}; "
                "optimizer= must be a function from a list of parameters to an optimizer whose step() needs no argument"
            ) from error
        state_bytes = sum(
            _bytes(value) for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)
        )
        beside = _repeated(self._beside, self._device, budget_seconds / 2)
        scale = self._facts.trainable_bytes / size_bytes
        return step_seconds / size_bytes, state_bytes / size_bytes, beside * scale

    def _beside(self) -> None:
        """Divide by the weights of the batch, clip, and clear."""
        torch._foreach_mul_(self._gradients, 1.0)
        if self._task.clip is not None:
            nn.utils.get_total_norm(self._gradients)
            torch._foreach_mul_(self._gradients, 1.0)
        torch._foreach_zero_(self._gradients)


def _sampled(facts: ModelFacts, limit_bytes: int, stepped: Mapping[str, int]) -> list[tuple[tuple[int, ...], str, int]]:
    """Shapes and dtypes of trainable parameters up to a size, and how many of its rows a step has gradients of where
    ``stepped`` says so, else 0; a first one that is larger is cut.
    """
    chosen: list[tuple[tuple[int, ...], str, int]] = []
    left = limit_bytes
    trainable = [parameter for parameter in facts.parameters if parameter.requires_grad]
    for parameter in trainable:
        if parameter.size_bytes <= left:
            chosen.append((parameter.shape, parameter.dtype, stepped.get(parameter.name, 0)))
            left -= parameter.size_bytes
    if trainable and not any(size for shape, _, _ in chosen for size in shape if size > 1):
        first = max(trainable, key=lambda parameter: parameter.size_bytes)
        if rows := stepped.get(first.name, 0):
            fitting = max(1, limit_bytes * first.shape[0] // first.size_bytes)
            cut = (fitting, *first.shape[1:]), first.dtype, max(1, rows * fitting // first.shape[0])
        else:
            cut = (limit_bytes // first.itemsize_bytes,), first.dtype, 0
        chosen.append(cut)
    return chosen


def _as_rows(values: Tensor, shape: Sequence[int]) -> Tensor:
    """A gradient of that shape, of rows that lie evenly apart."""
    places = torch.arange(len(values), device=values.device) * shape[0] // len(values)
    return torch.sparse_coo_tensor(places[None], values, tuple(shape), is_coalesced=True, check_invariants=True)


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()


def _fetch_seconds(task: Task, samples: int, budget_seconds: float) -> float:
    """Median seconds to fetch and collate one microbatch."""
    order = Order(task.num_samples, task.batch, samples, task.seed, shuffle=task.shuffle)
    microbatches = [microbatch for step in range(min(4, order.steps_per_epoch)) for microbatch in order.step(step)]
    turn = iter(range(10**9))

    def once() -> None:
        number = next(turn)
        fetch(task, microbatches[number % len(microbatches)].samples, key(task.seed, "example", number))

    return _repeated(once, torch.device("cpu"), budget_seconds)


@contextmanager
def on_threads(count: int) -> Iterator[None]:
    """Compute on the processor with so many threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _alone() -> None:
    """Wait for nobody."""
