"""BatchNorm's running statistics, updated in microbatch order whoever computed which microbatch.

The unit of BatchNorm, torch's or Keras's, is the microbatch everywhere. While a layer runs in training mode it writes
its batch statistics to a scratch buffer; at the end of the step all of them are applied to the running statistics in
order, on every worker. A layer in eval mode is left alone: it reads its running statistics, as it does in plain
PyTorch. Whatever else forward leaves behind cannot be merged or computed twice, and is refused by name.
"""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from sheaf.errors import PlanError
from sheaf.parallel.recompute import running_again
from sheaf.parallel.world import World
from sheaf.task.keras import is_batch_norm, is_layer


@dataclass(frozen=True)
class _Kind:
    """Where a kind of BatchNorm keeps its statistics, and the momentum with which only a batch's own are left there."""

    mean: str
    variance: str
    count: str | None
    own: float

    @property
    def kept(self) -> tuple[str, ...]:
        """The names of all its buffers that a batch moves."""
        return (self.mean, self.variance, *([self.count] if self.count else []))


_TORCH = _Kind("running_mean", "running_var", "num_batches_tracked", own=1.0)
_KERAS = _Kind("moving_mean", "moving_variance", None, own=0.0)
_OWN_FORWARD = nn.modules.batchnorm._BatchNorm.forward


class _Phase:
    """Whether a microbatch is running, so that layers called between steps work on their running statistics; and
    which modules run here, where other stages' are stood in for.
    """

    active = False
    runs: Callable[[str], bool] | None = None


class _Layer:
    """One BatchNorm layer: the scratch buffers that stand in while it trains, and its calls in a microbatch."""

    def __init__(self, name: str, module: Any, kind: _Kind, phase: _Phase) -> None:
        self.name, self.module, self.kind, self._phase = name, module, kind, phase
        self.size = module._buffers[kind.mean].numel()
        self.trained = self.read = 0
        self.scratch = {key: torch.zeros_like(module._buffers[key]) for key in kind.kept}
        self._running: dict[str, Any] | None = None
        self._momentum: float | None = None
        module.register_forward_pre_hook(self._set_aside, with_kwargs=True)
        module.register_forward_hook(self._put_back, prepend=True, always_call=True)

    def begin(self) -> None:
        """A microbatch begins; a NaN of the last one would survive momentum 1, as 0 * NaN is NaN."""
        self.trained = self.read = 0
        # new ones: autograd keeps those of a microbatch whose backward is still to come
        self.scratch = {key: torch.zeros_like(scratch) for key, scratch in self.scratch.items()}

    def update(self, statistics: Tensor) -> None:
        """Apply rows of (mean, variance, calls in training, calls in eval mode), in order, to the running statistics.

        Raises PlanError where the order of the calls within a step matters.
        """
        trained, read = statistics[:, -2].tolist(), statistics[:, -1].tolist()
        if max(trained) > 1:
            raise PlanError(
                f"{self.name} runs {round(max(trained))} times in one forward, so the order of its running statistics "
                "cannot be kept by several workers or under recomputation: use the serial plan without recomputation"
            )
        if max(trained) and max(read):
            raise PlanError(
                f"{self.name} runs in training and in eval mode within one step, so it reads running statistics that "
                "other microbatches of the step move: use the serial plan without recomputation"
            )
        seen = [row for row, count in enumerate(trained) if count]
        if not seen:
            return
        kept, weights = _moving_average(self._factors(len(seen)))
        means, variances = statistics[seen, : self.size], statistics[seen, self.size : 2 * self.size]
        for key, rows in ((self.kind.mean, means), (self.kind.variance, variances)):
            running = self.module._buffers[key]
            running.copy_(kept * running.double().cpu() + weights @ rows)

    def moments(self) -> Tensor:
        """Mean and variance that the microbatch's call left; zeros where it had none, whatever ran again since."""
        left = torch.cat([self.scratch[key].reshape(-1) for key in (self.kind.mean, self.kind.variance)])
        return left if self.trained else torch.zeros_like(left)

    def _factors(self, count: int) -> list[float]:
        """How much of each new batch's statistics goes into the running ones; the batches are counted."""
        momentum = self.module.momentum
        if self.kind.count is None:
            return [1.0 - momentum] * count
        tracked = self.module._buffers[self.kind.count]
        factors = [1.0 / (int(tracked) + number) if momentum is None else momentum for number in range(1, count + 1)]
        tracked += count
        return factors

    def _trains(self, keywords: dict[str, Any]) -> bool:
        if self.kind is _KERAS:
            return bool(keywords.get("training")) and self.module.trainable
        return self.module.training and self.module.track_running_stats

    def _set_aside(self, module: nn.Module, _arguments: Any, keywords: dict[str, Any]) -> None:
        """The layer is called: the kind's own momentum makes the scratch buffers hold the batch's statistics alone."""
        if not self._phase.active or (self._phase.runs is not None and not self._phase.runs(self.name)):
            return
        again = running_again()
        if not self._trains(keywords):
            self.read += not again
            return
        if not again and torch._C._current_graph_task_id() != -1:
            raise PlanError(
                f"{self.name} runs again in backward, which moves its running statistics twice: switch the model's own "
                "checkpointing off and use recompute=full, or use the serial plan without recomputation"
            )
        self.trained += not again
        self._running = {key: module._buffers[key] for key in self.kind.kept}
        self._momentum = self.module.momentum
        module._buffers.update(self.scratch)
        module.__dict__["momentum"] = self.kind.own

    def _put_back(self, module: nn.Module, _arguments: Any, _output: Any) -> None:
        if self._running is not None:
            module._buffers.update(self._running)
            module.__dict__["momentum"] = self._momentum
            self._running = None


def _refuse_synchronised(module: nn.Module, _arguments: Any) -> None:
    if module.training:
        raise PlanError(
            "SyncBatchNorm normalises over all workers, and the unit of normalisation here is the microbatch, so the "
            "answer would depend on the plan: use BatchNorm"
        )


class BatchStatistics:
    """The running statistics of a model's normalisation layers, as one step updates them.

    Of several workers that run the same microbatch together, one ``tells``.
    """

    def __init__(self, model: nn.Module, world: World, *, tells: bool = True) -> None:
        self._world, self._phase, self._tells = world, _Phase(), tells
        self._layers = [
            _Layer(name, module, kind, self._phase)
            for name, module in model.named_modules()
            if (kind := _kind(module)) is not None
        ]
        for module in model.modules():
            if world.workers > 1 and isinstance(module, nn.SyncBatchNorm):
                module.register_forward_pre_hook(_refuse_synchronised)
        self._traces = Traces(model)
        self._widths = [2 * layer.size + 2 for layer in self._layers]
        self._summed: Callable[[], Tensor] | None = None  # between start and finish
        self._found: dict[int, tuple[Tensor, Tensor]] = {}  # by microbatch, what the layers' calls left, and how many
        self._steps = 0

    @property
    def moving(self) -> tuple[Tensor, ...]:
        """The running means and variances, live."""
        found = ((layer.module, layer.kind) for layer in self._layers)
        return tuple(module._buffers[key] for module, kind in found for key in (kind.mean, kind.variance))

    def follow(self, runs: Callable[[str], bool]) -> None:
        """Look only at modules that ``runs`` says run here."""
        self._phase.runs = runs

    def begin_step(self) -> None:
        """Forget the last step's microbatches."""
        self._found.clear()
        self._steps += 1

    @contextmanager
    def microbatch(self) -> Iterator[None]:
        """Run a microbatch's forward and backward inside; its statistics are set aside.

        Raises PlanError when backward changed a buffer, which is looked at in the first step.
        """
        for layer in self._layers:
            if layer.trained or layer.read:
                layer.begin()
        self._traces.begin()
        self._phase.active = True
        try:
            yield
        finally:
            self._phase.active = False
        if self._steps == 1:
            self._traces.check("backward")

    @contextmanager
    def backward(self) -> Iterator[None]:
        """Run a microbatch's backward inside, after other microbatches' forwards."""
        self._phase.active = True
        try:
            yield
        finally:
            self._phase.active = False

    def collect(self, index: int) -> None:
        """Forward has run: take the statistics it left (called inside ``microbatch``, before backward).

        Raises PlanError when forward changed another buffer, which several workers cannot merge, and which a
        recomputation would change twice.
        """
        self._traces.check("forward")
        if self._layers:
            # left where it is: an accelerator need not be done with it yet
            left = torch.cat([layer.moments() for layer in self._layers]).double()
            calls = torch.tensor([[layer.trained, layer.read] for layer in self._layers], dtype=torch.float64)
            # a pipeline comes by once for each of a worker's stages, and each has layers of its own
            before = self._found.get(index)
            self._found[index] = (left, calls) if before is None else (before[0] + left, before[1] + calls)

    def apply(self, microbatches: int) -> None:
        """Update the running statistics by every worker's microbatches, in order (collective)."""
        self.start(microbatches)
        self.finish()

    def start(self, microbatches: int) -> None:
        """Begin to sum what every worker's microbatches left; until ``finish`` nothing is updated (collective)."""
        if not self._layers:
            return
        table = torch.zeros(microbatches, sum(self._widths), dtype=torch.float64)
        for index, (left, calls) in self._found.items() if self._tells else ():
            moments = left.cpu().split([2 * layer.size for layer in self._layers])
            table[index] = torch.cat([part for pair in zip(moments, calls, strict=True) for part in pair])
        self._summed = self._world.start_sum(table, "running statistics")

    def finish(self) -> None:
        """Update the running statistics by what was summed, in the order of microbatches."""
        if self._summed is None:
            return
        table, self._summed = self._summed(), None
        for layer, statistics in zip(self._layers, table.split(self._widths, dim=1), strict=True):
            layer.update(statistics)


class Traces:
    """What a microbatch leaves behind in the model beside BatchNorm's running statistics.

    Buffers are compared by identity and version in every microbatch. In the first one they are compared by value too,
    since kernels that normalise, and changes through ``.data``, do not count versions; so are the plain numbers and
    tensors that modules hold as attributes.
    """

    def __init__(self, model: nn.Module) -> None:
        self._modules = dict(model.named_modules())
        self._holders = [module._buffers for module in self._modules.values()]
        self._held: list[tuple[Tensor | None, int]] = []
        self._values: list[Tensor | None] | None = None
        self._attributes: dict[tuple[str, str], tuple[Any, int]] | None = None
        self._is_first = True

    def begin(self) -> None:
        """A microbatch begins."""
        self._held = [
            (buffer, 0 if buffer is None else buffer._version) for held in self._holders for buffer in held.values()
        ]
        self._values = self._attributes = None
        if self._is_first:
            self._values = [None if buffer is None else buffer.detach().clone() for buffer, _ in self._held]
            self._attributes = self._plain_attributes()
        self._is_first = False

    def check(self, when: str) -> None:
        """Raise PlanError naming what changed since the microbatch began."""
        now = [buffer for held in self._holders for buffer in held.values()]
        same = len(now) == len(self._held) and all(
            buffer is held and (buffer is None or buffer._version == version)
            for buffer, (held, version) in zip(now, self._held, strict=True)
        )
        values = self._values
        if not same or (values is not None and not all(map(_equal, now, values))):
            raise PlanError(
                f"the {when} of the model changes the buffer {self._changed()}; only BatchNorm's running statistics "
                "can be merged between workers and kept under recomputation: use the serial plan without recomputation"
            )
        if self._attributes is not None:
            self._check_attributes(self._attributes, when)

    def _changed(self) -> str:
        names = [f"{name}.{key}" if name else key for name, module in self._modules.items() for key in module._buffers]
        now = [buffer for held in self._holders for buffer in held.values()]
        values: list[Tensor | None] = self._values or [None] * len(self._held)
        for name, buffer, (held, version), value in zip(names, now, self._held, values, strict=False):
            moved = buffer is not held or (buffer is not None and buffer._version != version)
            if moved or (self._values is not None and not _equal(buffer, value)):
                return name
        return names[-1]

    def _plain_attributes(self) -> dict[tuple[str, str], tuple[Any, int]]:
        found: dict[tuple[str, str], tuple[Any, int]] = {}
        for name, module in self._modules.items():
            for attribute, value in vars(module).items():
                if isinstance(value, Tensor) and not value.requires_grad:
                    found[name, attribute] = (value, value._version)
                elif isinstance(value, int | float) and not isinstance(value, bool):
                    found[name, attribute] = (value, 0)
        return found

    def _check_attributes(self, before: dict[tuple[str, str], tuple[Any, int]], when: str) -> None:
        after = self._plain_attributes()
        for place, (value, version) in before.items():
            now, moved = after.get(place, (value, version))
            if (now is not value and not (isinstance(now, int | float) and now == value)) or moved != version:
                raise PlanError(
                    f"the {when} of the model changes {'.'.join(filter(None, place))}, which each worker, and each "
                    "recomputation, would do for itself: use the serial plan without recomputation, or leave that out"
                )


def _equal(one: Tensor | None, other: Tensor | None) -> bool:
    """Whether two buffers hold the same values, NaN being the same as NaN."""
    if one is None or other is None:
        return one is other
    return one.shape == other.shape and bool(((one == other) | (one.isnan() & other.isnan())).all())


def keeps_statistics(module: nn.Module) -> bool:
    """Whether a module keeps statistics of batches, in a way that can be merged."""
    return _kind(module) is not None


def _kind(module: nn.Module) -> _Kind | None:
    """The kind of BatchNorm that a module is, when its forward is torch's or Keras's own and it has statistics."""
    if is_layer(module):
        return _KERAS if is_batch_norm(module) else None
    is_norm = isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d | nn.BatchNorm3d)
    own = is_norm and type(module).forward is _OWN_FORWARD
    return _TORCH if own and all(module._buffers.get(key) is not None for key in _TORCH.kept) else None


def _moving_average(factors: Sequence[float]) -> tuple[float, Tensor]:
    """``x <- (1 - f) x + f s`` for every factor in turn, as the weight of the first x and of each s.

    >>> _moving_average([0.5, 0.5])
    (0.25, tensor([0.2500, 0.5000], dtype=torch.float64))
    """
    weights = [
        factor * math.prod(1.0 - later for later in factors[number + 1 :]) for number, factor in enumerate(factors)
    ]
    return math.prod(1.0 - factor for factor in factors), torch.tensor(weights, dtype=torch.float64)
