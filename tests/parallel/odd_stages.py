"""Models that are awkward to cut into stages, each with a task in float64."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sheaf import Task

WIDTH = 6


class Layers(nn.Module):
    """Four layers, of which each model makes its own forward."""

    def __init__(self, count: int = 4) -> None:
        super().__init__()
        self.layers = nn.ModuleList([nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.Tanh()) for _ in range(count)])
        self.head = nn.Linear(WIDTH, 5)


class Skips(Layers):
    """What every layer computed reaches the end."""

    def forward(self, given: Tensor) -> Tensor:
        kept = [given]
        for layer in self.layers:
            kept.append(layer(kept[-1]))
        return self.head(sum(kept[1:], start=kept[0]))


class InPlace(Layers):
    """Changes tensors of other stages in place, between blocks and at the start of one."""

    def __init__(self) -> None:
        super().__init__()
        self.relu = nn.ReLU(inplace=True)

    def forward(self, given: Tensor) -> Tensor:
        first = self.layers[0](given)
        total = first * 2
        second = self.layers[1](first)
        total += second
        third = self.relu(self.layers[2](total) + 0.1) * 2
        third[:, 0] = second[:, 1]
        return self.head(third + self.layers[3](third))


class Named(nn.Module):
    """A block that takes and gives a dict."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, state: dict[str, Any]) -> dict[str, Any]:
        return {
            "x": torch.tanh(self.inner(state["x"])) * state["mask"],
            "mask": state["mask"],
            "depth": state["depth"] + 1,
        }


class Dicts(nn.Module):
    """State goes from block to block in a dict, a mask among it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList([Named() for _ in range(4)]), nn.Linear(WIDTH, 5)

    def forward(self, given: Tensor) -> dict[str, Any]:
        state = {"x": given, "mask": (given > 0).to(given.dtype), "depth": 0}
        for layer in self.layers:
            state = layer(state)
        return {"logits": self.head(state["x"]) * state["depth"], "aside": state["mask"]}


@dataclass
class State:
    """Not a container that torch knows."""

    hidden: Tensor
    total: Tensor


class Carrying(nn.Module):
    """A block over such a state."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, state: State) -> State:
        hidden = torch.tanh(self.inner(state.hidden))
        return State(hidden, state.total + hidden)


class Objects(nn.Module):
    """State goes from block to block in a dataclass."""

    def __init__(self) -> None:
        super().__init__()
        self.layers, self.head = nn.ModuleList([Carrying() for _ in range(4)]), nn.Linear(WIDTH, 5)

    def forward(self, given: Tensor) -> Tensor:
        state = State(given, torch.zeros_like(given))
        for layer in self.layers:
            state = layer(state)
        return self.head(state.total)


class Shared(Layers):
    """One matrix in three layers, one parameter between blocks, one that is frozen, one unused."""

    def __init__(self) -> None:
        super().__init__()
        for layer in (self.layers[2], self.layers[3]):
            layer[0].weight = self.layers[0][0].weight
        self.scale, self.unused = nn.Parameter(torch.ones(WIDTH)), nn.Parameter(torch.ones(3))
        self.layers[1][0].bias.requires_grad_(False)

    def forward(self, given: Tensor) -> Tensor:
        for layer in self.layers:
            given = layer(given) * self.scale
        return self.head(given) + F.linear(given, self.layers[1][0].weight)[:, :5]


class Branching(Layers):
    """Asks for values between blocks: a branch, a count of loops, a draw."""

    def forward(self, given: Tensor) -> Tensor:
        given = self.layers[0](given)
        if given.sum() > 0:
            given = given * 2
        for _ in range(1 + int((given[0, 0] > 0).item())):
            given = self.layers[1](given)
        if torch.rand([]) < 0.5:
            given = self.layers[2](given)
        given = self.layers[3](given)
        return self.head(given * given.detach().abs().max().item())


class Picked(Layers):
    """Some layers are given some rows only: how many, the batch tells."""

    def forward(self, given: Tensor) -> Tensor:
        kept = self.layers[0](given)
        few = self.layers[1](given[given[:, 0] > 0])
        chosen = self.layers[2](kept[given[:, 1] > 0])
        return self.head(kept + chosen.sum(0) + self.layers[3](few).sum(0))


class Deciding(nn.Module):
    """A block whose own course depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, given: Tensor) -> Tensor:
        return torch.tanh(self.inner(given)) if given.mean() > 0 else self.inner(given)


class Choosing(nn.Module):
    """A block whose output's shape depends on values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, given: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.nonzero(given[:, 0] > given[:, 0].mean())[:, 0]
        return self.inner(given[rows]), rows


class Hidden(nn.Module):
    """Course and shapes inside blocks depend on values."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList([Deciding(), Deciding(), Choosing(), Deciding()])
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, given: Tensor) -> Tensor:
        given = self.layers[1](self.layers[0](given))
        chosen, rows = self.layers[2](given)
        return self.head(self.layers[3](given.index_add(0, rows, chosen)))


class Leaking(Layers):
    """A block keeps in an attribute what the end uses."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[0] = Keeper()

    def forward(self, given: Tensor) -> Tensor:
        for layer in self.layers:
            given = layer(given)
        return self.head(given + self.layers[0].kept)


class Keeper(nn.Module):
    """Keeps what it computed."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, given: Tensor) -> Tensor:
        self.kept = self.inner(given)
        return self.kept * 2


class Failing(Layers):
    """A block raises in the first forward."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[3] = Breaking()

    def forward(self, given: Tensor) -> Tensor:
        for layer in self.layers:
            given = layer(given)
        return self.head(given)


class Breaking(nn.Module):
    """Raises where there are values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, given: Tensor) -> Tensor:
        if type(given) is Tensor:
            raise ArithmeticError("the block broke")
        return self.inner(given)


ODD: dict[str, Callable[[], nn.Module]] = {
    "skips": Skips,
    "in place": InPlace,
    "dicts": Dicts,
    "objects": Objects,
    "shared": Shared,
    "branching": Branching,
    "picked": Picked,
    "hidden": Hidden,
}
REFUSED: dict[str, Callable[[], nn.Module]] = {"leaking": Leaking, "failing": Failing}


def odd(name: str, **changes: Any) -> Task:
    """A task of one of them, whose last microbatch is smaller."""
    generator = torch.Generator().manual_seed(1)
    data = [(torch.randn(WIDTH, generator=generator), index % 5) for index in range(21)]
    given: dict[str, Any] = {"batch": 7, "microbatch": 2, "precision": "fp64", "seed": 3} | changes
    return Task(
        name=name.replace(" ", "_"),
        model=(ODD | REFUSED)[name],
        loss=_loss,
        optimizer=partial(torch.optim.AdamW, lr=1e-2),
        data=data,
        **given,
    )


def _loss(output: Any, batch: Any) -> Tensor:
    return F.cross_entropy(output["logits"] if isinstance(output, dict) else output, batch[1])
