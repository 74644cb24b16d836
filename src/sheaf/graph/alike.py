"""Blocks that do what an equal one did before them run the user's code again, but nothing is computed or counted twice.

The first block of a kind is logged, function by function. In a later one of the same class and shapes, given the same,
each function that the user's code calls is compared with the log: function, arguments, module and autograd's state.
While they agree it gets tensors that only look as the real ones would, and in the end one autograd node stands for the
block. So control flow on shapes, numbers or module attributes is followed as it is. The last two of a kind are run
for real too: backward meets them first, and shows what a block's backward does when given gradients that look so.
Wherever anything differs, or could (a block that writes to buffers or to its inputs, uses another's parameters, leaves
a tensor elsewhere), ``Unlike`` is raised, and the model is to be traced with every block for itself.
"""

from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NoReturn

import torch
import torch._C._autograd as autograd_internals
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode

from sheaf.graph import ops
from sheaf.graph.counter import Counter, Work, in_backward
from sheaf.graph.crossings import Crossings
from sheaf.graph.kinds import kinds
from sheaf.graph.lent import Lent, Look, Seam, Stand, Unlike
from sheaf.graph.logs import Call, Follower, Log, Names, holds_objects, names_in, swapped_in, tensors_in

REAL = 2  # blocks of a kind that backward meets first
MEETS = " meets"  # after a block's name: adding up what it and others found for one tensor

_GETTERS = (
    "shape dtype device ndim requires_grad layout itemsize nbytes is_cuda is_cpu is_meta is_sparse is_quantized "
    "is_nested is_mps is_xpu"
)
_METHODS = (
    "size dim ndimension numel nelement stride element_size storage_offset is_floating_point is_complex is_signed "
    "is_contiguous __len__"
)
# which of its kernels attention may take
_ATTENTION = (
    torch.backends.cuda.flash_sdp_enabled,
    torch.backends.cuda.mem_efficient_sdp_enabled,
    torch.backends.cuda.math_sdp_enabled,
)
# what a tensor's look tells
_QUERIES = frozenset(
    {getattr(Tensor, name).__get__ for name in _GETTERS.split()}
    | {getattr(Tensor, name) for name in _METHODS.split()}
    | {torch.is_tensor, torch.is_floating_point, torch.is_complex, torch.numel}
)


class Again(Counter):
    """A Counter that runs blocks of a kind for real only as often as it takes to know what they do."""

    def __init__(
        self, model: nn.Module, blocks: dict[str, nn.Module], opened: Collection[nn.Module], crossings: Crossings
    ) -> None:
        super().__init__(model, blocks, opened, crossings)
        self._kinds = kinds(model, blocks)
        members: dict[Any, list[str]] = {}
        for name, kind in self._kinds.items():
            members.setdefault(kind, []).append(name)
        self._real = {name for names in members.values() for name in names[-REAL:]}
        self._templates: dict[Any, Log] = {}
        self._now: Log | Follower | None = None
        self._followers: list[Follower] = []
        self._dispatched = 0
        self._met: str | None = None
        self._begun: Log | None = None
        self._spoiled: str | None = None
        self._functions = _Functions(self)

    @contextmanager
    def counting(self) -> Iterator[None]:
        """As Counter's; raises Unlike at the end when what was found is not to be used."""
        with super().counting(), self._functions:
            yield
        if self._spoiled is not None:
            raise Unlike(self._spoiled)
        self._settle()

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self._dispatched += 1
        if any(issubclass(kind, Lent) for kind in types):
            self._spoil(f"{func} is given what was never computed")
        if isinstance(self._now, Follower) and not in_backward():
            self._spoil(f"{func} is run unseen")
        return super().__torch_dispatch__(func, types, args, kwargs)

    # Functions ------------------------------------------------------------------------------------------------------

    def called(self, function: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A torch function is called in the model's forward."""
        now = self._now
        if now is None or function in _QUERIES or in_backward():
            return function(*args, **kwargs)
        given = now.names.signed((args, kwargs))
        return (
            self._logged(now, function, given, args, kwargs)
            if isinstance(now, Log)
            else self._followed(now, function, given, args, kwargs)
        )

    def _logged(
        self, log: Log, function: Callable[..., Any], given: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        for tensor in tensors_in((args, kwargs)):
            if getattr(tensor, "constant", None) is not None and log.names.signed(tensor)[0] != "made":
                log.unfit = "it computes with a tensor whose value is known"
            if not log.is_as_made(tensor):
                log.unfit = "it changes how a tensor looks"
            if id(tensor) in log.names.outside:
                log.shared.update(ops.storage_bytes([tensor]))
                if tensor.requires_grad:
                    log.unfit = "it uses a tensor that follows from elsewhere"
        state, before = self._state(log.block), self._dispatched
        result = function(*args, **kwargs)
        found = tensors_in(result)
        if not found:
            if self._dispatched != before or tensors_in((args, kwargs)):
                log.unfit = f"it asks {function} of a tensor"
            return result
        for number, tensor in enumerate(found):
            if id(tensor) not in log.names.known:
                name = ("made", len(log.calls), number)
                log.names.add(name, tensor)
                log.looks[name] = Look.of(tensor)
        signed = log.names.signed(result)
        if holds_objects(signed):
            log.unfit = f"{function} gives what cannot be made"
        log.calls.append(Call(function, given, state, signed))
        return result

    def _followed(
        self, one: Follower, function: Callable[..., Any], given: Any, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> Any:
        call = one.log.calls[one.at] if one.at < len(one.log.calls) else None
        if (
            call is not None
            and call.function == function
            and call.given == given
            and call.state == self._state(one.block)
        ):
            one.at += 1
            for name in names_in(call.result):
                if name[0] == "made" and name not in one.names.held:
                    one.names.add(name, Lent(one.log.looks[name]))
            return one.names.built(call.result)
        if tensors_in((args, kwargs)):
            self._spoil(f"{one.block} calls {function}, unlike {one.log.block}")
        return function(*args, **kwargs)  # sets autograd's state; what makes a tensor is seen when it runs

    def _state(self, block: str) -> Any:
        keeps, _ = autograd_internals._top_saved_tensors_default_hooks(True)
        return (
            torch.is_grad_enabled(),
            torch.is_inference_mode_enabled(),
            torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu"),
            torch.get_default_dtype(),
            *(allows() for allows in _ATTENTION),
            keeps == self._pack,  # else a checkpoint, or another, keeps what backward needs
            _below(self.place, block),
        )

    # Blocks ---------------------------------------------------------------------------------------------------------

    def _given_to(self, block: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        kind = self._kinds.get(block)
        if kind is None:
            return None
        if self.tally(block).calls > 1:
            self._spoil(f"{block} runs twice")
        names, given = Names(module), tensors_in((args, kwargs))
        distinct = list({id(tensor): tensor for tensor in given}.values())
        for number, tensor in enumerate(distinct):
            names.add(("input", number), tensor)
        signed = names.signed((args, kwargs))
        if not names.is_plain or any(_is_closed(tensor) for tensor in distinct):
            return None
        storages = [next(iter(ops.storage_bytes([tensor]))) for tensor in distinct]
        looks = tuple((Look.of(tensor), storages.index(at)) for tensor, at in zip(distinct, storages, strict=True))
        follow = tuple(self._crossings.follows(key) for key in storages)
        key = (kind, signed, looks, follow, self._state(block))
        template = self._templates.get(key)
        if template is not None and not template.unfit and block not in self._real:
            self._now = Follower(block, template, names)
            return None
        shared = ops.storage_bytes([*module.parameters(), *module.buffers(), *distinct])
        log = Log(block, names, shared, given=dict(zip(storages, range(len(storages)), strict=True)))
        self._templates.setdefault(key, log)
        log.peers = self._templates[key].peers
        changed = self._seamed(log, distinct, args, kwargs) if torch.is_grad_enabled() else None
        self._now = log
        return changed

    def _seamed(self, log: Log, distinct: list[Tensor], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The arguments with a seam behind each tensor that autograd follows."""
        swapped: dict[int, Tensor] = {}
        for number, tensor in enumerate(distinct):
            if tensor.requires_grad:

                def told(gradient: Tensor | None, number: int = number) -> None:
                    if gradient is not None:
                        log.went[number] = Look.of(gradient)
                    if self._backward_owner != log.block:
                        log.is_mixed = True
                    else:
                        self._met = log.block

                made = Seam.apply(tensor, told)
                swapped[id(tensor)] = made
                log.names.known.pop(id(tensor))
                log.names.add(("input", number), made)
        return swapped_in(args, swapped), swapped_in(kwargs, swapped)

    def _gives(self, block: str, output: Any) -> Any:  # noqa: ARG002
        now, self._now = self._now, None
        if isinstance(now, Follower):
            return self._stood(now, output)
        if now is not None:
            self._close(now, output)
        return None

    def _close(self, log: Log, output: Any) -> None:
        """A block that was logged has ended."""
        module = self._model.get_submodule(log.block)
        if any(log.names.known.get(id(one)) is None for one in (*module.parameters(), *module.buffers())):
            log.unfit = "it changes its parameters or buffers"
        log.output = log.names.signed(output)
        if holds_objects(log.output):
            log.unfit = "it gives what cannot be made"
        log.outputs = tuple(dict.fromkeys(name for name in names_in(log.output) if name[0] == "made"))
        made = [log.names.held[name] for name in log.outputs]
        if not all(map(log.is_as_made, made)):
            log.unfit = "it changes how a tensor looks"
        storages = [next(iter(ops.storage_bytes([tensor]).items())) for tensor in made]
        log.output_storages = tuple(storages)
        log.follow = tuple(self._crossings.follows(key) for key, _ in storages)
        if len(dict(storages)) < len(storages) or any(key in log.shared for key, _ in storages):
            log.unfit = "what it gives shares memory"
        for name, tensor in zip(log.outputs, made, strict=True):
            if tensor.requires_grad:

                def comes(gradient: Tensor, name: Any = name) -> None:
                    log.came[name] = Look.of(gradient)
                    self._begun = log

                tensor.register_hook(comes)
        log.names.forget()
        if not log.peers or log.peers[0].alike(log):
            log.peers.append(log)

    def _stood(self, one: Follower, output: Any) -> Any:
        """A block that followed a log to its end gives what stands for its output."""
        log, names = one.log, one.names
        if one.at < len(log.calls) or names.signed(output) != log.output:
            self._spoil(f"{one.block} ends unlike {log.block}")
        inputs = [tensor for name, tensor in names.held.items() if name[0] == "input" and tensor.requires_grad]
        numbers = [name[1] for name, tensor in names.held.items() if name[0] == "input" and tensor.requires_grad]
        anchors = [tensor for name, tensor in names.held.items() if name[0] == "parameter" and tensor.requires_grad]
        looks = [log.looks[name] for name in log.outputs]

        def asked(came: list[Look | None]) -> list[Look | None]:
            found = {name: look for name, look in zip(log.outputs, came, strict=True) if look is not None}
            one.shown = next((peer for peer in log.peers if peer.came == found and not peer.is_mixed), None)
            if one.shown is None:
                self._spoil(f"{one.block} is given gradients unlike those of any before it")
            self._met = self._backward_owner = one.block
            return [one.shown.went.get(number) for number in numbers]

        made = Stand.apply(looks, asked, *inputs, anchors[0] if anchors else None) if looks else ()
        for name, tensor, (_, size) in zip(log.outputs, made, log.output_storages, strict=True):
            if Look.of(tensor) != log.looks[name] or list(ops.storage_bytes([tensor]).values()) != [size]:
                self._spoil(f"{one.block} gives a tensor that lies in memory as none that is made")
            names.add(name, tensor)
        self._copy(one, made)
        self._followers.append(one)
        given = names.built(log.output)
        names.forget()
        return given

    def _copy(self, one: Follower, made: tuple[Tensor, ...]) -> None:
        """Count what a followed block's forward did."""
        log, tally, shown = one.log, self.tally(one.block), self.tally(one.log.block)
        tally.forward = replace(shown.forward)
        tally.draws, tally.batch_dependent = shown.draws, shown.batch_dependent
        self.draws.update(dict.fromkeys(one.block + below for below in log.draws))
        self.batch_dependent.update(dict.fromkeys(one.block + below for below in log.batch_dependent))
        own = {at: ops.storage_bytes([one.names.held["input", at]]).popitem() for at in log.given.values()}
        place = {key: at for at, (key, _) in enumerate(log.output_storages)}
        fresh = [next(iter(ops.storage_bytes([tensor]))) for tensor in made]
        for key, size in log.packed.items():
            if key in log.given:
                self._keep(tally, *own[log.given[key]])
            elif key in log.shared:
                self._keep(tally, key, size)
            elif key in place:
                self._keep(tally, fresh[place[key]], size)
            else:
                tally.saved[-1 - len(tally.saved)] = size
        used = [own[log.given[key]][0] if key in log.given else key for key in log.used & log.shared.keys()]
        sizes = [size for _, size in log.output_storages]
        done = {key: size for key, size, follows in zip(fresh, sizes, log.follow, strict=True) if follows}
        self._crossings.repeat(used, done, len(self.order))
        self._apart += ops.kept_apart(made)

    # What a block that is logged does -------------------------------------------------------------------------------

    def _pack(self, tensor: Tensor) -> Tensor:
        if isinstance(self._now, Follower):
            self._spoil("autograd keeps what was never computed")
        if isinstance(self._now, Log):
            for key, size in ops.storage_bytes([tensor]).items():
                if key not in self._lasting:
                    self._now.packed[key] = size
        return super()._pack(tensor)

    def _count(self, func: OpOverload, args: tuple[Any, ...], kwargs: dict[str, Any], result: Any) -> None:
        log = self._now
        if isinstance(log, Log) and not in_backward():
            log.used.update(ops.storage_bytes(tensors_in((args, kwargs))))
            if log.shared.keys() & ops.storage_bytes(ops.changed(func, args, kwargs)).keys():
                log.unfit = f"{func} writes to what is not its own"
            below = _below(self.place, log.block)
            does = [(log.draws, ops.draws), (log.batch_dependent, ops.uses_batch_statistics)]
            for noted, asks in does:
                if asks(func, args, kwargs):
                    noted[below] = None
                    if below and not below.startswith("."):
                        log.unfit = f"{self.place} is elsewhere"
        super()._count(func, args, kwargs, result)

    def _owner_in_backward(self) -> str:
        node: Any = torch._C._current_autograd_node()  # None between nodes, whatever the stub says
        if torch.is_grad_enabled() and self._owner != self._default:
            return super()._owner_in_backward()
        if node is not None:
            self._met = self._begun = None
            return super()._owner_in_backward()
        owner = super()._owner_in_backward()
        if self._begun is not None and self._begun.block != owner:
            self._begun.is_mixed = True
        return owner if self._met is None else self._met + MEETS

    # ----------------------------------------------------------------------------------------------------------------

    def _settle(self) -> None:
        """Give followers the backward that they were shown, and every block what met at its seams."""
        for one in self._followers:
            if one.shown and self.tally(one.log.block).forward != self.tally(one.shown.block).forward:
                self._spoil(f"{one.log.block} and {one.shown.block} do the same, but not as much")
        shown = {one.block: replace(self.tally(one.shown.block).backward) for one in self._followers if one.shown}
        for block, work in shown.items():
            self.tally(block).backward = work
        for name in [name for name in self.tallies if name.endswith(MEETS)]:
            met, work = self.tallies.pop(name).backward, self.tally(name.removesuffix(MEETS)).backward
            _add(work, met)

    def _spoil(self, why: str) -> NoReturn:
        self._spoiled = self._spoiled or why
        raise Unlike(why)


class _Functions(TorchFunctionMode):
    """Shows an Again every torch function that the user's code calls."""

    def __init__(self, again: Again) -> None:
        super().__init__()
        self._again = again

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return self._again.called(func, args, kwargs or {})


def _is_closed(tensor: Tensor) -> bool:
    """Whether a block that is given the tensor may do other things than one that is given another like it."""
    known = getattr(tensor, "constant", None) is not None
    return known or tensor.layout is not torch.strided or (tensor.requires_grad and tensor.is_leaf)


def _below(place: str, block: str) -> str:
    """A module's name seen from a block: empty for the block, with a dot before it for one inside, else as it is."""
    if place == block:
        return ""
    return place[len(block) :] if place.startswith(f"{block}.") else place


def _add(work: Work, more: Work) -> None:
    work.flops += more.flops
    work.moved_bytes += more.moved_bytes
    work.kernels += more.kernels
