"""A plan becomes a step: shares of a batch, replicated or sharded state, gradients that meet."""

from sheaf.parallel.build import build, refuse, with_microbatch
from sheaf.parallel.step import Step

__all__ = ["Step", "build", "refuse", "with_microbatch"]
