"""Start workers: several processes on this machine, or join those that torchrun started. Knows nothing of training."""

from sheaf.launch.local import run
from sheaf.launch.ship import FromFile
from sheaf.launch.world import World, join, lost, peers

__all__ = ["FromFile", "World", "join", "lost", "peers", "run"]
