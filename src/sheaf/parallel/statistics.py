"""BatchNorm's running statistics, updated in microbatch order whoever computed which microbatch.

The unit of BatchNorm is the microbatch everywhere. While a microbatch runs, each layer writes its batch statistics to
a scratch buffer; at the end of the step all of them are applied to the running statistics in order, on every worker.
"""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sheaf.errors import PlanError
from sheaf.parallel.world import World

_Norm = nn.modules.batchnorm._NormBase
_KEPT = ("running_mean", "running_var", "num_batches_tracked")


class _Layer:
    """One normalisation layer: its running statistics, and the scratch buffers that stand in for them."""

    def __init__(self, name: str, module: _Norm) -> None:
        assert module.running_mean is not None
        assert module.running_var is not None
        assert module.num_batches_tracked is not None
        self.name, self.module, self.momentum = name, module, module.momentum
        self.size = module.running_mean.numel()
        self.scratch = {key: torch.zeros_like(module._buffers[key]) for key in _KEPT}
        self.running = {key: module._buffers[key] for key in _KEPT}

    def set_aside(self) -> None:
        """Let the layer write the batch's own statistics to the scratch buffers: momentum 1 forgets what they held."""
        self.running = {key: self.module._buffers[key] for key in _KEPT}
        self.scratch["num_batches_tracked"].zero_()
        self.module._buffers.update(self.scratch)
        self.module.__dict__["momentum"] = 1.0

    def put_back(self) -> None:
        """Give the layer its running statistics again."""
        self.module._buffers.update(self.running)
        self.module.__dict__["momentum"] = self.momentum

    def update(self, statistics: Tensor) -> None:
        """Apply rows of (mean, variance, calls), in order, to the running statistics.

        Raises PlanError where the layer ran more than once in a forward.
        """
        calls = statistics[:, -1].tolist()
        if max(calls) > 1:
            raise PlanError(
                f"{self.name} runs {round(max(calls))} times in one forward, so the order of its running statistics "
                "cannot be kept by several workers or under recomputation: use the serial plan without recomputation"
            )
        seen = [row for row, count in enumerate(calls) if count]
        tracked = self.module._buffers["num_batches_tracked"]
        assert tracked is not None
        factors = [
            self.momentum if self.momentum is not None else 1.0 / (int(tracked) + number)
            for number in range(1, len(seen) + 1)
        ]
        tracked += len(seen)
        kept, weights = _moving_average(factors)
        means, variances = statistics[seen, : self.size], statistics[seen, self.size : 2 * self.size]
        for key, rows in (("running_mean", means), ("running_var", variances)):
            running = self.module._buffers[key]
            assert running is not None
            running.copy_(kept * running.double().cpu() + weights @ rows)


class BatchStatistics:
    """The running statistics of a model's normalisation layers, as one step updates them."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self._world = world
        self._layers = [
            _Layer(name, module)
            for name, module in model.named_modules()
            if isinstance(module, _Norm) and module.track_running_stats and module.running_mean is not None
        ]
        names = {layer.name for layer in self._layers}
        self._others = {name: buffer for name, buffer in model.named_buffers() if name.rpartition(".")[0] not in names}
        self._versions = {name: buffer._version for name, buffer in self._others.items()}
        self._found: dict[int, Tensor] = {}

    def begin_step(self) -> None:
        """Forget the last step's microbatches."""
        self._found.clear()

    @contextmanager
    def microbatch(self) -> Iterator[None]:
        """Run a microbatch's forward and backward inside; its statistics are set aside."""
        for layer in self._layers:
            layer.set_aside()
        try:
            yield
        finally:
            for layer in self._layers:
                layer.put_back()

    def collect(self, index: int) -> None:
        """Forward has run: take the statistics it left (called inside ``microbatch``, before backward).

        Raises PlanError when forward changed another buffer, which several workers cannot merge.
        """
        if self._layers:
            self._found[index] = torch.cat([layer.scratch[key].reshape(-1) for layer in self._layers for key in _KEPT])
        changed = [name for name, buffer in self._others.items() if buffer._version != self._versions[name]]
        if changed and self._world.workers > 1:
            raise PlanError(
                f"the forward of the model changes the buffer {changed[0]}; only BatchNorm's running statistics can be "
                "merged between workers: use the serial plan"
            )

    def apply(self, microbatches: int) -> None:
        """Update the running statistics by every worker's microbatches, in order (collective)."""
        if not self._layers:
            return
        table = torch.zeros(microbatches, sum(2 * layer.size + 1 for layer in self._layers), dtype=torch.float64)
        for index, row in self._found.items():
            table[index] = row
        table = self._world.summed(table, "running statistics")
        widths = [2 * layer.size + 1 for layer in self._layers]
        for layer, statistics in zip(self._layers, table.split(widths, dim=1), strict=True):
            layer.update(statistics)


def _moving_average(factors: Sequence[float]) -> tuple[float, Tensor]:
    """``x <- (1 - f) x + f s`` for every factor in turn, as the weight of the first x and of each s.

    >>> _moving_average([0.5, 0.5])
    (0.25, tensor([0.2500, 0.5000], dtype=torch.float64))
    """
    weights = [
        factor * math.prod(1.0 - later for later in factors[number + 1 :]) for number, factor in enumerate(factors)
    ]
    return math.prod(1.0 - factor for factor in factors), torch.tensor(weights, dtype=torch.float64)
