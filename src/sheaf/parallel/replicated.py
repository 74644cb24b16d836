"""Everything on every worker: gradients are summed bucket by bucket while the last backward still runs.

The bucketing and overlap are those of DistributedDataParallel (Li et al., 2020, arXiv:2006.15704).
"""

import itertools
from collections.abc import Collection, Mapping

import torch
from torch import Tensor

from sheaf.cluster.primitives import Pending
from sheaf.parallel.compression import compressor
from sheaf.parallel.holding import AbstractHolding, Factor, Touched, laid_as, refuse_sparse
from sheaf.parallel.optimizers import sliced_optimizer, whole_optimizer
from sheaf.parallel.portion import Portion
from sheaf.parallel.rows.meeting import RowsMeeting
from sheaf.parallel.rows.store import Store
from sheaf.parallel.rows.tables import Tables
from sheaf.parallel.turnstile import Turnstile
from sheaf.parallel.world import World
from sheaf.plans.compression import Compression
from sheaf.plans.layout import Held, Piece, buckets


class Replicated(AbstractHolding):
    """The whole model and optimizer on each worker; alone, it is what a plain training loop does.

    Gradients of parameters that are ``apart`` are complete on each worker, and stay there; those of ``tables`` travel
    as rows.
    """

    def __init__(
        self,
        portion: Portion,
        world: World,
        factor: Factor,
        bucket_bytes: int,
        apart: Collection[str] = (),
        compression: Compression | None = None,
        tables: Tables | None = None,
    ) -> None:
        self._world, self._factor = world, factor
        self.model = portion.fill(world.device)
        self.parameters = portion.own(self.model)
        if portion.complete:
            self.optimizer = whole_optimizer(portion, self.parameters)
        else:  # its groups are decided on the whole model's parameters
            self.optimizer = sliced_optimizer(portion, {name: (held, None) for name, held in self.parameters.items()})
        rows = RowsMeeting(world, tables, self.parameters, factor) if tables else None
        self.store: Store | None = None
        self.rows = rows if rows and rows.names and world.workers > 1 else None
        tabled = self.rows.names if self.rows else frozenset[str]()
        held = [
            Held(name, value.numel(), str(value.dtype), value.requires_grad)
            for name, value in self.parameters.items()
            if name not in apart and name not in tabled
        ]
        self._apart = [name for name in self.parameters if name in apart and name not in tabled]
        sizes = {str(value.dtype): value.itemsize for value in self.parameters.values()}
        grouped = buckets(held, sizes, bucket_bytes) if world.workers > 1 else ()
        self._buckets = [[member.name for member in bucket] for bucket in grouped]
        self._flats = [self._flat(names) for names in self._buckets]
        self._views = {
            name: view
            for names, flat in zip(self._buckets, self._flats, strict=True)
            for name, view in zip(names, self._split(flat, names), strict=True)
        }
        self._compressors = [
            compressor(compression, world, flat, [self.parameters[name].shape for name in names])
            for names, flat in zip(self._buckets, self._flats, strict=True)
            if compression is not None and compression.kind != "none"
        ]
        self._pending: list[Pending] = []
        # a worker that is done early does not wait in its last backward for the others to begin theirs
        self._turnstile = Turnstile(self._buckets, self._launch, factor.known)
        self._touched = Touched(self.parameters.items(), self._ready)

    def pull(self, store: Store) -> None:
        """Rows of dealt tables come from a store, and their gradients go there."""
        self.store = store
        if self.rows is not None:
            self.rows.sums = store.sums

    @property
    def sharded(self) -> bool:
        return False

    def begin_step(self) -> None:
        if self.store is not None:
            self.store.begin_step()
        self._touched.names.clear()
        self._turnstile.forget()
        for parameter in self.parameters.values():
            parameter.grad = None

    def arm(self, *, last: bool) -> None:
        if last:
            self._turnstile.arm()

    def end_backward(self) -> None:
        """Nothing: what is not ready may still become so."""

    def gave_up(self) -> None:
        self._turnstile.catch_up()

    def flush(self) -> None:
        if not self._turnstile.armed:
            self._turnstile.arm()
        self._turnstile.flush()
        if self.rows:
            self.rows.start()

    def finish(self, used: set[str]) -> None:
        if self._world.workers == 1:
            factor = self._factor()
            if factor != 1.0:
                self.scale(factor)
            return
        for pending in self._pending:
            self._world.wait(pending)
        self._pending.clear()
        for name, view in self._views.items():
            self.parameters[name].grad = laid_as(self.parameters[name], view) if name in used else None
        if self._compressors:
            self._give_back(used)
        gradients = [gradient for name in self._apart if (gradient := self.parameters[name].grad) is not None]
        if gradients:
            torch._foreach_mul_(gradients, self._factor())
        if self.rows:
            self.rows.finish(used)

    def held(self) -> dict[str, Tensor]:
        return {name: value.grad for name, value in self.parameters.items() if value.grad is not None}

    def after_update(self) -> None:
        """Every worker made the same update, but of the rows that it holds for others."""
        if self.store is not None:
            self.store.updated()

    def loaded(self) -> None:
        if self.store is not None:
            self.store.loaded()

    def close(self) -> None:
        super().close()
        if self.store is not None:
            self.store.close()

    def full_gradients(self) -> dict[str, Tensor]:
        return {name: value.to_dense() if value.is_sparse else value for name, value in self.held().items()}

    def full_parameters(self) -> dict[str, Tensor]:
        return {name: value.detach() for name, value in self.parameters.items()}

    def kept(self) -> dict[str, Tensor]:
        return self.full_parameters()

    def stepped(self) -> Mapping[str, tuple[Tensor, Piece | None]]:
        return {name: (value, None) for name, value in self.parameters.items()}

    def extra(self) -> dict[str, Tensor]:
        return {
            f"bucket{index}/{name}": value
            for index, each in enumerate(self._compressors)
            for name, value in each.kept().items()
        }

    @property
    def distinct(self) -> bool:
        return bool(self._compressors)

    def _ready(self, name: str) -> None:
        if self._buckets and name in self._views:
            self._turnstile.ready(name)

    def _launch(self, bucket: int) -> None:
        factor = self._factor()
        for name in self._buckets[bucket]:
            gradient, view = self.parameters[name].grad, self._views[name]
            if gradient is None:
                view.zero_()
            else:
                refuse_sparse(name, gradient)
                torch.mul(gradient, factor, out=view)
                self.parameters[name].grad = None
        if self._compressors:
            self._pending.append(self._compressors[bucket].start(self._flats[bucket]))
        else:
            what = f"gradients of {self._buckets[bucket][-1]}"
            self._pending.append(self._world.all_reduce(self._flats[bucket], what))

    def _give_back(self, used: set[str]) -> None:
        """What coding owed parameters that have no gradient in this step comes to them in a later one."""
        for compress, names in zip(self._compressors, self._buckets, strict=True):
            starts = itertools.accumulate((self.parameters[name].numel() for name in names), initial=0)
            for name, start in zip(names, starts, strict=False):
                if name not in used:
                    compress.give_back(start, self._views[name])

    def _flat(self, names: list[str]) -> Tensor:
        first = self.parameters[names[0]]
        total = sum(self.parameters[name].numel() for name in names)
        return torch.zeros(total, dtype=first.dtype, device=first.device)

    def _split(self, flat: Tensor, names: list[str]) -> list[Tensor]:
        sizes = [self.parameters[name].numel() for name in names]
        return [part.view(self.parameters[name].shape) for name, part in zip(names, flat.split(sizes), strict=True)]
