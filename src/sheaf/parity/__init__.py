"""Is the planned answer the serial one? The same steps by plain PyTorch and by a plan, compared tensor by tensor."""

from sheaf.parity.observation import Observation, Store
from sheaf.parity.verdict import IDENTICAL, RELAXED, ROUNDING, WRONG, Verdict

__all__ = ["IDENTICAL", "RELAXED", "ROUNDING", "WRONG", "Observation", "Store", "Verdict"]
