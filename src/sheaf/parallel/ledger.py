"""Where each tensor of a forward is: which stage has it, under which name, and what has been sent and received."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._pytree import tree_map

from sheaf.errors import PlanError
from sheaf.parallel.post import FORWARD, Post
from sheaf.parallel.remote import Entry, Remote, no_leaf, version_of
from sheaf.parallel.stand_ins import Outline, StandIns, cut_off
from sheaf.parallel.trees import line_of_model, mapped, tensors
from sheaf.split.mode import Splitting
from sheaf.split.moves import laid_out
from sheaf.split.tensor import Split


class Kept:
    """What a microbatch's forward leaves for its backward: what went to later stages, and what came from earlier."""

    def __init__(self) -> None:
        self.sent: dict[int, list[Tensor]] = {}
        self.received: dict[int, list[Tensor]] = {}
        self.loss: Tensor | None = None
        self.hooked = False  # whether forward put a gradient hook on a tensor


class Ledger:
    """The tensors of the forward under way, as ``stage`` knows them. ``homes`` maps the ids of parameters to (name,
    stage), for those that are used between blocks.

    While ``checking``, both ends of a message compare which tensor they mean.
    """

    def __init__(
        self, homes: Mapping[int, tuple[str, int]], post: Post, stand_ins: StandIns, splitting: Splitting | None
    ) -> None:
        self.homes, self.post, self._stand_ins, self._splitting = homes, post, stand_ins, splitting
        self.stage, self.checking = -1, True
        self.kept = Kept()
        self._entries: dict[int, tuple[Tensor, Entry]] = {}
        self._come: dict[tuple[str, int], Tensor] = {}
        self._gone: set[tuple[tuple[str, int], int]] = set()
        self._stale: set[int] = set()
        self._arrived: list[tuple[int, tuple[int, ...], torch.dtype, torch.device]] = []

    def begin(self, stage: int) -> None:
        """A microbatch's forward begins."""
        self.forget()
        self._arrived = []
        self.stage = stage
        self.kept = Kept()

    def forget(self) -> None:
        """It has ended."""
        self.stage = -1
        self._entries.clear()
        self._come.clear()
        self._gone.clear()
        self._stale.clear()

    def entry(self, value: Any) -> Entry | None:
        """Where a tensor is; None for what every stage has, as what is computed from the batch alone."""
        if isinstance(value, Remote):
            return value.entry
        known = self._entries.get(id(value))
        if known is not None:
            if self._stale and known[1].real is not None and _storage(known[1].real) in self._stale:
                raise PlanError(
                    f"{line_of_model()} uses a tensor of stage {self.stage} after another stage changed a view of it "
                    "in place: write y = y + x for y += x there"
                )
            return known[1]
        home = self.homes.get(id(value))
        if home is None or not isinstance(value, Tensor):
            if isinstance(value, FakeTensor):
                raise PlanError(
                    f"{line_of_model()} uses a tensor that a block of another pipeline stage keeps in an attribute: "
                    "return it from the block's forward, or name stages= that keep both in one stage"
                )
            return None
        name, stage = home
        here = stage == self.stage
        fake = None if here else self._stand_ins.like(value)
        entry = Entry(stage, f"parameter {name}", value if here else None, fake, value._version if here else 0)
        if fake is not None:
            entry.version = fake._version
        self._entries[id(value)] = (value, entry)
        return entry

    def entries(self, value: Any) -> list[Entry]:
        """Those of all tensors in it."""
        return [entry for leaf in tensors(value) if (entry := self.entry(leaf)) is not None]

    def are_computed(self, value: Any) -> bool:
        """Whether all tensors in it were computed, and none of them from the batch alone."""
        return all(
            id(leaf) not in self.homes and (isinstance(leaf, Remote) or id(leaf) in self._entries)
            for leaf in tensors(value)
        )

    def arrivals(self) -> tuple[tuple[int, tuple[int, ...], torch.dtype, torch.device], ...]:
        """What this stage received of others in the forward that has run: from which stage, shape, dtype and device."""
        return tuple(self._arrived)

    def located(
        self, given: Sequence[Tensor], real: Sequence[Tensor], before: Sequence[int], result: Any, name: str
    ) -> Any:
        """Note what this stage computed from ``given``, whose real values ``real`` stood at the versions ``before``."""
        changed = {place for place, tensor in enumerate(real) if version_of(tensor) != before[place]}
        for place in sorted(changed):
            tensor = real[place]
            self._move(given[place], Entry(self.stage, f"{name}!{place}", real=tensor, version=version_of(tensor)))
        places = {id(tensor): place for place, tensor in enumerate(real)}
        count = -1

        def noted(leaf: Tensor) -> Tensor:
            nonlocal count
            count += 1
            place = places.setdefault(id(leaf), len(real))
            if place in changed:
                return given[place]
            known = self._entries.get(id(leaf))
            if place < len(real) or (known is not None and known[1].name.startswith(f"{name}.")):
                leaf = leaf.like(leaf.local) if isinstance(leaf, Split) else leaf.view_as(leaf)
            self._entries[id(leaf)] = (
                leaf,
                Entry(self.stage, f"{name}.{count}", real=leaf, version=version_of(leaf)),
            )
            return leaf

        return mapped(noted, result)

    def elsewhere(self, given: Sequence[Tensor], outline: Outline, stage: int, name: str) -> Any:
        """Note what another stage computed from ``given``, and give what stands for it."""
        for place, grad in outline.changed:
            fake = cut_off(self._stand_ins.like(given[place]).detach(), requires_grad=grad)
            self._move(given[place], Entry(stage, f"{name}!{place}", fake=fake, version=fake._version))
        changed = {place for place, _ in outline.changed}
        count, like = -1, self._stand_ins.like

        def remote(leaf: Tensor) -> Tensor:
            nonlocal count
            count += 1
            if outline.passed[count] in changed:
                return given[outline.passed[count]]
            if outline.common:
                return Remote(Entry(stage, f"{name}.{count}", looks=leaf, copied=like))
            fake = cut_off(leaf)
            return Remote(Entry(stage, f"{name}.{count}", fake=fake, version=fake._version))

        output = mapped(remote, outline.output)
        return tree_map(lambda leaf: leaf, output) if output is outline.output else output  # containers of its own

    def all_real(self, value: Any) -> Any:
        """The same with real tensors, received where need be."""

        def real(leaf: Tensor) -> Tensor:
            entry = self.entry(leaf)
            return leaf if entry is None else self.real(entry)

        return mapped(real, value)

    def all_fake(self, value: Any, *, fresh: bool = True) -> Any:
        """The same with fake tensors; those that are not ``fresh`` see changes in place, through views too."""

        def fake(leaf: Tensor) -> Tensor:
            entry = self.entry(leaf)
            known = entry.fake if entry is not None else None
            return self._stand_ins.like(leaf if known is None else known) if fresh or known is None else known

        return mapped(fake, value)

    def real(self, entry: Entry) -> Tensor:
        """A tensor's value: this stage's own, or received, once."""
        if entry.real is not None:
            return entry.real
        fake = entry.shown
        if entry.key not in self._come:
            shown = fake if self._splitting is None else self._splitting.arriving(fake)
            out = torch.empty(tuple(shown.shape), dtype=fake.dtype, device=fake.device)
            self._arrived.append((entry.stage, tuple(out.shape), out.dtype, out.device))
            self._compare(entry, entry.stage, self.stage)
            found = laid_out(self.post.receive(out, entry.stage, self.stage, FORWARD), shown)
            if fake.requires_grad:
                leaf = found.detach().requires_grad_()
                self.kept.received.setdefault(entry.stage, []).append(leaf)
                found = no_leaf(leaf)
            found = found if self._splitting is None else self._splitting.arrived(found, fake)
            self._come[entry.key] = found
        return self._come[entry.key]

    def send_all(self, entries: Collection[Entry], stage: int) -> None:
        """Send what this stage has of them, once."""
        for entry in entries:
            if entry.stage == self.stage:
                self.send(entry, stage)

    def send(self, entry: Entry, stage: int) -> None:
        """Send a tensor, once."""
        tensor, key = entry.real, entry.key
        assert tensor is not None
        if (key, stage) in self._gone:
            return
        self._gone.add((key, stage))
        with torch.enable_grad():
            if id(tensor) in self.homes:
                tensor = tensor.clone()  # in split layers a slice of a parameter becomes one that says so
            self._compare(entry, self.stage, stage, tuple(tensor.shape))
            if self._splitting is not None:
                tensor = self._splitting.leaving(tensor, f"stage {stage}")
        # a copy, since the model may change its own in place while this is under way
        copied = tensor.detach().clone(memory_format=torch.contiguous_format)
        self.post.send(copied, self.stage, stage, FORWARD)
        if tensor.requires_grad:
            self.kept.sent.setdefault(stage, []).append(tensor)

    def _move(self, leaf: Tensor, entry: Entry) -> None:
        """A tensor was changed in place: from now on it is where that was done."""
        before = self.entry(leaf)
        if before is not None and before.real is not None and entry.stage != self.stage:
            self._stale.add(_storage(before.real))
        if isinstance(leaf, Remote):
            leaf.entry = entry
        else:
            self._entries[id(leaf)] = (leaf, entry)

    def _compare(self, entry: Entry, origin: int, target: int, shape: tuple[int, ...] | None = None) -> None:
        """Both ends must mean the same tensor, or the model took another path somewhere."""
        if not self.checking:
            return
        known = entry.shown
        mine = f"{entry.key} {shape or tuple(known.shape)} {known.dtype} {known.requires_grad}"
        if self.stage == origin:
            self.post.tell(mine, origin, target)
        elif (theirs := self.post.hear(origin, target)) != mine:
            raise PlanError(
                f"{line_of_model()}: stage {target} expects tensor {mine} of the forward and stage {origin} sends "
                f"{theirs}: the model takes another path in each stage, as by an attribute that a block writes and "
                "another part reads, or by what differs between workers; keep such parts in one stage, with stages=..."
            )


def _storage(tensor: Tensor) -> int:
    return (tensor.local if isinstance(tensor, Split) else tensor).untyped_storage()._cdata
