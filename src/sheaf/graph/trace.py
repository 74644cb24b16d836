"""From a task to the facts of its model: one microbatch, forward and backward, on tensors that hold no memory."""

import hashlib
import logging
import traceback
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import jaxtyping
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
)
from torch.utils._pytree import tree_leaves

from sheaf.errors import SheafError, TaskError
from sheaf.graph import ops
from sheaf.graph.alike import Again
from sheaf.graph.counter import Counter, Tally
from sheaf.graph.crossings import Crossings
from sheaf.graph.cut import cut, is_composite, opened, owners
from sheaf.graph.drawn import Drawn
from sheaf.graph.example import converted, example, global_streams_kept, num_samples, precision
from sheaf.graph.facts import GLUE, LOSS, BlockFact, BufferFact, ModelFacts, ParameterFact, TableFact
from sheaf.graph.kinds import kinds
from sheaf.graph.lookups import tables
from sheaf.task import Task, arguments, as_loss
from sheaf.task.blueprint import Blueprint
from sheaf.units import pretty_bytes

SMALL_BYTES = 2 * 2**30  # parameters up to which a model that fake tensors cannot run is traced for real
CPU = torch.device("cpu")
_ROOMS = Path(__file__).parents[1]
_TOOLS = (Path(torch.__file__).parent, Path(jaxtyping.__file__).parent, _ROOMS / "graph", _ROOMS / "task")
_HERE = ("<", *(str(path) for path in _TOOLS))  # files that are never the user's; "<" starts made-up ones


def trace(
    task: Task,
    samples: int,
    *,
    known: tuple[TableFact, ...] | None = None,
    drawn: Drawn | None = None,
    begins: tuple[str, ...] = (),
) -> ModelFacts:
    """The facts of the task's model for microbatches of ``samples`` samples.

    ``known`` are its tables, where an earlier trace has counted their rows; ``drawn`` is its model, where others look
    at it too. Blocks inside of which one of ``begins`` is are told of as what they are made of (see ``cut``).

    Model, loss and backward run once on fake tensors: nothing is allocated, however large the model. Of many blocks
    that do the same, most are only checked to do so (see ``alike``). A model whose path depends on values
    (``if x.sum() > 0``) is run for real when its parameters weigh less than 2 GiB.

    Raises TaskError naming the module and the line when the model or the loss fails, and DataError when the samples
    cannot be had.
    """
    batch = example(task, samples)
    drawn = drawn or Drawn(task)
    fakes = drawn.blueprint.parameters.values()
    weight_bytes = sum(fake.numel() * drawn.blueprint.dtype_of(fake).itemsize for fake in fakes)
    try:
        found = (None if begins else _alike(task, samples, drawn, batch)) or _lent(task, samples, drawn, batch, begins)
        blueprint = drawn.blueprint
        if known is None:  # a model that writes to its buffers is built anew
            known = tables(task, samples, None if any(one.updated for one in found.buffers) else blueprint)
        return replace(found, tables=known)
    except SheafError:
        raise
    except _Failure as failure:
        if weight_bytes > SMALL_BYTES:
            raise TaskError(_too_large(failure, weight_bytes)) from failure.__cause__
    try:
        blueprint = Blueprint(task)
        return _facts(task, samples, blueprint.fill(CPU), blueprint.names, batch, None, begins)
    except _Failure as failure:
        raise TaskError(failure.told()) from failure.__cause__


def _alike(task: Task, samples: int, drawn: Drawn, batch: Any) -> ModelFacts | None:
    """The facts with most blocks of a kind checked only; None where there are none, or where they are not alike."""
    model = drawn.blueprint.model
    if not kinds(model, cut(model)):
        return None
    try:
        return _lent(task, samples, drawn, batch, (), again=True)
    except (_Failure, SheafError):  # if it is the model's, the trace of every block for itself tells it
        return None


def _lent(
    task: Task, samples: int, drawn: Drawn, batch: Any, begins: tuple[str, ...], *, again: bool = False
) -> ModelFacts:
    with drawn.lent() as blueprint:
        if task.precision == "fp64":
            widen(blueprint.model, blueprint.mode)
        return _facts(task, samples, blueprint.model, blueprint.names, batch, blueprint.mode, begins, again=again)


class _Failure(Exception):
    """What the user's code raised, and where."""

    def __init__(self, error: Exception, part: str, module: str, batch: Any) -> None:
        super().__init__(str(error))
        self.error, self.part, self.module, self.shapes = error, part, module, _shapes(batch)
        self.hint = _hint(error, part, batch)

    def told(self) -> str:
        """The message for the user."""
        text = str(self.error).strip().splitlines()
        first = text[0] if text else ""
        return (
            f"{self.where()} raised {type(self.error).__name__}: {first}{_at(self.error)}; the batch is {self.shapes}"
            f"{self.hint}"
        )

    def where(self) -> str:
        """The part of the task that failed."""
        return self.part if self.part == "the loss function" else f"{self.module} in {self.part}"


def _facts(
    task: Task,
    samples: int,
    model: nn.Module,
    names: dict[str, tuple[str, ...]],
    batch: Any,
    mode: FakeTensorMode | None,
    begins: tuple[str, ...],
    *,
    again: bool = False,
) -> ModelFacts:
    count = num_samples(task, samples)
    model.train()
    around = opened(model, begins)
    blocks, crossings = cut(model, begins), Crossings(model)
    kind = Again if again else Counter
    counter = kind(model, blocks, around.values(), crossings)
    buffers = {name: (id(buffer), buffer._version) for name, buffer in model.named_buffers()}
    part = "the model's forward"
    with ExitStack() as stack:
        stack.enter_context(global_streams_kept())
        if mode is not None:
            stack.enter_context(quiet())
            batch = converted(batch, mode.from_tensor)
            stack.enter_context(mode)
        try:
            positional, named = arguments(task, batch)
            with counter.counting():
                with precision(task, CPU):
                    counter.give(GLUE, (positional, named))
                    output = model(*positional, **named)
                    part = "the loss function"
                    with counter.within(LOSS, (output, batch)):
                        loss = as_loss(task.loss(output, batch), count)
                part = "the model's backward"
                if loss.sum.requires_grad:
                    loss.sum.backward()
        except SheafError:
            raise
        except Exception as error:
            raise _Failure(error, part, _module(model, counter.place), batch) from error
        finally:
            model.zero_grad(set_to_none=True)
    updated = _updated(model, buffers, counter.changed)
    found = _gather(count, model, names, batch, counter, begins, updated)
    return _crossed(found, crossings, counter.order, tuple(around))


def _crossed(facts: ModelFacts, crossings: Crossings, order: list[str], around: tuple[str, ...]) -> ModelFacts:
    """The facts with what crosses behind each block; for a module inside of a block that is what it gives, too."""
    inner = tuple(f"{name}." if name else "" for name in around)
    behind = dict(zip(order, crossings.behind(len(order)), strict=True))

    def told(block: BlockFact) -> BlockFact:
        crosses = behind.get(block.name)
        if crosses is None or block.name == LOSS:
            return block
        gives = crosses if block.name.startswith(inner) else block.output_bytes
        return replace(block, output_bytes=gives, crossing_bytes=crosses)

    return replace(facts, blocks=tuple(map(told, facts.blocks)))


def _gather(
    samples: int,
    model: nn.Module,
    names: dict[str, tuple[str, ...]],
    batch: Any,
    counter: Counter,
    begins: tuple[str, ...],
    updated: frozenset[str],
) -> ModelFacts:
    parameters = dict(model.named_parameters())
    modules, owned = cut(model, begins), owners(model, begins)
    classes = {name: type(module).__name__ for name, module in modules.items()} | {GLUE: "Glue", LOSS: "Loss"}
    composite = {name for name, module in modules.items() if is_composite(module)}
    order = [name for name in counter.order if name != LOSS]
    order += [name for name in owned if name not in order and name != GLUE]
    blocks = tuple(
        _block(name, classes[name], counter.tally(name), owned.get(name, ()), parameters, composite=name in composite)
        for name in (*order, GLUE, LOSS)
    )
    return ModelFacts(
        samples=samples,
        blocks=blocks,
        parameters=tuple(_parameter(name, parameters[name], aliases) for name, aliases in names.items()),
        buffers=_buffers(model, updated),
        draws=tuple(counter.draws),
        batch_dependent=tuple(counter.batch_dependent),
        batch_bytes=sum(ops.stored_bytes(tensor) for tensor in ops.tensors(batch)),
        begins=begins,
    )


def _block(
    name: str, kind: str, tally: Tally, owned: tuple[str, ...], parameters: dict[str, nn.Parameter], *, composite: bool
) -> BlockFact:
    forward, backward = tally.forward, tally.backward
    return BlockFact(
        name=name,
        kind=kind,
        parameters=owned,
        forward_flops=forward.flops,
        backward_flops=backward.flops,
        forward_bytes=float(forward.moved_bytes),
        backward_bytes=float(backward.moved_bytes),
        forward_kernels=forward.kernels,
        backward_kernels=backward.kernels,
        saved_bytes=sum(tally.saved.values()),
        input_bytes=tally.input_bytes,
        output_bytes=tally.output_bytes,
        parameter_bytes=sum(parameters[item].numel() * parameters[item].element_size() for item in owned),
        signature=_signature(kind, tally, [parameters[item] for item in owned]),
        calls=1 if name in (GLUE, LOSS) else tally.calls,
        draws=tally.draws,
        batch_dependent=tally.batch_dependent,
        composite=composite,
        saved_input_bytes=sum(tally.saved_inputs.values()),
        fresh_input_bytes=tally.fresh_input_bytes,
    )


def _signature(kind: str, tally: Tally, owned: list[nn.Parameter]) -> str:
    shapes = [f"{parameter.dtype}{list(parameter.shape)}{parameter.requires_grad}" for parameter in owned]
    done = [f"{work.flops:.0f}/{work.moved_bytes}/{work.kernels}" for work in (tally.forward, tally.backward)]
    text = "\n".join([kind, str(tally.calls), *shapes, "", *tally.input_shapes, "", *done])
    return hashlib.blake2b(text.encode(), digest_size=12).hexdigest()


def _parameter(name: str, parameter: nn.Parameter, aliases: tuple[str, ...]) -> ParameterFact:
    return ParameterFact(
        name=name,
        shape=tuple(parameter.shape),
        dtype=str(parameter.dtype).removeprefix("torch."),
        itemsize_bytes=parameter.element_size(),
        requires_grad=parameter.requires_grad,
        aliases=aliases,
    )


def _buffers(model: nn.Module, updated: frozenset[str]) -> tuple[BufferFact, ...]:
    modules = dict(model.named_modules())
    facts: list[BufferFact] = []
    for name, buffer in model.named_buffers():
        owner, _, short = name.rpartition(".")
        facts.append(
            BufferFact(
                name=name,
                size_bytes=buffer.numel() * buffer.element_size(),
                persistent=short not in modules[owner]._non_persistent_buffers_set,
                updated=name in updated,
                module_kind=type(modules[owner]).__name__,
            )
        )
    return tuple(facts)


def _updated(model: nn.Module, before: dict[str, tuple[int, int]], changed: set[int]) -> frozenset[str]:
    return frozenset(
        name
        for name, buffer in model.named_buffers()
        if before.get(name) != (id(buffer), buffer._version) or changed.intersection(ops.storage_bytes([buffer]))
    )


@contextmanager
def quiet() -> Iterator[None]:
    """Keep torch from logging an error that is raised, and told to the user, anyway."""
    logger = logging.getLogger("torch._subclasses.fake_tensor")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


def widen(model: nn.Module, mode: FakeTensorMode) -> None:
    """Hold every floating-point fake of a model as float64, in plain attributes too; shared ones stay shared."""
    made: dict[int, Tensor] = {}
    with mode:
        for module in model.modules():
            registries: list[dict[str, Any]] = [module._parameters, module._buffers, module.__dict__]
            for registry in registries:
                for name, tensor in registry.items():
                    dense = isinstance(tensor, FakeTensor) and tensor.layout is torch.strided
                    if dense and tensor.is_floating_point():
                        wide = made.get(id(tensor))
                        if wide is None:
                            wide = torch.empty(tensor.shape, dtype=torch.float64)
                            if isinstance(tensor, nn.Parameter):
                                wide = nn.Parameter(wide, requires_grad=tensor.requires_grad)
                            made[id(tensor)] = wide
                        registry[name] = wide


def _module(model: nn.Module, name: str) -> str:
    kind = type(model.get_submodule(name)).__name__
    return f"module {name} ({kind})" if name else f"the model ({kind})"


def _shapes(batch: Any) -> str:
    shapes = [f"{str(tensor.dtype).removeprefix('torch.')}{list(tensor.shape)}" for tensor in ops.tensors(batch)]
    texts = sum(isinstance(leaf, str | bytes) for leaf in tree_leaves(batch))
    shapes += [f"{texts} texts"] if texts and shapes else []
    return ", ".join(shapes) if shapes else f"a {type(batch).__name__} without tensors"


def _hint(error: Exception, part: str, batch: Any) -> str:
    """What a loss that was written for (output, target) is not told by what it raised."""
    mistaken = isinstance(error, TypeError | AttributeError) and isinstance(batch, list | tuple) and len(batch) > 1
    if part != "the loss function" or not mistaken:
        return ""
    return "; Sheaf calls loss(output, batch) with the whole batch: its target is batch[1]"


def _at(error: BaseException) -> str:
    """The innermost line that belongs neither to torch nor to Sheaf."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_HERE)]
    return f" at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""


def _too_large(failure: _Failure, weight_bytes: int) -> str:
    error = failure.error
    if not isinstance(error, DataDependentOutputException | DynamicOutputShapeException):
        return failure.told()
    return (
        f"{failure.where()} reads a tensor's value{_at(error)}, which has no value while the model is traced without "
        f"memory; with {pretty_bytes(float(weight_bytes))} of parameters it is too large to trace for real: "
        "use torch.where or a mask in place of the branch, .item(), bool(), nonzero() or boolean index"
    )
