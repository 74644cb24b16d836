"""A lock-step step whose microbatches are lent: whoever is there computes it, and nobody waits for one that is not."""

from torch import Tensor

from sheaf.parallel.portion import Portion
from sheaf.parallel.runner import AbstractRunner
from sheaf.parallel.server.borrowing import Borrower, Lent
from sheaf.parallel.server.client import Seen
from sheaf.parallel.server.failed import explained
from sheaf.parallel.server.link import Failed
from sheaf.parallel.server.seating import Seating
from sheaf.parallel.server.step import ServedStep
from sheaf.parallel.step import Observer
from sheaf.plans import Plan
from sheaf.task import Microbatch


class StolenStep(ServedStep):
    """The same sum over the same samples as any lock-step plan gives, whoever computed which of them.

    A step is closed when every microbatch is covered once, by pushes that all shards have. A worker that the others
    went on without takes up the step where they are.
    """

    def __init__(
        self,
        plan: Plan,
        portion: Portion,
        runner: AbstractRunner,
        client: Borrower,
        seating: Seating,
    ) -> None:
        super().__init__(plan, portion, runner, client, seating)
        dealer = runner.parts.dealer
        assert isinstance(dealer, Lent)
        self._lent, self._borrower = dealer, client
        dealer.client, dealer.stops = client, lambda: self._exchange.stop
        self._refused = 0
        self._counted: list[tuple[int, float, float]] = []

    @property
    def losses(self) -> list[tuple[int, float, float]]:
        """Those of pushes that count."""
        return self._counted

    def observe(self, observer: Observer | None) -> None:
        """As for any step; what a worker is lent while somebody looks on is its own until it hangs up."""
        super().observe(observer)
        self._borrower.watched = observer is not None

    def full_state(self) -> dict[str, Tensor]:
        """As of any step (collective): nobody goes on before the shards were read."""
        found = super().full_state()
        self._spread.computing.barrier()
        return found

    def _gradients(self) -> dict[str, Tensor]:
        found = super()._gradients()
        self._spread.computing.barrier()
        return found

    def _once(self, step: int, microbatches: tuple[Microbatch, ...]) -> tuple[float | None, Seen]:
        self._lent.begin()
        self._refused, self._counted, waited = 0, [], self._borrower.waited_seconds
        try:
            while self._cover(microbatches):
                continue
            seen = self._borrower.catch_up(step + 1)
            seen.waited_seconds = self._borrower.waited_seconds - waited
            self._told_here = self._exchange.mine
            return None, seen
        except Failed as failed:
            raise explained(failed.meta, self.index) from None

    def _cover(self, microbatches: tuple[Microbatch, ...]) -> bool:
        """Compute what is lent, and push it; False when the step is closed."""
        seconds = self._runner.compute_seconds
        self._runner.compute(self.index, microbatches, len(microbatches))
        if not self._lent.held:
            return False
        used = self._beside.put()
        common = {
            "losses": self._exchange.mine,
            "samples": self._samples(self.index, self._exchange.mine),
            "any": any(used),
            "stop": self._exchange.stop,
            "expected": self._expectation.weight,
            "watch": self._observer is not None,
            "seconds": self._runner.compute_seconds - seconds,
        }
        counts = self._borrower.cover(self.index, len(microbatches), [{"used": places, **common} for places in used])
        self._refused += not counts
        self._counted += self._exchange.mine if counts else []
        return True

    def _seen(self, seen: Seen) -> dict[str, float]:
        """What the record has beside the rest."""
        returned = seen.told.get("returned", {})
        return {"refused": self._refused, "returned": sum(returned.values())}
