"""ZeRO-3: parameters live in shards; a block's are gathered before it runs forward and again before its backward.

Rajbhandari et al., 2020 (arXiv:1910.02054); the freed-storage views are those of FSDP (Zhao et al., 2023,
arXiv:2304.11277). A block's parameters stay views of one flat tensor whose memory comes and goes, so what autograd
saved of them is valid again once the block is gathered. Backward gathers a block when it comes to a node that made one
of the block's outputs, or unpacks a saved parameter, whichever is first; it frees the block when its gradients have
been sent and backward has gone on to another.

Why no worker waits for ever: see ``rounds``.

Under autocast, what autograd saves is the low-precision copies of the weights, which are no views of the flats: they
stay from forward to backward unless the plan says recompute=full, and backward gathers all the same.
"""

import weakref
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sheaf.cluster.primitives import Pending
from sheaf.errors import PlanError
from sheaf.graph.facts import GLUE
from sheaf.parallel.flat import FlatTensors
from sheaf.parallel.holding import AbstractHolding, Factor, Touched
from sheaf.parallel.optimizers import sliced_optimizer
from sheaf.parallel.portion import Portion
from sheaf.parallel.recompute import again
from sheaf.parallel.rehearsal import orders_of, rehearse, tensors_in, unit_members, watching
from sheaf.parallel.rounds import Round, Unit
from sheaf.parallel.sharded import gathered
from sheaf.parallel.world import World
from sheaf.plans import Plan
from sheaf.plans.layout import Piece, flats

_IN_FLIGHT = 2


class Gathered(AbstractHolding):
    """Parameters, gradients and optimizer state in shards; one block or two are whole at a time."""

    lockstep = True

    def __init__(
        self,
        portion: Portion,
        world: World,
        factor: Factor,
        blocks: dict[str, nn.Module],
        plan: Plan,
        calls: Mapping[str, tuple[int, ...]] | None = None,
        stages: Sequence[int] = (0,),
        weights: tuple[int, ...] = (),
    ) -> None:
        self._world, self._factor = world, factor
        rehearsal = rehearse(portion, blocks)
        named = unit_members(portion, blocks, rehearsal, plan.bucket_bytes)
        shapes = {name: fake.shape for name, fake in portion.parameters.items()}
        self.flats = [
            FlatTensors(flat, world.rank, shapes, world.device, apart=True)
            for flat in flats(named.items(), world.workers, weights)
        ]
        self._units = {name: Unit(name, [flat for flat in self.flats if flat.flat.unit == name]) for name in named}
        self._unit_of_storage = {
            flat.storage: unit for name, unit in self._units.items() if name != GLUE for flat in unit.parts
        }
        self._fill(portion)
        self.slices: dict[str, tuple[Tensor, Piece]] = {
            piece.name: (flat.part_of(flat.shard, piece), piece)
            for flat in self.flats
            if flat.trained
            for piece in flat.pieces
        }
        self._gradients = {
            piece.name: flat.part_of(flat.gradient_shard, piece)
            for flat in self.flats
            if flat.trained
            for piece in flat.pieces
        }
        self.optimizer = sliced_optimizer(portion, self.slices)
        self._staged = calls is not None
        parts = {name: unit.parts for name, unit in self._units.items()}
        orders = orders_of(rehearsal.order, named, calls, stages)
        self._rounds = {
            stage: Round(
                order, parts, self._visit, self._launch, first_held=not self._staged
            )  # forward leaves its last
            for stage, order in orders.items()
        }
        self._round = self._rounds[stages[0]]
        self._trained = [flat for flat in self.flats if flat.trained]
        self._reduced: set[int] = set()
        self._pending: deque[tuple[Pending, Tensor | None, Tensor]] = deque()
        self._used = set[str]()
        self._done: list[Unit] = []
        self._backward = self._watched = self._gathering = False
        self._complete = rehearsal.complete
        self._touched = Touched(self.parameters.items(), self._ready)
        self._wrapped: list[tuple[nn.Module, Any]] = []
        repeated = again(plan, blocks)
        for name, block in blocks.items():
            if name in self._units:
                self._wrap(block, self._units[name], recomputed=name in repeated)

    @property
    def sharded(self) -> bool:
        """Gradients in ``held`` are disjoint pieces."""
        return True

    def begin_step(self) -> None:
        """Forget the last step's gradients; gather what belongs to no block, for the whole step."""
        self._touched.names.clear()
        for one in self._rounds.values():
            one.turnstile.forget()
        self._reduced.clear()
        for tensor, _ in self.slices.values():
            tensor.grad = None
        if not self._staged:
            self._begin_round()
        if GLUE in self._units:
            self._visit(GLUE)
            self._arrive(self._units[GLUE])

    def arm(self, *, last: bool) -> None:  # noqa: ARG002 - every round reduces
        """Backward is about to run: let go of blocks that forward skipped, and walk the turns in reverse."""
        self._turn_around()

    def enter_stage(self, stage: int, *, forward: bool) -> None:
        """Walk the turns of a stage, forward or in reverse."""
        self._round = self._rounds[stage]
        if forward:
            self._begin_round()

    def leave_forward(self) -> None:
        """Visit what is left, and let go of all."""
        self._round.forward.finish()
        for unit in self._units.values():
            if unit.name != GLUE:
                self._release(unit)

    def end_backward(self) -> None:
        """Reduce what is left of the round, and get ready for the next."""
        self._round.backward.finish()
        self._round.turnstile.flush()
        for unit in self._units.values():
            if unit.name != GLUE:
                self._release(unit)
        self._done.clear()
        if not self._staged:
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
        """The first forward is watched, and every one whose control flow depends on data.

        Reading a freed parameter would end the process, and reading one on its way would give a wrong answer.
        """
        if self._watched and self._complete:
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
        return gathered(self._world, self.flats, [flat.shard for flat in self.flats], self.parameters)

    def kept(self) -> dict[str, Tensor]:
        """This worker's shards."""
        return {f"shard {index}": flat.shard for index, flat in enumerate(self.flats)}

    def stepped(self) -> Mapping[str, tuple[Tensor, Piece | None]]:
        """The pieces of this worker's shards, as views of them."""
        return self.slices

    def close(self) -> None:
        """Take every hook off the model, and give its blocks their own forward back."""
        super().close()
        for block, own in self._wrapped:
            block.__dict__.pop("forward", None)
            if own is not None:
                block.__dict__["forward"] = own
        self._wrapped.clear()

    def _fill(self, portion: Portion) -> None:
        flat_of = {name: flat for flat in self.flats for name in flat.names}

        def parameter(name: str) -> Tensor:
            flat_of[name].put(name, portion.value(name))
            return flat_of[name].views[name]

        self.model = portion.install(self._world.device, parameter)
        self.parameters = portion.own(self.model)

    def _ready(self, name: str) -> None:
        self._round.turnstile.ready(name)

    def _begin_round(self) -> None:
        self._backward = False
        self._round.forward.begin()

    def _turn_around(self) -> None:
        turns = self._round.backward
        self._round.forward.finish()
        self._backward = True
        turns.begin()
        self._round.turnstile.arm()
        for unit in self._units.values():
            unit.open_reductions = len(unit.parts)  # a frozen part is never reduced, and stays until the round ends
            if unit.name not in (GLUE, *turns.sequence[:1]) or (unit.name != GLUE and self._staged):
                self._release(unit)
        if not self._staged:
            turns.pass_by(next(iter(turns.sequence), ""))
        turns.look_ahead()

    def _wrap(self, block: nn.Module, unit: Unit, *, recomputed: bool) -> None:
        forward: Callable[..., Any] = block.forward
        self._wrapped.append((block, block.__dict__.get("forward")))
        me = weakref.ref(self)

        def gathering(*positional: Any, **named: Any) -> Any:
            there = me()
            if there is None:
                return forward(*positional, **named)
            return there._run(unit, forward, positional, named, recomputed=recomputed)

        block.forward = gathering

    def _run(self, unit: Unit, forward: Callable[..., Any], positional: Any, named: Any, *, recomputed: bool) -> Any:
        turns = self._round.forward
        if self._backward:  # recomputation
            self._need(unit)
        else:
            turns.take(unit.name)
            self._arrive(unit)
            turns.look_ahead()
        # a block that is recomputed gathers when it runs again, and its checkpoint has hooks of its own
        keep = nullcontext() if recomputed else torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
        first_node = torch.autograd._get_sequence_nr()
        unit.running = True
        try:
            with keep:
                output = forward(*positional, **named)
        finally:
            unit.running = False
        if torch.is_grad_enabled():
            self._guard(unit, output, first_node)
        if not self._backward and not turns.done and not turns.repeats():
            self._release(unit)
        return output

    def _guard(self, unit: Unit, output: Any, first_node: int) -> None:
        """Gather before backward enters the block by any of its outputs, whoever saved what of it, and how."""
        for leaf in (output,) if isinstance(output, Tensor) else tensors_in(output):
            node = leaf.grad_fn
            if node is not None and node._sequence_nr() >= first_node:  # not a tensor that only passes through
                node.register_prehook(partial(self._entered, unit))

    def _entered(self, unit: Unit, _gradients: Any) -> None:
        self._need(unit)

    def _pack(self, tensor: Tensor) -> tuple[Unit | None, Tensor, int]:
        try:
            unit = self._unit_of_storage.get(tensor.untyped_storage()._cdata)
        except NotImplementedError:  # a sparse tensor
            unit = None
        return unit, tensor, tensor._version

    def _unpack(self, packed: tuple[Unit | None, Tensor, int]) -> Tensor:
        unit, tensor, version = packed
        if unit is not None:  # its version moves with each gather
            self._need(unit)
        elif tensor._version != version:  # PyTorch checks this only where no hooks are set
            raise RuntimeError(
                "one of the variables needed for gradient computation has been modified by an inplace operation: "
                f"[{tensor.type()} {list(tensor.shape)}] is at version {tensor._version}; expected version {version} "
                "instead"
            )
        return tensor

    def _need(self, unit: Unit) -> None:
        """Backward needs a unit's parameters now, and soon those of the unit before it."""
        if unit.gathers == []:
            return
        if unit.gathers is None:
            if not self._backward:
                raise PlanError(
                    f"a gradient through {unit.name} is taken within forward, when ZeRO-3 has freed its parameters: "
                    "use zero=2"
                )
            self._round.backward.take(unit.name)
        else:
            self._round.backward.pass_by(unit.name)
        self._arrive(unit)
        self._release_done(unit)
        self._round.backward.look_ahead()

    def _release_done(self, current: Unit) -> None:
        """Free units whose gradients are all sent, but for the one in which backward may still be."""
        for unit in self._done:
            if unit is not current:
                self._release(unit)
        self._done = [unit for unit in self._done if unit is current]

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
            self._world.all_gather(flat.whole, flat.shard, f"parameters of {unit.name}", flat.flat.sizes)
            for flat in unit.parts
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

    def _launch(self, turn: Round, index: int) -> None:
        flat = turn.trained[index]
        unit = self._units[flat.flat.unit]
        turn.backward.reach(turn.last_turn[unit.name] + 1)
        while len(self._pending) >= _IN_FLIGHT:
            self._collect()
        first = id(flat) not in self._reduced
        self._reduced.add(id(flat))
        laid = torch.empty(flat.flat.padded_elements, dtype=flat.dtype, device=self._world.device)
        flat.gradients_into(laid, self.parameters, 1.0)
        unit.open_reductions -= 1
        if not unit.open_reductions and unit.name != GLUE:
            self._done.append(unit)
        self._release_done(unit)
        target = flat.gradient_shard if first else torch.empty_like(flat.gradient_shard)
        pending = self._world.reduce_scatter(target, laid, f"gradients of {flat.flat.unit}", flat.flat.sizes)
        self._pending.append((pending, None if first else flat.gradient_shard, target))

    def _collect(self) -> None:
        pending, total, part = self._pending.popleft()
        self._world.wait(pending)
        if total is not None:
            total.add_(part)
