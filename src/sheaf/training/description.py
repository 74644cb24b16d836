"""A task as plain values: what a run directory keeps of it, and what a resumed run must agree with."""

import hashlib
import json
from pathlib import Path
from typing import Any

from sheaf.checkpoint.files import crc32
from sheaf.plans import Plan
from sheaf.plans.stages import default_microbatch
from sheaf.task import Task
from sheaf.task.blueprint import Blueprint
from sheaf.task.probe import over_stand_ins


def describe(task: Task, plan: Plan) -> dict[str, Any]:
    """Everything about a task that decides the answer and can be told in JSON. The model is built, without memory.

    Raises TaskError when the model or the optimizer cannot be built.
    """
    blueprint = Blueprint(task)
    parameters = blueprint.parameters
    shapes = {name: [list(value.shape), str(value.dtype)] for name, value in parameters.items()}
    return {
        "name": task.name,
        "model": f"{type(blueprint.model).__module__}.{type(blueprint.model).__qualname__}",
        "parameters": sum(value.numel() for value in parameters.values()),
        "shapes_sha256": hashlib.sha256(json.dumps(shapes).encode()).hexdigest(),
        "optimizer": _optimizer(task, blueprint),
        "samples": task.num_samples,
        "batch": task.batch,
        "microbatch": task.microbatch or plan.microbatch or default_microbatch(plan, task.batch),
        "seed": task.seed,
        "shuffle": task.shuffle,
        "precision": task.precision,
        "clip": task.clip,
        "weights_crc32": None if task.weights is None else crc32(Path(task.weights)),
    }


def digest(values: dict[str, Any]) -> str:
    """A short fingerprint of a description; names of things do not enter."""
    told = {name: value for name, value in values.items() if name not in ("name", "model")}
    return hashlib.sha256(json.dumps(told, sort_keys=True).encode()).hexdigest()[:16]


def differences(saved: dict[str, Any], given: dict[str, Any]) -> list[str]:
    """The settings in which two descriptions depart, as ``name: saved 1, given 2``; names do not count."""
    flat_saved, flat_given = _flat(saved), _flat(given)
    names = [name for name in {**flat_saved, **flat_given} if name not in ("name", "model")]
    return [
        f"{name}: saved {flat_saved.get(name)}, given {flat_given.get(name)}"
        for name in names
        if flat_saved.get(name) != flat_given.get(name)
    ]


def _flat(values: dict[str, Any]) -> dict[str, Any]:
    flat: dict[str, Any] = {}
    for name, value in values.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": item for inner, item in value.items()}
        else:
            flat[name] = value
    return flat


def _optimizer(task: Task, blueprint: Blueprint) -> dict[str, Any]:
    """The optimizer's kind and settings, read from one built over small stand-ins."""
    parameters = [(fake.dim(), fake.requires_grad) for fake in blueprint.parameters.values()]
    optimizer = over_stand_ins(task.optimizer, parameters)
    settings = {name: value for name, value in optimizer.defaults.items() if _is_plain(value)}
    return {"kind": type(optimizer).__qualname__, **json.loads(json.dumps(settings))}


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(_is_plain(item) for item in value)
    return value is None or isinstance(value, bool | int | float | str)
