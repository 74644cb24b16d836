"""Workers, devices and links: measured here, read from a file, or known machines."""

from sheaf.cluster.assemble import assemble
from sheaf.cluster.cluster import Cluster, Device, Host, Link, Timing
from sheaf.cluster.files import known, read, write
from sheaf.cluster.links import OPERATIONS, collective_seconds, model_seconds
from sheaf.cluster.machine import available_cores, describe_local, free_memory_bytes
from sheaf.cluster.measuring import from_everyone, measure_rank
from sheaf.cluster.primitives import all_gather, reduce_scatter

__all__ = [
    "OPERATIONS",
    "Cluster",
    "Device",
    "Host",
    "Link",
    "Timing",
    "all_gather",
    "assemble",
    "available_cores",
    "collective_seconds",
    "describe_local",
    "free_memory_bytes",
    "from_everyone",
    "known",
    "measure_rank",
    "model_seconds",
    "read",
    "reduce_scatter",
    "write",
]
