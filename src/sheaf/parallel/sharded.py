"""ZeRO-1 and ZeRO-2: whole parameters everywhere, each worker updates its shard of them.

Rajbhandari et al., 2020, "ZeRO: Memory Optimizations Toward Training Trillion Parameter Models" (arXiv:1910.02054).
"""

from collections import deque
from collections.abc import Mapping

import torch
from torch import Tensor

from sheaf.cluster.primitives import Pending
from sheaf.parallel.flat import FlatTensors
from sheaf.parallel.holding import AbstractHolding, Factor, Touched
from sheaf.parallel.optimizers import sliced_optimizer
from sheaf.parallel.portion import Portion
from sheaf.parallel.turnstile import Turnstile
from sheaf.parallel.world import World
from sheaf.plans.layout import Flat, Held, Piece, buckets

_IN_FLIGHT = 2  # reductions under way at once: one is sent while the next is laid out


class Sharded(AbstractHolding):
    """Optimizer state in shards; with ``shard_gradients`` (ZeRO-2) gradients too, reduced in every backward."""

    def __init__(
        self,
        portion: Portion,
        world: World,
        factor: Factor,
        bucket_bytes: int,
        weights: tuple[int, ...] = (),
        *,
        shard_gradients: bool,
    ) -> None:
        self._world, self._factor = world, factor
        self.lockstep = shard_gradients
        fakes = portion.parameters
        held = [
            Held(name, fake.numel(), str(portion.dtype_of(fake)).removeprefix("torch."), fake.requires_grad)
            for name, fake in fakes.items()
        ]
        sizes = {member.dtype: getattr(torch, member.dtype).itemsize for member in held}
        shapes = {name: fake.shape for name, fake in fakes.items()}
        self.flats = [
            FlatTensors(flat, world.rank, shapes, world.device, apart=False)
            for bucket in buckets(held, sizes, bucket_bytes)
            for flat in [Flat(bucket[-1].name, bucket, world.workers, weights)]
        ]
        views = {name: view for flat in self.flats for name, view in flat.views.items()}

        def parameter(name: str) -> Tensor:
            value = portion.value(name)
            return views[name].copy_(value) if name in views else value.to(world.device)

        self.model = portion.install(world.device, parameter)
        self.parameters = portion.own(self.model)
        self.slices: dict[str, tuple[Tensor, Piece]] = {
            piece.name: (flat.part_of(flat.shard, piece), piece) for flat in self.flats for piece in flat.pieces
        }
        self._gradients = {
            piece.name: flat.part_of(flat.gradient_shard, piece) for flat in self.flats for piece in flat.pieces
        }
        self.optimizer = sliced_optimizer(portion, self.slices)
        self._flat_of = {name: index for index, flat in enumerate(self.flats) for name in flat.names}
        self._pending: deque[tuple[Pending, Tensor | None, Tensor]] = deque()
        self._launched = 0
        self._used: set[str] = set()
        # a worker that is done early does not wait in its last backward for the others to begin theirs
        self._turnstile = Turnstile([flat.names for flat in self.flats], self._launch, factor.known)
        self._touched = Touched(self.parameters.items(), self._turnstile.ready)

    @property
    def sharded(self) -> bool:
        return True

    def begin_step(self) -> None:
        self._touched.names.clear()
        self._turnstile.forget()
        self._launched = 0
        for parameter in self.parameters.values():
            parameter.grad = None
        for tensor, _ in self.slices.values():
            tensor.grad = None

    def arm(self, *, last: bool) -> None:
        if last or self.lockstep:
            self._turnstile.arm()

    def end_backward(self) -> None:
        if self.lockstep:
            self._turnstile.flush()

    def idle_round(self) -> None:
        self._turnstile.arm()
        self._turnstile.flush()

    def gave_up(self) -> None:
        self._turnstile.catch_up()

    def flush(self) -> None:
        if self._turnstile.armed or self._launched < len(self.flats):
            if not self._turnstile.armed:
                self._turnstile.arm()
            self._turnstile.flush()

    def finish(self, used: set[str]) -> None:
        while self._pending:
            self._collect()
        if self.lockstep:
            factor = self._factor()
            for flat in self.flats:
                flat.gradient_shard.mul_(factor)
        self._used = used
        for name, (tensor, _) in self.slices.items():
            tensor.grad = self._gradients[name] if name in used else None

    def held(self) -> dict[str, Tensor]:
        return {name: tensor.grad for name, (tensor, _) in self.slices.items() if tensor.grad is not None}

    def after_update(self) -> None:
        gathers = [
            self._world.all_gather(flat.whole, flat.shard, f"parameters of {flat.flat.unit}", flat.flat.sizes)
            for flat in self.flats
        ]
        for gather in gathers:
            self._world.wait(gather)

    def full_gradients(self) -> dict[str, Tensor]:
        whole = gathered(self._world, self.flats, [flat.gradient_shard for flat in self.flats], self.parameters)
        return {name: value for name, value in whole.items() if name in self._used}

    def full_parameters(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.parameters.items()}

    def kept(self) -> dict[str, Tensor]:
        frozen = {name: value.detach() for name, value in self.parameters.items() if name not in self._flat_of}
        return frozen | {f"shard {index}": flat.shard for index, flat in enumerate(self.flats)}

    def stepped(self) -> Mapping[str, tuple[Tensor, Piece | None]]:
        return self.slices

    def _launch(self, index: int) -> None:
        flat = self.flats[index]
        while len(self._pending) >= _IN_FLIGHT:
            self._collect()
        first = self._launched < len(self.flats)
        self._launched += 1
        laid = torch.empty_like(flat.whole)
        flat.gradients_into(laid, self.parameters, 1.0 if self.lockstep else self._factor())
        target = flat.gradient_shard if first else torch.empty_like(flat.gradient_shard)
        pending = self._world.reduce_scatter(target, laid, f"gradients of {flat.flat.unit}", flat.flat.sizes)
        self._pending.append((pending, None if first else flat.gradient_shard, target))

    def _collect(self) -> None:
        pending, total, part = self._pending.popleft()
        self._world.wait(pending)
        if total is not None:
            total.add_(part)


def gathered(
    world: World, flats: list[FlatTensors], shards: list[Tensor], shapes: dict[str, torch.nn.Parameter]
) -> dict[str, Tensor]:
    """Whole tensors by parameter name, from every worker's shards laid out like ``flats`` (collective)."""
    whole: dict[str, Tensor] = {}
    for flat, shard in zip(flats, shards, strict=True):
        if flat.flat.num_elements:
            out = shard.new_empty(flat.flat.padded_elements)
            world.wait(world.all_gather(out, shard.contiguous(), f"all of {flat.flat.unit}", flat.flat.sizes))
            whole.update({name: part.view(shapes[name].shape) for name, part in flat.split(out).items()})
    return whole
