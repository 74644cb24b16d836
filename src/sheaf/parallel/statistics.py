"""BatchNorm's running statistics, updated in microbatch order whoever computed which microbatch.

The unit of BatchNorm is the microbatch everywhere. While a microbatch runs, each layer writes its batch statistics to
a scratch buffer; at the end of the step all of them are applied to the running statistics in order, on every worker.
"""

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sheaf.errors import PlanError
from sheaf.parallel.world import World

_Norm = nn.modules.batchnorm._NormBase


class BatchStatistics:
    """The running statistics of a model's normalisation layers, as one step updates them."""

    def __init__(self, model: nn.Module, world: World) -> None:
        self._world = world
        self._layers = {
            name: module
            for name, module in model.named_modules()
            if isinstance(module, _Norm) and module.track_running_stats and module.running_mean is not None
        }
        self._others = {
            name: buffer for name, buffer in model.named_buffers() if name.rpartition(".")[0] not in self._layers
        }
        self._versions = {name: buffer._version for name, buffer in self._others.items()}
        self._found: dict[int, Tensor] = {}

    def begin_step(self) -> None:
        """Forget the last step's microbatches."""
        self._found.clear()

    @contextmanager
    def microbatch(self) -> Iterator[None]:
        """Run a microbatch's forward and backward inside; its statistics are set aside.

        Raises PlanError when a layer runs twice in one forward, or another buffer changes: neither can be merged.
        """
        kept = {name: (layer.running_mean, layer.running_var, layer.num_batches_tracked, layer.momentum)
                for name, layer in self._layers.items()}  # fmt: skip
        for layer in self._layers.values():
            assert layer.running_mean is not None
            assert layer.running_var is not None
            layer.running_mean = torch.zeros_like(layer.running_mean)
            layer.running_var = torch.zeros_like(layer.running_var)
            layer.num_batches_tracked = torch.zeros((), dtype=torch.int64, device=layer.running_mean.device)
            layer.momentum = 1.0  # so that the scratch buffer holds the batch's own statistics
        try:
            yield
        finally:
            for name, layer in self._layers.items():
                layer.running_mean, layer.running_var, layer.num_batches_tracked, layer.momentum = kept[name]

    def collect(self, index: int) -> None:
        """Forward has run: take the statistics it left (called inside ``microbatch``, before backward)."""
        parts: list[Tensor] = []
        for name, layer in self._layers.items():
            assert layer.running_mean is not None
            assert layer.running_var is not None
            assert layer.num_batches_tracked is not None
            calls = int(layer.num_batches_tracked)
            if calls > 1:
                raise PlanError(
                    f"{name} runs {calls} times in one forward, so the order of its running statistics cannot be kept "
                    "by several workers or under recomputation: use the serial plan without recomputation"
                )
            parts += [layer.running_mean, layer.running_var, layer.running_mean.new_tensor([float(calls)])]
        if parts:
            self._found[index] = torch.cat([part.flatten().to(torch.float64) for part in parts])
        self._check_others()

    def apply(self, microbatches: int) -> None:
        """Update the running statistics by every worker's microbatches, in order (collective)."""
        if not self._layers:
            return
        width = sum(2 * _size(layer) + 1 for layer in self._layers.values())
        table = torch.zeros(microbatches, width, dtype=torch.float64)
        for index, row in self._found.items():
            table[index] = row.cpu()
        table = self._world.summed(table, "running statistics")
        for row in table:
            position = 0
            for layer in self._layers.values():
                size = _size(layer)
                mean, variance = row[position : position + size], row[position + size : position + 2 * size]
                if row[position + 2 * size] > 0:
                    _update(layer, mean, variance)
                position += 2 * size + 1

    def _check_others(self) -> None:
        changed = [name for name, buffer in self._others.items() if buffer._version != self._versions[name]]
        if changed and self._world.workers > 1:
            raise PlanError(
                f"the forward of the model changes the buffer {changed[0]}; only BatchNorm's running statistics can be "
                "merged between workers: use the serial plan"
            )


def _size(layer: _Norm) -> int:
    assert layer.running_mean is not None
    return layer.running_mean.numel()


def _update(layer: _Norm, mean: Tensor, variance: Tensor) -> None:
    assert layer.running_mean is not None
    assert layer.running_var is not None
    assert layer.num_batches_tracked is not None
    layer.num_batches_tracked += 1
    factor = layer.momentum if layer.momentum is not None else 1.0 / float(layer.num_batches_tracked)
    for running, batch in ((layer.running_mean, mean), (layer.running_var, variance)):
        running.mul_(1.0 - factor).add_(batch.to(device=running.device, dtype=running.dtype), alpha=factor)
