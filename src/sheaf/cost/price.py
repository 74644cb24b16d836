"""What a plan costs: step seconds and peak bytes, each a sum of named terms."""

from dataclasses import dataclass

from sheaf.plans import Plan

SECONDS_TERMS = ("compute", "recompute", "all_reduce", "reduce_scatter", "all_gather", "wait", "optimizer", "host")
BYTES_TERMS = ("parameters", "gradients", "optimizer_state", "activations", "buffers", "workspace")


@dataclass(frozen=True)
class Price:
    """Predicted seconds per step and peak bytes of the fullest worker, term by term.

    Communication terms hold the exposed part only; ``hidden_seconds`` is what computation covers. ``wait`` is the
    time the fastest worker idles for the slowest.
    """

    plan: Plan
    seconds: dict[str, float]  # keys of SECONDS_TERMS
    memory: dict[str, int]  # keys of BYTES_TERMS
    traffic_bytes: float  # sent by one worker per step
    hidden_seconds: float = 0.0

    @property
    def step_seconds(self) -> float:
        """Seconds per global step."""
        return sum(self.seconds.values())

    @property
    def peak_bytes(self) -> int:
        """Peak bytes of the fullest worker."""
        return sum(self.memory.values())
