"""ZeRO-3: parameters live in shards; a block's are gathered before it runs forward and again before its backward.

Rajbhandari et al., 2020 (arXiv:1910.02054); the freed-storage views are those of FSDP (Zhao et al., 2023,
arXiv:2304.11277). A block's parameters stay views of one flat tensor whose memory comes and goes, so what autograd
saved of them is valid again once the block is gathered; backward gathers when it first unpacks a saved parameter,
whatever the block's output looked like.
"""

from collections import deque
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sheaf.cluster.primitives import Pending
from sheaf.errors import PlanError
from sheaf.graph import is_composite
from sheaf.graph.facts import GLUE
from sheaf.parallel.flat import FlatTensors
from sheaf.parallel.holding import AbstractHolding, Factor, Touched
from sheaf.parallel.optimizers import sliced_optimizer
from sheaf.parallel.rehearsal import Rehearsal, home, rehearse, watching
from sheaf.parallel.sharded import gathered
from sheaf.parallel.turns import Turns
from sheaf.parallel.turnstile import Turnstile
from sheaf.parallel.world import World
from sheaf.plans import Plan
from sheaf.plans.layout import Held, Piece, flats, kept_whole
from sheaf.task import Blueprint

_IN_FLIGHT = 2


class Unit:
    """The flats of one block, and whether its parameters are there, on their way, or freed."""

    def __init__(self, name: str, parts: list[FlatTensors]) -> None:
        self.name, self.parts = name, parts
        self.gathers: list[Pending] | None = None  # None: freed
        self.open_reductions = 0
        self.running = False


class Gathered(AbstractHolding):
    """Parameters, gradients and optimizer state in shards; one block or two are whole at a time."""

    lockstep = True

    def __init__(self, blueprint: Blueprint, world: World, factor: Factor, blocks: dict[str, nn.Module], plan: Plan):
        self._world, self._factor = world, factor
        rehearsal = rehearse(blueprint, blocks)
        named = unit_members(blueprint, blocks, rehearsal, plan.bucket_bytes)
        order = [name for name in rehearsal.order if name in named]
        order += [name for name in named if name not in order and name != GLUE]
        shapes = {name: fake.shape for name, fake in blueprint.parameters.items()}
        self._flats = [
            FlatTensors(flat, world.rank, shapes, world.device, apart=True)
            for flat in flats(named.items(), world.workers)
        ]
        self._units = {name: Unit(name, [flat for flat in self._flats if flat.flat.unit == name]) for name in named}
        self._unit_of_storage = {
            flat.storage: unit for name, unit in self._units.items() if name != GLUE for flat in unit.parts
        }
        self._fill(blueprint)
        self.slices: dict[str, tuple[Tensor, Piece]] = {
            piece.name: (flat.part_of(flat.shard, piece), piece)
            for flat in self._flats
            if flat.trained
            for piece in flat.pieces
        }
        self._gradients = {
            piece.name: flat.part_of(flat.gradient_shard, piece)
            for flat in self._flats
            if flat.trained
            for piece in flat.pieces
        }
        self.optimizer = sliced_optimizer(blueprint, self.slices)
        self._trained = self._reduction_order(order)
        self._flat_of = {name: index for index, flat in enumerate(self._trained) for name in flat.names}
        self._pending: deque[tuple[Pending, Tensor | None, Tensor]] = deque()
        self._launched, self._used = 0, set[str]()
        self._backward = self._watched = self._gathering = False
        self._forward_turns = Turns(order, self._visit)
        self._backward_turns = Turns(order[::-1], self._visit, first_held=True)  # forward leaves its last block there
        self._turnstile = Turnstile([len(flat.names) for flat in self._trained], self._launch)
        self._touched = Touched(self.parameters.items(), lambda name: self._turnstile.ready(self._flat_of[name]))
        for name, block in blocks.items():
            if name in self._units:
                self._wrap(block, self._units[name], recomputed=plan.recompute == "full" and is_composite(block))

    @property
    def sharded(self) -> bool:
        """Gradients in ``held`` are disjoint pieces."""
        return True

    @property
    def touched(self) -> set[str]:
        """Parameters that got a gradient in this step."""
        return self._touched.names

    def begin_step(self) -> None:
        """Forget the last step's gradients; gather what belongs to no block, for the whole step."""
        self._touched.names.clear()
        self._launched = 0
        for tensor, _ in self.slices.values():
            tensor.grad = None
        self._begin_round()
        if GLUE in self._units:
            self._visit(GLUE)
            self._arrive(self._units[GLUE])

    def arm(self, *, last: bool) -> None:  # noqa: ARG002 - every round reduces
        """Backward is about to run: let go of blocks that forward skipped, and walk the turns in reverse."""
        self._turn_around()

    def end_backward(self) -> None:
        """Reduce what is left of the round, and get ready for the next."""
        self._backward_turns.finish()
        self._turnstile.flush()
        for unit in self._units.values():
            if unit.name != GLUE:
                self._release(unit)
        self._begin_round()

    def idle_round(self) -> None:
        """Gather and reduce in turn with the others."""
        self._turn_around()
        self.end_backward()

    def flush(self) -> None:
        """A step without any round cannot be: every step has a microbatch, and every worker its rounds."""

    def finish(self, used: set[str]) -> None:
        """Wait for the reductions; gradients become the step's own."""
        while self._pending:
            self._collect()
        factor = self._factor()
        for flat in self._trained:
            flat.gradient_shard.mul_(factor)
        self._used = used
        for name, (tensor, _) in self.slices.items():
            tensor.grad = self._gradients[name] if name in used else None
        for unit in self._units.values():
            self._release(unit)

    def forward_context(self) -> AbstractContextManager[object]:
        """The first forward is watched: reading a freed parameter would end the process, or worse."""
        if self._watched:
            return nullcontext()
        self._watched = True
        return watching(self._refuse_freed)

    def held(self) -> dict[str, Tensor]:
        """The pieces of gradients that this worker's optimizer sees."""
        return {name: tensor.grad for name, (tensor, _) in self.slices.items() if tensor.grad is not None}

    def after_update(self) -> None:
        """Nothing: the next gather brings the new values."""

    def full_gradients(self) -> dict[str, Tensor]:
        """Whole gradients on every worker."""
        whole = gathered(self._world, self._trained, [flat.gradient_shard for flat in self._trained], self.parameters)
        return {name: value for name, value in whole.items() if name in self._used}

    def full_parameters(self) -> dict[str, Tensor]:
        """Whole parameters on every worker."""
        return gathered(self._world, self._flats, [flat.shard for flat in self._flats], self.parameters)

    def kept(self) -> dict[str, Tensor]:
        """This worker's shards."""
        return {f"shard {index}": flat.shard for index, flat in enumerate(self._flats)}

    def optimizer_names(self) -> dict[int, str]:
        """The parameter name of each slice that the optimizer steps."""
        return {id(tensor): name for name, (tensor, _) in self.slices.items()}

    def _fill(self, blueprint: Blueprint) -> None:
        flat_of = {name: flat for flat in self._flats for name in flat.names}

        def parameter(name: str) -> Tensor:
            flat_of[name].put(name, blueprint.value(name))
            return flat_of[name].views[name]

        self.model = blueprint.install(self._world.device, parameter)
        self.parameters = dict(self.model.named_parameters())

    def _reduction_order(self, order: Sequence[str]) -> list[FlatTensors]:
        units = [*dict.fromkeys(reversed(order)), *([GLUE] if GLUE in self._units else [])]
        return [flat for name in units for flat in self._units[name].parts if flat.trained]

    def _begin_round(self) -> None:
        self._backward = False
        self._forward_turns.begin()

    def _turn_around(self) -> None:
        self._forward_turns.finish()
        self._backward = True
        self._backward_turns.begin()
        self._turnstile.arm()
        for unit in self._units.values():
            unit.open_reductions = len(unit.parts)  # a frozen part is never reduced, and stays until the round ends
            if unit.name not in (GLUE, *self._backward_turns.sequence[:1]):
                self._release(unit)

    def _wrap(self, block: nn.Module, unit: Unit, *, recomputed: bool) -> None:
        forward: Callable[..., Any] = block.forward

        def gathering(*positional: Any, **named: Any) -> Any:
            # under recomputation this runs again within backward
            turns = self._forward_turns
            if self._backward:
                self._need(unit)
            else:
                turns.take(unit.name)
                self._arrive(unit)
                turns.look_ahead()
            # a block that is recomputed gathers when it runs again, and its checkpoint has hooks of its own
            keep = nullcontext() if recomputed else torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
            unit.running = True
            with keep:
                output = forward(*positional, **named)
            unit.running = False
            if not self._backward and not turns.done and not turns.repeats():
                self._release(unit)
            return output

        block.forward = gathering

    def _pack(self, tensor: Tensor) -> tuple[Unit | None, Tensor]:
        return self._unit_of_storage.get(tensor.untyped_storage()._cdata), tensor

    def _unpack(self, packed: tuple[Unit | None, Tensor]) -> Tensor:
        unit, tensor = packed
        if unit is not None:
            self._need(unit)
        return tensor

    def _need(self, unit: Unit) -> None:
        """Backward needs a unit's parameters now, and soon those of the unit before it."""
        if unit.gathers is None or unit.gathers:
            if unit.gathers is None:
                self._backward_turns.take(unit.name)
            self._arrive(unit)
            self._backward_turns.look_ahead()

    def _refuse_freed(self, tensor: Tensor) -> None:
        unit = self._unit_of_storage.get(tensor.untyped_storage()._cdata)
        if unit is not None and not unit.running and not self._gathering:
            raise PlanError(
                f"a parameter of {unit.name} is used while {unit.name} is not running, and control flow on data hid "
                "that from the rehearsal, so ZeRO-3 had freed it: use zero=2"
            )

    def _visit(self, name: str) -> None:
        """A unit's turn has come, or passed on this worker: start its gather."""
        unit = self._units[name]
        if unit.gathers is None:
            for flat in unit.parts:
                flat.allocate()
        self._arrive(unit)
        self._gathering = True
        unit.gathers = [
            self._world.all_gather(flat.whole, flat.shard, f"parameters of {unit.name}") for flat in unit.parts
        ]
        self._gathering = False

    def _arrive(self, unit: Unit) -> None:
        for gather in unit.gathers or ():
            self._world.wait(gather)
        unit.gathers = []

    def _release(self, unit: Unit) -> None:
        if unit.gathers is None:
            return
        self._arrive(unit)
        unit.gathers = None
        for flat in unit.parts:
            flat.free()

    def _launch(self, index: int) -> None:
        flat = self._trained[index]
        while len(self._pending) >= _IN_FLIGHT:
            self._collect()
        first = self._launched < len(self._trained)
        self._launched += 1
        laid = torch.empty(flat.flat.padded_elements, dtype=flat.dtype, device=self._world.device)
        flat.gradients_into(laid, self.parameters, 1.0)
        unit = self._units[flat.flat.unit]
        unit.open_reductions -= 1
        if unit.open_reductions == 0 and unit.name != GLUE:
            self._release(unit)
        target = flat.gradient_shard if first else torch.empty_like(flat.gradient_shard)
        pending = self._world.reduce_scatter(target, laid, f"gradients of {flat.flat.unit}")
        self._pending.append((pending, None if first else flat.gradient_shard, target))

    def _collect(self) -> None:
        pending, total, part = self._pending.popleft()
        self._world.wait(pending)
        if total is not None:
            total.add_(part)


def unit_members(
    blueprint: Blueprint, blocks: dict[str, nn.Module], rehearsal: Rehearsal, bucket_bytes: int
) -> dict[str, list[Held]]:
    """Which parameters each unit holds: a block those that only it uses, GLUE all others, whole for the whole step.

    Blocks that are too small to be worth a collective are left to GLUE too.
    """
    members: dict[str, list[Held]] = {}
    homes = home(blueprint, blocks, rehearsal)
    sizes: dict[str | None, int] = {}
    for name, block in homes.items():
        fake = blueprint.parameters[name]
        sizes[block] = sizes.get(block, 0) + fake.numel() * blueprint.dtype_of(fake).itemsize
    for name, block in homes.items():
        fake = blueprint.parameters[name]
        dtype = str(blueprint.dtype_of(fake)).removeprefix("torch.")
        unit = GLUE if block is None or kept_whole(sizes[block], bucket_bytes) else block
        members.setdefault(unit, []).append(Held(name, fake.numel(), dtype, fake.requires_grad))
    return members
