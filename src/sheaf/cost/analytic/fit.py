"""Constants from measured runs: least squares on the logarithm of the step's time, held near what is expected."""

import math
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from sheaf.cost.analytic.constants import Book, Constants, Measured, Stack
from sheaf.cost.analytic.memory import peak
from sheaf.cost.analytic.step import Job, seconds

NOISE = 0.04  # relative error of a run that the fit takes as ordinary
_NORMAL = 1.48  # standard deviation beside the median of absolute deviations, of a normal distribution
_ORDINARY = 0.06  # scatter of a stack's runs beside the fit that is not held against them
_TOLD, _MOST_TOLD = 12.0, 0.75  # constants that the runs of a stack tell: so many, or this share of the runs
_DOUBTS = (2.0, 1.0)  # groups of runs of a model, runs of a shape of layer, that would say that the formulas are right
_MOST_LEFT = 0.4  # in natural logarithms
_ROUNDS = 15
_NUDGE = 1e-3


@dataclass(frozen=True)
class Sample:
    """A run and its measured seconds per step."""

    job: Job
    seconds: float  # 0: only its memory was measured
    peak_bytes: float = 0.0  # 0: not measured
    weight: float = 1.0  # of what a usual run counts for


# How much of a constant's width lies with all runs, a device, a stack, and a stack on a device: most with
# the last, as what few sources share by chance must not move a source that none of them is like.
_SHARES = {"all": 0.25, "device": 0.3, "stack": 0.5, "both": 1.0}
_TOLD_BY_OTHERS = (
    0.3  # of the widths of a stack that only those like it were seen of: how they differ is mostly their own
)
_OF_DEVICES = ("matmul", "narrow", "attention", "memory")  # constants that say more of a device than of software


def fitted(book: Book, samples: Sequence[Sample]) -> Book:
    """The book with what ``samples`` show of all runs, of each kind of device, each stack, and each stack on a device.

    All of these effects are fitted at once, each held near nothing: what many stacks share is told apart from what is
    one stack's own, and a stack with few runs stays near those it is like. Last, how layers of each shape did beside
    that: a kernel library picks other kernels for other shapes, and no formula knows which.
    """
    timed = [sample for sample in samples if sample.seconds]
    book = replace(book, held=_held(book, samples))
    if timed:  # first to see how far off the runs of each stack are by themselves, then with that in mind
        book = replace(book, fitted=_effects(replace(book, fitted={}), timed))
        timed = _weighed(book, timed)
        book = replace(book, fitted=_effects(book, timed))
    return replace(book, measured=_measured(replace(book, measured={}), timed))


def _weighed(book: Book, samples: Sequence[Sample]) -> list[Sample]:
    """Runs of a stack whose runs scatter more than ordinary ones count for less: by the square of how much more."""
    left: dict[str, list[float]] = {}
    for sample in samples:
        job = sample.job
        predicted = sum(seconds(job, book.constants(job.stack, job.kind), {}).values())
        left.setdefault(job.stack.name, []).append(abs(math.log(sample.seconds / predicted)))
    scatter: dict[str, float] = {}
    for name, each in left.items():
        free = max(1.0, len(each) - min(_TOLD, _MOST_TOLD * len(each)))  # runs beyond those that tell the constants
        scatter[name] = math.sqrt(len(each) / free) * _NORMAL * statistics.median([*each, NOISE])
    return [
        replace(sample, weight=sample.weight * min(1.0, _ORDINARY / scatter[sample.job.stack.name]) ** 2)
        for sample in samples
    ]


def _effects(book: Book, samples: Sequence[Sample]) -> dict[tuple[str, str], Constants]:
    """The factors of every effect that the samples share, looked for from those that the book has."""
    names = Constants.names()
    of_sample = [book.effects(sample.job.stack, sample.job.kind) for sample in samples]
    effects = sorted({effect for each in of_sample for effect in each})
    place = {effect: number for number, effect in enumerate(effects)}
    member = np.zeros((len(samples), len(effects)))
    for number, each in enumerate(of_sample):
        member[number, [place[effect] for effect in each]] = 1.0
    prior = np.log([book.priors[name].value for name in names])
    widths = np.array([[_width(book, effect, name) for name in names] for effect in effects])
    own = {"", *(sample.job.stack.name for sample in samples)}
    widths *= np.array([[1.0 if stack in own else _TOLD_BY_OTHERS] for stack, _ in effects])
    measured = np.log([sample.seconds for sample in samples])
    weights = np.sqrt([sample.weight for sample in samples]) / NOISE

    def predicted(logs: np.ndarray) -> np.ndarray:
        made = (Constants(**dict(zip(names, each, strict=True))) for each in np.exp(logs).tolist())
        pairs = zip(samples, made, strict=True)
        return np.log([sum(seconds(run.job, constants, {}).values()) for run, constants in pairs])

    def residuals(point: np.ndarray) -> np.ndarray:
        return (predicted(prior + member @ point.reshape(widths.shape)) - measured) * weights

    def slopes(point: np.ndarray, here: np.ndarray) -> np.ndarray:
        logs = prior + member @ point.reshape(widths.shape)
        nudged = [(predicted(logs + _NUDGE * step) - measured) * weights for step in np.eye(len(names))]
        own = (np.stack(nudged, axis=1) - here[:, None]) / _NUDGE
        return (member[:, :, None] * own[:, None, :]).reshape(len(samples), -1)

    start = np.array([[getattr(book.fitted.get(effect), name, 1.0) for name in names] for effect in effects])
    point = _descend(np.log(start).ravel(), np.zeros(widths.size), widths.ravel(), residuals, slopes)
    found = np.exp(point.reshape(widths.shape)).tolist()
    return {
        effect: Constants(**dict(zip(names, values, strict=True)))
        for effect, values in zip(effects, found, strict=True)
    }


def _width(book: Book, effect: tuple[str, str], name: str) -> float:
    """How far an effect may take a constant from what is expected, in natural logarithms, before it counts."""
    return book.priors[name].width * _share(effect, name) * book.loose.get(effect[1], {}).get(name, 1.0)


def _share(effect: tuple[str, str], name: str) -> float:
    stack, kind = effect
    if stack and kind:
        return _SHARES["both"]
    level = "stack" if stack else "device" if kind else "all"
    other = level == ("stack" if name in _OF_DEVICES else "device")
    return _SHARES[level] * (0.7 if other else 1.0)


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
    """What is left of each model's shape, then of each shape of layer, drawn towards nothing where few runs tell it.

    A model counts by how it did on each stack and device, not by its runs: one group is no sign of the model.
    """
    rests: list[float] = []
    for sample in samples:
        predicted = sum(seconds(sample.job, book.constants(sample.job.stack, sample.job.kind), {}).values())
        rests.append(float(np.clip(np.log(sample.seconds / predicted), -_MOST_LEFT, _MOST_LEFT)))
    found: dict[tuple[str, str, str], Measured] = {}
    for level, doubt in enumerate(_DOUBTS):
        left: dict[tuple[str, str, str], dict[tuple[str, str], list[tuple[float, float]]]] = {}
        for sample, rest in zip(samples, rests, strict=True):
            group = (sample.job.stack.name, sample.job.kind)
            left.setdefault(sample.job.layer_keys[level], {}).setdefault(group, []).append((rest, sample.weight))
        for key, groups in left.items():
            told = [
                (sum(rest * weight for rest, weight in each), sum(weight for _, weight in each))
                for each in groups.values()
            ]
            if level == 0:
                told = [(total / weight, 1.0) for total, weight in told]
            share = sum(total for total, _ in told) / (sum(weight for _, weight in told) + doubt)
            found[key] = Measured(float(np.exp(share)), sum(map(len, groups.values())))
        rests = [
            rest - float(np.log(found[sample.job.layer_keys[level]].factor))
            for sample, rest in zip(samples, rests, strict=True)
        ]
    return found


def _depth(by_name: dict[str, Stack], stack: Stack) -> int:
    return 0 if not stack.like else 1 + _depth(by_name, by_name[stack.like])


def _descend(
    point: np.ndarray,
    start: np.ndarray,
    widths: np.ndarray,
    residuals: Callable[[np.ndarray], np.ndarray],
    slopes: Callable[[np.ndarray, np.ndarray], np.ndarray] | None = None,
) -> np.ndarray:
    """Levenberg's and Marquardt's method, with residuals far off counting by their size, not its square."""

    def loss(point: np.ndarray) -> float:
        return float(np.sum(2 * (np.sqrt(1 + residuals(point) ** 2) - 1)) + np.sum(((point - start) / widths) ** 2))

    damping, best = 1e-2, loss(point)
    for _ in range(_ROUNDS):
        here = residuals(point)
        if slopes is None:
            steps = [(residuals(point + _NUDGE * step) - here) / _NUDGE for step in np.eye(len(point))]
            slope = np.stack(steps, axis=1)
        else:
            slope = slopes(point, here)
        counted = 1 / np.sqrt(1 + here**2)
        pull = slope.T @ (counted * here) + (point - start) / widths**2
        bend = slope.T @ (counted[:, None] * slope) + np.diag(1 / widths**2)
        before = best
        while damping < 1e6:
            step = np.linalg.solve(bend + damping * np.diag(np.diag(bend)), -pull)
            after = loss(point + step)
            if after < best:
                point, best, damping = point + step, after, max(damping / 5, 1e-6)
                break
            damping *= 4
        if before - best < 3e-4 * max(1.0, before):
            break
    return point
