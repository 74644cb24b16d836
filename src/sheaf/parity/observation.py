"""What one step of training leaves to be compared, and the files in which steps wait for it."""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.utils._pytree import tree_leaves
from torch.utils.hooks import RemovableHandle

from sheaf.errors import RunError
from sheaf.graph import cut
from sheaf.split.moves import sliced
from sheaf.split.sent import Sent
from sheaf.split.tensor import Split

START = -1  # the step number of what was there before the first step: weights and buffers only

Print = tuple[float, float, float]  # of an output: sum, L2 norm, and a sum weighted by position
PrintKey = tuple[int, str, int]  # microbatch, block, which call of the block in that forward


@dataclass(frozen=True, kw_only=True)
class Observation:
    """One step: whole tensors on the CPU under the model's own names, and what each microbatch gave.

    ``gradients`` are of the step's loss (sum over weight) before clipping; a parameter that got none is absent, and a
    skipped fp16 step has none at all. ``weights`` and ``buffers`` (persistent ones) are those after the step.
    ``losses`` maps a microbatch to its (sum, weight); ``moves`` a parameter to the L2 norm of its update.
    """

    step: int
    loss: float = 0.0
    skipped: bool = False
    losses: Mapping[int, tuple[float, float]] = field(default_factory=dict[int, tuple[float, float]])
    prints: Mapping[PrintKey, Print] = field(default_factory=dict[PrintKey, Print])
    moves: Mapping[str, float] = field(default_factory=dict[str, float])
    gradients: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    weights: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])
    buffers: Mapping[str, Tensor] = field(default_factory=dict[str, Tensor])


class Store:
    """Observations as safetensors files in a directory, one per step, so that no run need fit in memory."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def write(self, observation: Observation) -> None:
        """Keep one step."""
        tensors = {
            f"{kind}/{name}": tensor.detach().cpu().contiguous().clone()
            for kind in ("gradients", "weights", "buffers")
            for name, tensor in getattr(observation, kind).items()
        }
        header = {
            "step": observation.step,
            "loss": observation.loss,
            "skipped": observation.skipped,
            "losses": list(observation.losses.items()),
            "prints": list(observation.prints.items()),
            "moves": dict(observation.moves),
            # safetensors sorts by size; the model's order is kept here
            "order": list(tensors),
        }
        save_file(tensors, self._path(observation.step), metadata={"observation": json.dumps(header)})

    def read(self, step: int) -> Observation:
        """One step back. Raises RunError when it was never written."""
        path = self._path(step)
        if not path.is_file():
            raise RunError(f"{path} does not exist: the run that should have written step {step} ended before it")
        with safe_open(path, framework="pt") as file:
            header = json.loads((file.metadata() or {})["observation"])
            held: dict[str, dict[str, Tensor]] = {"gradients": {}, "weights": {}, "buffers": {}}
            for entry in header["order"]:
                kind, _, name = entry.partition("/")
                held[kind][name] = file.get_tensor(entry)
        return Observation(
            step=header["step"],
            loss=header["loss"],
            skipped=header["skipped"],
            losses={index: (total, weight) for index, (total, weight) in header["losses"]},
            prints={(mb, name, call): (a, b, c) for (mb, name, call), (a, b, c) in header["prints"]},
            moves=header["moves"],
            gradients=held["gradients"],
            weights=held["weights"],
            buffers=held["buffers"],
        )

    def _path(self, step: int) -> Path:
        return self.directory / (f"step_{step:05d}.safetensors" if step != START else "start.safetensors")


class Prints:
    """Takes a print of every block's output while microbatches run forward.

    ``position`` tells the microbatch under way, or None outside of one. A block that runs again in backward
    (recomputation) is not counted again. Of blocks that others run (``runs`` of their name is false) nothing is taken;
    of an output that several workers have alike, only where one ``leads``; of a split one, slice ``part`` is.
    """

    def __init__(
        self,
        model: nn.Module,
        position: Callable[[], int | None],
        *,
        runs: Callable[[str], bool] = lambda _name: True,
        leads: Callable[[], bool] = lambda: True,
        part: int = 0,
    ) -> None:
        self._position, self._runs, self._leads, self._part = position, runs, leads, part
        self._taken: dict[PrintKey, Print] = {}
        self._calls: dict[str, int] = {}  # in the forward under way
        self._handles: list[RemovableHandle] = [model.register_forward_pre_hook(self._begin)]
        self._handles += [block.register_forward_hook(self._hook(name)) for name, block in cut(model).items()]

    def take(self) -> dict[PrintKey, Print]:
        """The prints since the last take."""
        taken, self._taken = self._taken, {}
        return taken

    def close(self) -> None:
        """Detach from the model."""
        for handle in self._handles:
            handle.remove()

    def _begin(self, _module: nn.Module, _arguments: Any) -> None:
        self._calls.clear()

    def _hook(self, name: str) -> Callable[[nn.Module, Any, Any], None]:
        def after(_module: nn.Module, _arguments: Any, output: Any) -> None:
            microbatch = self._position()
            again = torch._C._current_graph_task_id() != -1  # inside backward
            if microbatch is None or again:
                return
            call = self._calls.get(name, 0)
            self._calls[name] = call + 1
            if self._runs(name):
                self._taken[microbatch, name, call] = fingerprint(output, self._part, leads=self._leads())

        return after


def fingerprint(output: Any, part: int = 0, *, leads: bool = True) -> Print:
    """Sum, L2 norm and position-weighted sum, in float64, of all finite floating-point numbers in ``output``.

    Of a split tensor it is the part that slice ``part`` has in them; what is whole counts where ``leads``. Nothing that
    watches torch functions sees this.

    >>> fingerprint((torch.tensor([3.0, -4.0]), None))[:2]
    (-1.0, 5.0)
    """
    total = squares = probed = 0.0
    with torch._C.DisableTorchFunction(), torch.no_grad():
        for leaf in tree_leaves(output):
            if not isinstance(leaf, Tensor) or not leaf.is_floating_point():
                continue
            held = leaf.local if isinstance(leaf, Split) else leaf
            held = leaf.home if isinstance(leaf, Sent) and leaf.home is not None else held
            if not held.numel() or not (leads or isinstance(leaf, Split)):
                continue
            values = held.detach().to("cpu", torch.float64).flatten()
            values = torch.nan_to_num(values, nan=0.0, posinf=0.0, neginf=0.0)
            probe = _probe(leaf.numel())
            if isinstance(leaf, Split):
                probe = sliced(probe.reshape(leaf.shape), leaf.axis, leaf.cut, part).flatten()
            total += values.sum().item()
            squares += values.dot(values).item()
            probed += values.dot(probe).item()
    return total, math.sqrt(squares), probed


def added(print_: Print | None, other: Sequence[float]) -> Print:
    """The print of two slices together.

    >>> added((1.0, 3.0, 2.0), (1.0, 4.0, 2.0))
    (2.0, 5.0, 4.0)
    """
    total, length, probed = print_ or (0.0, 0.0, 0.0)
    return total + other[0], math.hypot(length, other[1]), probed + other[2]


@lru_cache(maxsize=8)
def _probe(num_elements: int) -> Tensor:
    return torch.arange(num_elements, dtype=torch.float64).mul_(0.7).cos_()


def persistent_buffers(model: nn.Module) -> dict[str, Tensor]:
    """The buffers that a state dict holds, by name, each once."""
    held = model.state_dict(keep_vars=True)
    return {name: buffer for name, buffer in model.named_buffers() if name in held}
