"""One stage's run through the model's whole forward, in which the blocks of other stages are stood in for.

Every worker runs the model's own Python. A block of this stage runs for real; any other gives tensors without values,
from a run of it on fake tensors, kept by the shapes of its inputs. What lies between blocks runs in the last stage that
any of its inputs comes from. So all stages come by the same sequence of events, and each knows by itself what it must
send to whom, and what it will be sent: skips over stages, several inputs and outputs, and masks need no description. A
branch on a value waits for the stage that knows the value.
"""

from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_iter, tree_map

from sheaf.errors import PlanError
from sheaf.parallel.functions import ABOUT, DRAWS, FACTORIES, PICKS, READS, UNSHAPED, has_mask
from sheaf.parallel.post import FORWARD, Post
from sheaf.parallel.remote import Entry, Remote, version_of
from sheaf.parallel.stand_ins import StandIns, blanks, cut_off, signature
from sheaf.split.mode import Splitting
from sheaf.split.rules.elementwise import is_inplace
from sheaf.split.tensor import Split


class Finished(BaseException):
    """This stage has nothing more to do in the forward under way."""


class Kept:
    """What a microbatch's forward leaves for its backward: what went to later stages, and what came from earlier."""

    def __init__(self) -> None:
        self.sent: dict[int, list[Tensor]] = {}
        self.received: dict[int, list[Tensor]] = {}
        self.loss: Tensor | None = None


class Passing(TorchFunctionMode):
    """Runs forwards as one stage at a time. ``where`` maps block names to stages, ``homes`` the ids of parameters that
    are used between blocks to (name, stage).

    ``paused`` is entered while other stages' blocks run on fake tensors.
    """

    def __init__(
        self,
        blocks: Mapping[str, nn.Module],
        where: Mapping[str, int],
        homes: Mapping[int, tuple[str, int]],
        post: Post,
        num_stages: int,
        fakes: FakeTensorMode,
        splitting: Splitting | None,
        paused: Callable[[], AbstractContextManager[object]],
    ) -> None:
        super().__init__()
        self.where, self.homes, self.post, self.num_stages = dict(where), dict(homes), post, num_stages
        self._splitting = splitting
        self._stand_ins = StandIns(fakes, paused)
        self.checking = True
        self._tails: dict[Any, int | None] = {}
        self._wrapped: list[tuple[nn.Module, Any]] = []
        self.stage, self._inside, self._count, self._last = -1, 0, 0, 0
        self._signature: Any = None
        self._reads = False
        self._entries: dict[int, tuple[Tensor, Entry]] = {}
        self._come: dict[tuple[str, int], Tensor] = {}
        self._gone: set[tuple[tuple[str, int], int]] = set()
        self.kept = Kept()
        for name, block in blocks.items():
            if name in self.where:
                self._wrap(name, block)

    def begin(self, stage: int, batch: Any) -> None:
        """A microbatch's forward as this stage begins."""
        self.stage, self._inside, self._count, self._last, self._reads = stage, 0, 0, 0, False
        self._signature = (stage, signature(batch))
        self._entries.clear()
        self._come.clear()
        self._gone.clear()
        self.kept = Kept()

    def end(self, loss: Tensor | None) -> None:
        """Forward and loss have run, or as much of them as concerns this stage; the last stage keeps the loss."""
        if not self._reads and self._signature not in self._tails:
            self._tails[self._signature] = self._last if loss is None else None
        self.kept.loss = loss
        self._entries.clear()
        self._come.clear()
        self.stage = -1

    def runs(self, module: str) -> bool:
        """Whether a module is in a block of the stage under way."""
        parts = module.split(".")
        names = ["", *(".".join(parts[: count + 1]) for count in range(len(parts)))]
        return any(self.where.get(name) == self.stage for name in names)

    def close(self) -> None:
        """Give the blocks their own forward back."""
        for block, own in self._wrapped:
            block.__dict__.pop("forward", None)
            if own is not None:
                block.__dict__["forward"] = own
        self._wrapped.clear()

    def bring(self, tensor: Any) -> Any:
        """A tensor for the last stage, wherever it was computed: itself there, and None elsewhere."""
        self._inside += 1
        try:
            return self._bring(tensor)
        finally:
            self._inside -= 1

    def _bring(self, tensor: Any) -> Any:
        entry = self._entry(tensor)
        last = self.num_stages - 1
        if entry is None:
            return tensor if self.stage == last else None
        self._event(self.stage in (entry.stage, last))
        if entry.stage == self.stage and self.stage != last:
            self._send(entry, last)
        return self._real(entry) if self.stage == last else None

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if self._inside or self.stage < 0:
            return func(*args, **kwargs)
        entries = [entry for leaf in _tensors((args, kwargs)) if (entry := self._entry(leaf)) is not None]
        if not entries:
            if func in READS or getattr(func, "__name__", "") in FACTORIES:
                self._reads = True  # the next microbatch may take another path
            return func(*args, **kwargs)
        if func in ABOUT:
            return func(
                *(
                    value.entry.fake
                    if isinstance(value, Remote) and value.entry.real is None
                    else value.entry.real
                    if isinstance(value, Remote)
                    else value
                    for value in args
                ),
                **kwargs,
            )
        stage = max(entry.stage for entry in entries)
        if func in READS:
            return self._read(lambda: func(*self._all_real(args), **self._all_real(kwargs)), stage)
        if func in UNSHAPED or (func in PICKS and has_mask(args[1])):
            return self._unshaped(func, args, kwargs, entries, stage)
        self._event(stage == self.stage or any(entry.stage == self.stage for entry in entries))
        if stage == self.stage:
            return self._own(func, args, kwargs)
        if stage > self.stage:
            self._send_all(entries, stage)
        return self._elsewhere(func, args, kwargs, stage)

    # Events ---------------------------------------------------------------------------------------------------------

    def _event(self, concerns: bool) -> None:
        """Something that every stage comes by; ends the run when nothing more concerns this one."""
        tail = self._tails.get(self._signature)
        if tail is not None and self._count >= tail:
            raise Finished
        self._count += 1
        if concerns:
            self._last = self._count

    def _own(self, func: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        inplace = is_inplace(func)
        first = args[0] if args else None
        real_args, real_kwargs = self._all_real(args, copies=inplace), self._all_real(kwargs)
        result = func(*real_args, **real_kwargs)
        name = f"{self._count}"
        if inplace and isinstance(first, Remote):
            first.entry.stage, first.entry.name, first.entry.real = self.stage, name, result
            first.entry.version = version_of(result)
            return first
        given = {id(leaf) for leaf in _tensors((real_args, real_kwargs))}

        def fresh(value: Any) -> Any:
            if not isinstance(value, Tensor) or id(value) not in given or inplace:
                return value
            return value.like(value.local) if isinstance(value, Split) else value.view_as(value)

        return self._locate(tree_map(fresh, result), name)

    def _elsewhere(self, func: Callable[..., Any], args: Any, kwargs: Any, stage: int) -> Any:
        if getattr(func, "__name__", "") in DRAWS:  # the generator must move as in the stage that draws
            given = blanks((args, kwargs))
            func(*given[0], **given[1])
        fakes = self._all_fake((args, kwargs))
        result = self._stand_ins.function(func, *fakes)
        name = f"{self._count}"
        first = args[0] if args else None
        if is_inplace(func) and isinstance(first, Tensor):
            return self._moved(first, result, stage, name)
        return self._remotes(result, stage, name)

    def _moved(self, first: Tensor, fake: Tensor, stage: int, name: str) -> Tensor:
        """A tensor was changed in place by another stage: from now on it is there."""
        entry = self._entry(first)
        fake = fake.detach().requires_grad_(fake.requires_grad and fake.is_floating_point())
        made = Entry(stage, name, fake=fake, version=fake._version)
        if isinstance(first, Remote):
            first.entry = made
        elif entry is not None:
            self._entries[id(first)] = (first, made)
        else:
            raise PlanError("a tensor of the batch is changed in place by what a later stage computed: copy it first")
        return first

    def _read(self, value: Callable[[], Any], stage: int) -> Any:
        """A value that Python asks for: the stage that has it tells all others."""
        self._reads = True
        self._event(concerns=True)
        if stage > self.stage and self.post.is_here(stage):
            raise PlanError(
                f"the forward reads a value that stage {stage} computes before this worker gets to that stage: use a "
                "schedule in which each worker has one stage, such as pp=2:1f1b"
            )
        if stage == self.stage:
            found = value()
            for other in range(self.num_stages):
                if other != stage:
                    self.post.tell(found, stage, other)
            return found
        return self.post.hear(stage, self.stage)

    def _unshaped(self, func: Callable[..., Any], args: Any, kwargs: Any, entries: list[Entry], stage: int) -> Any:
        """A result whose shape depends on values."""
        if stage > self.stage:
            self._send_all(entries, stage)
        if stage != self.stage and not any(self._entry(leaf) for leaf in _tensors((args[1:], kwargs))):
            # what picks the elements is known here, so that the shape is too
            self._event(any(entry.stage == self.stage for entry in entries))
            blank = torch.zeros((), dtype=args[0].dtype).expand(tuple(args[0].shape))
            shape = list(func(blank, *args[1:], **kwargs).shape)
            grad = bool(self._all_fake(args[0]).requires_grad)
            fake = self._stand_ins.of(shape, str(args[0].dtype).removeprefix("torch."), requires_grad=grad)
            return self._remotes(fake, stage, f"{self._count}")
        if not any(self._entry(leaf) for leaf in _tensors((args[1:], kwargs))) and func in PICKS:
            self._event(concerns=True)
            return self._own(func, args, kwargs)
        made: list[Any] = []

        def shapes() -> Any:
            made.append(self._own(func, args, kwargs))
            return [
                [list(leaf.shape), str(leaf.dtype).removeprefix("torch."), bool(leaf.requires_grad)]
                for leaf in _tensors(made[0])
            ]

        told = self._read(shapes, stage)
        if made:
            return made[0]
        fakes = [self._stand_ins.of(size, kind, requires_grad=grad) for size, kind, grad in told]
        return self._remotes(fakes[0] if len(fakes) == 1 else tuple(fakes), stage, f"{self._count}")

    # Blocks ---------------------------------------------------------------------------------------------------------

    def _wrap(self, name: str, block: nn.Module) -> None:
        forward: Callable[..., Any] = block.forward
        self._wrapped.append((block, block.__dict__.get("forward")))

        def staged(*args: Any, **kwargs: Any) -> Any:
            if self._inside or self.stage < 0:
                return forward(*args, **kwargs)
            self._inside += 1  # what is done here is no event
            try:
                return self._block(name, block, forward, args, kwargs)
            finally:
                self._inside -= 1

        block.forward = staged

    def _block(self, name: str, block: nn.Module, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        stage = self.where[name]
        entries = [entry for leaf in _tensors((args, kwargs)) if (entry := self._entry(leaf)) is not None]
        late = max((entry.stage for entry in entries), default=0)
        if late > stage:
            raise PlanError(
                f"{name or 'the model'} is of pipeline stage {stage} and is given what stage {late} computed: blocks "
                "that run again after later ones must be in one stage with them, with stages=... or a smaller pp"
            )
        self._event(stage == self.stage or any(entry.stage == self.stage for entry in entries))
        label = f"{self._count} {name}"
        if stage == self.stage:
            real_args, real_kwargs = self._all_real(args), self._all_real(kwargs)
            return self._locate(forward(*real_args, **real_kwargs), label)
        if stage > self.stage:
            self._send_all(entries, stage)
        fakes = self._all_fake((args, kwargs))
        output = self._stand_ins.block(name, block, forward, *fakes)
        return self._remotes(output, stage, label)

    # Tensors --------------------------------------------------------------------------------------------------------

    def _entry(self, value: Any) -> Entry | None:
        if isinstance(value, Remote):
            return value.entry
        known = self._entries.get(id(value))
        if known is not None:
            return known[1]
        home = self.homes.get(id(value))
        if home is None or not isinstance(value, Tensor):
            return None
        name, stage = home
        here = stage == self.stage
        fake = None if here else self._stand_ins.like(value)
        entry = Entry(stage, f"parameter {name}", value if here else None, fake, value._version if here else 0)
        if not here and fake is not None:
            entry.version = fake._version
        self._entries[id(value)] = (value, entry)
        return entry

    def _locate(self, output: Any, name: str) -> Any:
        for place, leaf in enumerate(_tensors(output)):
            self._entries[id(leaf)] = (leaf, Entry(self.stage, f"{name}.{place}", real=leaf, version=version_of(leaf)))
        return output

    def _remotes(self, output: Any, stage: int, name: str) -> Any:
        place = -1

        def remote(leaf: Any) -> Any:
            nonlocal place
            if not isinstance(leaf, Tensor):
                return leaf
            place += 1
            fake = cut_off(leaf)
            return Remote(Entry(stage, f"{name}.{place}", fake=fake, version=fake._version))

        return tree_map(remote, output)

    def _all_real(self, value: Any, *, copies: bool = False) -> Any:
        def real(leaf: Any) -> Any:
            entry = self._entry(leaf) if isinstance(leaf, Tensor) else None
            if entry is None:
                return leaf
            found = self._real(entry)
            return found.clone() if copies and isinstance(leaf, Remote) and found.requires_grad else found

        return tree_map(real, value)

    def _all_fake(self, value: Any) -> Any:
        def fake(leaf: Any) -> Any:
            if not isinstance(leaf, Tensor):
                return leaf
            entry = self._entry(leaf)
            return entry.fake if entry is not None and entry.fake is not None else self._stand_ins.like(leaf)

        return tree_map(fake, value)

    def _real(self, entry: Entry) -> Tensor:
        if entry.real is None:
            assert entry.fake is not None
            if entry.key not in self._come:
                fake = entry.fake
                out = torch.empty(tuple(fake.shape), dtype=fake.dtype, device=fake.device)
                self._compare(entry, entry.stage, self.stage)
                found = self.post.receive(out, entry.stage, self.stage, FORWARD)
                if fake.requires_grad and torch.is_grad_enabled():
                    found = found.detach().requires_grad_()
                    self.kept.received.setdefault(entry.stage, []).append(found)
                self._come[entry.key] = found
            return self._come[entry.key]
        return entry.real

    def _compare(self, entry: Entry, origin: int, target: int) -> None:
        """While ``checking``: both ends must mean the same tensor, or the model took another path somewhere."""
        if not self.checking:
            return
        mine = f"{entry.key} {tuple((entry.real if entry.real is not None else entry.fake).shape)}"  # pyright: ignore[reportOptionalMemberAccess]
        if self.stage == origin:
            self.post.tell(mine, origin, target)
        elif (theirs := self.post.hear(origin, target)) != mine:
            raise PlanError(
                f"stage {target} expects tensor {mine} of the forward and stage {origin} sends {theirs}: the model's "
                "forward takes another path in each stage (it depends on something that differs between workers)"
            )

    def _send_all(self, entries: list[Entry], stage: int) -> None:
        for entry in entries:
            if entry.stage == self.stage:
                self._send(entry, stage)

    def _send(self, entry: Entry, stage: int) -> None:
        tensor = entry.real
        assert tensor is not None
        key = entry.key
        if (key, stage) in self._gone:
            return
        self._gone.add((key, stage))
        if isinstance(tensor, Split):
            assert self._splitting is not None
            tensor = self._splitting.gather(tensor, f"stage {stage}")
        self._compare(entry, self.stage, stage)
        self.post.send(tensor.detach().contiguous(), self.stage, stage, FORWARD)
        if tensor.requires_grad:
            self.kept.sent.setdefault(stage, []).append(tensor)


def _tensors(value: Any) -> Iterator[Tensor]:
    return (leaf for leaf in tree_iter(value) if isinstance(leaf, Tensor))
