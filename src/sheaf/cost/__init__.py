"""What a plan costs: step time, memory and traffic, term by term."""

from sheaf.cost.price import BYTES_TERMS, SECONDS_TERMS, Price  # isort: skip
from sheaf.cost.estimate import microbatch_sizes, price, priced, worker_seconds  # the function, not the module

__all__ = ["BYTES_TERMS", "SECONDS_TERMS", "Price", "microbatch_sizes", "price", "priced", "worker_seconds"]
