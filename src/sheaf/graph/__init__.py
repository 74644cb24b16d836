"""What a model is made of: its blocks with their work and memory, traced without allocating, and measured times."""

from sheaf.graph.cache import cached_profile
from sheaf.graph.cut import cut, is_composite, owners
from sheaf.graph.facts import (
    GLUE,
    LOSS,
    BlockFact,
    BlockTime,
    BufferFact,
    ModelFacts,
    ParameterFact,
    Profile,
    TableFact,
)
from sheaf.graph.profile import profile
from sheaf.graph.trace import trace

__all__ = [
    "GLUE",
    "LOSS",
    "BlockFact",
    "BlockTime",
    "BufferFact",
    "ModelFacts",
    "ParameterFact",
    "Profile",
    "TableFact",
    "cached_profile",
    "cut",
    "is_composite",
    "owners",
    "profile",
    "trace",
]
