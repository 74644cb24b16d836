"""What a plan costs: step seconds and peak bytes, each a sum of named terms."""

from dataclasses import dataclass

from sheaf.cluster.traffic import wire_bytes
from sheaf.plans import Plan

SECONDS_TERMS = (
    "compute",
    "recompute",
    "dispatch",
    "tensor",
    "all_to_all",
    "transfer",
    "bubble",
    "all_reduce",
    "reduce_scatter",
    "all_gather",
    "server",
    "rows",
    "wait",
    "offload",
    "optimizer",
    "host",
)
BYTES_TERMS = ("parameters", "gradients", "optimizer_state", "activations", "buffers", "workspace")

Row = tuple[int, str, int, int, float, float]  # worker, kind, microbatch, stage, start and stop in seconds


@dataclass(frozen=True)
class Price:
    """Predicted seconds per step and peak bytes of the fullest worker, term by term.

    Communication terms hold the exposed part only; ``hidden_seconds`` is what computation covers. ``dispatch`` is
    what executors add to each microbatch (see ``cost.overheads``), ``tensor`` what the workers that split a layer
    send each other, ``all_to_all`` what replicas send to experts and back, ``transfer`` what passing microbatches
    from stage to stage adds, ``server`` what pushing gradients to shards and pulling values takes, ``rows`` what
    tables take whose gradients travel as rows, ``offload`` what copies to the hosts' memory and back take, and
    ``bubble`` what the busiest worker of a pipeline idles for the others. ``wait`` is the time the fastest replica
    idles for the slowest. ``stages`` counts the blocks of a pipeline's stages, ``begins`` names the first of each;
    ``timeline`` is its slowest replica's. ``traffic_bytes`` are handed to the network, in so many ``messages`` of gloo,
    with what that says about each, by the worker that sends most; where some come late for a meeting, that is chance,
    and these are means over the workers. ``wire_bytes`` is what the links carry.
    """

    plan: Plan
    seconds: dict[str, float]  # keys of SECONDS_TERMS
    memory: dict[str, int]  # keys of BYTES_TERMS
    traffic_bytes: float  # sent by one worker per step
    hidden_seconds: float = 0.0
    stages: tuple[int, ...] = ()
    begins: tuple[str, ...] = ()
    timeline: tuple[Row, ...] = ()
    messages: float = 0.0
    host_bytes: int = 0  # in its host's memory, of the worker that needs most there

    @property
    def step_seconds(self) -> float:
        """Seconds per global step."""
        return sum(self.seconds.values())

    @property
    def wire_bytes(self) -> float:
        """Bytes that one worker's link carries per step, the network's headers included."""
        return wire_bytes(self.traffic_bytes, self.messages)

    @property
    def peak_bytes(self) -> int:
        """Peak bytes of the fullest worker."""
        return sum(self.memory.values())
