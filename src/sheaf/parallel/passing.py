"""One stage's run through the model's whole forward, in which the blocks of other stages are stood in for.

Every worker runs the model's own Python. A block of this stage runs for real; any other gives tensors without values,
from a run of it on fake tensors, kept by the shapes of its inputs. What lies between blocks runs in the last stage that
any of its inputs comes from; so does a block that holds nothing (a dropout used in many places), from its own stage on.
So all stages come by the same sequence of events, and each knows by itself what it must send to whom, and what it will
be sent: skips over stages, several inputs and outputs, and masks need no description.

A branch on a value waits for the stage that knows the value. What cannot run on fake tensors, since its course or its
shapes depend on values, is described to the other stages by the one that ran it; a block whose descriptions were the
same for the same inputs all through the first step is taken to go on so, and nobody waits for it any more.
"""

from collections.abc import Callable, Collection, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, _get_current_function_mode, _pop_mode, _push_mode, resolve_name

from sheaf.errors import PlanError
from sheaf.parallel.course import Course
from sheaf.parallel.functions import ABOUT, ARRAYS, READS, is_pick, may_differ
from sheaf.parallel.ledger import Kept, Ledger
from sheaf.parallel.outlines import described, pictured
from sheaf.parallel.post import FORWARD
from sheaf.parallel.remote import Entry, Remote, version_of
from sheaf.parallel.stand_ins import Outline, StandIns, blanks, kinds, signature
from sheaf.parallel.trees import detached, line_of_model, tensors


class Passing(TorchFunctionMode):
    """Runs forwards as one stage at a time. ``where`` maps block names to the stages of their calls, in order (the last
    one stands for further calls). ``complete`` says that a rehearsal ran the whole forward on fake tensors.
    """

    def __init__(
        self,
        blocks: Mapping[str, nn.Module],
        where: Mapping[str, tuple[int, ...]],
        num_stages: int,
        ledger: Ledger,
        stand_ins: StandIns,
        *,
        complete: bool,
    ) -> None:
        super().__init__()
        self.where, self.num_stages = dict(where), num_stages
        self._free = {name for name in self.where if holds_nothing(blocks[name])}
        self._calls: dict[str, list[int]] = {}  # by block, the stages of the calls that were made
        self._ledger, self._post, self._stand_ins = ledger, ledger.post, stand_ins
        self._course = Course()
        self._wrapped: list[tuple[nn.Module, Any]] = []
        self.stage, self._inside, self.in_loss = -1, 0, False
        self._complete = complete
        self.rows: Collection[str] = ()  # blocks that compute row by row
        self.by_rows = True  # whether this stage has computed nothing else in the forward under way
        self.notes_hooks = False  # whether ``kept`` must say that forward put a gradient hook on a tensor
        self._shown: dict[Any, bool] = {}  # what was met, and whether it runs on fakes
        self._described: dict[Any, Any] = {}
        self._unsteady: set[str] = set()
        for name in self.where:
            self._wrap(name, blocks[name])

    @property
    def kept(self) -> Kept:
        """What the forward that has run leaves for its backward."""
        return self._ledger.kept

    @property
    def checking(self) -> bool:
        """Whether stages compare what they send: in the first step."""
        return self._ledger.checking

    @checking.setter
    def checking(self, value: bool) -> None:
        self._ledger.checking = value

    def begin(self, stage: int, batch: Any) -> None:
        """A microbatch's forward as this stage begins."""
        self.stage, self._inside, self.in_loss = stage, 0, False
        self._calls = {}
        self._course.begin(stage, batch)
        self.by_rows = self._complete
        self._ledger.begin(stage)

    def end(self, loss: Tensor | None) -> None:
        """Forward and loss have run, or as much of them as concerns this stage; the last stage keeps the loss."""
        if not self._ledger.checking:
            self._course.end(self._ledger.arrivals(), whole=loss is not None)
        self.kept.loss = loss
        self._ledger.forget()
        self.stage = -1

    def expect(self, stage: int, batch: Any) -> bool:
        """A microbatch's forward as this stage comes soon: be ready for what it received for such a batch before.

        False where that is not known.
        """
        arrivals = self._course.arrivals(stage, batch)
        for origin, shape, dtype, device in arrivals or ():
            self._post.expect(torch.empty(shape, dtype=dtype, device=device), origin, stage, FORWARD)
        return arrivals is not None

    def computed_here(self, tensor: Tensor) -> bool:
        """Whether this stage made a tensor in the forward under way."""
        self._inside += 1
        try:
            entry = self._ledger.entry(tensor)
            return entry is not None and entry.stage == self.stage
        finally:
            self._inside -= 1

    def ran(self, block: str) -> bool:
        """Whether a block's last call was of the stage under way."""
        return self._calls.get(block, [-2])[-1] == self.stage

    def runs(self, module: str) -> bool:
        """Whether a module is in a block whose call under way, or next one, is of the stage under way."""
        if self.stage < 0:  # what runs again in backward is its own
            return True
        parts = module.split(".")
        for name in ["", *(".".join(parts[: count + 1]) for count in range(len(parts)))]:
            if name in self.where:
                made = self._calls.get(name, [])
                return (made[-1] if self._inside and made else self._next(name)) == self.stage
        return False

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
            entry, last = self._ledger.entry(tensor), self.num_stages - 1
            if entry is None:
                return tensor if self.stage == last else None
            self._course.event("loss", self.stage in (entry.stage, last))
            if entry.stage == self.stage and self.stage != last:
                self._ledger.send(entry, last)
            return self._ledger.real(entry) if self.stage == last else None
        finally:
            self._inside -= 1

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.register_hook:
            self.kept.hooked = True
        if self._inside or self.stage < 0:
            return func(*args, **kwargs)
        entries = self._ledger.entries((args, kwargs))
        if not entries:
            if may_differ(func, args, kwargs, picks=not self.in_loss):
                self._course.steady = self.by_rows = False  # the next microbatch may take another path
            return func(*args, **kwargs)
        if func in ABOUT:
            return func(*(_shown(value) for value in args), **kwargs)
        if func is Tensor.__iter__:
            return iter(self.__torch_function__(torch.unbind, types, args, kwargs))
        stage = max(entry.stage for entry in entries)
        if func in READS:
            return self._value(func, args, kwargs, stage)
        return self._function(func, args, kwargs, entries, stage)

    # Functions ------------------------------------------------------------------------------------------------------

    def _function(self, func: Any, args: Any, kwargs: Any, entries: Collection[Entry], stage: int) -> Any:
        ledger = self._ledger
        name = resolve_name(func) or getattr(func, "__name__", str(func))
        picks = is_pick(func, args) and not ledger.entries((args[1:], kwargs))
        key = None if self._complete else (func, kinds((args, kwargs)))
        if self._complete:
            self._shown[key] = True
        elif not picks and key not in self._shown and stage == self.stage:
            given = (args, kwargs)
            self._shown[key] = self._stand_ins.function(func, given, partial(ledger.all_fake, given)) is not None

        def run() -> Any:
            return self._own(func, args, kwargs, name)

        self.by_rows = self.by_rows and stage != self.stage
        self._course.steady &= not picks or stage == self.num_stages - 1  # as many may not be picked of the next batch
        if stage == self.stage and (picks or self._shown[key]):
            self._course.event(name, concerns=True)
            return run()
        if picks or self._shown.get(key, True):
            self._course.event(name, any(entry.stage == self.stage for entry in entries))
            if stage > self.stage:
                ledger.send_all(entries, stage)
            given = list(tensors((args, kwargs)))
            outline = self._picked(func, args, kwargs) if picks else self._function_outline(func, args, kwargs)
            if not picks and key not in self._shown:
                self._shown[key] = outline is not None
            if outline is not None:
                return ledger.elsewhere(given, outline, stage, self._course.label(name))
            if self._shown.get(key, True):
                raise PlanError(
                    f"{line_of_model()} calls {name} on a tensor of stage {stage}, and what it returns depends on "
                    f"values here and did not before ({self._stand_ins.why}): put it into a module of its own"
                )
            self._course.steady = False
            return self._hear(args, kwargs, stage, self._course.label(name))
        self._course.event(name, concerns=True)
        self._course.steady = False
        if stage > self.stage:
            ledger.send_all(entries, stage)
        if stage != self.stage:
            return self._hear(args, kwargs, stage, self._course.label(name))
        result = run()
        self._tell(described(result, (), name))
        return result

    def _function_outline(self, func: Any, args: Any, kwargs: Any) -> Outline | None:
        both = (args, kwargs)
        outline = self._stand_ins.function(func, both, partial(self._ledger.all_fake, both, fresh=False))
        if outline is not None and outline.draws:  # the generator must move as in the stage that draws
            given = blanks((args, kwargs))
            func(*given[0], **given[1])
        return outline

    def _picked(self, func: Any, args: Any, kwargs: Any) -> Outline:
        """What picks the elements is known here, so that the shape is too."""
        blank = torch.zeros((), dtype=args[0].dtype, device=args[0].device).expand(tuple(args[0].shape))
        shape = list(func(blank, *args[1:], **kwargs).shape)
        fake = self._ledger.all_fake(args[0])
        name = str(args[0].dtype).removeprefix("torch.")
        made = self._stand_ins.of(shape, name, requires_grad=fake.requires_grad, device=args[0].device)
        return Outline(made, passed=(-1,))

    def _own(self, run: Callable[..., Any], args: Any, kwargs: Any, name: str) -> Any:
        ledger = self._ledger
        given = list(tensors((args, kwargs)))
        real_args, real_kwargs = ledger.all_real((args, kwargs))
        real = list(tensors((real_args, real_kwargs)))
        before = [version_of(tensor) for tensor in real]
        result = run(*real_args, **real_kwargs)
        return ledger.located(given, real, before, result, self._course.label(name))

    # Values ---------------------------------------------------------------------------------------------------------

    def _value(self, func: Any, args: Any, kwargs: Any, stage: int) -> Any:
        """A value that Python asks for: the stage that has it tells all others."""
        self._course.event(getattr(func, "__name__", "value"), concerns=True)
        self._course.steady = self.by_rows = False
        ledger = self._ledger
        for entry in ledger.entries((args, kwargs)) if stage > self.stage else ():
            if entry.stage == self.stage:
                ledger.send(entry, stage)
        if stage != self.stage:
            found = self._heard(stage)
            return np.asarray(found[0], dtype=found[1]) if func in ARRAYS else found
        real_args, real_kwargs = ledger.all_real((args, kwargs))
        found = func(*real_args, **real_kwargs)
        self._tell([found.tolist(), str(found.dtype)] if func in ARRAYS else found)
        return found

    def _tell(self, value: Any) -> None:
        for other in range(self.num_stages):
            if other != self.stage:
                self._post.tell(value, self.stage, other)

    def _heard(self, stage: int) -> Any:
        if stage > self.stage and self._post.is_here(stage):
            raise PlanError(
                f"{line_of_model()} needs a value that stage {stage} computes before this worker gets to that stage: "
                "use a schedule in which each worker has one stage, such as pp=2:1f1b"
            )
        return self._post.hear(stage, self.stage)

    def _hear(self, args: Any, kwargs: Any, stage: int, name: str) -> Any:
        outline = pictured(self._heard(stage), self._stand_ins, next(tensors((args, kwargs))).device)
        return self._ledger.elsewhere(list(tensors((args, kwargs))), outline, stage, name)

    # Blocks ---------------------------------------------------------------------------------------------------------

    def _wrap(self, name: str, block: nn.Module) -> None:
        forward: Callable[..., Any] = block.forward
        self._wrapped.append((block, block.__dict__.get("forward")))

        def staged(*args: Any, **kwargs: Any) -> Any:
            if self._inside or self.stage < 0:
                return forward(*args, **kwargs)
            self._inside += 1  # what is done here is no event
            # off the stack, where it would be asked about each function only to let it through
            off = not self.notes_hooks and _get_current_function_mode() is self
            if off:
                _pop_mode()
            try:
                return self._block(name, forward, args, kwargs)
            finally:
                if off:
                    _push_mode(self)
                self._inside -= 1

        block.forward = staged

    def _block(self, name: str, forward: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        ledger, stage = self._ledger, self._next(name)
        entries = ledger.entries((args, kwargs))
        late = max((entry.stage for entry in entries), default=0)
        if late > stage and (name in self._free or late in self.where[name]):
            stage = late
        self._calls.setdefault(name, []).append(stage)
        if late > stage:
            raise PlanError(
                f"{line_of_model()} gives {name or 'the model'}, of pipeline stage {stage}, what stage {late} "
                "computed: blocks that run again after later ones must be in one stage with them, with stages=... or "
                "a smaller pp"
            )
        known = self._complete or self._shown.get(name)
        if known is None:
            both = (args, kwargs)
            known = self._shown[name] = self._stand_ins.block(name, both, partial(_apart, ledger, both)) is not None
        asked = None if known else (name, signature((args, kwargs)))
        told = not known and (ledger.checking or name in self._unsteady or asked not in self._described)
        self._course.event(name, told or stage == self.stage or any(entry.stage == self.stage for entry in entries))
        self._course.steady = self._course.steady and not told
        if stage == self.stage:
            self.by_rows = self.by_rows and name in self.rows and self._ledger.are_computed((args, kwargs))
            return self._own_block(name, forward, args, kwargs, asked, told=told)
        if stage > self.stage:
            ledger.send_all(entries, stage)
        if not known:
            if told:
                self._note(asked, self._heard(stage))
            outline = pictured(self._described[asked], self._stand_ins, next(tensors((args, kwargs))).device)
        else:
            both = (args, kwargs)
            found = self._stand_ins.block(name, both, partial(ledger.all_fake, both))
            if found is None:
                raise PlanError(
                    f"{name} of stage {stage} computes by the values of its inputs for some of their shapes, and not "
                    f"for those it was given first ({self._stand_ins.why}), so other stages cannot know what it "
                    "returns: make it do so always, or name stages= that put it into the first stage's worker alone"
                )
            outline = found
        return ledger.elsewhere(list(tensors((args, kwargs))), outline, stage, self._course.label(name))

    def _next(self, name: str) -> int:
        calls = self.where[name]
        return calls[min(len(self._calls.get(name, ())), len(calls) - 1)]

    def _own_block(self, name: str, forward: Any, args: Any, kwargs: Any, asked: Any, *, told: bool) -> Any:
        if asked is None:
            return self._own(forward, args, kwargs, name)
        description: Any = None

        def run(*given: Any, **named: Any) -> Any:
            nonlocal description
            reals = list(tensors((given, named)))
            before = [version_of(tensor) for tensor in reals]
            result = forward(*given, **named)
            changed = [place for place, tensor in enumerate(reals) if version_of(tensor) != before[place]]
            description = described(result, [(place, reals[place].requires_grad) for place in changed], name, reals)
            return result

        output = self._own(run, args, kwargs, name)
        if told:
            self._tell(description)
            self._note(asked, description)
        elif description != self._described[asked]:
            raise PlanError(
                f"{name} returned other shapes than for inputs of the same shapes in the first step, where they had "
                "never differed, so other stages went on with those: make it return one shape (with padding and a "
                "mask), or name stages= that put it into the last stage"
            )
        return output

    def _note(self, asked: Any, description: Any) -> None:
        """While the first step runs, every description is told, and whether they stay the same is learnt."""
        if self._described.setdefault(asked, description) != description:
            self._unsteady.add(asked[0])
            self._described[asked] = description


def holds_nothing(block: nn.Module) -> bool:
    """Whether a block has neither parameters nor buffers, so that any stage can run it."""
    return next(block.parameters(), None) is None and next(block.buffers(), None) is None


def _shown(value: Any) -> Any:
    if not isinstance(value, Remote):
        return value
    return value.entry.shown


def _apart(ledger: Ledger, given: Any) -> Any:
    """Fakes in copies of all else."""
    return detached(ledger.all_fake(given))
