"""What is computed: the model, the loss, the data's order, the random streams, the initial weights."""

from sheaf.task.batches import Microbatch, Order, arguments, fetch, moved, steps_per_epoch
from sheaf.task.blueprint import Blueprint
from sheaf.task.loss import Loss, as_loss
from sheaf.task.streams import Streams, key
from sheaf.task.task import PRECISIONS, Task

__all__ = [
    "PRECISIONS",
    "Blueprint",
    "Loss",
    "Microbatch",
    "Order",
    "Streams",
    "Task",
    "arguments",
    "as_loss",
    "fetch",
    "key",
    "moved",
    "steps_per_epoch",
]
