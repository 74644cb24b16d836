"""Which blocks of a model are of one kind: the same classes, parameters and buffers under the same names."""

from collections import Counter
from typing import Any

import torch
from torch import nn

from sheaf.graph.lent import Look

LEAST = 6  # blocks of a kind; of fewer each is traced for itself


def kinds(model: nn.Module, blocks: dict[str, nn.Module]) -> dict[str, Any]:
    """What each block is of which there are several like it, by name; those that share anything with others are not."""
    uses = Counter(id(one) for _, one in model.named_modules(remove_duplicate=False))
    uses.update(id(one) for _, one in model.named_parameters(remove_duplicate=False))
    uses.update(id(one) for _, one in model.named_buffers(remove_duplicate=False))
    found: dict[str, Any] = {}
    for name, block in blocks.items():
        parts = [*block.modules(), *block.parameters(), *block.buffers()]
        tensors = [*block.parameters(), *block.buffers()]
        if name and all(uses[id(part)] == 1 for part in parts) and all(t.layout is torch.strided for t in tensors):
            found[name] = (
                tuple((below, type(one), one.training) for below, one in block.named_modules()),
                tuple((below, type(one), Look.of(one)) for below, one in block.named_parameters()),
                tuple((below, type(one), Look.of(one)) for below, one in block.named_buffers()),
            )
    many = Counter(found.values())
    return {name: kind for name, kind in found.items() if many[kind] >= LEAST}
