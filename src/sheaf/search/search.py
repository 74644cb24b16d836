"""Price every plan worth it, refuse what cannot run, rank the rest, and say why."""

import gc
import heapq
import itertools
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace

from sheaf.cost import Price
from sheaf.plans import Plan
from sheaf.plans.offload import ON_DEVICE, OPTIMIZER
from sheaf.search import rules, words
from sheaf.search.bounds import Bounds
from sheaf.search.families import Group, Strategy, families, groups
from sheaf.search.fewest import instead
from sheaf.search.measured import facts_for
from sheaf.search.offloads import moved, offloaded
from sheaf.search.question import Question
from sheaf.search.ranking import Entry, Ranking, Refusal
from sheaf.search.remedies import Remedies, told

EVERYTHING_UP_TO = 64  # workers: every plan is priced
RANKED_AT_LEAST = 16  # plans, where not everything is
TOLD_SECONDS = 0.25  # how far a search is, though nothing better was found

_Item = Group | Strategy | list[Plan]
_Left = tuple[float, tuple[int, int], _Item]  # what it takes at least, its turn, and what it is


@dataclass(frozen=True)
class Progress:
    """How far a search is: the best plan so far, how many were priced, and how many groups of plans may hold better.

    ``least_seconds`` is what no plan that is left can go below; None when every plan is to be priced anyway.
    """

    best: Price | None
    priced: int
    left: int
    seconds: float
    least_seconds: float | None = None


def search(
    question: Question,
    *,
    seconds: float | None = None,
    heard: Callable[[Progress], None] | None = None,
    everything: bool | None = None,
    first: bool = False,
) -> Ranking:
    """Every plan that can run, best first, and every one that cannot.

    Where the task leaves the microbatch open, each strategy is ranked with the microbatch that suits it best, and
    refused only when none does. Plans within 1 % of each other go by fewer workers, less memory, shorter text.

    Up to 64 workers ``everything`` is priced. Beyond, plans are priced in the order of the least that they could take,
    until no other can win: the best is the same, the ranking ends sooner. ``heard`` is told as it goes on; after
    ``seconds`` the best so far counts, and the ranking says that it is not proven. With ``first`` the first plan that
    fits is enough.
    """
    with _uncollected():
        return _searched(question, seconds, heard, everything, first=first)


def _searched(
    question: Question,
    seconds: float | None,
    heard: Callable[[Progress], None] | None,
    everything: bool | None,
    *,
    first: bool,
) -> Ranking:
    took = _Taken(question, 0.0 if first else seconds, heard)
    bounds = Bounds(question.batch, question.basis, question.size)
    if everything if everything is not None else question.available <= EVERYTHING_UP_TO:
        for choices in families(question):
            took.priced(choices)
            if took.late():
                break
    else:
        _best_first(question, took, bounds)
    over = first or (seconds is not None and took.seconds >= seconds)
    fewer = [] if over else instead(question, took.prices)
    prices, refused = [*took.prices, *fewer], took.refused
    ordered = _ordered(prices)
    refused.extend(_starved(question, ordered, took.starved, bounds))
    drawn = set[int]()
    for place, found in enumerate(ordered):  # torchrun takes the best plan for as many workers as it started
        if found.plan.workers not in drawn and found.plan.pp > 1 and not took.wide:
            ordered[place] = question.price(found.plan)
        drawn.add(found.plan.workers)
    return Ranking(
        ranked=_explained(ordered),
        refused=tuple(refused),
        cluster=question.cluster.name,
        batch=question.batch,
        microbatch=question.microbatch,
        looked_at=took.count + len(fewer),
        seconds=took.seconds,
        least_seconds=took.least,
        starved=tuple(one for one, _ in took.starved),
        asked=question,
    )


@contextmanager
def _uncollected() -> Iterator[None]:
    """Without looking for garbage that refers to itself: a search makes none, and to look for it takes a
    twentieth of its time.
    """
    collecting = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collecting:
            gc.enable()


def exchanged(ranking: Ranking, plan: Plan, price: Price, asked: Question) -> Ranking:
    """The ranking with the price of one plan exchanged for that of another, in order again."""
    ordered = _ordered([price if entry.plan == plan else entry.price for entry in ranking.ranked])
    return replace(ranking, ranked=_explained(ordered), asked=asked)


def _starved(
    question: Question, ordered: Sequence[Price], starved: Sequence[tuple[Price, str]], bounds: Bounds
) -> list[Refusal]:
    """Plans that do not fit, each with what would make it fit."""
    if not ordered:
        return [Refusal(str(one.plan), why, rules.roomier(one)) for one, why in starved]
    remedies = Remedies(question, ordered, bounds)
    found = [(one, why, remedies.of(one.plan)) for one, why in starved]
    return [Refusal(str(one.plan), why, told(best), best) for one, why, best in found]


class _Taken:
    """What a search has found so far."""

    def __init__(self, question: Question, seconds: float | None, heard: Callable[[Progress], None] | None) -> None:
        self.prices: list[Price] = []
        self.refused: list[Refusal] = []
        self.starved: list[tuple[Price, str]] = []
        self.best: Price | None = None
        self.count, self.left, self.wide = 0, 0, False
        self.least: float | None = None
        self.bounds: Bounds | None = None  # where plans are left out that cannot be as fast as the best, or not fit
        self.put_off: list[_Item] = []  # what does not fit, to be looked at offloaded
        self._question, self._budget, self._heard = question, seconds, heard
        self._began, self._told = time.monotonic(), 0.0

    def priced(self, choices: Sequence[Plan]) -> None:
        """Price plans that differ in the microbatch only, and keep the best of them."""
        legal, faults = _legal(self._question, choices)
        if not legal:
            self.refused.append(faults[0])
            return
        held = [self._question.held(plan) for plan in self.worthwhile(legal)]
        self.count += len(held)
        fitting = [one.plan for one in held if rules.too_large(one, self._question.cluster) is None]
        if not held:
            return
        if not fitting:
            leanest = min(held, key=lambda one: one.peak_bytes)
            told = leanest.plan.offload != ON_DEVICE or (self.wide and len(self.starved) >= RANKED_AT_LEAST)
            if not told:
                self.starved.append((leanest, rules.too_large(leanest, self._question.cluster) or ""))
            if self.wide:
                self.put_off.append(legal)
            elif variants := offloaded(self._question, legal):
                self.priced(variants)
        if all(map(self._hopeless, fitting)):
            return
        self.prices.append(_ordered([self._question.rough(plan) for plan in fitting])[0])
        if self.best is None or self.prices[-1].step_seconds < self.best.step_seconds:
            self.best = self.prices[-1]
            self.tell()
        elif self.seconds >= self._told + TOLD_SECONDS:
            self.tell()

    def worthwhile(self, choices: Sequence[Plan]) -> list[Plan]:
        """Of plans that differ in the microbatch only those that may fit, where one of them may be the best.

        Until enough is told of plans that do not fit, those too that would if they kept little for backward.
        """
        if self.bounds is None:
            return [*choices]
        enough = len(self.starved) >= RANKED_AT_LEAST
        rooms = [self.bounds.room(plan, cut=enough) for plan in choices]
        fitting = [plan for plan, room in zip(choices, rooms, strict=True) if room[plan.offload == OPTIMIZER]]
        if not fitting and any(offloaded for _, offloaded in rooms):
            self.put_off.append([*choices])
        return [] if enough and all(map(self._hopeless, fitting)) else fitting

    @property
    def most_seconds(self) -> float:
        """What takes longer is not worth a look; infinite until enough was priced."""
        if self.best is None or len(self.prices) < RANKED_AT_LEAST:
            return math.inf
        return self.best.step_seconds * (1 + words.TIE)

    def _hopeless(self, plan: Plan) -> bool:
        """Whether a plan that fits cannot be as fast as the best."""
        if self.bounds is None or (most := self.most_seconds) == math.inf:
            return False
        least = self.bounds.seconds(plan)
        return least > most or least + self.bounds.meeting(plan) > most

    def tell(self) -> None:
        """Say how far it is."""
        self._told = self.seconds
        if self._heard is not None:
            self._heard(Progress(self.best, self.count, self.left, self.seconds, self.least))

    @property
    def seconds(self) -> float:
        """How long it has taken."""
        return time.monotonic() - self._began

    def late(self) -> bool:
        """Whether the time that was given is over, and something was found."""
        return self._budget is not None and bool(self.prices) and self.seconds >= self._budget


def _best_first(question: Question, took: _Taken, bounds: Bounds) -> None:
    """Price what could be fastest first, until the rest cannot be as fast as the best within 1 %.

    Groups of plans on one mesh go by the least of their mesh; opened, each strategy by the least that it takes with
    any stages; opened, each family by its own. What does not fit comes once more with its optimizers in the memory of
    the hosts, which makes it slower: when the best of the others is known, little of it is worth a look.
    """
    took.wide, took.bounds = True, bounds
    number = itertools.count()
    heap: list[_Left] = []
    for group in groups(question):
        _push(heap, group, (next(number), 0), took)
    proven = _emptied(heap, question, took, number)
    put_off, took.put_off = took.put_off if question.offloadable else [], []
    if not proven:  # what is left may be faster than what was found: ``least`` says by how much at most
        took.least = min((took.least or 0.0, *(_least(item, bounds) for item in put_off)))
        return
    for item in put_off:
        if _least(item, bounds) <= took.most_seconds:
            for other in moved(question, item):
                _push(heap, other, (next(number), 0), took)
    if not _emptied(heap, question, took, number):
        return
    took.least, took.bounds = None, None
    _asked_for(question, took)


def _emptied(heap: list[_Left], question: Question, took: _Taken, number: Iterator[int]) -> bool:
    """Price what is left in a heap, as far as it may be as fast as the best; False where time is over before."""
    while heap:
        least, place, item = heapq.heappop(heap)
        took.left, took.least = len(heap) + 1, least
        if least > took.most_seconds:
            heap.clear()
        elif took.late():
            return False
        elif isinstance(item, Group):
            for strategy in item.strategies():
                _push(heap, strategy, (next(number), 0), took)
        elif isinstance(item, Strategy):
            for later, choices in enumerate(item.families(question)):
                _push(heap, choices, (place[0], later), took)
        else:
            took.priced(item)
    return True


def _push(heap: list[_Left], item: _Item, place: tuple[int, int], took: _Taken) -> None:
    """Add what may be worth pricing, by the least that its plans take; what does not fit is put off."""
    bounds = took.bounds
    assert bounds is not None
    if isinstance(item, list):
        seconds = list(map(bounds.seconds, took.worthwhile(item)))
    elif isinstance(item, Strategy):
        first = item.open[0]
        room = bounds.room(first, cut=False)  # says nothing of what microbatches keep
        fits = room[first.offload == OPTIMIZER]
        seconds = [bounds.seconds(plan, cut=False) for plan in item.open] if fits else []
        if not fits and room[1]:
            took.put_off.append(item)
    elif item.leanest and not any(bounds.fits(plan, cut=False) for plan in item.leanest):
        seconds = []
        if any(bounds.room(plan, cut=False)[1] for plan in item.leanest):
            took.put_off.append(item)
    else:
        seconds = [_least(item, bounds)]
    if seconds:
        heapq.heappush(heap, (min(seconds), place, item))


def _least(item: _Item, bounds: Bounds) -> float:
    """What any of its plans takes at least, whatever their stages are, and wherever their optimizers step."""
    plans = item if isinstance(item, list) else item.examples if isinstance(item, Group) else item.open
    return min((bounds.seconds(plan, cut=False) for plan in plans), default=0.0)


def _asked_for(question: Question, took: _Taken) -> None:
    """What people ask about first is priced or refused with its reason, however slow: serial, and all as replicas."""
    seen = {str(replace(one.plan, microbatch=None)) for one in took.prices}
    every = question.available
    for plan in (Plan(), *(Plan(dp=every, zero=zero) for zero in range(4 if every > 1 else 0))):
        if str(plan) not in seen:
            took.priced([replace(plan, microbatch=None if question.microbatch else -(-question.batch // plan.dp))])


def _legal(question: Question, choices: Sequence[Plan]) -> tuple[list[Plan], list[Refusal]]:
    legal: list[Plan] = []
    faults: list[Refusal] = []
    for plan in choices:
        found = rules.broken(
            plan,
            facts=facts_for(question.facts, question.size(plan)),
            workers=question.available,
            batch=question.batch,
            microbatch=question.microbatch,
            elementwise=question.elementwise,
        )
        faults.extend(found)
        if not found:
            legal.append(plan)
    return legal, faults


def _ordered(prices: list[Price]) -> list[Price]:
    """By time; of what is left, all within 1 % of the fastest go by workers, memory, text."""
    rest = sorted(prices, key=lambda one: one.step_seconds)
    ordered: list[Price] = []
    while rest:
        limit = rest[0].step_seconds * (1 + words.TIE)
        tied = [one for one in rest if one.step_seconds <= limit]
        ordered += sorted(tied, key=words.order)
        rest = rest[len(tied) :]
    return ordered


def _explained(ordered: list[Price]) -> tuple[Entry, ...]:
    if not ordered:
        return ()
    best, *others = ordered
    serials = [one for one in ordered if one.plan.serial and one.plan.offload == ON_DEVICE]
    serial = min(serials, key=lambda one: one.step_seconds) if serials else None
    reason = words.reason(best, serial, others[0] if others else None)
    leader = Entry(best, reason=reason, caution=words.caution(best.plan))
    rest = (Entry(one, loses_on=words.loses_on(one, best), caution=words.caution(one.plan)) for one in others)
    return (leader, *rest)
