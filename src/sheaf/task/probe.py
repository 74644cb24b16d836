"""Whether an optimizer treats every number for itself, found out by stepping it."""

import warnings
from collections.abc import Callable

import torch
from torch import Tensor, nn

_SHAPES = ((3, 4), (5,), (2, 1, 2, 2))
_STEPS = 4
# Where a vector ends decides which kernel rounds its tail, so bits may differ; what is looked for is far larger.
_RELATIVE = 1e-12


def elementwise(optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> bool:
    """Whether flat slices of parameters can be stepped apart from each other, as ZeRO's shards are.

    Steps small float64 parameters whole, and cut into flat slices that are given to three optimizers, each made over
    the whole parameters as the executors do (so groups may depend on shapes). An optimizer that looks at shapes,
    norms, other elements or other parameters when it steps (Adafactor, LAMB, Muon), or that raises on slices, is not
    elementwise.
    """
    with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            return _same(_whole(optimizer), _split(optimizer))
        except Exception:  # noqa: BLE001 - whatever it raises, its slices cannot be stepped
            return False


def _values(step: int) -> list[Tensor]:
    """Fixed numbers of very different sizes, so that norms over slices differ from norms over all."""
    made: list[Tensor] = []
    for index, shape in enumerate(_SHAPES):
        count = torch.arange(1, 1 + torch.Size(shape).numel(), dtype=torch.float64)
        made.append((torch.sin(count * (1.7 + index) + step) * torch.exp2(count % 7 - 3 + index)).reshape(shape))
    return made


def _whole(optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Tensor:
    parameters = [nn.Parameter(value) for value in _values(0)]
    stepping = optimizer(list(parameters))
    for step in range(1, _STEPS + 1):
        for parameter, gradient in zip(parameters, _values(step), strict=True):
            parameter.grad = gradient
        stepping.step()
    return torch.cat([parameter.detach().flatten() for parameter in parameters])


def _split(optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer]) -> Tensor:
    slices: list[Tensor] = []
    for cuts in ({0: (0, 7)}, {0: (7, 12), 1: (0, 2)}, {1: (2, 5), 2: (0, 8)}):
        slices.extend(_one_worker(optimizer, cuts))
    return torch.cat(slices)


def _one_worker(
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer], cuts: dict[int, tuple[int, int]]
) -> list[Tensor]:
    """What one worker's slices become: the optimizer is made over whole parameters, then given slices to step."""
    whole = [nn.Parameter(value) for value in _values(0)]
    stepping = optimizer(list(whole))
    slices = {
        index: nn.Parameter(whole[index].detach().flatten()[low:high].clone()) for index, (low, high) in cuts.items()
    }
    index_of = {id(parameter): index for index, parameter in enumerate(whole)}
    made = dict(stepping.state)
    stepping.state.clear()
    for group in stepping.param_groups:
        held = [index_of[id(parameter)] for parameter in group["params"]]
        group["params"] = [slices[index] for index in held if index in slices]
    for parameter, state in made.items():
        index = index_of[id(parameter)]
        if index in slices:
            low, high = cuts[index]
            stepping.state[slices[index]] = {
                key: value.flatten()[low:high].clone()
                if isinstance(value, Tensor) and value.shape == parameter.shape
                else value
                for key, value in state.items()
            }
    for step in range(1, _STEPS + 1):
        gradients = _values(step)
        for index, (low, high) in cuts.items():
            slices[index].grad = gradients[index].flatten()[low:high].clone()
        stepping.step()
    return [slices[index].detach() for index in cuts]


def _same(whole: Tensor, split: Tensor) -> bool:
    return bool(torch.isfinite(whole).all()) and torch.allclose(whole, split, rtol=_RELATIVE, atol=0.0)
