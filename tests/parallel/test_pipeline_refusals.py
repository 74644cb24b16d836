"""What a pipeline cannot follow is refused with its reason, on a worker that sees it, and nobody goes on."""

from dataclasses import dataclass, replace
from functools import partial

import pytest
import torch
from odd_stages import WIDTH, Keeper, Layers, odd
from plain import planned
from torch import Tensor, nn
from torch.nn import functional as F

from pool import RankRaised
from sheaf.errors import PlanError


class Viewed(Layers):
    """A later stage changes a view of what an earlier one goes on with."""

    def forward(self, given: Tensor) -> Tensor:
        first = self.layers[0](given)
        part = first[:, :3]
        part += self.layers[3](self.layers[2](self.layers[1](first)))[:, :3]
        return self.head(first * 2)


class Unseen(Layers):
    """A branch on a value ends the rehearsal before the attribute that leaks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[0] = Keeper()

    def forward(self, given: Tensor) -> Tensor:
        if given.sum() > 1e9:
            return self.head(given)
        kept = given
        for layer in self.layers:
            kept = layer(kept)
        return self.head(kept + self.layers[0].kept)


class Telling(nn.Module):
    """Writes down, in a list, that it ran on values."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.ran = nn.Linear(WIDTH, WIDTH), [False]

    def forward(self, given: Tensor) -> Tensor:
        self.ran[0] = type(given) is Tensor
        return self.inner(given)


class Parting(Layers):
    """Another path on the worker that ran a block."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[0] = Telling()

    def forward(self, given: Tensor) -> Tensor:
        given = self.layers[0](given)
        if self.layers[0].ran[0]:
            given = given.tanh()
        for layer in self.layers[1:]:
            given = layer(given)
        return self.head(given)


@dataclass
class Boxed:
    """Not what JSON knows."""

    hidden: Tensor


class Boxing(nn.Module):
    """By the values of its input, in an object."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, given: Tensor) -> Boxed:
        return Boxed(self.inner(given) if given.mean() > 0 else given)


class Opening(nn.Module):
    """Takes such an object."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, given: Boxed) -> Tensor:
        return self.inner(given.hidden)


class Objects(Layers):
    """The other stages cannot know what is in it."""

    def __init__(self) -> None:
        super().__init__()
        self.layers[1], self.layers[2] = Boxing(), Opening()

    def forward(self, given: Tensor) -> Tensor:
        for layer in self.layers:
            given = layer(given)
        return self.head(given)


class Growing(Layers):
    """A list that grows, and with it the forward."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[int] = []

    def forward(self, given: Tensor) -> Tensor:
        self.seen.append(0)
        given = self.layers[0](given)
        given = given.sin() if len(self.seen) > 10 else given.tanh()
        for layer in self.layers[1:]:
            given = layer(given)
        return self.head(given)


class Sometimes(nn.Module):
    """By values for a lone sample only."""

    def __init__(self) -> None:
        super().__init__()
        self.inner = nn.Linear(WIDTH, WIDTH)

    def forward(self, given: Tensor) -> Tensor:
        return self.inner(given) if len(given) > 1 or given.mean() > 0 else given


class Swelling(nn.Module):
    """By values always, and in later steps of another shape."""

    def __init__(self) -> None:
        super().__init__()
        self.inner, self.calls = nn.Linear(WIDTH, WIDTH), []

    def forward(self, given: Tensor) -> tuple[Tensor, Tensor]:
        given = self.inner(given) if given.mean() > -1e9 else given
        self.calls.append(0)
        return given, given.new_ones(2 if len(self.calls) > 4 else 1)


class With(Layers):
    """A block of another kind among the others."""

    def __init__(self, place: int, kind: type[nn.Module]) -> None:
        super().__init__()
        self.layers[place] = kind()

    def forward(self, given: Tensor) -> Tensor:
        for layer in self.layers:
            given = layer(given)
            given = given[0] if isinstance(given, tuple) else given
        return self.head(given)


class Returning(Layers):
    """Comes back to its first block behind a branch on a value."""

    def forward(self, given: Tensor) -> Tensor:
        if given.sum() > 1e9:
            return self.head(given)
        for layer in (*self.layers, self.layers[0]):
            given = layer(given)
        return self.head(given)


class Custom(Layers):
    """Computes with torch's functions switched off for every mode, as compiled code does."""

    def forward(self, given: Tensor) -> Tensor:
        for layer in self.layers:
            given = layer(given)
            with torch._C.DisableTorchFunction():
                given = given**3
        return self.head(given)


class Counting(Layers):
    """Between blocks by values, for a lone sample only: a number of classes that is not said has to be looked up."""

    def forward(self, given: Tensor) -> Tensor:
        if given.sum() > 1e9:
            return self.head(given)
        for layer in self.layers:
            given = layer(given)
        kinds = F.one_hot(given.argmax(-1), WIDTH if len(given) > 1 else -1)
        return self.head(given) + kinds.sum()


REFUSED = {
    "a function that needs values for some": (
        Counting,
        1,
        "calls torch.nn.functional.one_hot on a tensor of stage 1, a",
    ),
    "a view that goes stale": (Viewed, 1, "after another stage changed a view of it in place: write y = y"),
    "an attribute nobody saw": (Unseen, 1, "that a block of another pipeline stage keeps in an attribute: return it"),
    "a path of one worker": (Parting, 1, "the model takes another path in each stage, as by an attribute"),
    "an object made by values": (Objects, 1, "layers.1 returns a Boxed, and what it computes depends on values"),
    "values for some shapes": (partial(With, 1, Sometimes), 1, "by the values of its inputs for some of their shapes"),
    "shapes that change": (partial(With, 1, Swelling), 2, "other shapes than for inputs of the same shapes in the fir"),
    "a block that comes back": (Returning, 1, "gives layers.0, of pipeline stage 0, what stage 1 computed: blocks"),
    "a function nobody sees": (Custom, 1, r"by a way that cannot be followed \(an attribute, a closure, a custom"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_pipeline_says_what_it_cannot_follow(ranks, name):
    model, steps, reason = REFUSED[name]
    task = replace(odd("skips"), model=model, name="refused")
    with pytest.raises(RankRaised, match=reason) as raised:
        ranks(planned, 2, task, "pp=2,stages=3:2", steps)
    assert isinstance(raised.value.exception, PlanError)


def test_a_path_that_changes_in_a_later_step_is_refused(ranks):
    def grown() -> None:
        from sheaf.parallel import build
        from sheaf.parallel.course import Course
        from sheaf.plans import Plan

        own, Course._has_drawn = Course._has_drawn, lambda _self: False  # a checker of types draws where one is there
        try:
            step = build(task, Plan.parse("pp=2,stages=3:2"))
            for _ in range(5):
                step()
        finally:
            Course._has_drawn = own

    task = replace(odd("skips"), model=Growing, name="growing")
    reason = r"comes to torch.Tensor.sin, and for batches of the same shapes it came to torch.Tensor.tanh before"
    with pytest.raises(RankRaised, match=reason) as raised:
        ranks(grown, 2)
    assert isinstance(raised.value.exception, PlanError)
