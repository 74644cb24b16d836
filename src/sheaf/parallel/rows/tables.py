"""Which parameters of a model are tables of rows, and what a plan does with them."""

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.overrides import resolve_name

from sheaf.errors import PlanError, nearest
from sheaf.graph.lookups import LOOKUPS, uses
from sheaf.plans import Plan
from sheaf.plans.rows import ANSWERS, ROWS, SPARSE
from sheaf.plans.split import Cut, Slice
from sheaf.task import Blueprint, Task


@dataclass(frozen=True)
class Tables:
    """``shared``: tables that every worker holds, whose gradients travel as rows to all; ``dealt``: those of which each
    worker holds a block of rows. ``narrow`` of them have gradients that torch keeps as rows too (``sparse=True``).
    """

    shared: frozenset[str] = frozenset()
    dealt: Mapping[str, Slice] = field(default_factory=dict[str, Slice])
    narrow: frozenset[str] = frozenset()

    def __bool__(self) -> bool:
        return bool(self.shared or self.dealt)


def tables(task: Task, plan: Plan, blueprint: Blueprint) -> Tables:
    """What a plan's ``sparse`` and ``rows`` mean for a model; tables built with ``sparse=True`` travel as rows anyway.

    Raises PlanError for a part without a table, one whose table is used otherwise than by looking up rows while its
    rows are dealt out, and a model whose lookups several workers cannot follow.
    """
    model, names = blueprint.model, blueprint.names
    canonical = {alias: name for name, aliases in names.items() for alias in (name, *aliases)}
    layers = {
        canonical[f"{path}.weight" if path else "weight"]: (path, module)
        for path, module in model.named_modules()
        if isinstance(module, nn.Embedding | nn.EmbeddingBag)
    }
    if plan.serial:
        return Tables()
    _refuse_renormed(plan, layers)
    narrow = frozenset(name for name, (_, layer) in layers.items() if layer.sparse)
    if narrow:
        _refuse_narrow(task, plan, narrow)
    if not any(answer in ANSWERS for _, answer in plan.parts):
        return Tables(shared=narrow, narrow=narrow)
    used = uses(task, blueprint)
    looked_up = {name for name, functions in used.items() if functions & set(LOOKUPS)} | set(layers)
    answers = {
        name: {answer for alias in (name, *names[name]) if (answer := plan.part(alias)) is not None}
        for name in names
        if name in looked_up
    }
    _refuse_nothing(plan, answers, names)
    for name, found in answers.items():
        if len(found) > 1 and found & set(ANSWERS):
            raise PlanError(
                f"parameter {name} is in parts with the answers {' and '.join(sorted(found))}: give all names of a "
                f"shared table ({', '.join((name, *names[name]))}) one answer"
            )
    dealt = [name for name, found in answers.items() if ROWS in found]
    for name in dealt:
        others = used.get(name, set()) - set(LOOKUPS)
        if others:
            raise not_looked_up(name, next(iter(sorted(map(called, others)))))
        if name not in layers:
            raise not_held_by_a_layer(name)
        if name in narrow:
            raise PlanError(
                f"{name} is dealt out by rows, and was built with sparse=True, whose optimizers step touched rows of a "
                f"whole table: use {name.rpartition('.')[0]}={SPARSE}, or build it with sparse=False"
            )
    slices = {name: Slice(0, Cut.even(blueprint.parameters[name].shape[0], plan.dp)) for name in dealt}
    shared = narrow | {name for name, found in answers.items() if SPARSE in found}
    return Tables(shared=shared - set(dealt), dealt=slices, narrow=narrow)


def called(function: Callable[..., Any]) -> str:
    """What a torch function is called in a sentence."""
    return (resolve_name(function) or getattr(function, "__name__", str(function))).rpartition(".")[2]


def not_looked_up(name: str, function: str) -> PlanError:
    """Why rows of a table that a function takes whole cannot be dealt out."""
    part = name.rpartition(".")[0] or name
    return PlanError(
        f"{name} is dealt out by rows, and {function} uses it whole, as a tied output layer does: use {part}={SPARSE}, "
        "or tp for it and what shares it"
    )


def not_held_by_a_layer(name: str) -> PlanError:
    """Why rows of a table that is no layer's, or is looked up beside its layer, cannot be dealt out."""
    part = name.rpartition(".")[0] or name
    return PlanError(
        f"{name} is dealt out by rows, and looked up by a function: only nn.Embedding and nn.EmbeddingBag can see to "
        f"it that its rows are there; look it up with one of them, or use {part}={SPARSE}"
    )


def _refuse_nothing(plan: Plan, answers: Mapping[str, set[str]], names: Mapping[str, tuple[str, ...]]) -> None:
    """A part must name a table."""
    broken: list[str] = []
    for glob, answer in plan.parts:
        alone = Plan(dp=2, parts=((glob, answer),)) if answer in ANSWERS else None
        if alone is None or any(alone.part(alias) for name in answers for alias in (name, *names[name])):
            continue
        known = [name.rpartition(".")[0] or name for name in answers]
        broken.append(
            f"{glob}={answer} names no table of rows; "
            + (nearest(glob, known) if known else "the model looks up rows of none (no nn.Embedding, no F.embedding)")
        )
    if broken:
        raise PlanError(broken)


def _refuse_renormed(plan: Plan, layers: Mapping[str, tuple[str, nn.Embedding | nn.EmbeddingBag]]) -> None:
    for path, layer in layers.values():
        if layer.max_norm:
            raise PlanError(
                f"{path or 'the model'} was built with max_norm, so that looking up rows changes them, on each worker "
                f"others: {plan} would let replicas drift apart; drop max_norm, or use serial"
            )


def _refuse_narrow(task: Task, plan: Plan, narrow: frozenset[str]) -> None:
    name = min(narrow).rpartition(".")[0]
    cut = next((one for one in sorted(narrow) if plan.part(one) in ("tp", "ep")), None)
    if cut is not None:
        raise PlanError(
            f"{cut} makes sparse gradients, and {plan} would split it: leave it out of the parts, or build it with "
            "sparse=False"
        )
    if plan.workers > plan.dp or plan.zero or plan.local or plan.server:
        raise PlanError(
            f"{name} makes sparse gradients, which {plan} cannot add up: use dp={plan.workers} alone, or build it with "
            "sparse=False"
        )
    if task.clip is not None or task.precision == "fp16":
        raise PlanError(
            f"{name} makes sparse gradients, of which torch takes no norm, and the task has "
            f"{'clip' if task.clip is not None else 'precision=fp16'}: build it with sparse=False"
        )
    refusal = _refusal_of(task)
    if refusal:
        raise PlanError(
            f"{name} makes sparse gradients, and the optimizer takes none ({refusal}): use SGD, Adagrad or SparseAdam, "
            f"or build it with sparse=False and say {name}={SPARSE}"
        )


def _refusal_of(task: Task) -> str:
    """What the optimizer says to a sparse gradient; nothing where it takes it."""
    parameter = nn.Parameter(torch.zeros(3, 2))
    parameter.grad = torch.sparse_coo_tensor(
        torch.tensor([[1]]), torch.ones(1, 2), (3, 2), is_coalesced=True, check_invariants=False
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            task.optimizer([parameter]).step()
        except RuntimeError as error:
            return str(error) if "sparse" in str(error) else ""
        except Exception:  # noqa: BLE001 - it wants other parameters than these, and tells in time what it cannot do
            return ""
    return ""
