"""Whether an optimizer treats every number for itself, found out by stepping it."""

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn, optim
from torch.optim.optimizer import _global_optimizer_post_hooks, _global_optimizer_pre_hooks

from sheaf.errors import TaskError

_SHAPES = ((3, 4), (5,), (2, 1, 2, 2))
_LARGE = ((257, 129), (5000,))  # beyond the sizes at which optimizers change their rule
_LARGEST, _MOST = 100_000, 8  # numbers of a shape of the model's, and how many of those
_STEPS = 4
# Where a vector ends decides which kernel rounds its tail, so bits may differ; what is looked for is far larger.
_RELATIVE = 1e-12

_KNOWN = frozenset({optim.SGD, optim.Adam, optim.AdamW, optim.RMSprop})  # a test steps each
_DOUBTFUL = ("capturable", "differentiable", "foreach", "fused")  # settings with which they may not step, or others do
_MODEST = 1e3  # settings up to here keep what is stepped finite

_Optimizer = Callable[[list[nn.Parameter]], torch.optim.Optimizer]
_Cuts = dict[int, tuple[int, int]]  # parameter -> where the slice begins and ends


def elementwise(optimizer: _Optimizer, shapes: Sequence[Sequence[int]] | None = None) -> bool:
    """Whether flat slices of parameters can be stepped apart from each other, as ZeRO's shards are.

    Steps float64 parameters whole, and cut into flat slices that are given to three optimizers, each made over the
    whole parameters as the executors do (so groups may depend on shapes). An optimizer that looks at shapes, norms,
    other elements or other parameters when it steps (Adafactor, LAMB, Muon), or that raises on slices, is not
    elementwise. ``shapes`` of the model's own parameters are tried beside small and large ones, cut down to 100 000
    numbers each; a rule that changes at a size never tried is not seen. Of torch's own most common ones it is known.
    """
    own = sorted({_small(tuple(shape)) for shape in shapes or () if math.prod(shape)}, key=math.prod, reverse=True)
    tried = [*_SHAPES, *_LARGE, *own[:_MOST]]
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if _is_known(optimizer, tried):
            return True
        values = [_values(step, tried) for step in range(_STEPS + 1)]
        try:
            return _same(_whole(optimizer, values), _split(optimizer, values))
        except Exception:  # noqa: BLE001 - whatever it raises, its slices cannot be stepped
            return False


def unhosted(optimizer: _Optimizer, parameters: Sequence[tuple[int, bool]]) -> str:
    """Why the optimizer does not step dense tensors in the host's memory, by what it raises there; empty where it does.

    ``parameters`` are given as to ``over_stand_ins``. Of one that wants other parameters nobody knows: empty too.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            made = over_stand_ins(optimizer, parameters)
        except TaskError:
            return ""
        try:
            for parameter in (one for group in made.param_groups for one in group["params"] if one.requires_grad):
                parameter.grad = torch.ones_like(parameter)
            made.step()
        except Exception as error:  # noqa: BLE001 - whatever it raises, it is no step
            return f"it raised {type(error).__name__}: {error}"
    return ""


def over_stand_ins(optimizer: _Optimizer, parameters: Sequence[tuple[int, bool]]) -> optim.Optimizer:
    """The optimizer over small stand-ins of parameters, each given by its dimensions and whether it is trained.

    Raises TaskError where it cannot be built, or is none.
    """
    stand_ins = [nn.Parameter(torch.zeros((1,) * dimensions), requires_grad=grad) for dimensions, grad in parameters]
    try:
        made = cast("object", optimizer(stand_ins))
    except Exception as error:
        raise TaskError(f"building the optimizer raised {type(error).__name__}: {error}") from error
    if not isinstance(made, optim.Optimizer):
        raise TaskError(f"optimizer() returned a {type(made).__name__}; it must return a torch.optim.Optimizer")
    return made


def _is_known(optimizer: _Optimizer, shapes: list[tuple[int, ...]]) -> bool:
    """Whether it is one of torch's own that look at single elements only, with nothing added to it."""
    try:
        made: Any = optimizer([nn.Parameter(torch.ones(shape, dtype=torch.float64)) for shape in shapes])
    except Exception:  # noqa: BLE001 - stepping it finds the same
        return False
    if type(made) not in _KNOWN or "step" in vars(made) or made.state:
        return False
    if made._optimizer_step_pre_hooks or made._optimizer_step_post_hooks:
        return False
    if _global_optimizer_pre_hooks or _global_optimizer_post_hooks:
        return False
    settings = [pair for group in made.param_groups for pair in group.items() if pair[0] != "params"]
    return all(_is_modest(value) and not (name in _DOUBTFUL and value) for name, value in settings)


def _is_modest(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_modest, value))
    return value is None or (type(value) in (bool, int, float) and abs(value) <= _MODEST)


def _small(shape: tuple[int, ...]) -> tuple[int, ...]:
    """The shape with its longest dimensions cut until it is small enough."""
    sizes = list(shape)
    while math.prod(sizes) > _LARGEST:
        longest = sizes.index(max(sizes))
        sizes[longest] = max(1, min(sizes[longest] // 2, _LARGEST))
    return tuple(sizes)


def _values(step: int, shapes: list[tuple[int, ...]]) -> list[Tensor]:
    """Fixed numbers of very different sizes, so that norms over slices differ from norms over all."""
    made: list[Tensor] = []
    for index, shape in enumerate(shapes):
        count = torch.arange(1, 1 + math.prod(shape), dtype=torch.float64)
        scale = 2.0 ** (torch.arange(7.0, dtype=torch.float64) - 3 + index % 5)
        made.append((torch.sin(count * (1.7 + index) + step) * scale[count.long() % 7]).reshape(shape))
    return made


def _whole(optimizer: _Optimizer, values: list[list[Tensor]]) -> list[Tensor]:
    parameters = [nn.Parameter(value.clone()) for value in values[0]]
    stepping = optimizer(list(parameters))
    for gradients in values[1:]:
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient.clone()
        stepping.step()
    return [parameter.detach().flatten() for parameter in parameters]


def _split(optimizer: _Optimizer, values: list[list[Tensor]]) -> list[Tensor]:
    workers: tuple[_Cuts, _Cuts, _Cuts] = ({}, {}, {})
    for index, value in enumerate(values[0]):
        count = value.numel()
        if index == 2:
            workers[2][index] = 0, count
            continue
        first, cut = (index % 2, count * 7 // 12 if index % 2 == 0 else count * 2 // 5)
        for worker, low, high in ((first, 0, cut), (first + 1, cut, count)):
            if low < high:
                workers[worker][index] = low, high
    made = [torch.empty(value.numel(), dtype=value.dtype) for value in values[0]]
    for cuts in workers:
        for index, piece in _one_worker(optimizer, values, cuts).items():
            low, high = cuts[index]
            made[index][low:high] = piece
    return made


def _one_worker(optimizer: _Optimizer, values: list[list[Tensor]], cuts: _Cuts) -> dict[int, Tensor]:
    """What one worker's slices become: the optimizer is made over whole parameters, then given slices to step."""
    whole = [nn.Parameter(value.clone()) for value in values[0]]
    stepping = optimizer(list(whole))
    slices = {
        index: nn.Parameter(whole[index].detach().flatten()[low:high].clone()) for index, (low, high) in cuts.items()
    }
    index_of = {id(parameter): index for index, parameter in enumerate(whole)}
    made = dict(stepping.state)
    stepping.state.clear()
    for group in stepping.param_groups:
        held = [index_of.get(id(parameter)) for parameter in group["params"]]  # one of its own is told elsewhere
        group["params"] = [slices[index] for index in held if index is not None and index in slices]
    for parameter, state in made.items():
        index = index_of.get(id(parameter))
        if index is not None and index in slices:
            low, high = cuts[index]
            stepping.state[slices[index]] = {
                key: value.flatten()[low:high].clone()
                if isinstance(value, Tensor) and value.shape == parameter.shape
                else value
                for key, value in state.items()
            }
    for gradients in values[1:]:
        for index, (low, high) in cuts.items():
            slices[index].grad = gradients[index].flatten()[low:high].clone()
        stepping.step()
    return {index: piece.detach() for index, piece in slices.items()}


def _same(whole: list[Tensor], split: list[Tensor]) -> bool:
    return all(
        bool(torch.isfinite(one).all())
        and torch.allclose(one, other, rtol=_RELATIVE, atol=_RELATIVE * float(one.abs().mean()))
        for one, other in zip(whole, split, strict=True)
    )
