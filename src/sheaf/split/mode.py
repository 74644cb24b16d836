"""The mode in which a model runs while its layers are split: every torch function that meets a slice goes by a rule.

A function with a rule computes on slices and says what the result is a slice of. Any other gets its arguments whole,
which is always right. So no model needs to be written for it, and what pairs with what (a product cut by columns, then
one cut by rows) comes out of running it.
"""

import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.overrides import resolve_name
from torch.utils._pytree import tree_map

from sheaf.errors import PlanError
from sheaf.plans.split import Cut, Slice
from sheaf.split.late import Late
from sheaf.split.layouts import as_shadow, follow
from sheaf.split.moves import Enter, Gather, GatherEnter, Part, Share, Team, Total, TotalPart, sliced
from sheaf.split.registry import FALLBACK, RULES, is_inplace
from sheaf.split.sent import Sent
from sheaf.split.tensor import Split
from sheaf.split.unseen import AbstractSeeing

LENGTH_DIM = 1  # of batch x length x features, along which sequence=1 splits


class Splitting(AbstractSeeing):
    """Runs a forward whose parameters are slices. ``parameters`` maps the id of a local parameter to (name, slice).

    With ``sequence`` partial sums of batch x length x features are left split along the length. ``partial`` are whole
    parameters that are used in split work: each worker finds a part of their gradients, to be summed once per step.
    """

    def __init__(
        self,
        team: Team,
        parameters: Mapping[int, tuple[str, Slice]],
        *,
        sequence: bool = False,
        partial: Iterable[Tensor] = (),
    ) -> None:
        super().__init__()
        self.team, self.sequence = team, sequence
        self._partial = {id(parameter) for parameter in partial if parameter.requires_grad}
        self._parameter_of: dict[int, tuple[Tensor, Tensor]] = {}
        self.lends = True  # keys and values of attention are let go between forward and backward
        self._late = Late(team)
        self._parameters = dict(parameters)
        self._held: dict[int, tuple[Tensor, Split]] = {}
        self._entered: dict[int, tuple[weakref.ref[Tensor], int, Tensor]] = {}

    def begin(self) -> None:
        """A forward begins."""
        self._late.forget()

    def end(self) -> None:
        """Forget what forward moved."""
        self._entered.clear()
        self._held.clear()
        self._parameter_of.clear()

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self.look(leaves(args, kwargs))
        if self._partial and any(id(leaf) in self._partial for leaf in leaves(args, kwargs)):
            args = tree_map(self._aliased, args)
            kwargs = {key: tree_map(self._aliased, value) for key, value in kwargs.items()}
        if not any(self._concerns(value) for value in leaves(args, kwargs)):
            return func(*args, **kwargs)
        args = tuple(self._seen(value) for value in args)
        kwargs = {key: self._seen(value) for key, value in kwargs.items()}
        found = RULES.get(func)
        if found is not None:
            result = found(self, func, args, kwargs)
            if result is not FALLBACK:
                follow(func, args, kwargs, result)
                return result
        return self.fallback(func, args, kwargs)

    def fallback(self, func: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Compute on whole tensors."""
        name = resolve_name(func) or getattr(func, "__name__", str(func))
        short = name.rpartition(".")[2]
        if (is_inplace(func) and isinstance(args[0], Split)) or isinstance(kwargs.get("out"), Split):
            raise PlanError(
                f"{name} changes a tensor that is split among workers in a way that has no split counterpart: keep the "
                "module whole, with NAME=whole in the plan"
            )
        return func(
            *(self.whole(value, short) for value in args), **{k: self.whole(v, short) for k, v in kwargs.items()}
        )

    # What rules ask for ---------------------------------------------------------------------------------------------

    def whole(self, value: Any, why: str) -> Any:
        """The same value with every slice gathered, in containers too."""
        if isinstance(value, Split):
            return self.gather(value, why)
        if isinstance(value, list | tuple) and any(isinstance(item, Split) for item in leaves(tuple(value), {})):
            made = [self.whole(item, why) for item in value]
            return type(value)(*made) if hasattr(value, "_fields") else type(value)(made)
        if isinstance(value, dict):
            return {key: self.whole(item, why) for key, item in value.items()}
        return value

    def gather(self, split: Split, why: str) -> Tensor:
        """The whole tensor, the same on every worker; gathered once however often it is asked for."""
        return self._once(
            split,
            lambda: as_shadow(
                Gather.apply(split.local, split.axis, split.cut, self.team, f"whole for {why}{self.place}"), split
            ),
        )

    def enter(self, tensor: Tensor, why: str) -> Tensor:
        """A whole tensor (or one gathered) for use in split work, where each worker finds a part of its gradient."""
        if isinstance(tensor, Split):
            split = tensor
            return self._once(
                split,
                lambda: as_shadow(
                    GatherEnter.apply(split.local, split.axis, split.cut, self.team, f"whole for {why}{self.place}"),
                    split,
                ),
                place=-id(split),
            )
        if not tensor.requires_grad or not torch.is_grad_enabled():
            return tensor
        known = self._parameter_of.get(id(tensor))
        if known is not None:
            return known[1]
        return self._once(tensor, lambda: Enter.apply(tensor, self.team, f"gradient of {why}'s input{self.place}"))

    def part(self, tensor: Tensor, dim: int, cut: Cut, why: str) -> Tensor:
        """This worker's slice of a whole tensor: a slice that is held anyway, or one that is cut off."""
        known = self._parameter_of.get(id(tensor))
        if known is not None:
            return sliced(known[1], dim, cut, self.team.rank)
        proposed = self._seen(tensor) if id(tensor) in self._parameters else self.propose(tensor, dim, cut)
        if proposed is not None:
            tensor = proposed
        if isinstance(tensor, Split):
            if (tensor.axis, tensor.cut) == (dim, cut):
                return tensor.local
            tensor = self.gather(tensor, why)
        return Part.apply(tensor, dim, cut, self.team, f"gradient of {why}'s input{self.place}")

    def total(self, partial: Tensor, why: str) -> Tensor:
        """Partial sums, added up over the workers."""
        return Total.apply(partial, self.team, f"partial sums of {why}{self.place}")

    def add_up(self, partial: Tensor, why: str) -> Tensor:
        """Partial sums of a layer's output: whole, or split along the sequence if the plan says so."""
        if not self.sequence or partial.ndim != LENGTH_DIM + 2 or partial.shape[LENGTH_DIM] < self.team.workers:
            return self.total(partial, why)
        cut = Cut.even(partial.shape[LENGTH_DIM], self.team.workers)
        local = TotalPart.apply(partial, LENGTH_DIM, cut, self.team, f"partial sums of {why}{self.place}")
        return Split(local, LENGTH_DIM, cut)

    def later(self, whole: Tensor, part: Tensor, cut: Cut, why: str) -> None:
        """Let every worker have a tensor of one dimension whole, of which this one has a slice, when forward ends."""
        self._late.add(whole, part, cut, why)

    def look(self, given: Iterable[Any]) -> None:
        """A function is about to be given these: bring what was to be whole later, if it is among them."""
        if self._late.is_waiting and any(self._late.holds(leaf) for leaf in given):
            self.settle()

    def is_away(self, value: Any) -> bool:
        """Whether a tensor is not here as it looks."""
        return isinstance(value, Split | Sent)

    def settle(self) -> None:
        """Bring what was to be whole later; forward does so when it ends (collective)."""
        if self._late.is_waiting:
            self._late.bring(self.place)

    def leaving(self, tensor: Tensor, why: str) -> Tensor:
        """What this worker sends of a tensor to its like in another stage: all of it."""
        return self.gather(tensor, why) if isinstance(tensor, Split) else tensor

    def arriving(self, whole: Tensor) -> Tensor:
        """What comes of a tensor that looks as ``whole`` does, from the like in another stage."""
        return whole

    def arrived(self, found: Tensor, whole: Tensor) -> Tensor:  # noqa: ARG002 - one whose inputs are split looks
        """The tensor from what came."""
        return found

    def propose(self, tensor: Tensor, dim: int, cut: Cut | None = None) -> Split | None:  # noqa: ARG002 - rehearsals do
        """Offer to hold a parameter as slices along ``dim``; None where it is whole, or no parameter.

        Only a rehearsal decides; a run has slices already.
        """
        return None

    def refine(self, split: Split, outer: int, unit: int) -> None:
        """A slice would be of use if the run it is cut from were ``outer`` runs cut in units of ``unit``."""

    @property
    def place(self) -> str:
        """Where forward is, to be told with what moves; a rehearsal knows."""
        return ""

    # ----------------------------------------------------------------------------------------------------------------

    def _once(self, tensor: Tensor, make: Callable[[], Tensor], place: int | None = None) -> Tensor:
        local = tensor.local if isinstance(tensor, Split) else tensor
        place = id(tensor) if place is None else place
        kept = self._entered.get(place)
        needs_history = local.requires_grad and torch.is_grad_enabled()  # one that was made under no_grad has none
        is_same = kept is not None and kept[0]() is tensor and kept[1] == local._version
        if kept is not None and is_same and (kept[2].requires_grad or not needs_history):
            return kept[2]
        made = make()
        self._entered[place] = (weakref.ref(tensor), local._version, made)
        return made

    def _concerns(self, value: Any) -> bool:
        return type(value) is Split or id(value) in self._parameters

    def _seen(self, value: Any) -> Any:
        if id(value) in self._parameters and isinstance(value, Tensor):
            return self._parameter(value)
        if type(value) in (list, tuple) and any(id(item) in self._parameters for item in value):
            return type(value)(self._seen(item) for item in value)
        return value

    def _aliased(self, leaf: Any) -> Any:
        """What stands for a partial parameter in a rule: used as it is, every worker does the same with it."""
        if id(leaf) not in self._partial:
            return leaf
        alias = Share.apply(leaf, self.team.workers)
        self._parameter_of[id(alias)] = (alias, leaf)
        return alias

    def _parameter(self, local: Tensor) -> Split:
        held = self._held.get(id(local))
        if held is None:
            name, cut = self._parameters[id(local)]
            held = self._held[id(local)] = (local, Split(local, cut.dim, cut.cut, origin=name, held=True))
        return held[1]


def leaves(args: Any, kwargs: Any) -> Iterator[Any]:
    """Arguments one by one, those in lists and tuples too."""
    for value in (*args, *kwargs.values()):
        if type(value) in (list, tuple):
            yield from leaves(value, {})
        else:
            yield value
