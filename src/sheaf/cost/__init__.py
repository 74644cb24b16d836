"""What a plan costs: step time, memory and traffic, term by term."""

from sheaf.cost.price import BYTES_TERMS, SECONDS_TERMS, Price  # isort: skip
from sheaf.cost.estimate import price, priced, update_rates, worker_seconds  # the function, not the module
from sheaf.cost.sizes import microbatch_sizes

__all__ = [
    "BYTES_TERMS",
    "SECONDS_TERMS",
    "Price",
    "microbatch_sizes",
    "price",
    "priced",
    "update_rates",
    "worker_seconds",
]
