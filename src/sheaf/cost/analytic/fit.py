"""Constants from measured runs: least squares on the logarithm of the step's time, held near what is expected."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sheaf.cost.analytic.constants import Book, Constants, Measured, Stack
from sheaf.cost.analytic.memory import peak
from sheaf.cost.analytic.step import Job, seconds

NOISE = 0.04  # relative error of a run that the fit takes as ordinary
_DOUBT = 1.0  # runs that would say that the model is right as it is
_MOST_LEFT = 0.4  # in natural logarithms
_ROUNDS = 25
_NUDGE = 1e-3


@dataclass(frozen=True)
class Sample:
    """A run and its measured seconds per step."""

    job: Job
    seconds: float  # 0: only its memory was measured
    peak_bytes: float = 0.0  # 0: not measured
    weight: float = 1.0  # of what a usual run counts for


def fitted(book: Book, samples: Sequence[Sample]) -> Book:
    """The book with constants for every stack and kind of device that ``samples`` show.

    First one set for each kind of device, each stack counting alike; then one for each stack, held near that of the
    stack it is ``like`` or else of its device. Last, how layers of each shape did beside that: a kernel library picks
    other kernels for other shapes, and no formula knows which.
    """
    by_name = {stack.name: stack for stack in book.stacks}
    groups: dict[tuple[str, str], list[Sample]] = {}
    kinds: dict[str, list[Sample]] = {}
    timed = [sample for sample in samples if sample.seconds]
    for sample in timed:
        groups.setdefault((sample.job.stack.name, sample.job.kind), []).append(sample)
    for (_, kind), group in groups.items():
        kinds.setdefault(kind, []).extend(replace(one, weight=one.weight * len(group) ** -0.5) for one in group)
    known: dict[tuple[str, str], Constants] = {}
    for kind, group in sorted(kinds.items()):
        known["", kind] = _least_squares(book, group, book.expected())
    for name, kind in sorted(groups, key=lambda key: (_depth(by_name, by_name[key[0]]), *key)):
        centre = replace(book, fitted=known).constants(by_name[name], kind)
        known[name, kind] = _least_squares(book, groups[name, kind], centre)
    book = replace(book, held=_held(book, samples))
    return replace(book, fitted=known, measured=_measured(replace(book, fitted=known, measured={}), timed))


def _held(book: Book, samples: Sequence[Sample]) -> dict[str, dict[str, float]]:
    """Constants of memory for every stack with measured peaks."""
    groups: dict[str, list[Sample]] = {}
    for sample in samples:
        if sample.peak_bytes:
            groups.setdefault(sample.job.stack.name, []).append(sample)
    by_name = {stack.name: stack for stack in book.stacks}
    every = [replace(one, weight=len(group) ** -0.5) for group in groups.values() for one in group]
    known = replace(book, held={})
    if every:
        known = replace(book, held={"": _memory_least_squares(known, every, known.memory(book.stacks[-1]))})
    for name in sorted(groups, key=lambda name: (_depth(by_name, by_name[name]), name)):
        found = _memory_least_squares(book, groups[name], known.memory(by_name[name]))
        known = replace(known, held={**known.held, name: found})
    return known.held


def _memory_least_squares(book: Book, samples: Sequence[Sample], centre: dict[str, float]) -> dict[str, float]:
    names = list(book.memory_priors)
    start = np.log([centre[name] for name in names])
    widths = np.array([book.memory_priors[name].width for name in names])
    measured = np.log([sample.peak_bytes for sample in samples])
    weights = np.sqrt([sample.weight for sample in samples])

    def residuals(point: np.ndarray) -> np.ndarray:
        tried = replace(book, held={"": dict(zip(names, np.exp(point).tolist(), strict=True))})
        predicted = np.log([sum(peak(replace(one.job, book=tried)).values()) for one in samples])
        return (predicted - measured) / NOISE * weights

    return dict(zip(names, np.exp(_descend(start, start, widths, residuals)).tolist(), strict=True))


def _measured(book: Book, samples: Sequence[Sample]) -> dict[tuple[str, str, str], Measured]:
    """What is left of each shape of layer, drawn towards nothing where few runs tell it."""
    left: dict[tuple[str, str, str], list[tuple[float, float]]] = {}
    for sample in samples:
        job = sample.job
        predicted = sum(seconds(job, book.constants(job.stack, job.kind), {}).values())
        rest = float(np.clip(np.log(sample.seconds / predicted), -_MOST_LEFT, _MOST_LEFT))
        left.setdefault((job.stack.name, job.kind, job.layer_key), []).append((rest, sample.weight))
    found: dict[tuple[str, str, str], Measured] = {}
    for key, rests in left.items():
        told = sum(rest * weight for rest, weight in rests) / (sum(weight for _, weight in rests) + _DOUBT)
        found[key] = Measured(float(np.exp(told)), len(rests))
    return found


def _depth(by_name: dict[str, Stack], stack: Stack) -> int:
    return 0 if not stack.like else 1 + _depth(by_name, by_name[stack.like])


def _least_squares(book: Book, samples: Sequence[Sample], centre: Constants) -> Constants:
    names = Constants.names()
    start = np.log([getattr(centre, name) for name in names])
    widths = np.array([book.priors[name].width for name in names])
    measured = np.log([sample.seconds for sample in samples])
    weights = np.sqrt([sample.weight for sample in samples])

    def predicted(point: np.ndarray) -> np.ndarray:
        constants = Constants(**dict(zip(names, np.exp(point).tolist(), strict=True)))
        return np.log([sum(seconds(sample.job, constants, {}).values()) for sample in samples])

    def residuals(point: np.ndarray) -> np.ndarray:
        return (predicted(point) - measured) / NOISE * weights

    point = _descend(start, start, widths, residuals)
    return Constants(**dict(zip(names, np.exp(point).tolist(), strict=True)))


def _descend(
    point: np.ndarray,
    start: np.ndarray,
    widths: np.ndarray,
    residuals: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Levenberg's and Marquardt's method, with residuals far off counting by their size, not its square."""

    def loss(point: np.ndarray) -> float:
        return float(np.sum(2 * (np.sqrt(1 + residuals(point) ** 2) - 1)) + np.sum(((point - start) / widths) ** 2))

    damping, best = 1e-2, loss(point)
    for _ in range(_ROUNDS):
        here = residuals(point)
        slopes = np.stack([(residuals(point + _NUDGE * step) - here) / _NUDGE for step in np.eye(len(point))], axis=1)
        counted = 1 / np.sqrt(1 + here**2)
        pull = slopes.T @ (counted * here) + (point - start) / widths**2
        bend = slopes.T @ (counted[:, None] * slopes) + np.diag(1 / widths**2)
        before = best
        while damping < 1e6:
            step = np.linalg.solve(bend + damping * np.diag(np.diag(bend)), -pull)
            after = loss(point + step)
            if after < best:
                point, best, damping = point + step, after, max(damping / 5, 1e-6)
                break
            damping *= 4
        if before - best < 1e-4 * max(1.0, before):
            break
    return point
